// Products of tiles that lie in the second-level cache, while the next tiles are on their way to it from memory.
#pragma once

#include "panels.hpp"

namespace CAPIBARA_ISA {

// Lines of memory that the next tile needs, fetched into the second-level cache one by one while products run.
struct Ahead {
    static constexpr int RANGES = 3;
    const char *next[RANGES] = {}, *end[RANGES] = {};
    int range = 0;

    void fetch(int which, const float* from, int64_t count) {
        next[which] = reinterpret_cast<const char*>(from), end[which] = next[which] + 4 * count, range = 0;
    }
    inline void step() {
        if (range == RANGES) return;
        __builtin_prefetch(next[range], 0, 2);
        next[range] += 64;
        if (next[range] >= end[range]) ++range;
    }
};

// C[ROWS, VECTORS · W] = (C +) A · B; the rows of B lie b_next apart.
template <int ROWS, int VECTORS>
inline void tile_product(int64_t depth, const float* a, int64_t a_row, int64_t a_next, const float* b, int64_t b_next, float* c, int64_t c_row, bool add,
                         Ahead& ahead) {
    Vec sums[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; ++j) sums[i][j] = add ? load(c + i * c_row + j * W) : Vec{};
    for (int64_t k = 0; k < depth;) {
        const int64_t stop = k + 4 < depth ? k + 4 : depth;
        ahead.step();
        for (; k < stop; ++k, b += b_next, a += a_next) {
            Vec row[VECTORS];
#pragma GCC unroll 8
            for (int j = 0; j < VECTORS; ++j) row[j] = load(b + j * W);
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
                for (int j = 0; j < VECTORS; ++j) sums[i][j] += a[i * a_row] * row[j];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; ++j) store(c + i * c_row + j * W, sums[i][j]);
}

template <int VECTORS>
inline void tile_rows(int64_t count, int64_t depth, const float* a, int64_t a_row, int64_t a_next, const float* b, int64_t b_next, float* c, int64_t c_row,
                      bool add, Ahead& ahead) {
    int64_t i = 0;
    for (; i + MR <= count; i += MR) tile_product<MR, VECTORS>(depth, a + i * a_row, a_row, a_next, b, b_next, c + i * c_row, c_row, add, ahead);
    for (; i + 2 <= count; i += 2) tile_product<2, VECTORS>(depth, a + i * a_row, a_row, a_next, b, b_next, c + i * c_row, c_row, add, ahead);
    if (i < count) tile_product<1, VECTORS>(depth, a + i * a_row, a_row, a_next, b, b_next, c + i * c_row, c_row, add, ahead);
}

inline void tile_columns(int vectors, int64_t count, int64_t depth, const float* a, int64_t a_row, int64_t a_next, const float* b, int64_t b_next, float* c,
                         int64_t c_row, bool add, Ahead& ahead) {
    switch (vectors) {
        case 1: return tile_rows<1>(count, depth, a, a_row, a_next, b, b_next, c, c_row, add, ahead);
        case 2: return tile_rows<2>(count, depth, a, a_row, a_next, b, b_next, c, c_row, add, ahead);
#if CAPIBARA_PANEL == 4
        case 3: return tile_rows<3>(count, depth, a, a_row, a_next, b, b_next, c, c_row, add, ahead);
        case 4: return tile_rows<4>(count, depth, a, a_row, a_next, b, b_next, c, c_row, add, ahead);
#endif
    }
}

}  // namespace CAPIBARA_ISA
