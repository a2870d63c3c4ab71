// Along a row of float32 or bfloat16 of any length: whole vectors, then one that holds what is left and zeros.
#pragma once

#include "rows.hpp"

namespace CAPIBARA_ISA {

inline void store_row(float* row, int64_t k, Vec v) { std::memcpy(reinterpret_cast<char*>(row) + 4 * k, &v, sizeof v); }

inline void store_row(uint16_t* row, int64_t k, Vec v) {  // the bits of `from_float`
    Bits bits;
    std::memcpy(&bits, &v, sizeof v);
    const Bits nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, nan = (bits >> 16) | 64;
    const Shorts narrow = __builtin_convertvector(v != v ? nan : nearest, Shorts);
    std::memcpy(reinterpret_cast<char*>(row) + 2 * k, &narrow, sizeof narrow);
}

// What a row is as it is read again, once it was written in its dtype.
inline Vec as_stored(const float*, Vec v) { return v; }
inline Vec as_stored(const uint16_t*, Vec v) {
    uint16_t narrow[W];
    store_row(narrow, 0, v);
    return load_row(narrow, 0);
}

struct Whole {
    template <class T>
    Vec read(const T* row, int64_t k) const { return load_row(row, k); }
    template <class T>
    void write(T* row, int64_t k, Vec v) const { store_row(row, k, v); }
};

struct Rest {
    int64_t count;

    template <class T>
    Vec read(const T* row, int64_t k) const {
        T some[W] = {};
        std::memcpy(some, row + k, sizeof(T) * count);
        return load_row(some, 0);
    }
    template <class T>
    void write(T* row, int64_t k, Vec v) const {
        T some[W];
        store_row(some, 0, v);
        std::memcpy(row + k, some, sizeof(T) * count);
    }
};

// `body(k, lanes)` for k = 0, W, 2W, …; `lanes` reads and writes there.
template <class Body>
inline void along(int64_t length, const Body& body) {
    int64_t k = 0;
    for (; k + W <= length; k += W) body(k, Whole{});
    if (k < length) body(k, Rest{length - k});
}

}  // namespace CAPIBARA_ISA
