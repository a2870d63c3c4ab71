// A program of the kernels of one instruction set alone: every array ends or begins at a page that may not be touched,
// so that a step too far ends the process, and results are compared with plain formulas in double. No Python: it runs
// under the sanitizers and, built for another processor, under its emulator. Prints how many cases passed.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "attention.hpp"
#include "gram.hpp"
#include "rounded.hpp"
#include "sorted_mean.hpp"
#include "weighted_sum.hpp"

using namespace CAPIBARA_ISA;
using capibara::AttentionArray;
using capibara::AttentionShape;

namespace {

std::mt19937 generator(7);

int64_t drawn(int64_t low, int64_t high) { return low + static_cast<int64_t>(generator() % static_cast<uint32_t>(high - low + 1)); }

void require(bool holds, const char* claim) {
    if (!holds) std::fprintf(stderr, "not true: %s\n", claim), std::exit(1);
}

// Numbers between two forbidden pages: behind the last of them directly, or (`first`) before the first.
template <class T>
struct Guarded {
    Guarded(int64_t length, bool first) : count(length), page(sysconf(_SC_PAGESIZE)) {
        const int64_t bytes = count * static_cast<int64_t>(sizeof(T)), used = (bytes + page - 1) / page * page;
        whole = used + 2 * page;
        memory = static_cast<char*>(mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        require(memory != MAP_FAILED, "the system gives memory");
        mprotect(memory, page, PROT_NONE);
        mprotect(memory + page + used, page, PROT_NONE);
        data = reinterpret_cast<T*>(memory + page + (first ? 0 : used - bytes));
        std::normal_distribution<float> normal;
        for (int64_t i = 0; i < count; ++i) from_any(normal(generator), data + i);
    }
    Guarded(const Guarded&) = delete;
    ~Guarded() { munmap(memory, whole); }
    static void from_any(float x, double* out) { *out = x; }
    static void from_any(float x, int32_t* out) { *out = static_cast<int32_t>(x); }
    template <class Number>
    static void from_any(float x, Number* out) { from_float(x, out); }
    double operator[](int64_t i) const { return to_float(data[i]); }

    int64_t count, page, whole;
    char* memory;
    T* data;
};

template <class T>
constexpr double LOOSE = sizeof(T) == 2 ? 4e-2 : 1e-4;  // the outputs' rounding; sums of float32

template <class T>
void compare(const Guarded<T>& found, const std::vector<double>& wanted, const char* claim) {
    for (int64_t i = 0; i < found.count; ++i)
        if (!(std::fabs(found[i] - wanted[i]) <= LOOSE<T> * (1 + std::fabs(wanted[i])))) {
            std::fprintf(stderr, "%ld of %ld: %g instead of %g\n", static_cast<long>(i), static_cast<long>(found.count), found[i], wanted[i]);
            require(false, claim);
        }
}

template <class T>
void attention(bool first) {
    const int64_t B = drawn(1, 2), K = drawn(1, 2), N = K * drawn(1, 3), D = drawn(1, 9) == 1 ? 130 : drawn(1, 70);
    const int64_t edges[] = {drawn(1, 20), 47, 48, 49, 255, 256, 257, drawn(1, 300)};
    const int64_t Tq = edges[drawn(0, 7)], S = drawn(0, 1) ? Tq : edges[drawn(0, 7)];
    const bool causal = drawn(0, 1), segmented = drawn(0, 1);
    const int64_t window = drawn(0, 2) ? 0 : drawn(1, 300);
    Guarded<T> q(B * Tq * N * D, first), k(B * S * K * D, first), v(B * S * K * D, first), out(B * Tq * N * D, first);
    Guarded<T> grad(B * Tq * N * D, first), dq(B * Tq * N * D, first), dk(B * S * K * D, first), dv(B * S * K * D, first);
    Guarded<float> partition(B * N * Tq, first);
    Guarded<int32_t> q_ids(B * Tq, first), k_ids(B * S, first);
    const float scale = 1 / std::sqrt(static_cast<float>(D));
    const AttentionShape shape{B, Tq, S, N, K, D, scale, causal, window, segmented ? q_ids.data : nullptr, segmented ? k_ids.data : nullptr};
    const auto of = [&](Guarded<T>& x, int64_t length, int64_t heads) { return AttentionArray{x.data, length * heads * D, heads * D, D}; };
    const capibara::AttentionForward forward{shape, of(q, Tq, N), of(k, S, K), of(v, S, K), of(out, Tq, N), partition.data};
    for (int64_t task = 0; task < B * N; ++task) attention_forward<T>(forward, task);

    std::vector<double> o(B * Tq * N * D), to_q(o.size()), to_k(B * S * K * D), to_v(to_k.size()), share(S);
    for (int64_t b = 0; b < B; ++b)
        for (int64_t h = 0; h < N; ++h)
            for (int64_t t = 0; t < Tq; ++t) {
                const int64_t row = ((b * Tq + t) * N + h) * D, here = t + S - Tq;
                const auto key = [&](int64_t s) { return ((b * S + s) * K + h / (N / K)) * D; };
                double highest = -INFINITY, total = 0, delta = 0;
                for (int64_t s = 0; s < S; ++s) {
                    const bool seen = (!causal || s <= here) && (!window || s > here - window) &&
                                      (!segmented || q_ids.data[b * Tq + t] == k_ids.data[b * S + s]);
                    double score = 0;
                    for (int64_t d = 0; d < D; ++d) score += q[row + d] * k[key(s) + d];
                    share[s] = seen ? score * scale : -INFINITY;
                    highest = std::max(highest, share[s]);
                }
                for (double& x : share) total += x = x == -INFINITY ? 0 : std::exp(x - highest);
                for (int64_t s = 0; s < S && total > 0; ++s)
                    for (int64_t d = 0; d < D; ++d) o[row + d] += share[s] / total * v[key(s) + d];
                for (int64_t d = 0; d < D; ++d) delta += o[row + d] * grad[row + d];
                for (int64_t s = 0; s < S && total > 0; ++s) {
                    const double p = share[s] / total;
                    double slope = -delta;
                    for (int64_t d = 0; d < D; ++d) slope += grad[row + d] * v[key(s) + d];
                    for (int64_t d = 0; d < D; ++d) {
                        to_q[row + d] += p * slope * scale * k[key(s) + d];
                        to_k[key(s) + d] += p * slope * scale * q[row + d];
                        to_v[key(s) + d] += p * grad[row + d];
                    }
                }
            }
    compare(out, o, "attention is the formula");
    const capibara::AttentionBackward backward{shape, of(q, Tq, N), of(k, S, K), of(v, S, K), of(out, Tq, N), of(grad, Tq, N),
                                               of(dq, Tq, N), of(dk, S, K), of(dv, S, K), partition.data};
    for (int64_t task = 0; task < B * K; ++task) attention_backward<T>(backward, task);
    compare(dq, to_q, "the gradient of the queries is the formula");
    compare(dk, to_k, "the gradient of the keys is the formula");
    compare(dv, to_v, "the gradient of the values is the formula");
}

template <class T>
void rows_of_one_length(bool first) {
    const int64_t n = drawn(1, 9), length = drawn(0, 1) ? drawn(0, 70) : drawn(0, 9000), block = drawn(0, 1) ? 4096 : 65536;
    const int64_t tasks = (length + block - 1) / block, low = drawn(0, n - 1), high = drawn(low + 1, n);
    std::vector<Guarded<T>*> rows;
    std::vector<const void*> places;
    for (int64_t i = 0; i < n; ++i) rows.push_back(new Guarded<T>(length, first)), places.push_back(rows[i]->data);
    Guarded<double> weights(n, first);
    Guarded<float> centre(length, first), out(length, first), moves(length, first);
    Guarded<T> narrow(length, first);
    std::vector<int32_t> steps;
    for (int32_t i = 0; i < n; ++i)
        for (int32_t j = 0; j + 1 < n - i; ++j) steps.push_back(j), steps.push_back(j + 1);
    const bool wide = drawn(0, 1), centred = drawn(0, 1);
    Guarded<double> partial(tasks * n * n, first);
    const float* from = centred ? centre.data : nullptr;

    const capibara::Gram products{places.data(), n, length, block, partial.data, from, wide};
    for (int64_t task = 0; task < tasks; ++task) gram<T>(products, task);
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = i; j < n; ++j) {
            double found = 0, wanted = 0, a = 0, b = 0;
            for (int64_t task = 0; task < tasks; ++task) found += partial.data[(task * n + i) * n + j];
            for (int64_t d = 0; d < length; ++d) {
                const float less = centred ? centre.data[d] : 0;
                const double x = static_cast<float>((*rows[i])[d]) - less, y = static_cast<float>((*rows[j])[d]) - less;
                wanted += x * y, a += x * x, b += y * y;
            }
            require(std::fabs(found - wanted) <= 1e-6 * std::sqrt(a * b), "a product is exact to 1e-6 of the lengths");
        }

