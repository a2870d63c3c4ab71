// RMSNorm, with and without what is added before and behind it, and activations, each with its gradients.
#pragma once

#include "activation.hpp"
#include "guarded.hpp"
#include "norm.hpp"

namespace guards {

inline int64_t width_of_a_row() { return drawn(0, 3) ? drawn(1, 70) : drawn(1, 700); }

template <class T>
void norms(bool first) {
    const int64_t groups = drawn(1, 2), rows = drawn(1, 7), width = width_of_a_row(), block = drawn(1, 4), blocks = (rows + block - 1) / block;
    const int64_t numbers = groups * rows * width, tasks = groups * blocks;
    const bool added = drawn(0, 1), beside = drawn(0, 1);
    Guarded<T> x(numbers, first), residual(added ? numbers : 0, first), sum(residual.count, first), out(numbers, first);
    Guarded<T> grad(numbers, first), straight(beside ? numbers : 0, first), to_s(numbers, first);
    Guarded<float> scale(groups * width, first), to_scale(tasks * width, first);
    const capibara::NormShape shape{rows, width, block, blocks, 1e-5f, scale.data};
    const capibara::NormForward forward{shape, x.data, added ? residual.data : nullptr, added ? sum.data : nullptr, out.data};
    for (int64_t task = 0; task < tasks; ++task) rms_norm_forward<T>(forward, task);
    const Guarded<T>& s = added ? sum : x;
    const capibara::NormBackward backward{shape, s.data, grad.data, beside ? straight.data : nullptr, to_s.data, to_scale.data};
    for (int64_t task = 0; task < tasks; ++task) rms_norm_backward<T>(backward, task);

    std::vector<double> y(numbers), pulled(numbers), to_scales(tasks * width);
    for (int64_t i = 0; i < groups * rows; ++i) {
        const int64_t group = i / rows, task = group * blocks + i % rows / block, row = i * width;
        double squares = 0, products = 0;
        for (int64_t d = 0; d < width; ++d) {
            if (added) compare(sum[row + d], x[row + d] + residual[row + d], ROUNDED<T>, "the sum of two rows is kept");
            squares += s[row + d] * s[row + d];
            products += s[row + d] * grad[row + d] * scale[group * width + d];
        }
        const double r = 1 / std::sqrt(squares / width + 1e-5), mean = products * r / width;
        for (int64_t d = 0; d < width; ++d) {
            const double unit = s[row + d] * r, factor = scale[group * width + d];
            y[row + d] = unit * factor;
            pulled[row + d] = r * (grad[row + d] * factor - unit * mean) + (beside ? straight[row + d] : 0);
            to_scales[task * width + d] += grad[row + d] * unit;
        }
    }
    compare(out, y, "a norm is the formula");
    compare(to_s, pulled, "the gradient of what is normalised is the formula");
    compare(to_scale, to_scales, "the gradient of a norm's scale is the formula");
}

using Task = void (*)(const capibara::Activation&, int64_t);

template <class T>
void activation(bool first, Task forward, Task backward, double (*gate)(double), bool gated, const char* claim) {
    const int64_t length = drawn(0, 3) ? drawn(0, 70) : drawn(0, 3000), block = drawn(0, 1) ? 64 : 1000;
    Guarded<T> x(length, first), up(gated ? length : 0, first), grad(length, first), out(length, first), to_x(length, first), to_up(up.count, first);
    for (int64_t task = 0; task * block < length; ++task) {
        forward({x.data, up.data, nullptr, length, block, out.data, nullptr}, task);
        backward({x.data, up.data, grad.data, length, block, to_x.data, to_up.data}, task);
    }
    std::vector<double> values(length), slopes(length), ups(up.count);
    for (int64_t i = 0; i < length; ++i) {
        const double step = 1e-6, factor = gated ? up[i] : 1;
        values[i] = gate(x[i]) * factor;
        slopes[i] = grad[i] * factor * (gate(x[i] + step) - gate(x[i] - step)) / (2 * step);
        if (gated) ups[i] = grad[i] * gate(x[i]);
    }
    compare(out, values, claim);
    compare(to_x, slopes, claim);
    compare(to_up, ups, claim);
}

template <class T>
void activations(bool first) {
    const auto silu = [](double x) { return x / (1 + std::exp(-x)); };
    const auto gelu = [](double x) { return x / 2 * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x))); };
    activation<T>(first, silu_forward<T>, silu_backward<T>, silu, false, "SiLU and its slope are the formula");
    activation<T>(first, gelu_forward<T>, gelu_backward<T>, gelu, false, "GELU and its slope are the formula");
    activation<T>(first, swiglu_forward<T>, swiglu_backward<T>, silu, true, "SwiGLU and its slopes are the formula");
}

}  // namespace guards
