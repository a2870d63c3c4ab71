// What each kernel is asked to do: plain structs, the same for every instruction set.
//
// A kernel is void(const Call&, int64_t task). Its tasks may run in any order and at once: each number is written by one.
#pragma once

#include <cstdint>

namespace capibara {

// Inner products of rows: task t writes those of its block into the upper triangle of partial[t].
struct Gram {
    const void* const* rows;  // n pointers, of any alignment
    int64_t n, length, block;
    double* partial;  // [tasks, n, n]
    const float* centre;     // subtracted from every row, or null
    bool wide;               // products in float64 too
};

// out = sum of weights[i] * rows[i], summed in float64 and rounded once: the same bits on every machine.
struct WeightedSum {
    const void* const* rows;
    const double* weights;
    int64_t n, length, block;
    float* out;
};

// out = the mean of positions low … high - 1 of every column once `steps`, pairs of a sorting network, have put it in
// order; NaN where one is in the column. At most MOST_SORTED rows.
constexpr int64_t MOST_SORTED = 1024;
struct SortedMean {
    const void* const* rows;
    const int32_t* steps;  // [num_steps, 2]
    int64_t n, num_steps, low, high, length, block;
    float* out;
};

// out = from + share * (to - from) in float32, each operation rounded: the same bits on every machine. out may be from.
struct Moved {
    const float* from;
    const void* to;
    float share;
    int64_t length, block;
    float* out;
};

// out = in, rounded to the nearest, ties to even.
struct Rounded {
    const float* in;
    int64_t length, block;
    void* out;
};

// Arrays are [batch, length, heads, size]: batch b begins at number first[b], strides are in numbers, the last axis is
// contiguous. What all batches share has the same first[b] everywhere. Packed q, k and v are three views of one array.
struct AttentionArray {
    void* data;
    const int64_t* first;
    int64_t token, head;
};

// Added to the scores, [batch, heads, queries, keys]; a stride is 0 where all share. -inf hides the key. data may be null.
struct AttentionBias {
    void* data;
    bool wide;  // float32, whatever the other arrays are
    const int64_t* first;
    int64_t head, query, key;
};

struct AttentionSegments {
    const int32_t* data;  // [batch, length] or null
    const int64_t* first;
};

// Angles of RoPE, [batch, keys, size / 2] or null; a query stands at the key with its position.
struct AttentionAngles {
    const float *cos, *sin;
    const int64_t *cos_first, *sin_first;
};

struct AttentionShape {
    int64_t batch, queries, keys, heads, kv_heads, size;
    float scale;
    bool causal;             // query t sees key s where s <= t + keys - queries
    int64_t window;          // and s > t + keys - queries - window, where window > 0
    AttentionSegments query_segments, key_segments;  // only equal segments see each other
    AttentionBias bias;
    AttentionAngles angles;
};

struct AttentionForward {
    AttentionShape shape;
    AttentionArray q, k, v, out;
    float* partition;  // [batch, heads, queries]: log2 Σ exp S, +inf for a query that sees nothing
};

struct AttentionPartition {
    const float* data;  // [batch, heads, queries]
    const int64_t* first;
};

struct AttentionBackward {
    AttentionShape shape;
    AttentionArray q, k, v, out, grad, dq, dk, dv;
    AttentionPartition partition;
    AttentionBias dbias;                       // float32, or null
    int64_t batches_together, heads_together;  // of one task, in key/value heads: those that share numbers of dbias
};

// [groups, rows, width] with a scale [width] for each group; a task is `block` rows of one of them, `blocks` a group.
struct NormShape {
    int64_t rows, width, block, blocks;
    float eps;
    const float* scale;
};

// sum = x + residual, out = the normalised sum. Without a residual (null) there is no sum, and x is normalised.
struct NormForward {
    NormShape shape;
    const void *x, *residual;
    void *sum, *out;
};

// to_s = the gradient through `out` of what was normalised, s, plus `beside` where it is not null.
struct NormBackward {
    NormShape shape;
    const void *s, *grad, *beside;
    void* to_s;
    float* to_scale;  // [tasks, width]: of each task's rows
};

// One number for each of x; `up` and `to_up` belong to SwiGLU, `grad` to the backward kernels.
struct Activation {
    const void *x, *up, *grad;
    int64_t length, block;
    void *out, *to_up;
};

// A chunk of tokens of the cross-entropy of a linear head [vocabulary, width]; arrays of one number a token have room for
// `room` of them, a multiple of 16. Tasks are segments of the vocabulary, made of whole tiles; `begin`, `merge` and `end`
// are one task.
struct CrossEntropy {
    const void *hidden, *head;  // [tokens, width], [vocabulary, width]
    bool narrow;                // the head is float32 and is rounded to bfloat16
    int64_t tokens, room, vocabulary, width, tile, segments;
    const int32_t* targets;  // negative ones count from the end; outside the loss is NaN
    const float* weights;
    float z_loss;
    bool kept, first;                     // all shares are kept, for gradients; to_head holds nothing yet
    float *hidden_columns, *hidden_rows;  // packed
    int32_t* places;                      // [room]: of the target, or -1
    float *chosen, *tops, *sums;          // [room], [tiles, room], [tiles, room]
    float* shares;                        // [vocabulary, room], or [segments, tile, room]
    float* to_hidden;                     // [segments, tokens, width in whole vectors]
    float *losses, *partition, *to_head;  // results
    void* hidden_out;                     // dH, in the dtype of hidden
};

// out[rows, columns] = x · w, times `scale` column by column where it is not null; w is [inner, columns], or [columns,
// inner] by columns.
struct FewRows {
    const float* x;  // [rows, inner]
    const void* w;
    const float* scale;
    int64_t rows, inner, columns, block;  // columns of a task
    bool by_columns;
    float* out;
};

}  // namespace capibara
