// Multiply-adds on registers only: what a core can do at most, to compare kernels with.
#pragma once

#include "vector.hpp"

namespace CAPIBARA_ISA {

// Runs `rounds` rounds and returns how many operations that was, a multiplication and an addition being two.
inline int64_t multiply_adds(int64_t rounds) {
    constexpr int CHAINS = 12;  // more than an addition's latency times what starts in a cycle
    volatile float given = 0.999f;
    Vec sums[CHAINS];
    const Vec factor = all(given), term = all(given);
#pragma GCC unroll 12
    for (int i = 0; i < CHAINS; ++i) sums[i] = all(static_cast<float>(i));
    for (int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; ++i) sums[i] = sums[i] * factor + term;
    for (int i = 1; i < CHAINS; ++i) sums[0] += sums[i];
    volatile float kept = sum_of(sums[0]);
    (void)kept;
    return rounds * CHAINS * W * 2;
}

}  // namespace CAPIBARA_ISA
