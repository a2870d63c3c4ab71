// RMSNorm of a sum of two rows, and its gradients, each in one pass over memory (Zhang & Sennrich 2019).
//
//     s = x + residual, rounded to its dtype     r = (mean s² + eps)^-1/2     y = r · s · scale
//     ds = r · (g · scale − r s · mean(g · scale · r s)) + what comes from s itself          dscale = Σ over rows of g · r s
//
// A row is read from memory once: its second pass finds it in the first-level cache. Sums are float32, a lane each, so
// their order is that of the set. A task is a block of rows of one group, the rows that share a scale; each task writes
// its own part of dscale, so that the caller can add them in order.
#pragma once

#include "calls.hpp"
#include "lanes.hpp"

namespace CAPIBARA_ISA {

struct NormTask {
    int64_t first, last;  // rows
    const float* scale;

    NormTask(const capibara::NormShape& shape, int64_t task) {
        const int64_t group = task / shape.blocks, start = task % shape.blocks * shape.block, end = start + shape.block;
        first = group * shape.rows + start;
        last = group * shape.rows + (end < shape.rows ? end : shape.rows);
        scale = shape.scale + group * shape.width;
    }
};

inline float inverse_root(const capibara::NormShape& shape, Vec squares) {
    return 1.0f / __builtin_sqrtf(sum_of(squares) / static_cast<float>(shape.width) + shape.eps);
}

template <class T>
void rms_norm_forward(const capibara::NormForward& call, int64_t task) {
    const capibara::NormShape& shape = call.shape;
    const int64_t width = shape.width;
    const NormTask rows(shape, task);
    for (int64_t i = rows.first; i < rows.last; ++i) {
        const T* x = static_cast<const T*>(call.x) + i * width;
        const T* residual = call.residual ? static_cast<const T*>(call.residual) + i * width : nullptr;
        T *sum = call.residual ? static_cast<T*>(call.sum) + i * width : nullptr, *out = static_cast<T*>(call.out) + i * width;
        Vec squares{};
        if (call.residual) {
            along(width, [&](int64_t k, auto lanes) {
                const Vec s = as_stored(x, lanes.read(x, k) + lanes.read(residual, k));
                lanes.write(sum, k, s);
                squares += s * s;
            });
        } else {
            along(width, [&](int64_t k, auto lanes) {
                const Vec s = lanes.read(x, k);
                squares += s * s;
            });
        }
        const float r = inverse_root(shape, squares);
        const T* s = call.residual ? sum : x;
        along(width, [&](int64_t k, auto lanes) { lanes.write(out, k, lanes.read(s, k) * r * lanes.read(rows.scale, k)); });
    }
}

template <class T>
void rms_norm_backward(const capibara::NormBackward& call, int64_t task) {
    const capibara::NormShape& shape = call.shape;
    const int64_t width = shape.width;
    const NormTask rows(shape, task);
    float* to_scale = call.to_scale + task * width;
    along(width, [&](int64_t k, auto lanes) { lanes.write(to_scale, k, Vec{}); });
    for (int64_t i = rows.first; i < rows.last; ++i) {
        const T *s = static_cast<const T*>(call.s) + i * width, *grad = static_cast<const T*>(call.grad) + i * width;
        const T* beside = call.beside ? static_cast<const T*>(call.beside) + i * width : nullptr;
        T* to_s = static_cast<T*>(call.to_s) + i * width;
        Vec squares{}, products{};
        along(width, [&](int64_t k, auto lanes) {
            const Vec x = lanes.read(s, k);
            squares += x * x;
            products += x * (lanes.read(grad, k) * lanes.read(rows.scale, k));
        });
        const float r = inverse_root(shape, squares);
        const float mean = sum_of(products) * r / static_cast<float>(width);
        const auto pull = [&](int64_t k, auto lanes) {
            const Vec x = lanes.read(s, k) * r, g = lanes.read(grad, k);
            lanes.write(to_scale, k, lanes.read(to_scale, k) + g * x);
            return (g * lanes.read(rows.scale, k) - x * mean) * r;
        };
        if (call.beside) along(width, [&](int64_t k, auto lanes) { lanes.write(to_s, k, pull(k, lanes) + lanes.read(beside, k)); });
        else along(width, [&](int64_t k, auto lanes) { lanes.write(to_s, k, pull(k, lanes)); });
    }
}

}  // namespace CAPIBARA_ISA
