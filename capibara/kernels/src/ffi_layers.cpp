// Handlers of the layers' kernels: norms and activations. Shapes were checked where the program was traced.
#include <vector>

#include "ffi_dtype.hpp"
#include "parallel.hpp"

namespace ffi = xla::ffi;

namespace capibara {
namespace {

using Array = ffi::AnyBuffer;
using Result = ffi::Result<ffi::AnyBuffer>;
using Floats = ffi::Buffer<ffi::F32>;

constexpr int64_t LEAST_ROWS = 32, MOST_BLOCKS = 64;  // of a task of a norm, and of a group: dscale's parts stay small
constexpr int64_t BLOCK = 1 << 14;                    // numbers of a task of an activation

// Runs `call` with the dtype of x, which all arrays but a scale share.
template <class Call>
ffi::Error with_dtype(const Array& x, const Call& call) {
    Dtype dtype;
    if (ffi::Error error = read_dtype(x, &dtype); error.failure()) return error;
    call(dtype);
    return ffi::Error::Success();
}

void* data_or_null(Array array) { return array.element_count() ? array.untyped_data() : nullptr; }

struct Norm {
    NormShape shape;
    int64_t groups;

    // x is [groups…, rows…, width] and scale [groups…, width]: vmap puts the same axes in front of both.
    Norm(Array x, Floats scale, float eps) {
        const int64_t width = scale.dimensions().back(), numbers = static_cast<int64_t>(x.element_count());
        groups = width ? static_cast<int64_t>(scale.element_count()) / width : 0;
        const int64_t rows = groups ? numbers / (groups * width) : 0, even = (rows + MOST_BLOCKS - 1) / MOST_BLOCKS;
        const int64_t block = even < LEAST_ROWS ? LEAST_ROWS : even;
        shape = {rows, width, block, (rows + block - 1) / block, eps, scale.typed_data()};
    }
    int64_t tasks() const { return groups * shape.blocks; }
};

ffi::Error rms_norm(ffi::ThreadPool pool, float eps, Array x, Floats scale, Result out) {
    return with_dtype(x, [&](Dtype dtype) {
        const Norm norm(x, scale, eps);
        const NormForward call{norm.shape, x.untyped_data(), nullptr, nullptr, out->untyped_data()};
        const auto kernel = kernels().rms_norm_forward.of[dtype];
        parallel_for(pool, norm.tasks(), [&](int64_t task) { kernel(call, task); });
    });
}

ffi::Error residual_rms_norm(ffi::ThreadPool pool, float eps, Array x, Array residual, Floats scale, Result sum, Result out) {
    return with_dtype(x, [&](Dtype dtype) {
        const Norm norm(x, scale, eps);
        const NormForward call{norm.shape, x.untyped_data(), residual.untyped_data(), sum->untyped_data(), out->untyped_data()};
        const auto kernel = kernels().rms_norm_forward.of[dtype];
        parallel_for(pool, norm.tasks(), [&](int64_t task) { kernel(call, task); });
    });
}

ffi::Error rms_norm_backward(ffi::ThreadPool pool, float eps, Array s, Floats scale, Array grad, Array beside, Result to_s,
                             ffi::Result<Floats> to_scale) {
    return with_dtype(s, [&](Dtype dtype) {
        const Norm norm(s, scale, eps);
        const int64_t width = norm.shape.width, blocks = norm.shape.blocks;
        std::vector<float> parts(static_cast<size_t>(norm.tasks() * width));
        const NormBackward call{norm.shape, s.untyped_data(), grad.untyped_data(), data_or_null(beside), to_s->untyped_data(), parts.data()};
        const auto kernel = kernels().rms_norm_backward.of[dtype];
        parallel_for(pool, norm.tasks(), [&](int64_t task) { kernel(call, task); });
        for (int64_t group = 0; group < norm.groups; ++group) {
            float* total = to_scale->typed_data() + group * width;
            for (int64_t k = 0; k < width; ++k) total[k] = 0;
            for (int64_t block = 0; block < blocks; ++block) {
                const float* part = parts.data() + (group * blocks + block) * width;
                for (int64_t k = 0; k < width; ++k) total[k] += part[k];
            }
        }
    });
}

using Activations = Kernel<Activation> Kernels::*;

ffi::Error activation(ffi::ThreadPool pool, Activations which, Array x, Activation call) {
    return with_dtype(x, [&](Dtype dtype) {
        call.x = x.untyped_data();
        call.length = static_cast<int64_t>(x.element_count());
        call.block = BLOCK;
        const auto kernel = (kernels().*which).of[dtype];
        parallel_for(pool, (call.length + BLOCK - 1) / BLOCK, [&](int64_t task) { kernel(call, task); });
    });
}

template <Activations WHICH>
ffi::Error one_forward(ffi::ThreadPool pool, Array x, Result out) {
    return activation(pool, WHICH, x, {nullptr, nullptr, nullptr, 0, 0, out->untyped_data(), nullptr});
}

template <Activations WHICH>
ffi::Error one_backward(ffi::ThreadPool pool, Array x, Array grad, Result to_x) {
    return activation(pool, WHICH, x, {nullptr, nullptr, grad.untyped_data(), 0, 0, to_x->untyped_data(), nullptr});
}

ffi::Error swiglu_forward(ffi::ThreadPool pool, Array gate, Array up, Result out) {
    return activation(pool, &Kernels::swiglu_forward, gate, {nullptr, up.untyped_data(), nullptr, 0, 0, out->untyped_data(), nullptr});
}

ffi::Error swiglu_backward(ffi::ThreadPool pool, Array gate, Array up, Array grad, Result to_gate, Result to_up) {
    return activation(pool, &Kernels::swiglu_backward, gate,
                      {nullptr, up.untyped_data(), grad.untyped_data(), 0, 0, to_gate->untyped_data(), to_up->untyped_data()});
}

}  // namespace

#define CAPIBARA_POOL ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
#define CAPIBARA_NORM CAPIBARA_POOL.Attr<float>("eps")

XLA_FFI_DEFINE_HANDLER_SYMBOL(capibara_rms_norm, rms_norm, CAPIBARA_NORM.Arg<Array>().Arg<Floats>().Ret<Array>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(capibara_residual_rms_norm, residual_rms_norm,
                              CAPIBARA_NORM.Arg<Array>().Arg<Array>().Arg<Floats>().Ret<Array>().Ret<Array>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(capibara_rms_norm_backward, rms_norm_backward,
                              CAPIBARA_NORM.Arg<Array>().Arg<Floats>().Arg<Array>().Arg<Array>().Ret<Array>().Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(capibara_silu_forward, one_forward<&Kernels::silu_forward>, CAPIBARA_POOL.Arg<Array>().Ret<Array>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(capibara_silu_backward, one_backward<&Kernels::silu_backward>,
                              CAPIBARA_POOL.Arg<Array>().Arg<Array>().Ret<Array>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(capibara_gelu_forward, one_forward<&Kernels::gelu_forward>, CAPIBARA_POOL.Arg<Array>().Ret<Array>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(capibara_gelu_backward, one_backward<&Kernels::gelu_backward>,
                              CAPIBARA_POOL.Arg<Array>().Arg<Array>().Ret<Array>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(capibara_swiglu_forward, swiglu_forward, CAPIBARA_POOL.Arg<Array>().Arg<Array>().Ret<Array>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(capibara_swiglu_backward, swiglu_backward,
                              CAPIBARA_POOL.Arg<Array>().Arg<Array>().Arg<Array>().Ret<Array>().Ret<Array>());

}  // namespace capibara
