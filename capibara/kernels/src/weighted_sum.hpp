// The weighted sum of n long rows in one pass, summed in float64 in the order of the rows and rounded once; and one row
// moved towards another.
//
// No product is fused into a sum: every instruction set, and NumPy, gives the same bits.
#pragma once

#include "calls.hpp"
#include "rows.hpp"

namespace CAPIBARA_ISA {

#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
#endif

template <class T>
void weighted_sum(const capibara::WeightedSum& call, int64_t task) {
    const int64_t first = task * call.block, last = call.length - first < call.block ? call.length : first + call.block;
    int64_t k = first;
    for (; k + W <= last; k += W) {
        Doubles low{}, high{};
        for (int64_t i = 0; i < call.n; ++i) {
            const Pair pair = widen(load_row(static_cast<const T*>(call.rows[i]), k));
            low += pair.low * call.weights[i];
            high += pair.high * call.weights[i];
        }
        const Half half[2] = {__builtin_convertvector(low, Half), __builtin_convertvector(high, Half)};
        std::memcpy(call.out + k, half, sizeof half);
    }
    for (; k < last; ++k) {
        double total = 0;
        for (int64_t i = 0; i < call.n; ++i) total += number(static_cast<const T*>(call.rows[i]), k) * call.weights[i];
        put(call.out, k, static_cast<float>(total));
    }
}

template <class T>
void moved(const capibara::Moved& call, int64_t task) {
    const int64_t first = task * call.block, last = call.length - first < call.block ? call.length : first + call.block;
    const T* to = static_cast<const T*>(call.to);
    int64_t k = first;
    for (; k + W <= last; k += W) {
        const Vec from = load_row(call.from, k), step = (load_row(to, k) - from) * call.share;
        put_row(call.out, k, from + step);
    }
    for (; k < last; ++k) {
        const float from = one(call.from, k), step = (to_float(one(to, k)) - from) * call.share;
        put(call.out, k, from + step);
    }
}

#if defined(__clang__)
#pragma clang fp contract(fast)
#else
#pragma GCC pop_options
#endif

}  // namespace CAPIBARA_ISA
