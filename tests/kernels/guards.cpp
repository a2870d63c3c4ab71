// A program of the kernels of one instruction set alone: every array ends or begins at a page that may not be touched,
// so that a step too far ends the process, and results are compared with plain formulas in double. No Python: it runs
// under the sanitizers and, built for another processor, under its emulator. Prints how many cases passed.
#include <algorithm>

#include "gram.hpp"
#include "guards_attention.hpp"
#include "guards_layers.hpp"
#include "guards_products.hpp"
#include "rounded.hpp"
#include "sorted_mean.hpp"
#include "weighted_sum.hpp"

namespace guards {

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

}  // namespace guards

int main(int given, char** words) {
    using namespace guards;
    void (*const cases[])(bool) = {
        attention<float>, attention<uint16_t>, rows_of_one_length<float>, rows_of_one_length<uint16_t>,
        norms<float>, norms<uint16_t>, activations<float>, activations<uint16_t>,
        cross_entropy<float, float>, cross_entropy<float, uint16_t>, cross_entropy<uint16_t, float>, cross_entropy<uint16_t, uint16_t>,
        products_of_few_rows<float>, products_of_few_rows<uint16_t>, products_of_few_rows<int8_t>,
    };
    const int64_t rounds = given > 1 ? std::atoll(words[1]) : 60;
    int64_t passed = 0;
    for (int64_t round = 0; round < rounds; ++round)
        for (const auto run : cases) run(round % 2), ++passed;
    std::printf("%ld cases passed\n", static_cast<long>(passed));
}
