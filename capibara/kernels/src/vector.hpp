// Vectors of the widest kind that this translation unit may use, as GCC's vector extension; exp and sums of them.
//
// No intrinsic is named, so one source serves SSE2, AVX2, AVX-512 and NEON: W floats a vector, NV vectors a panel.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#define CAPIBARA_LANES 16
#define CAPIBARA_PANEL 4
#elif defined(__AVX__)
#define CAPIBARA_LANES 8
#define CAPIBARA_PANEL 2
#else
#define CAPIBARA_LANES 4
#define CAPIBARA_PANEL 2
#endif

namespace CAPIBARA_ISA {

constexpr int W = CAPIBARA_LANES;
constexpr int NV = CAPIBARA_PANEL;
constexpr int NR = W * NV;

typedef float Vec __attribute__((vector_size(4 * W)));
typedef int32_t IntVec __attribute__((vector_size(4 * W)));
typedef float LooseVec __attribute__((vector_size(4 * W), aligned(4), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const LooseVec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<LooseVec*>(p) = v; }
inline Vec all(float x) { return x - Vec{}; }
constexpr float NEVER = -__builtin_inff();

inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

inline float larger_of(float a, float b) { return a > b ? a : b; }

inline float sum_of(Vec v) {
    float part[W];
    std::memcpy(part, &v, sizeof v);
    for (int width = W / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) part[i] += part[i + width];
    return part[0];
}

inline float largest_of(Vec v) {
    float best = v[0];
    for (int i = 1; i < W; ++i) best = v[i] > best ? v[i] : best;
    return best;
}

// e^x for x <= 88: 2^n · p(r) with r in [-ln 2 / 2, ln 2 / 2]; Taylor to r^7 is exact to 2 units in the last place.
// Below -87.33, where the result would be denormal, it is 0; NaN stays NaN.
inline Vec exponential(Vec x) {
    constexpr float LOWEST = -87.33f, ROUND = 12582912.0f;  // 1.5 · 2^23: adding it rounds to an integer
    Vec safe = x < LOWEST ? all(LOWEST) : x;
    Vec shifted = safe * 1.44269504f + ROUND;
    Vec n = shifted - ROUND;
    Vec r = safe - n * 0.693145752f;
    r = r - n * 1.42860677e-6f;
    Vec p = all(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    IntVec exponent = (__builtin_convertvector(n, IntVec) + 127) << 23;
    Vec scale;
    std::memcpy(&scale, &exponent, sizeof scale);
    return x < LOWEST ? Vec{} : p * scale;
}

// 2^x for x < 128, to 1.4 units in the last place: 2^n · p(r) with r in [-1/2, 1/2] and p minimax with p(0) = 1. Below
// -126, where the result would be denormal, it is 0; NaN stays NaN.
inline Vec power_of_two(Vec x) {
    constexpr float LOWEST = -126.0f, ROUND = 12582912.0f;  // 1.5 · 2^23: adding it rounds to an integer
    Vec safe = x < LOWEST ? all(LOWEST) : x;
    Vec shifted = safe + ROUND;
    Vec r = safe - (shifted - ROUND);
    Vec p = all(0.0013264727f);
    p = p * r + 0.009671513f;
    p = p * r + 0.055507336f;
    p = p * r + 0.24022242f;
    p = p * r + 0.693147f;
    p = p * r + 1.0f;
    IntVec exponent;
    std::memcpy(&exponent, &shifted, sizeof exponent);
    exponent = (exponent + 127) << 23;
    Vec scale;
    std::memcpy(&scale, &exponent, sizeof scale);
    return x < LOWEST ? Vec{} : p * scale;
}

inline float to_float(float x) { return x; }
inline float to_float(uint16_t bits) {
    uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
}

inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, uint16_t* out) {  // to the nearest bfloat16, ties to even; a NaN stays one
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    *out = x != x ? static_cast<uint16_t>((bits >> 16) | 64) : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace CAPIBARA_ISA
