// Inner products of n long rows in one pass over memory.
//
//     G[i, j] = sum of (rows[i][k] - r[k]) * (rows[j][k] - r[k]), r the centre or nothing
//
// A lane sums 16 products in float32 before it is added to float64: at most 16 roundings of 2^-24, 1e-6 of |a| |b|.
// Wide, the products are float64, which holds them exactly: nearly equal rows may then be compared by their products.
// A span of all rows is read from memory once and stays in the second-level cache while tiles of 4 rows by 4 pass it.
#pragma once

#include "calls.hpp"
#include "rows.hpp"

namespace CAPIBARA_ISA {

constexpr int TALL = 4, BROAD = W == 16 ? 4 : 2;  // rows of a tile; as many sums as stay in registers
constexpr int64_t RUN = 16 * W, SPAN = 16 * RUN;

template <bool LESS, bool WIDE, class T>
inline void gram_tile(const capibara::Gram& call, int64_t i0, int64_t j0, int64_t k, int64_t end, double* out) {
    const T *a[TALL], *b[BROAD];  // beyond the last row stands the last one again; what it gives is dropped
    for (int i = 0; i < TALL; ++i) a[i] = static_cast<const T*>(call.rows[i0 + i < call.n ? i0 + i : call.n - 1]);
    for (int j = 0; j < BROAD; ++j) b[j] = static_cast<const T*>(call.rows[j0 + j < call.n ? j0 + j : call.n - 1]);
    Doubles wide[TALL][BROAD] = {};
    const int64_t whole = k + (end - k) / W * W;
    for (; WIDE && k < whole; k += W) {
        const Vec origin = LESS ? load_row(call.centre, k) : Vec{};
        Pair column[BROAD];
#pragma GCC unroll 4
        for (int j = 0; j < BROAD; ++j) column[j] = widen(LESS ? load_row(b[j], k) - origin : load_row(b[j], k));
#pragma GCC unroll 4
        for (int i = 0; i < TALL; ++i) {
            const Pair row = widen(LESS ? load_row(a[i], k) - origin : load_row(a[i], k));
#pragma GCC unroll 4
            for (int j = 0; j < BROAD; ++j) {
                wide[i][j] += row.low * column[j].low;
                wide[i][j] += row.high * column[j].high;
            }
        }
    }
    while (k < whole) {
        const int64_t stop = whole - k < RUN ? whole : k + RUN;
        Vec sums[TALL][BROAD] = {};
        for (; k < stop; k += W) {
            const Vec origin = LESS ? load_row(call.centre, k) : Vec{};
            Vec column[BROAD];
#pragma GCC unroll 4
            for (int j = 0; j < BROAD; ++j) column[j] = LESS ? load_row(b[j], k) - origin : load_row(b[j], k);
#pragma GCC unroll 4
            for (int i = 0; i < TALL; ++i) {
                const Vec row = LESS ? load_row(a[i], k) - origin : load_row(a[i], k);
#pragma GCC unroll 4
                for (int j = 0; j < BROAD; ++j) sums[i][j] += row * column[j];
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < TALL; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < BROAD; ++j) {
                const Pair pair = widen(sums[i][j]);
                wide[i][j] += pair.low + pair.high;
            }
    }
    for (int64_t i = i0; i < i0 + TALL && i < call.n; ++i)
        for (int64_t j = j0 > i ? j0 : i; j < j0 + BROAD && j < call.n; ++j) {
            double total = sum_of(wide[i - i0][j - j0]);
            for (int64_t last = whole; last < end; ++last) {
                const float origin = LESS ? to_float(one(call.centre, last)) : 0;
                const float left = to_float(one(a[i - i0], last)) - origin, right = to_float(one(b[j - j0], last)) - origin;
                total += static_cast<double>(left) * right;
            }
            out[i * call.n + j] += total;
        }
}

template <bool LESS, bool WIDE, class T>
void gram_block(const capibara::Gram& call, int64_t task) {
    const int64_t first = task * call.block, last = call.length - first < call.block ? call.length : first + call.block;
    double* out = call.partial + task * call.n * call.n;
    for (int64_t i = 0; i < call.n * call.n; ++i) out[i] = 0;
    for (int64_t k = first; k < last; k += SPAN)
        for (int64_t i = 0; i < call.n; i += TALL)
            for (int64_t j = i; j < call.n; j += BROAD)
                gram_tile<LESS, WIDE, T>(call, i, j, k, last - k < SPAN ? last : k + SPAN, out);
}

template <class T>
void gram(const capibara::Gram& call, int64_t task) {
    if (call.wide)
        call.centre ? gram_block<true, true, T>(call, task) : gram_block<false, true, T>(call, task);
    else
        call.centre ? gram_block<true, false, T>(call, task) : gram_block<false, false, T>(call, task);
}

}  // namespace CAPIBARA_ISA
