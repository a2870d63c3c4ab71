// Flash attention, forward and backward, on one core a task: O(T) memory, tiles that no query sees are skipped.
//
//     S = scale · Q Kᵀ      P = softmax(S)      O = P V           forward: running maximum and sum, Milakov & Gimelshein 2018
//     dV = Pᵀ dO    dS = P ∘ (dO Vᵀ − δ)    dQ = scale · dS K    dK = scale · dSᵀ Q    δ = Σ dO ∘ O    (Dao et al. 2022, alg. 4)
//
// A forward task is one query head of one sequence; a backward task is one key/value head with all its query heads, so
// that every number is written by one task, in one order: the same bits for any number of threads.
#pragma once

#include <cstdlib>

#include "calls.hpp"
#include "panels.hpp"

namespace CAPIBARA_ISA {

using capibara::AttentionArray;
using capibara::AttentionBackward;
using capibara::AttentionForward;
using capibara::AttentionShape;

constexpr int64_t QUERIES = 48, KEYS = 256;  // of a tile: scores of 48 KB stay in the second-level cache
constexpr float NEVER = -__builtin_inff();

struct Scratch {
    explicit Scratch(int64_t count) : data(static_cast<float*>(std::aligned_alloc(64, round_up(count * 4 + 64, 64)))), next(data) {}
    ~Scratch() { std::free(data); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    float* take(int64_t count) {
        float* found = next;
        next += round_up(count, 16);
        return found;
    }
    float *data, *next;
};

template <class T>
inline T* at(const AttentionArray& array, int64_t b, int64_t h) {
    return static_cast<T*>(array.data) + b * array.batch + h * array.head;
}

// Which keys a tile of queries sees: none, all, or some.
struct Sight {
    const AttentionShape& shape;
    const int32_t *query_segments, *key_segments;

    Sight(const AttentionShape& s, int64_t b)
        : shape(s), query_segments(s.query_segments ? s.query_segments + b * s.queries : nullptr),
          key_segments(s.query_segments ? s.key_segments + b * s.keys : nullptr) {}

    int64_t offset() const { return shape.keys - shape.queries; }
    int64_t first_key(int64_t query) const {  // a multiple of KEYS
        int64_t first = shape.window > 0 ? query + offset() - shape.window + 1 : 0;
        return first <= 0 ? 0 : first / KEYS * KEYS;
    }
    int64_t end_key(int64_t last_query) const {
        int64_t end = shape.causal ? last_query + offset() + 1 : shape.keys;
        return end < 0 ? 0 : end < shape.keys ? end : shape.keys;
    }
    static void range(const int32_t* ids, int64_t first, int64_t end, int32_t* low, int32_t* high) {
        *low = *high = ids[first];
        for (int64_t i = first + 1; i < end; ++i) {
            if (ids[i] < *low) *low = ids[i];
            if (ids[i] > *high) *high = ids[i];
        }
    }
    // 0: none of the keys [k, k_end) is seen by a query of [q, q_end); 2: all are by all; 1: it depends.
    int of(int64_t q, int64_t q_end, int64_t k, int64_t k_end) const {
        int seen = 2;
        if (shape.causal && k_end - 1 > q + offset()) seen = 1;
        if (shape.window > 0 && k <= q_end - 1 + offset() - shape.window) seen = 1;
        if (query_segments) {
            int32_t q_low, q_high, k_low, k_high;
            range(query_segments, q, q_end, &q_low, &q_high);
            range(key_segments, k, k_end, &k_low, &k_high);
            if (q_high < k_low || k_high < q_low) return 0;
            if (q_low != q_high || k_low != k_high) seen = 1;
        }
        return seen;
    }
    void hide(float* scores, int64_t q, int64_t rows, int64_t k, int64_t k_end) const {
        for (int64_t i = 0; i < rows; ++i) {
            float* row = scores + i * KEYS - k;
            int64_t here = q + i + offset(), end = k_end, first = k;
            if (shape.causal && here + 1 < end) end = here + 1 > k ? here + 1 : k;
            if (shape.window > 0 && here - shape.window + 1 > first) first = here - shape.window + 1 < k_end ? here - shape.window + 1 : k_end;
            for (int64_t j = k; j < first; ++j) row[j] = NEVER;
            for (int64_t j = end; j < k_end; ++j) row[j] = NEVER;
            if (query_segments)
                for (int64_t j = first; j < end; ++j) row[j] = key_segments[j] == query_segments[q + i] ? row[j] : NEVER;
        }
    }
};

// Scores of one tile, hidden ones at -inf, columns filled to whole vectors with -inf. False where no score counts.
inline bool tile_scores(const Sight& sight, const float* queries, int64_t size, int64_t q, int64_t rows, const Panels& keys, int64_t k,
                        int64_t k_end, float* scores) {
    int seen = sight.of(q, q + rows, k, k_end);
    if (seen == 0) return false;
    multiply(rows, size, queries, size, 1, keys, 0, k, k_end, scores, KEYS, false);
    if (seen == 1) sight.hide(scores, q, rows, k, k_end);
    int64_t used = k_end - k, filled = round_up(used, W);
    for (int64_t i = 0; i < rows && used < filled; ++i)
        for (int64_t j = used; j < filled; ++j) scores[i * KEYS + j] = NEVER;
    return true;
}

template <class T>
inline void copy_rows(const T* from, int64_t stride, int64_t rows, int64_t size, float factor, float* to) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t d = 0; d < size; ++d) to[i * size + d] = to_float(from[i * stride + d]) * factor;
}

