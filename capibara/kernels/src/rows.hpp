// Loads and stores of long rows of float32 or bfloat16 at any address, and float64 sums of float vectors.
#pragma once

#include "vector.hpp"

namespace CAPIBARA_ISA {

typedef uint32_t Bits __attribute__((vector_size(4 * W)));
typedef uint16_t Shorts __attribute__((vector_size(2 * W)));
typedef float Half __attribute__((vector_size(2 * W)));
typedef double Doubles __attribute__((vector_size(4 * W)));  // W / 2 of them: as wide a register as Vec

inline Vec load_row(const float* row, int64_t k) {
    Vec v;
    std::memcpy(&v, reinterpret_cast<const char*>(row) + 4 * k, sizeof v);
    return v;
}

inline Vec load_row(const uint16_t* row, int64_t k) {
    Shorts narrow;
    std::memcpy(&narrow, reinterpret_cast<const char*>(row) + 2 * k, sizeof narrow);
    const Bits wide = __builtin_convertvector(narrow, Bits) << 16;
    Vec v;
    std::memcpy(&v, &wide, sizeof v);
    return v;
}

template <class T>
inline T one(const T* row, int64_t k) {
    T x;
    std::memcpy(&x, reinterpret_cast<const char*>(row) + sizeof(T) * k, sizeof x);
    return x;
}

template <class T>
inline void put(T* row, int64_t k, T x) {
    std::memcpy(reinterpret_cast<char*>(row) + sizeof(T) * k, &x, sizeof x);
}

inline void put_row(float* row, int64_t k, Vec v) { std::memcpy(reinterpret_cast<char*>(row) + 4 * k, &v, sizeof v); }

template <class T>
inline double number(const T* row, int64_t k) { return to_float(one(row, k)); }

struct Pair {
    Doubles low, high;
};

inline Pair widen(Vec v) {
    Half half[2];
    std::memcpy(half, &v, sizeof v);
    return {__builtin_convertvector(half[0], Doubles), __builtin_convertvector(half[1], Doubles)};
}

inline double sum_of(Doubles v) {
    double total = 0;
    for (int i = 0; i < W / 2; ++i) total += v[i];
    return total;
}

}  // namespace CAPIBARA_ISA
