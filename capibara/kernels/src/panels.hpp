// Small products C += A · B with B packed in panels of NR columns, so that every load of B is a whole vector.
//
//     panel p of a [K, N] matrix: K rows of `width(p)` numbers, one below the other; the last panel may be narrower.
#pragma once

#include "vector.hpp"

namespace CAPIBARA_ISA {

constexpr int MR = 6;

inline int64_t round_up(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

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

template <int ROWS, int VECTORS>
inline void product(int64_t depth, const float* a, int64_t a_row, int64_t a_next, const float* b, float* c, int64_t c_row, bool add) {
    Vec sums[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; ++j) sums[i][j] = add ? load(c + i * c_row + j * W) : Vec{};
    for (int64_t k = 0; k < depth; ++k, b += VECTORS * W, a += a_next) {
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

template <int VECTORS>
inline void rows_product(int64_t count, int64_t depth, const float* a, int64_t a_row, int64_t a_next, const float* b, float* c, int64_t c_row, bool add) {
    int64_t i = 0;
    for (; i + MR <= count; i += MR) product<MR, VECTORS>(depth, a + i * a_row, a_row, a_next, b, c + i * c_row, c_row, add);
    for (; i + 2 <= count; i += 2) product<2, VECTORS>(depth, a + i * a_row, a_row, a_next, b, c + i * c_row, c_row, add);
    if (i < count) product<1, VECTORS>(depth, a + i * a_row, a_row, a_next, b, c + i * c_row, c_row, add);
}

// C[count, last - first] (+)= A[count, depth] · B[row … row + depth, first … last]; `first` is a multiple of NR.
// A's element (i, k) is a[i · a_row + k · a_next], so a transposed A costs nothing.
inline void multiply(int64_t count, int64_t depth, const float* a, int64_t a_row, int64_t a_next, const Panels& b, int64_t row,
                     int64_t first, int64_t last, float* c, int64_t c_row, bool add) {
    for (int64_t column = first; column < last; column += NR, c += NR) {
        const float* panel = b.at(column, row);
        switch (b.vectors(column)) {
            case 1: rows_product<1>(count, depth, a, a_row, a_next, panel, c, c_row, add); break;
            case 2: rows_product<2>(count, depth, a, a_row, a_next, panel, c, c_row, add); break;
#if CAPIBARA_PANEL == 4
            case 3: rows_product<3>(count, depth, a, a_row, a_next, panel, c, c_row, add); break;
            case 4: rows_product<4>(count, depth, a, a_row, a_next, panel, c, c_row, add); break;
#endif
        }
    }
}

// Packs rows [rows, columns] of a strided array.
template <class T>
inline void pack(const T* from, int64_t stride, float factor, const Panels& to) {
    for (int64_t column = 0; column < to.columns; column += NR) {
        int64_t width = to.vectors(column) * W, used = to.columns - column < width ? to.columns - column : width;
        for (int64_t row = 0; row < to.rows; ++row) {
            float* out = to.at(column, row);
            const T* in = from + row * stride + column;
            for (int64_t j = 0; j < used; ++j) out[j] = to_float(in[j]) * factor;
            for (int64_t j = used; j < width; ++j) out[j] = 0;
        }
    }
}

// Packs the transpose: `to` is [columns of `from`, rows of `from`].
template <class T>
inline void pack_transposed(const T* from, int64_t stride, const Panels& to) {
    for (int64_t column = 0; column < to.columns; column += NR) {
        int64_t width = to.vectors(column) * W, used = to.columns - column < width ? to.columns - column : width;
        float* out = to.at(column, 0);
        for (int64_t j = 0; j < used; ++j) {
            const T* in = from + (column + j) * stride;
            for (int64_t d = 0; d < to.rows; ++d) out[d * width + j] = to_float(in[d]);
        }
        for (int64_t j = used; j < width; ++j)
            for (int64_t d = 0; d < to.rows; ++d) out[d * width + j] = 0;
    }
}

}  // namespace CAPIBARA_ISA