template <class T>
void attention_forward(const AttentionForward& call, int64_t task) {
    const AttentionShape& shape = call.shape;
    const int64_t b = task / shape.heads, h = task % shape.heads, g = h / (shape.heads / shape.kv_heads);
    const int64_t D = shape.size, wide = round_up(D, W);
    Scratch scratch(Panels::size(D, shape.keys) + Panels::size(shape.keys, D) + QUERIES * (D + wide + KEYS + 4) + 256);
    Panels keys{scratch.take(Panels::size(D, shape.keys)), D, shape.keys};
    Panels values{scratch.take(Panels::size(shape.keys, D)), shape.keys, D};
    float *queries = scratch.take(QUERIES * D), *mixed = scratch.take(QUERIES * wide), *scores = scratch.take(QUERIES * KEYS);
    float *highest = scratch.take(QUERIES), *total = scratch.take(QUERIES), *shrink = scratch.take(QUERIES);
    pack_transposed(at<const T>(call.k, b, g), call.k.token, keys);
    pack(at<const T>(call.v, b, g), call.v.token, 1.0f, values);
    const Sight sight(shape, b);
    for (int64_t q = 0; q < shape.queries; q += QUERIES) {
        const int64_t rows = shape.queries - q < QUERIES ? shape.queries - q : QUERIES;
        copy_rows(at<const T>(call.q, b, h) + q * call.q.token, call.q.token, rows, D, shape.scale, queries);
        for (int64_t i = 0; i < QUERIES; ++i) highest[i] = NEVER, total[i] = 0;
        for (int64_t i = 0; i < QUERIES * wide; ++i) mixed[i] = 0;
        for (int64_t k = sight.first_key(q), last = sight.end_key(q + rows - 1); k < last; k += KEYS) {
            const int64_t k_end = last - k < KEYS ? last : k + KEYS, filled = round_up(k_end - k, W);
            if (!tile_scores(sight, queries, D, q, rows, keys, k, k_end, scores)) continue;
            for (int64_t i = 0; i < rows; ++i) {
                float* row = scores + i * KEYS;
                Vec top = load(row);
                for (int64_t j = W; j < filled; j += W) top = larger(load(row + j), top);
                float best = largest_of(top);
                best = best > highest[i] ? best : highest[i];
                shrink[i] = best == NEVER ? 0.0f : highest[i] - best;  // nothing seen yet: everything is 0 anyway
                highest[i] = best;
            }
            for (int64_t i = 0; i < QUERIES; i += W) store(shrink + i, exponential(load(shrink + i)));
            for (int64_t i = 0; i < rows; ++i) {
                float *row = scores + i * KEYS, *out = mixed + i * wide;
                const Vec best = all(highest[i] == NEVER ? 0.0f : highest[i]);
                Vec sum{};
                for (int64_t j = 0; j < filled; j += W) {
                    Vec share = exponential(load(row + j) - best);
                    sum += share;
                    store(row + j, share);
                }
                total[i] = total[i] * shrink[i] + sum_of(sum);
                for (int64_t d = 0; d < wide; d += W) store(out + d, load(out + d) * shrink[i]);
            }
            multiply(rows, k_end - k, scores, KEYS, 1, values, k, 0, D, mixed, wide, true);
        }
        for (int64_t i = 0; i < rows; ++i) {
            const bool blind = highest[i] == NEVER && total[i] == 0;
            const float share = blind ? 0.0f : 1.0f / total[i];
            T* out = at<T>(call.out, b, h) + (q + i) * call.out.token;
            for (int64_t d = 0; d < D; ++d) from_float(mixed[i * wide + d] * share, out + d);
            call.partition[(b * shape.heads + h) * shape.queries + q + i] = blind ? -NEVER : highest[i] + __builtin_logf(total[i]);
        }
    }
}