    const capibara::WeightedSum sum{places.data(), weights.data, n, length, block, out.data};
    for (int64_t task = 0; task < tasks; ++task) weighted_sum<T>(sum, task);
    const capibara::Moved move{centre.data, places[0], 0.3f, length, block, moves.data};
    for (int64_t task = 0; task < tasks; ++task) moved<T>(move, task);
    const capibara::Rounded round{centre.data, length, block, narrow.data};
    for (int64_t task = 0; task < tasks; ++task) rounded<T>(round, task);
    for (int64_t d = 0; d < length; ++d) {
        volatile double total = 0, part;  // volatile: no product fused into a sum
        for (int64_t i = 0; i < n; ++i) part = (*rows[i])[d] * weights.data[i], total = total + part;
        require(out.data[d] == static_cast<float>(total), "a weighted sum has the bits of its formula");
        volatile float step = static_cast<float>((*rows[0])[d]) - centre.data[d];
        step = step * 0.3f;
        require(moves.data[d] == centre.data[d] + step, "a move has the bits of its formula");
        require(std::fabs(narrow[d] - centre.data[d]) <= std::ldexp(std::fabs(centre.data[d]), -8), "a rounding is the nearest");
    }

    const capibara::SortedMean middle{places.data(), steps.data(), n, static_cast<int64_t>(steps.size() / 2), low, high, length, block, out.data};
    for (int64_t task = 0; task < tasks; ++task) sorted_mean<T>(middle, task);
    std::vector<float> column(n);
    for (int64_t d = 0; d < length; ++d) {
        for (int64_t i = 0; i < n; ++i) column[i] = static_cast<float>((*rows[i])[d]);
        std::sort(column.begin(), column.end());
        volatile float total = column[low];
        for (int64_t i = low + 1; i < high; ++i) total = total + column[i];
        require(out.data[d] == total / static_cast<float>(high - low), "a sorted mean has the bits of its formula");
    }
    for (Guarded<T>* row : rows) delete row;
}

}  // namespace

int main(int given, char** words) {
    const int64_t rounds = given > 1 ? std::atoll(words[1]) : 60;
    for (int64_t round = 0; round < rounds; ++round) {
        attention<float>(round % 2), attention<uint16_t>(round % 2);
        rows_of_one_length<float>(round % 2), rows_of_one_length<uint16_t>(round % 2);
    }
    std::printf("%ld cases passed\n", static_cast<long>(4 * rounds));
}
