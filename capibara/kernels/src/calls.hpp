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

// Arrays are [batch, length, heads, size] with these strides in numbers; the last axis is contiguous.
struct AttentionArray {
    void* data;
    int64_t batch, token, head;
};

struct AttentionShape {
    int64_t batch, queries, keys, heads, kv_heads, size;
    float scale;
    bool causal;             // query t sees key s where s <= t + keys - queries
    int64_t window;          // and s > t + keys - queries - window, where window > 0
    const int32_t* query_segments;  // [batch, queries] or null: only equal segments see each other
    const int32_t* key_segments;    // [batch, keys]
};

struct AttentionForward {
    AttentionShape shape;
    AttentionArray q, k, v, out;
    float* partition;  // [batch, heads, queries]: log Σ exp S, +inf for a query that sees nothing
};

struct AttentionBackward {
    AttentionShape shape;
    AttentionArray q, k, v, out, grad, dq, dk, dv;
    const float* partition;
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