template <class T>
void attention_backward(const AttentionBackward& call, int64_t task) {
    const AttentionShape& shape = call.shape;
    const int64_t b = task / shape.kv_heads, g = task % shape.kv_heads, group = shape.heads / shape.kv_heads;
    const int64_t D = shape.size, wide = round_up(D, W), across = Panels::size(D, shape.keys), along = Panels::size(shape.keys, D);
    Scratch scratch(2 * across + along + 2 * shape.keys * wide + QUERIES * (2 * D + 3 * wide + 2 * KEYS + 4) + 512);
    Panels keys{scratch.take(across), D, shape.keys}, values{scratch.take(across), D, shape.keys};
    Panels key_rows{scratch.take(along), shape.keys, D};
    float *to_keys = scratch.take(shape.keys * wide), *to_values = scratch.take(shape.keys * wide);
    float *queries = scratch.take(QUERIES * D), *grads = scratch.take(QUERIES * D), *to_queries = scratch.take(QUERIES * wide);
    Panels query_rows{scratch.take(QUERIES * wide), QUERIES, D}, grad_rows{scratch.take(QUERIES * wide), QUERIES, D};
    float *shares = scratch.take(QUERIES * KEYS), *slopes = scratch.take(QUERIES * KEYS), *delta = scratch.take(QUERIES);
    pack_transposed(at<const T>(call.k, b, g), call.k.token, keys);
    pack_transposed(at<const T>(call.v, b, g), call.v.token, values);
    pack(at<const T>(call.k, b, g), call.k.token, 1.0f, key_rows);
    for (int64_t i = 0; i < shape.keys * wide; ++i) to_keys[i] = to_values[i] = 0;
    const Sight sight(shape, b);
    for (int64_t h = g * group; h < (g + 1) * group; ++h) {
        for (int64_t q = 0; q < shape.queries; q += QUERIES) {
            const int64_t rows = shape.queries - q < QUERIES ? shape.queries - q : QUERIES;
            const T* query = at<const T>(call.q, b, h) + q * call.q.token;
            const T* grad = at<const T>(call.grad, b, h) + q * call.grad.token;
            const T* out = at<const T>(call.out, b, h) + q * call.out.token;
            const float* partition = call.partition + (b * shape.heads + h) * shape.queries + q;
            copy_rows(query, call.q.token, rows, D, shape.scale, queries);
            copy_rows(grad, call.grad.token, rows, D, 1.0f, grads);
            query_rows.rows = grad_rows.rows = rows;
            pack(query, call.q.token, shape.scale, query_rows);
            pack(grad, call.grad.token, 1.0f, grad_rows);
            for (int64_t i = 0; i < rows; ++i) {
                float sum = 0;
                for (int64_t d = 0; d < D; ++d) sum += grads[i * D + d] * to_float(out[i * call.out.token + d]);
                delta[i] = sum;
            }
            for (int64_t i = 0; i < rows * wide; ++i) to_queries[i] = 0;
            for (int64_t k = sight.first_key(q), last = sight.end_key(q + rows - 1); k < last; k += KEYS) {
                const int64_t k_end = last - k < KEYS ? last : k + KEYS, filled = round_up(k_end - k, W);
                if (!tile_scores(sight, queries, D, q, rows, keys, k, k_end, shares)) continue;
                multiply(rows, D, grads, D, 1, values, 0, k, k_end, slopes, KEYS, false);
                for (int64_t i = 0; i < rows; ++i) {
                    float *share = shares + i * KEYS, *slope = slopes + i * KEYS;
                    for (int64_t j = 0; j < filled; j += W) {
                        Vec p = exponential(load(share + j) - partition[i]);
                        store(share + j, p);
                        store(slope + j, p * (load(slope + j) - delta[i]));
                    }
                }
                multiply(rows, k_end - k, slopes, KEYS, 1, key_rows, k, 0, D, to_queries, wide, true);
                multiply(k_end - k, rows, shares, 1, KEYS, grad_rows, 0, 0, D, to_values + k * wide, wide, true);
                multiply(k_end - k, rows, slopes, 1, KEYS, query_rows, 0, 0, D, to_keys + k * wide, wide, true);
            }
            T* dq = at<T>(call.dq, b, h) + q * call.dq.token;
            for (int64_t i = 0; i < rows; ++i)
                for (int64_t d = 0; d < D; ++d) from_float(to_queries[i * wide + d] * shape.scale, dq + i * call.dq.token + d);
        }
    }
    T *dk = at<T>(call.dk, b, g), *dv = at<T>(call.dv, b, g);
    for (int64_t i = 0; i < shape.keys; ++i)
        for (int64_t d = 0; d < D; ++d) {
            from_float(to_keys[i * wide + d], dk + i * call.dk.token + d);
            from_float(to_values[i * wide + d], dv + i * call.dv.token + d);
        }
}

}  // namespace CAPIBARA_ISA
