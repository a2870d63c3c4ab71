// Flash attention, backward (Dao et al. 2022, algorithm 4), on one core a task.
//
//     dV = Pᵀ dO    dS = P ∘ (dO Vᵀ − δ)    dQ = R⁻¹(scale · dS K)    dK = R⁻¹(scale · dSᵀ Q)    δ = Σ dO ∘ O    dbias = dS
//
// A task is one key/value head of one sequence with all its query heads, or several where they share numbers of dbias, one
// after another: every number is written by one task, in one order.
#pragma once

#include "attention.hpp"

namespace CAPIBARA_ISA {

using capibara::AttentionBackward;

// Scores to shares P, and dO Vᵀ to slopes dS, of one row. `plain` is false where something of the tile is not finite: what
// is hidden is then kept at 0, where a NaN times 0 would not be.
inline void slope_row(float* share, float* slope, int64_t width, float partition, float delta, bool plain) {
    if (plain) {
        for (int64_t j = 0; j < width; j += W) {
            const Vec p = power_of_two(load(share + j) - partition);
            store(share + j, p);
            store(slope + j, p * (load(slope + j) - delta));
        }
        return;
    }
    for (int64_t j = 0; j < width; j += W) {
        const Vec score = load(share + j);
        const Vec p = score == all(NEVER) ? Vec{} : power_of_two(score - partition);
        store(share + j, p);
        store(slope + j, p == Vec{} ? Vec{} : p * (load(slope + j) - delta));
    }
}

struct Copied {
    const float* data;
    int64_t size;
    void operator()(int64_t row, float* out) const {
        for (int64_t d = 0; d < size; ++d) out[d] = data[row * size + d];
    }
};

inline float dot(const float* a, const float* b, int64_t size) {
    Vec sum{};
    int64_t d = 0;
    for (; d + W <= size; d += W) sum += load(a + d) * load(b + d);
    float found = sum_of(sum);
    for (; d < size; ++d) found += a[d] * b[d];
    return found;
}

// Adds the slopes of a tile to the bias's gradient; axes that the bias shares are sums.
inline void add_slopes(const AttentionBias& dbias, int64_t b, int64_t h, const Tile& tile, const float* slopes) {
    for (int64_t i = 0; i < tile.rows; ++i) {
        float* to = static_cast<float*>(dbias.data) + dbias.first[b] + h * dbias.head + (tile.q + i) * dbias.query + tile.k * dbias.key;
        const float* from = slopes + i * ROW;
        const int64_t end = between(0, tile.reach + i, tile.used);
        if (dbias.key) {
            for (int64_t j = 0; j < end; ++j) to[j] += from[j];
        } else {
            float sum = 0;
            for (int64_t j = 0; j < end; ++j) sum += from[j];
            *to += sum;
        }
    }
}

template <class T>
struct Backward {
    const AttentionBackward& call;
    const AttentionShape& shape;
    const int64_t D, wide, block, across, along;
    Scratch scratch;
    Panels keys, values, key_rows, query_rows, grad_rows;
    float *to_keys, *to_values, *queries, *grads, *to_queries, *shares, *slopes, *delta, *buffer;

    explicit Backward(const AttentionBackward& c)
        : call(c), shape(c.shape), D(shape.size), wide(round_up(D, W)), block(QUERIES < shape.queries ? QUERIES : shape.queries),
          across(Panels::size(D, shape.keys)), along(Panels::size(shape.keys, D)),
          scratch(2 * across + along + 2 * shape.keys * wide + block * (2 * D + 3 * wide + 2 * ROW + 1) + W * D + 14 * 16) {
        keys = {scratch.take(across), D, shape.keys};
        values = {scratch.take(across), D, shape.keys};
        key_rows = {scratch.take(along), shape.keys, D};
        query_rows = {scratch.take(block * wide), block, D};
        grad_rows = {scratch.take(block * wide), block, D};
        to_keys = scratch.take(shape.keys * wide), to_values = scratch.take(shape.keys * wide);
        queries = scratch.take(block * D), grads = scratch.take(block * D), to_queries = scratch.take(block * wide);
        shares = scratch.take(block * ROW), slopes = scratch.take(block * ROW), delta = scratch.take(block), buffer = scratch.take(W * D);
    }

    // C += A · B, where a hidden pair's 0 of A must take nothing from a row of B that is not finite.
    template <class Extents>
    void add(bool finite, int64_t count, const float* a, int64_t a_row, int64_t a_next, const Panels& b, int64_t row, float* c, const Extents& extent) {
        if (finite) multiply(count, a, a_row, a_next, b, row, 0, D, c, wide, true, extent);
        else multiply_seen(count, a, a_row, a_next, b, row, 0, D, c, wide, extent);
    }

