// Small products C += A · B with B packed in panels of NR columns, so that every load of B is a whole vector.
//
//     panel p of a [K, N] matrix: K rows of `width(p)` numbers, one below the other; the last panel may be narrower.
#pragma once

#include "vector.hpp"

namespace CAPIBARA_ISA {

constexpr int MR = 6;

inline int64_t round_up(int64_t count, int64_t to) { return (count + to - 1) / to * to; }
inline int64_t between(int64_t low, int64_t x, int64_t high) { return x < low ? low : x < high ? x : high; }

struct Panels {
    float* data;
    int64_t rows, columns;  // columns that are used; each panel is filled with zeros to whole vectors

    static int64_t size(int64_t rows, int64_t columns) { return rows * round_up(columns, W); }
    int vectors(int64_t first) const {
        int64_t left = round_up(columns - first, W) / W;
        return left < NV ? static_cast<int>(left) : NV;
    }
    float* at(int64_t first, int64_t row) const { return data + first * rows + row * vectors(first) * W; }
};

// What a block of MR rows of C needs: the terms [from, to) of its sums, and its first columns, to whole vectors.
struct Extent {
    int64_t from, to, columns;
};

template <int ROWS, int VECTORS>
__attribute__((noinline)) void product(int64_t depth, const float* a, int64_t a_row, int64_t a_next, const float* b, int64_t b_next, float* c,
                                       int64_t c_row, bool add) {
    Vec sums[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; ++j) sums[i][j] = add ? load(c + i * c_row + j * W) : Vec{};
    for (int64_t k = 0; k < depth; ++k, b += b_next, a += a_next) {
        Vec row[VECTORS];
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; ++j) row[j] = load(b + j * W);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
            for (int j = 0; j < VECTORS; ++j) sums[i][j] += a[i * a_row] * row[j];
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; ++j) store(c + i * c_row + j * W, sums[i][j]);
}

typedef void (*Product)(int64_t, const float*, int64_t, int64_t, const float*, int64_t, float*, int64_t, bool);

#if CAPIBARA_PANEL == 4
#define CAPIBARA_PRODUCTS(rows) {product<rows, 1>, product<rows, 2>, product<rows, 3>, product<rows, 4>}
#else
#define CAPIBARA_PRODUCTS(rows) {product<rows, 1>, product<rows, 2>}
#endif
static constexpr Product PRODUCTS[MR][NV] = {CAPIBARA_PRODUCTS(1), CAPIBARA_PRODUCTS(2), CAPIBARA_PRODUCTS(3),
                                             CAPIBARA_PRODUCTS(4), CAPIBARA_PRODUCTS(5), CAPIBARA_PRODUCTS(6)};

// C[count, last - first] (+)= A · B[row …, first … last]; `first` is a multiple of NR. A's element (i, k) is
// a[i · a_row + k · a_next], so a transposed A costs nothing. `extent(i)` is of the block of rows i … i + MR - 1.
template <class Extents>
inline void multiply(int64_t count, const float* a, int64_t a_row, int64_t a_next, const Panels& b, int64_t row, int64_t first, int64_t last,
                     float* c, int64_t c_row, bool add, const Extents& extent) {
    for (int64_t column = first; column < last; column += NR) {
        const int64_t vectors = b.vectors(column), width = vectors * W;
        const float* panel = b.at(column, row);
        for (int64_t i = 0; i < count; i += MR) {
            const Extent part = extent(i);
            const int64_t left = part.columns - (column - first);
            if (left <= 0 || (add && part.to <= part.from)) continue;
            const int64_t used = left < width ? (left + W - 1) / W : vectors, rows = count - i < MR ? count - i : MR;
            PRODUCTS[rows - 1][used - 1](part.to - part.from, a + i * a_row + part.from * a_next, a_row, a_next, panel + part.from * width, width,
                                         c + i * c_row + (column - first), c_row, add);
        }
    }
}

