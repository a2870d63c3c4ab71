// Products of few rows with a matrix that stands in memory as float32, bfloat16 or int8: those of generation, where the
// matrix is read from memory once for every token, and that reading is the cost.
//
//     out[m, n] = scale[n] · sum over k of x[m, k] · w[k, n]        or w[n, k] where the matrix stands by its columns
//
// Numbers of w are widened to float32 in registers; for many rows, once, in a block that stays in the first-level cache.
// A sum has one order, whatever the number of rows, tasks and threads: k by k, or for a matrix by columns in W lanes
// that are folded at the end.
#pragma once

#include "calls.hpp"
#include "panels.hpp"
#include "rows.hpp"

#if defined(__AVX2__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 on its own header
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace CAPIBARA_ISA {

constexpr int FEW = 4;                      // rows at a time, and the most that do without a widened block
constexpr int DOTS = W == 16 ? 4 : 2;       // columns at a time of a matrix by columns
constexpr int64_t DEEP = 64, LONG = 1024;   // of a widened block: DEEP rows of a panel, or DOTS columns of at most LONG
constexpr int64_t ROWS_AHEAD = 16;          // rows that are fetched early

// GCC 12 widens vectors piece by piece, at a third of the speed: here alone an instruction is named.
inline Vec widened(const float* row, int64_t k) { return load_row(row, k); }

inline Vec widened(const uint16_t* row, int64_t k) {
#if defined(__AVX512F__)
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + k))), 16));
#elif defined(__AVX2__)
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + k))), 16));
#else
    return load_row(row, k);
#endif
}

inline Vec widened(const int8_t* row, int64_t k) {
#if defined(__AVX512F__)
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + k))));
#elif defined(__AVX2__)
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(row + k))));
#else
    Vec v;
    for (int i = 0; i < W; ++i) v[i] = row[k + i];
    return v;
#endif
}

inline float to_float(int8_t x) { return x; }

template <int ROWS, int VECTORS, class T>
inline void few_tile(int64_t depth, const float* x, int64_t x_row, const T* w, int64_t w_row, float* out, int64_t out_row, bool add) {
    Vec sums[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; ++j) sums[i][j] = add ? load(out + i * out_row + j * W) : Vec{};
    for (int64_t k = 0; k < depth; ++k, w += w_row) {
        Vec row[VECTORS];
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; ++j) row[j] = widened(w, j * W);
#pragma GCC unroll 8
        for (size_t byte = 0; byte < VECTORS * W * sizeof(T); byte += 64)
            __builtin_prefetch(reinterpret_cast<const char*>(w + ROWS_AHEAD * w_row) + byte);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
            for (int j = 0; j < VECTORS; ++j) sums[i][j] += x[i * x_row + k] * row[j];
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; ++j) store(out + i * out_row + j * W, sums[i][j]);
}

// Columns n … n + VECTORS · W - 1 of all rows.
template <int VECTORS, class T>
inline void few_panel(const capibara::FewRows& call, const T* w, int64_t n) {
    const int64_t depth = call.inner, columns = call.columns;
    float* out = call.out + n;
    w += n;
    switch (call.rows) {
        case 1: return few_tile<1, VECTORS>(depth, call.x, depth, w, columns, out, columns, false);
        case 2: return few_tile<2, VECTORS>(depth, call.x, depth, w, columns, out, columns, false);
        case 3: return few_tile<3, VECTORS>(depth, call.x, depth, w, columns, out, columns, false);
        case 4: return few_tile<4, VECTORS>(depth, call.x, depth, w, columns, out, columns, false);
    }
    if constexpr (VECTORS <= NV) {  // a wider panel is for one row alone
        float block[DEEP * VECTORS * W];
        for (int64_t k = 0; k < depth; k += DEEP) {
            const int64_t deep = depth - k < DEEP ? depth - k : DEEP;
            for (int64_t row = 0; row < deep; ++row) {
                const T* from = w + (k + row) * columns;
#pragma GCC unroll 8
                for (size_t byte = 0; byte < VECTORS * W * sizeof(T); byte += 64)
                    __builtin_prefetch(reinterpret_cast<const char*>(from + DEEP * columns) + byte, 0, 2);
#pragma GCC unroll 8
                for (int j = 0; j < VECTORS; ++j) store(block + (row * VECTORS + j) * W, widened(from, j * W));
            }
            for (int64_t m = 0; m < call.rows; m += MR) {
                const int64_t rows = call.rows - m < MR ? call.rows - m : MR;
                PRODUCTS[rows - 1][VECTORS - 1](deep, call.x + m * depth + k, depth, 1, block, VECTORS * W, out + m * columns, columns, k > 0);
            }
        }
    }
}

