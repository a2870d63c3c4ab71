// SiLU, GELU in its tanh form, and SwiGLU, with their gradients: one exponential and one division a number.
//
//     x · σ(z(x))     z = x for SiLU     z = 2 √(2/π) (x + 0.044715 x³) for GELU, since (1 + tanh(z/2)) / 2 = σ(z)
//     its slope: σ(z) · (1 + x z' (1 − σ(z)))
//     SwiGLU: gate · σ(gate) · up
//
// Hendrycks & Gimpel 2016, Elfwing et al. 2017, Shazeer 2020. Arithmetic is float32, results are rounded once. σ is 0
// below −87.33, where it would be denormal soon; x = −∞ gives NaN, as the product x · σ does.
#pragma once

#include "calls.hpp"
#include "lanes.hpp"

namespace CAPIBARA_ISA {

struct Gate {
    Vec on, off;  // σ(z) and 1 − σ(z), each exact to some units in its own last place
};

inline Gate gate_of(Vec z) {
    Bits bits;
    std::memcpy(&bits, &z, sizeof z);
    bits |= 0x80000000;
    Vec below;  // −|z|: its exponential cannot overflow
    std::memcpy(&below, &bits, sizeof z);
    const Vec e = exponential(below), most = 1.0f / (1.0f + e), least = e * most;
    return {z < 0.0f ? least : most, z < 0.0f ? most : least};
}

struct Silu {
    static Vec argument(Vec x) { return x; }
    static Vec steepness(Vec x) { return x; }  // x z'(x)
};

struct Gelu {
    static constexpr float TWICE_ROOT = 1.5957691216f, CUBE = 0.044715f;
    // beyond 16, σ is 0 or 1 in float32, and so it stays where x³ would overflow
    static Vec limited(Vec x) { return x > 16.0f ? all(16.0f) : x < -16.0f ? all(-16.0f) : x; }
    static Vec argument(Vec x) {
        const Vec y = limited(x);
        return TWICE_ROOT * (y + CUBE * y * y * y);
    }
    static Vec steepness(Vec x) {
        const Vec y = limited(x);
        return TWICE_ROOT * (y + 3 * CUBE * y * y * y);
    }
};

struct Span {
    int64_t first, length;

    Span(const capibara::Activation& call, int64_t task) : first(task * call.block), length(call.length - first) {
        if (length > call.block) length = call.block;
    }
};

template <class Kind, class T>
inline void activation_forward(const capibara::Activation& call, int64_t task) {
    const Span span(call, task);
    const T* x = static_cast<const T*>(call.x) + span.first;
    T* out = static_cast<T*>(call.out) + span.first;
    along(span.length, [&](int64_t k, auto lanes) {
        const Vec v = lanes.read(x, k);
        lanes.write(out, k, v * gate_of(Kind::argument(v)).on);
    });
}

template <class Kind, class T>
inline void activation_backward(const capibara::Activation& call, int64_t task) {
    const Span span(call, task);
    const T *x = static_cast<const T*>(call.x) + span.first, *grad = static_cast<const T*>(call.grad) + span.first;
    T* out = static_cast<T*>(call.out) + span.first;
    along(span.length, [&](int64_t k, auto lanes) {
        const Vec v = lanes.read(x, k);
        const Gate gate = gate_of(Kind::argument(v));
        lanes.write(out, k, lanes.read(grad, k) * (gate.on * (1.0f + Kind::steepness(v) * gate.off)));
    });
}

template <class T>
void silu_forward(const capibara::Activation& call, int64_t task) { activation_forward<Silu, T>(call, task); }
template <class T>
void silu_backward(const capibara::Activation& call, int64_t task) { activation_backward<Silu, T>(call, task); }
template <class T>
void gelu_forward(const capibara::Activation& call, int64_t task) { activation_forward<Gelu, T>(call, task); }
template <class T>
void gelu_backward(const capibara::Activation& call, int64_t task) { activation_backward<Gelu, T>(call, task); }

template <class T>
void swiglu_forward(const capibara::Activation& call, int64_t task) {
    const Span span(call, task);
    const T *x = static_cast<const T*>(call.x) + span.first, *up = static_cast<const T*>(call.up) + span.first;
    T* out = static_cast<T*>(call.out) + span.first;
    along(span.length, [&](int64_t k, auto lanes) {
        const Vec v = lanes.read(x, k);
        lanes.write(out, k, v * gate_of(v).on * lanes.read(up, k));
    });
}

template <class T>
void swiglu_backward(const capibara::Activation& call, int64_t task) {
    const Span span(call, task);
    const T *x = static_cast<const T*>(call.x) + span.first, *up = static_cast<const T*>(call.up) + span.first;
    const T* grad = static_cast<const T*>(call.grad) + span.first;
    T *to_x = static_cast<T*>(call.out) + span.first, *to_up = static_cast<T*>(call.to_up) + span.first;
    along(span.length, [&](int64_t k, auto lanes) {
        const Vec v = lanes.read(x, k), g = lanes.read(grad, k);
        const Gate gate = gate_of(v);
        lanes.write(to_x, k, g * lanes.read(up, k) * (gate.on * (1.0f + v * gate.off)));
        lanes.write(to_up, k, g * (v * gate.on));
    });
}

}  // namespace CAPIBARA_ISA
