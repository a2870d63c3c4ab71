// Rows of a head, read as float32 and written back: widened, scaled, and turned by RoPE on the way where there are angles.
//
//     (a, b) -> (a cos - b sin, b cos + a sin), where a is the first half of the head and b the second (Su et al. 2021)
#pragma once

#include "calls.hpp"
#include "vector.hpp"

namespace CAPIBARA_ISA {

using capibara::AttentionArray;
using capibara::AttentionShape;

// The angles of one batch, beginning at one position; null pointers where nothing turns.
struct Angles {
    const float *cos, *sin;
    int64_t half;

    static Angles of(const AttentionShape& shape, int64_t b, int64_t position) {
        const int64_t half = shape.size / 2;
        if (!shape.angles.cos) return {nullptr, nullptr, half};
        const int64_t first = position * half;
        return {shape.angles.cos + shape.angles.cos_first[b] + first, shape.angles.sin + shape.angles.sin_first[b] + first, half};
    }
    // Turns `x` back where `sign` is -1, which is what its gradient needs.
    void turn(int64_t row, float sign, float* x) const {
        const float *c = cos + row * half, *s = sin + row * half;
        for (int64_t d = 0; d < half; ++d) {
            const float a = x[d], b = x[half + d], sine = sign * s[d];
            x[d] = a * c[d] - b * sine;
            x[half + d] = b * c[d] + a * sine;
        }
    }
};

// A head's rows lie a whole token apart, which the processor does not foresee: asked for AHEAD rows early, short sequences
// take 0.75 of the time.
constexpr int64_t AHEAD = 8;

template <int WRITE, class T>
inline void prefetch(const T* row, int64_t size) {
    const char* bytes = reinterpret_cast<const char*>(row);
    for (int64_t i = 0; i < size * static_cast<int64_t>(sizeof(T)); i += 64) __builtin_prefetch(bytes + i, WRITE);
}

template <class T>
struct Rows {
    const T* data;
    int64_t stride, size;
    float factor;
    Angles angles;

    void operator()(int64_t row, float* out) const {
        const T* in = data + row * stride;
        prefetch<0>(in + AHEAD * stride, size);
        for (int64_t d = 0; d < size; ++d) out[d] = to_float(in[d]) * factor;
        if (angles.cos) angles.turn(row, 1, out);
    }
};

template <class T>
inline T* at(const AttentionArray& array, int64_t b, int64_t h, int64_t token = 0) {
    return static_cast<T*>(array.data) + array.first[b] + h * array.head + token * array.token;
}

// Writes rows of float32 to `out`; a gradient of something turned is turned back in place first.
template <class T>
inline void write_rows(float* from, int64_t from_row, int64_t count, int64_t size, float factor, const Angles& angles, T* out, int64_t stride) {
    for (int64_t i = 0; i < count; ++i) {
        float* row = from + i * from_row;
        if (angles.cos) angles.turn(i, -1, row);
        if (stride) prefetch<1>(out + (i + AHEAD) * stride, size);
        for (int64_t d = 0; d < size; ++d) from_float(row[d] * factor, out + i * stride + d);
    }
}

}  // namespace CAPIBARA_ISA