template <class T>
inline void few_by_rows(const capibara::FewRows& call, int64_t first, int64_t last) {
    const T* w = static_cast<const T*>(call.w);
    int64_t n = first;
    for (; call.rows == 1 && n + 2 * NR <= last; n += 2 * NR) few_panel<2 * NV>(call, w, n);
    for (; n + NR <= last; n += NR) few_panel<NV>(call, w, n);
    for (; n + W <= last; n += W) few_panel<1>(call, w, n);
    for (; n < last; ++n)
        for (int64_t m = 0; m < call.rows; ++m) {
            float sum = 0;
            for (int64_t k = 0; k < call.inner; ++k) sum += call.x[m * call.inner + k] * to_float(w[k * call.columns + n]);
            call.out[m * call.columns + n] = sum;
        }
}

// The sum of W numbers, halves upon halves; `sum_of` goes through memory, which shows where sums are short.
inline float folded(Vec v) {
    typedef float Four __attribute__((vector_size(16)));
    Four part[W / 4];
    std::memcpy(part, &v, sizeof v);
#if CAPIBARA_LANES == 16
    part[0] = (part[0] + part[2]) + (part[1] + part[3]);
#elif CAPIBARA_LANES == 8
    part[0] += part[1];
#endif
    return (part[0][0] + part[0][2]) + (part[0][1] + part[0][3]);
}

template <int ROWS, int COLUMNS, class T>
inline void few_dots(int64_t depth, const float* x, int64_t x_row, const T* w, int64_t w_row, float* out, int64_t out_row) {
    Vec sums[ROWS][COLUMNS] = {};
    int64_t k = 0;
    for (; k + W <= depth; k += W) {
        Vec column[COLUMNS];
#pragma GCC unroll 8
        for (int j = 0; j < COLUMNS; ++j) column[j] = widened(w + j * w_row, k);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) {
            const Vec row = load(x + i * x_row + k);
#pragma GCC unroll 8
            for (int j = 0; j < COLUMNS; ++j) sums[i][j] += row * column[j];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < COLUMNS; ++j) {
            float sum = folded(sums[i][j]);
            for (int64_t rest = k; rest < depth; ++rest) sum += x[i * x_row + rest] * to_float(w[j * w_row + rest]);
            out[i * out_row + j] = sum;
        }
}

// Columns n … n + COLUMNS - 1 of all rows.
template <int COLUMNS, class T>
inline void few_columns(const capibara::FewRows& call, const T* w, int64_t n) {
    const int64_t depth = call.inner, columns = call.columns;
    float* out = call.out + n;
    w += n * depth;
    switch (call.rows) {
        case 1: return few_dots<1, COLUMNS>(depth, call.x, depth, w, depth, out, columns);
        case 2: return few_dots<2, COLUMNS>(depth, call.x, depth, w, depth, out, columns);
        case 3: return few_dots<3, COLUMNS>(depth, call.x, depth, w, depth, out, columns);
        case 4: return few_dots<4, COLUMNS>(depth, call.x, depth, w, depth, out, columns);
    }
    float block[COLUMNS * LONG];
    const bool fits = depth <= LONG;
    for (int j = 0; fits && j < COLUMNS; ++j) {
        int64_t k = 0;
        for (; k + W <= depth; k += W) store(block + j * LONG + k, widened(w + j * depth, k));
        for (; k < depth; ++k) block[j * LONG + k] = to_float(w[j * depth + k]);
    }
    int64_t m = 0;
    for (; m + FEW <= call.rows; m += FEW)
        if (fits) few_dots<FEW, COLUMNS>(depth, call.x + m * depth, depth, block, LONG, out + m * columns, columns);
        else few_dots<FEW, COLUMNS>(depth, call.x + m * depth, depth, w, depth, out + m * columns, columns);
    for (; m < call.rows; ++m)
        if (fits) few_dots<1, COLUMNS>(depth, call.x + m * depth, depth, block, LONG, out + m * columns, columns);
        else few_dots<1, COLUMNS>(depth, call.x + m * depth, depth, w, depth, out + m * columns, columns);
}

template <class T>
inline void few_by_columns(const capibara::FewRows& call, int64_t first, int64_t last) {
    const T* w = static_cast<const T*>(call.w);
    int64_t n = first;
    for (; call.rows == 1 && n + 2 * DOTS <= last; n += 2 * DOTS) few_columns<2 * DOTS>(call, w, n);
    for (; n + DOTS <= last; n += DOTS) few_columns<DOTS>(call, w, n);
    for (; n < last; ++n) few_columns<1>(call, w, n);
}

template <class T>
void few_rows(const capibara::FewRows& call, int64_t task) {
    const int64_t first = task * call.block, last = call.columns - first < call.block ? call.columns : first + call.block;
    call.by_columns ? few_by_columns<T>(call, first, last) : few_by_rows<T>(call, first, last);
    for (int64_t m = 0; call.scale && m < call.rows; ++m)
        for (int64_t n = first; n < last; ++n) call.out[m * call.columns + n] *= call.scale[n];
}

}  // namespace CAPIBARA_ISA
