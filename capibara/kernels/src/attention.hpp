// Flash attention, forward, on one core a task: O(T) memory, tiles that no query sees are skipped.
//
//     S = scale · R(Q) R(K)ᵀ + bias      P = softmax(S)      O = P V      R: RoPE, in float32, where there are angles
//
// Running maximum and sum: Milakov & Gimelshein 2018. A task is one query head of one sequence, so that every number is
// written by one task, in one order: the same bits for any number of threads. What a query does not see never touches its
// row: hidden scores are -inf, so their shares are 0, and where values are not finite shares of 0 are left out of the sum.
#pragma once

#include "scratch.hpp"
#include "sight.hpp"
#include "turned.hpp"

namespace CAPIBARA_ISA {

using capibara::AttentionForward;

// Turns a row of scores into shares of `best`, and returns their sum.
inline float share_out(float* row, int64_t width, float best) {
    const Vec highest = all(best == NEVER ? 0.0f : best);
    Vec sum{};
    for (int64_t j = 0; j < width; j += W) {
        const Vec share = power_of_two(load(row + j) - highest);
        sum += share;
        store(row + j, share);
    }
    return sum_of(sum);
}

template <class T>
void attention_forward(const AttentionForward& call, int64_t task) {
    const AttentionShape& shape = call.shape;
    const int64_t b = task / shape.heads, h = task % shape.heads, g = h / (shape.heads / shape.kv_heads);
    const int64_t D = shape.size, wide = round_up(D, W), block = QUERIES < shape.queries ? QUERIES : round_up(shape.queries, W);
    Scratch scratch(Panels::size(D, shape.keys) + Panels::size(shape.keys, D) + block * (D + wide + ROW + 3) + W * D + 9 * 16);
    Panels keys{scratch.take(Panels::size(D, shape.keys)), D, shape.keys};
    Panels values{scratch.take(Panels::size(shape.keys, D)), shape.keys, D};
    float *queries = scratch.take(block * D), *mixed = scratch.take(block * wide), *scores = scratch.take(block * ROW);
    float *highest = scratch.take(block), *total = scratch.take(block), *shrink = scratch.take(block), *buffer = scratch.take(W * D);
    const Angles still{nullptr, nullptr, 0};
    pack_transposed(Rows<T>{at<const T>(call.k, b, g), call.k.token, D, 1.0f, Angles::of(shape, b, 0)}, buffer, keys);
    pack(Rows<T>{at<const T>(call.v, b, g), call.v.token, D, 1.0f, still}, buffer, values);
    const bool finite = all_finite(values.data, Panels::size(shape.keys, D));
    const Sight sight(shape, b, h);
    for (int64_t q = 0; q < shape.queries; q += block) {
        const int64_t rows = shape.queries - q < block ? shape.queries - q : block;
        const Rows<T> read{at<const T>(call.q, b, h, q), call.q.token, D, shape.scale * LOG2_E, Angles::of(shape, b, q + sight.offset())};
        for (int64_t i = 0; i < rows; ++i) read(i, queries + i * D);
        for (int64_t i = 0; i < block; ++i) highest[i] = NEVER, total[i] = shrink[i] = 0;
        for (int64_t i = 0; i < rows * wide; ++i) mixed[i] = 0;
        for (int64_t k = sight.first_key(q), last = sight.end_key(q + rows - 1); k < last; k += KEYS) {
            const Tile tile = sight.tile(q, rows, k, last);
            if (!tile_scores<T>(sight, queries, keys, tile, scores)) continue;
            for (int64_t i = 0; i < rows; ++i) {
                Vec top = all(NEVER);
                for (int64_t j = 0, end = tile.width(i); j < end; j += W) top = larger(load(scores + i * ROW + j), top);
                const float best = larger_of(largest_of(top), highest[i]);
                shrink[i] = best == NEVER ? 0.0f : highest[i] - best;  // nothing seen yet: everything is 0 anyway
                highest[i] = best;
            }
            for (int64_t i = 0; i < block; i += W) store(shrink + i, power_of_two(load(shrink + i)));
            for (int64_t i = 0; i < rows; ++i) {
                float* out = mixed + i * wide;
                total[i] = total[i] * shrink[i] + share_out(scores + i * ROW, tile.width(i), highest[i]);
                for (int64_t d = 0; d < wide; d += W) store(out + d, load(out + d) * shrink[i]);
            }
            const auto extent = [&](int64_t i) { return tile.over_keys(D, i); };
            if (finite) multiply(rows, scores, ROW, 1, values, k, 0, D, mixed, wide, true, extent);
            else multiply_seen(rows, scores, ROW, 1, values, k, 0, D, mixed, wide, extent);
        }
        for (int64_t i = 0; i < rows; ++i) {
            const bool blind = highest[i] == NEVER && total[i] == 0;
            write_rows(mixed + i * wide, wide, 1, D, blind ? 0.0f : 1.0f / total[i], still, at<T>(call.out, b, h, q + i), 0);
            call.partition[(b * shape.heads + h) * shape.queries + q + i] = blind ? -NEVER : highest[i] + __builtin_log2f(total[i]);
        }
    }
}

}  // namespace CAPIBARA_ISA