// The same, added to C, where B has numbers that are not finite: a 0 of A takes nothing from its row of B. Slow.
template <class Extents>
inline void multiply_seen(int64_t count, const float* a, int64_t a_row, int64_t a_next, const Panels& b, int64_t row, int64_t first, int64_t last,
                          float* c, int64_t c_row, const Extents& extent) {
    for (int64_t column = first; column < last; column += NR) {
        const int64_t width = b.vectors(column) * W;
        for (int64_t i = 0; i < count; ++i) {
            const Extent part = extent(i / MR * MR);
            for (int64_t k = part.from; k < part.to; ++k) {
                const float factor = a[i * a_row + k * a_next], *from = b.at(column, row + k);
                if (factor == 0) continue;
                for (int64_t j = 0; j < width; ++j) c[i * c_row + (column - first) + j] += factor * from[j];
            }
        }
    }
}

// Whether none of `count` numbers, a multiple of W, is infinite or NaN.
inline bool all_finite(const float* from, int64_t count) {
    Vec sum{};
    for (int64_t i = 0; i < count; i += W) sum += load(from + i) * 0.0f;
    return sum_of(sum) == 0;
}

// Packs a matrix that `read(row, out)` gives row by row; `buffer` holds one row.
template <class Reader>
inline void pack(const Reader& read, float* buffer, const Panels& to) {
    for (int64_t row = 0; row < to.rows; ++row) {
        read(row, buffer);
        for (int64_t column = 0; column < to.columns; column += NR) {
            const int64_t width = to.vectors(column) * W, used = to.columns - column < width ? to.columns - column : width;
            float* out = to.at(column, row);
            for (int64_t j = 0; j < used; ++j) out[j] = buffer[column + j];
            for (int64_t j = used; j < width; ++j) out[j] = 0;
        }
    }
}

// to[d][i] = from[i][d] for W x W numbers. Each round takes vectors i and i + W / 2 in turn, number by number, which rotates
// the bits of (row, column) by one: after log2 W rounds they have changed places.
inline void transpose(const float* from, int64_t from_row, float* to, int64_t to_row) {
#if defined(__GNUC__) && !defined(__clang__)
    IntVec low, high;
    for (int i = 0; i < W; ++i) {
        low[i] = i / 2 + i % 2 * W;
        high[i] = low[i] + W / 2;
    }
    Vec rows[W], turned[W];
    for (int i = 0; i < W; ++i) rows[i] = load(from + i * from_row);
#pragma GCC unroll 4
    for (int round = 1; round < W; round *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < W / 2; ++i) {
            turned[2 * i] = __builtin_shuffle(rows[i], rows[i + W / 2], low);
            turned[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + W / 2], high);
        }
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) rows[i] = turned[i];
    }
    for (int i = 0; i < W; ++i) store(to + i * to_row, rows[i]);
#else
    for (int i = 0; i < W; ++i)
        for (int d = 0; d < W; ++d) to[d * to_row + i] = from[i * from_row + d];
#endif
}

// Packs its transpose: row i of what is read becomes column i. `buffer` holds W rows.
template <class Reader>
inline void pack_transposed(const Reader& read, float* buffer, const Panels& to) {
    const int64_t size = to.rows;
    for (int64_t column = 0; column < to.columns; column += NR) {
        const int64_t width = to.vectors(column) * W, used = to.columns - column < width ? to.columns - column : width;
        for (int64_t j = 0; j < width; j += W) {
            const int64_t count = between(0, used - j, W), whole = count == W ? size / W * W : 0;
            float* out = to.at(column, 0) + j;
            for (int64_t i = 0; i < count; ++i) read(column + j + i, buffer + i * size);
            for (int64_t d = 0; d < whole; d += W) transpose(buffer + d, size, out + d * width, width);
            for (int64_t d = whole; d < size; ++d)
                for (int64_t i = 0; i < W; ++i) out[d * width + i] = i < count ? buffer[i * size + d] : 0;
        }
    }
}

}  // namespace CAPIBARA_ISA
