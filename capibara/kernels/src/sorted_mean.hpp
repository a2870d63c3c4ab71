// The mean of some sorted positions of every column of n rows: the median, a trimmed mean.
//
// Rows are sorted as the integers that stand in the order of their numbers, -0 before 0: bfloat16 is half the bytes.
// A tile of all rows stays in the nearest cache while the sorting network passes over it.
#pragma once

#include "calls.hpp"
#include "vector.hpp"

namespace CAPIBARA_ISA {

template <class T>
struct Ordered;
template <>
struct Ordered<float> {
    typedef int32_t Number;
    static constexpr Number INFINITE = 0x7f800000;
};
template <>
struct Ordered<uint16_t> {
    typedef int16_t Number;
    static constexpr Number INFINITE = 0x7f80;
};

template <class T>
void sorted_mean(const capibara::SortedMean& call, int64_t task) {
    typedef typename Ordered<T>::Number Number;
    typedef Number Numbers __attribute__((vector_size(4 * W)));
    constexpr int BITS = 8 * sizeof(Number), LANES = 4 * W / sizeof(Number), MOST = 8;
    constexpr Number SIZE = static_cast<Number>(~(Number(1) << (BITS - 1)));  // all bits but the sign
    alignas(64) Numbers room[capibara::MOST_SORTED];
    const int64_t fit = capibara::MOST_SORTED / call.n, wide = fit < 1 ? 1 : fit > MOST ? MOST : fit;
    const int64_t first = task * call.block, last = call.length - first < call.block ? call.length : first + call.block;
    for (int64_t k = first; k < last; k += wide * LANES) {
        const int64_t count = last - k < wide * LANES ? last - k : wide * LANES;
        Numbers bad[MOST] = {};
        for (int64_t i = 0; i < call.n; ++i) {
            Numbers* row = room + i * wide;
            if (count < wide * LANES)
                for (int64_t v = 0; v < wide; ++v) row[v] = Numbers{};
            std::memcpy(row, static_cast<const char*>(call.rows[i]) + sizeof(T) * k, sizeof(T) * count);
            for (int64_t v = 0; v < wide; ++v) {
                bad[v] |= (row[v] & SIZE) > Ordered<T>::INFINITE;
                row[v] ^= (row[v] >> (BITS - 1)) & SIZE;
            }
        }
        for (int64_t s = 0; s < call.num_steps; ++s) {
            Numbers *a = room + call.steps[2 * s] * wide, *b = room + call.steps[2 * s + 1] * wide;
            for (int64_t v = 0; v < wide; ++v) {
                const Numbers low = a[v] < b[v] ? a[v] : b[v], high = a[v] < b[v] ? b[v] : a[v];
                a[v] = low;
                b[v] = high;
            }
        }
        float total[MOST * LANES] = {};
        for (int64_t r = call.low; r < call.high; ++r) {
            for (int64_t v = 0; v < wide; ++v) room[r * wide + v] ^= (room[r * wide + v] >> (BITS - 1)) & SIZE;
            T row[MOST * LANES];
            std::memcpy(row, room + r * wide, sizeof(Numbers) * wide);
            if (r == call.low)
                for (int64_t lane = 0; lane < wide * LANES; ++lane) total[lane] = to_float(row[lane]);
            else
                for (int64_t lane = 0; lane < wide * LANES; ++lane) total[lane] += to_float(row[lane]);
        }
        Number nan[MOST * LANES];
        std::memcpy(nan, bad, sizeof bad);
        const float among = static_cast<float>(call.high - call.low);
        for (int64_t lane = 0; lane < wide * LANES; ++lane)
            total[lane] = nan[lane] ? __builtin_nanf("") : total[lane] / among;
        std::memcpy(call.out + k, total, sizeof(float) * count);
    }
}

}  // namespace CAPIBARA_ISA
