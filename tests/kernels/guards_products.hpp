// Cross-entropy of a linear head, chunk by chunk, and products of few rows.
#pragma once

#include "cross_entropy.hpp"
#include "guarded.hpp"

namespace guards {

inline double narrowed(double x) {
    uint16_t bits;
    from_float(static_cast<float>(x), &bits);
    return to_float(bits);
}

// Scratch memory as the kernel may use it, and not a number more.
template <class T, class U>
void cross_entropy(bool first) {
    const int64_t M = drawn(1, 40), D = drawn(0, 1) ? drawn(1, 70) : 16 * drawn(1, 6), V = drawn(1, 200), chunk = drawn((M + 1) / 2, M);
    const int64_t room = round_up(chunk, 16), tile = drawn(0, 1) ? 48 : drawn(1, 60), tiles = (V + tile - 1) / tile, wide = round_up(D, W);
    const int64_t segments = drawn(1, tiles < 4 ? tiles : 4);
    const bool kept = drawn(0, 2), narrow = sizeof(T) == 2 && sizeof(U) == 4;
    const float z_loss = drawn(0, 1) ? 0.01f : 0.0f;
    Guarded<T> hidden(M * D, first), hidden_out(kept ? M * D : 0, first);
    Guarded<U> head(V * D, first);
    Guarded<int32_t> targets(M, first), places(room, first);
    Guarded<float> weights(kept ? M : 0, first), columns(D * room, first), rows(kept ? chunk * wide : 0, first), chosen(room, first);
    Guarded<float> tops(tiles * room, first), sums(tiles * room, first), shares((kept ? V : segments * tile) * room, first);
    Guarded<float> to_hidden(kept ? segments * chunk * wide : 0, first), losses(M, first), partition(M, first), to_head(kept ? V * D : 0, first);
    for (int64_t t = 0; t < M; ++t) targets.data[t] = static_cast<int32_t>(drawn(0, 9) ? drawn(-V, V - 1) : drawn(0, 1) ? V : -V - 1);
    for (int64_t start = 0; start < M; start += chunk) {
        const auto from = [&](auto& array, int64_t width) { return array.count ? array.data + start * width : nullptr; };
        const capibara::CrossEntropy call{from(hidden, D), head.data, narrow, M - start < chunk ? M - start : chunk, room, V, D, tile, segments,
                                          from(targets, 1), from(weights, 1), z_loss, kept, start == 0, columns.data, rows.data, places.data,
                                          chosen.data, tops.data, sums.data, shares.data, to_hidden.data, from(losses, 1), from(partition, 1),
                                          to_head.data, from(hidden_out, D)};
        cross_entropy_begin<T>(call, 0);
        for (int64_t task = 0; task < segments; ++task) cross_entropy_scores<U>(call, task);
        cross_entropy_merge(call, 0);
        if (!kept) continue;
        for (int64_t task = 0; task < segments; ++task) cross_entropy_slopes<U>(call, task);
        cross_entropy_end<T>(call, 0);
    }

    std::vector<double> weight(V * D), logits(V), to_h(hidden_out.count), to_w(to_head.count);
    for (int64_t i = 0; i < V * D; ++i) weight[i] = narrow ? narrowed(head[i]) : head[i];
    for (int64_t t = 0; t < M; ++t) {
        const int64_t target = targets.data[t] < 0 ? targets.data[t] + V : targets.data[t];
        double highest = -INFINITY, total = 0;
        for (int64_t v = 0; v < V; ++v) {
            logits[v] = 0;
            for (int64_t d = 0; d < D; ++d) logits[v] += hidden[t * D + d] * weight[v * D + d];
            highest = std::fmax(highest, logits[v]);
        }
        for (int64_t v = 0; v < V; ++v) total += std::exp(logits[v] - highest);
        const double whole = highest + std::log(total);
        compare(partition[t], whole, 1e-4, "a partition is the formula");
        if (target < 0 || target >= V) require(std::isnan(losses[t]), "a target outside of the vocabulary has no loss");
        else compare(losses[t], whole - logits[target], 1e-4, "a loss is the formula");
        for (int64_t v = 0; kept && v < V; ++v) {
            const double slope = weights[t] * ((1 + 2 * z_loss * whole) * std::exp(logits[v] - whole) - (v == target));
            for (int64_t d = 0; d < D; ++d) {
                to_h[t * D + d] += slope * weight[v * D + d];
                to_w[v * D + d] += slope * hidden[t * D + d];
            }
        }
    }
    compare(hidden_out, to_h, "the gradient of hidden states is the formula");
    compare(to_head, to_w, "the gradient of a head is the formula");
}

template <class T>
void products_of_few_rows(bool first) {
    const int64_t counts[] = {1, 2, 3, 4, 5, 17}, depths[] = {drawn(1, 70), drawn(1, 70), 64, 65, 1024, drawn(1000, 1100)};
    const int64_t rows = counts[drawn(0, 5)], inner = depths[drawn(0, 5)], columns = drawn(0, 1) ? drawn(1, 40) : drawn(1, 300);
    const int64_t block = drawn(0, 1) ? 128 : drawn(1, 300);
    const bool by_columns = drawn(0, 1), scaled = drawn(0, 1);
    Guarded<float> x(rows * inner, first), scale(scaled ? columns : 0, first), out(rows * columns, first);
    Guarded<T> w(inner * columns, first);
    const capibara::FewRows call{x.data, w.data, scaled ? scale.data : nullptr, rows, inner, columns, block, by_columns, out.data};
    for (int64_t task = 0; task * block < columns; ++task) few_rows<T>(call, task);
    for (int64_t m = 0; m < rows; ++m)
        for (int64_t n = 0; n < columns; ++n) {
            double sum = 0, size = 0;
            for (int64_t k = 0; k < inner; ++k) {
                const double term = x[m * inner + k] * w[by_columns ? n * inner + k : k * columns + n];
                sum += term, size += std::fabs(term);
            }
            const double factor = scaled ? scale[n] : 1, error = std::fabs(out[m * columns + n] - sum * factor);
            require(error <= 1e-5 * size * std::fabs(factor), "a product of few rows is exact to 1e-5 of its terms");
        }
}

}  // namespace guards