    void queries_of(const Sight& sight, int64_t q, bool finite_keys) {
        const int64_t b = sight.b, h = sight.h, rows = shape.queries - q < block ? shape.queries - q : block;
        const Angles angles = Angles::of(shape, b, q + sight.offset()), still{nullptr, nullptr, 0};
        const float* partition = call.partition.data + call.partition.first[b] + h * shape.queries + q;
        const Rows<T> query{at<const T>(call.q, b, h, q), call.q.token, D, shape.scale, angles};
        const Rows<T> grad{at<const T>(call.grad, b, h, q), call.grad.token, D, 1.0f, still};
        const Rows<T> out{at<const T>(call.out, b, h, q), call.out.token, D, 1.0f, still};
        query_rows.rows = grad_rows.rows = rows;
        for (int64_t i = 0; i < rows; ++i) {
            query(i, queries + i * D);
            grad(i, grads + i * D);
            out(i, buffer);
            delta[i] = dot(grads + i * D, buffer, D);
        }
        pack(Copied{queries, D}, buffer, query_rows);
        pack(Copied{grads, D}, buffer, grad_rows);
        for (int64_t i = 0; i < rows * D; ++i) queries[i] *= LOG2_E;
        const bool finite_queries = all_finite(query_rows.data, rows * wide), finite_grads = all_finite(grad_rows.data, rows * wide);
        bool plain = finite_keys && finite_queries && finite_grads;
        for (int64_t i = 0; i < rows; ++i) plain = plain && delta[i] * 0.0f == 0 && partition[i] == partition[i];
        for (int64_t i = 0; i < rows * wide; ++i) to_queries[i] = 0;
        for (int64_t k = sight.first_key(q), last = sight.end_key(q + rows - 1); k < last; k += KEYS) {
            const Tile tile = sight.tile(q, rows, k, last);
            if (!tile_scores<T>(sight, queries, keys, tile, shares)) continue;
            multiply(rows, grads, D, 1, values, 0, k, tile.end(), slopes, ROW, false, [&](int64_t i) { return tile.scores(D, i); });
            for (int64_t i = 0; i < rows; ++i) slope_row(shares + i * ROW, slopes + i * ROW, tile.width(i), partition[i], delta[i], plain);
            if (call.dbias.data) add_slopes(call.dbias, b, h, tile, slopes);
            const auto over_keys = [&](int64_t i) { return tile.over_keys(D, i); };
            const auto over_queries = [&](int64_t j) { return tile.over_queries(D, j); };
            add(finite_keys, rows, slopes, ROW, 1, key_rows, k, to_queries, over_keys);
            add(finite_grads, tile.used, shares, 1, ROW, grad_rows, 0, to_values + k * wide, over_queries);
            add(finite_queries, tile.used, slopes, 1, ROW, query_rows, 0, to_keys + k * wide, over_queries);
        }
        write_rows(to_queries, wide, rows, D, shape.scale, angles, at<T>(call.dq, b, h, q), call.dq.token);
    }

    void head(int64_t b, int64_t g) {
        const int64_t group = shape.heads / shape.kv_heads;
        const Angles angles = Angles::of(shape, b, 0), still{nullptr, nullptr, 0};
        const Rows<T> key{at<const T>(call.k, b, g), call.k.token, D, 1.0f, angles}, value{at<const T>(call.v, b, g), call.v.token, D, 1.0f, still};
        pack_transposed(key, buffer, keys);
        pack_transposed(value, buffer, values);
        pack(key, buffer, key_rows);
        const bool finite = all_finite(keys.data, across) && all_finite(values.data, across);
        for (int64_t i = 0; i < shape.keys * wide; ++i) to_keys[i] = to_values[i] = 0;
        for (int64_t h = g * group; h < (g + 1) * group; ++h) {
            const Sight sight(shape, b, h);
            for (int64_t q = 0; q < shape.queries; q += block) queries_of(sight, q, finite);
        }
        write_rows(to_keys, wide, shape.keys, D, 1.0f, angles, at<T>(call.dk, b, g), call.dk.token);
        write_rows(to_values, wide, shape.keys, D, 1.0f, still, at<T>(call.dv, b, g), call.dv.token);
    }
};

template <class T>
void attention_backward(const AttentionBackward& call, int64_t task) {
    const int64_t across = call.shape.kv_heads / call.heads_together;
    const int64_t b = task / across * call.batches_together, g = task % across * call.heads_together;
    Backward<T> backward(call);
    for (int64_t i = 0; i < call.batches_together; ++i)
        for (int64_t j = 0; j < call.heads_together; ++j) backward.head(b + i, g + j);
}

}  // namespace CAPIBARA_ISA
