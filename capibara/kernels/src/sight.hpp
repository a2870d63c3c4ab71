// Which keys the queries of a tile see, and the tile's scores.
//
// A tile is a block of queries and KEYS keys. Under a causal mask its row i sees no column from reach + i on: the products
// stop there (at whole vectors, for blocks of MR rows), so that the diagonal costs about the half that it holds.
#pragma once

#include "calls.hpp"
#include "panels.hpp"

namespace CAPIBARA_ISA {

using capibara::AttentionBias;
using capibara::AttentionShape;

constexpr int64_t QUERIES = 96, KEYS = 256;   // of a tile: its scores stay in the second-level cache
constexpr int64_t ROW = KEYS + W;             // of scores, in numbers: rows of 2^n bytes would share few cache sets
constexpr float LOG2_E = 1.44269504f;
constexpr float LOWEST = -3e38f;  // of a bias in units of log2 that hides nothing: the lowest floats would become -inf

struct Tile {
    int64_t q, rows, k, used, reach;

    int64_t end() const { return k + used; }
    // Columns of row i that are computed, in whole vectors. MR more than are seen: dK and dV read columns in blocks of MR.
    int64_t width(int64_t i) const { return round_up(between(0, reach + i / MR * MR + 2 * MR - 1, used), W); }
    Extent scores(int64_t size, int64_t i) const { return {0, size, width(i)}; }
    Extent over_keys(int64_t size, int64_t i) const { return {0, between(0, reach + i + MR - 1, used), size}; }
    Extent over_queries(int64_t size, int64_t j) const { return {between(0, j - reach + 1, rows), rows, size}; }
};

struct Sight {
    const AttentionShape& shape;
    const int32_t *query_segments, *key_segments;
    int64_t b, h;

    Sight(const AttentionShape& s, int64_t batch, int64_t head)
        : shape(s), query_segments(s.query_segments.data ? s.query_segments.data + s.query_segments.first[batch] : nullptr),
          key_segments(s.query_segments.data ? s.key_segments.data + s.key_segments.first[batch] : nullptr), b(batch), h(head) {}

    int64_t offset() const { return shape.keys - shape.queries; }
    int64_t first_key(int64_t query) const {  // a multiple of KEYS
        int64_t first = shape.window > 0 ? query + offset() - shape.window + 1 : 0;
        return first <= 0 ? 0 : first / KEYS * KEYS;
    }
    int64_t end_key(int64_t last_query) const { return shape.causal ? between(0, last_query + offset() + 1, shape.keys) : shape.keys; }
    Tile tile(int64_t q, int64_t rows, int64_t k, int64_t last) const {
        const int64_t used = last - k < KEYS ? last - k : KEYS;
        return {q, rows, k, used, shape.causal ? q + offset() + 1 - k : used};
    }

    static void range(const int32_t* ids, int64_t first, int64_t end, int32_t* low, int32_t* high) {
        *low = *high = ids[first];
        for (int64_t i = first + 1; i < end; ++i) {
            if (ids[i] < *low) *low = ids[i];
            if (ids[i] > *high) *high = ids[i];
        }
    }
    // By positions and segments. 0: no query of the tile sees a key of it; 2: all see all; 1: it depends.
    int of(const Tile& tile) const {
        int seen = 2;
        if (tile.reach < tile.used) seen = 1;
        if (shape.window > 0 && tile.k <= tile.q + tile.rows - 1 + offset() - shape.window) seen = 1;
        if (query_segments) {
            int32_t q_low, q_high, k_low, k_high;
            range(query_segments, tile.q, tile.q + tile.rows, &q_low, &q_high);
            range(key_segments, tile.k, tile.end(), &k_low, &k_high);
            if (q_high < k_low || k_high < q_low) return 0;
            if (q_low != q_high || k_low != k_high) seen = 1;
        }
        return seen;
    }
    void hide(float* scores, const Tile& tile) const {
        for (int64_t i = 0; i < tile.rows; ++i) {
            float* row = scores + i * ROW;
            const int64_t end = between(0, tile.reach + i, tile.used), wide = tile.width(i), q = tile.q + i;
            const int64_t first = shape.window > 0 ? between(0, q + offset() - shape.window + 1 - tile.k, end) : 0;
            for (int64_t j = 0; j < first; ++j) row[j] = NEVER;
            for (int64_t j = end; j < wide; ++j) row[j] = NEVER;
            if (query_segments)
                for (int64_t j = first; j < end; ++j) row[j] = key_segments[tile.k + j] == query_segments[q] ? row[j] : NEVER;
        }
    }
    // False where the bias hides all of the tile. Scores are in units of log2, so the bias is too.
    template <class T>
    bool add_bias(float* scores, const Tile& tile) const {
        const AttentionBias& bias = shape.bias;
        bool seen = false;
        for (int64_t i = 0; i < tile.rows; ++i) {
            float* row = scores + i * ROW;
            const T* from = static_cast<const T*>(bias.data) + bias.first[b] + h * bias.head + (tile.q + i) * bias.query + tile.k * bias.key;
            const int64_t end = between(0, tile.reach + i, tile.used);
            for (int64_t j = 0; j < end; ++j) {
                const float added = bias.key ? to_float(from[j]) : to_float(from[0]);
                seen |= added != NEVER;
                row[j] = added == NEVER ? NEVER : row[j] + larger_of(added * LOG2_E, LOWEST);
            }
        }
        return seen;
    }
};

// Scores of one tile in units of log2; hidden ones, and those that fill a row's width, are -inf. False: none counts.
template <class T>
inline bool tile_scores(const Sight& sight, const float* queries, const Panels& keys, const Tile& tile, float* scores) {
    const int seen = sight.of(tile);
    if (seen == 0) return false;
    const int64_t size = keys.rows;
    multiply(tile.rows, queries, size, 1, keys, 0, tile.k, tile.end(), scores, ROW, false, [&](int64_t i) { return tile.scores(size, i); });
    const AttentionBias& bias = sight.shape.bias;
    if (bias.data && !(bias.wide ? sight.add_bias<float>(scores, tile) : sight.add_bias<T>(scores, tile))) return false;
    if (seen == 1) sight.hide(scores, tile);
    const int64_t filled = round_up(tile.used, W);
    for (int64_t i = 0; i < tile.rows && seen == 2 && tile.used < filled; ++i)
        for (int64_t j = tile.used; j < filled; ++j) scores[i * ROW + j] = NEVER;
    return true;
}

}  // namespace CAPIBARA_ISA
