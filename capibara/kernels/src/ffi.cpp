// Handlers of XLA's foreign function interface. Shapes were checked where the program was traced; dtypes are checked here.
#include "ffi.hpp"

#include <vector>

#include "layer_handlers.hpp"
#include "ffi_attention.hpp"
#include "votes.hpp"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

#define CAPIBARA_DECLARED(name) XLA_FFI_DECLARE_HANDLER_SYMBOL(name);
CAPIBARA_LAYER_HANDLERS(CAPIBARA_DECLARED)

namespace capibara {
namespace {

ffi::Error read_dtype(const ffi::AnyBuffer& array, Dtype* dtype) {
    if (array.element_type() == ffi::F32) return *dtype = FLOAT32, ffi::Error::Success();
    if (array.element_type() == ffi::BF16) return *dtype = BFLOAT16, ffi::Error::Success();
    return ffi::Error::InvalidArgument("The native kernels take float32 or bfloat16.");
}

std::vector<const void*> rows_of(ffi::AnyBuffer& stack, Dtype dtype) {
    const int64_t n = stack.dimensions()[0], bytes = stack.dimensions()[1] * (dtype == FLOAT32 ? 4 : 2);
    std::vector<const void*> rows(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) rows[i] = static_cast<const char*>(stack.untyped_data()) + i * bytes;
    return rows;
}

ffi::Error gram_handler(ffi::ThreadPool pool, ffi::AnyBuffer stack, ffi::Buffer<ffi::F32> weights, ffi::Result<ffi::AnyBuffer> out) {
    Dtype dtype;
    if (ffi::Error error = read_dtype(stack, &dtype); error.failure()) return error;
    const int64_t n = stack.dimensions()[0];
    std::vector<double> found(static_cast<size_t>(n * n));
    gram(pool, dtype, rows_of(stack, dtype), weights.typed_data(), nullptr, false, stack.dimensions()[1], found.data());
    const bool is_double = out->element_type() == ffi::F64;
    for (int64_t i = 0; i < n * n; ++i)
        if (is_double) static_cast<double*>(out->untyped_data())[i] = found[i];
        else static_cast<float*>(out->untyped_data())[i] = static_cast<float>(found[i]);
    return ffi::Error::Success();
}

ffi::Error weighted_sum_handler(ffi::ThreadPool pool, ffi::AnyBuffer stack, ffi::Buffer<ffi::F32> weights, ffi::Result<ffi::Buffer<ffi::F32>> out) {
    Dtype dtype;
    if (ffi::Error error = read_dtype(stack, &dtype); error.failure()) return error;
    weighted_sum(pool, dtype, rows_of(stack, dtype), weights.typed_data(), stack.dimensions()[1], out->typed_data());
    return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER(call_gram, gram_handler,
                       ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Arg<ffi::Buffer<ffi::F32>>().Ret<ffi::AnyBuffer>());
XLA_FFI_DEFINE_HANDLER(call_weighted_sum, weighted_sum_handler,
                       ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Arg<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::F32>>());

}  // namespace

const Handler* handlers() {
    static const Handler found[] = {
        {"capibara_gram", reinterpret_cast<void*>(call_gram)},
        {"capibara_weighted_sum", reinterpret_cast<void*>(call_weighted_sum)},
        {"capibara_attention_forward", attention_forward_call()},
        {"capibara_attention_backward", attention_backward_call()},
#define CAPIBARA_LISTED(name) {#name, reinterpret_cast<void*>(name)},
        CAPIBARA_LAYER_HANDLERS(CAPIBARA_LISTED)
        {"capibara_cross_entropy_losses", cross_entropy_losses_function()},
        {"capibara_cross_entropy_gradients", cross_entropy_gradients_function()},
        {nullptr, nullptr},
    };
    return found;
}

}  // namespace capibara
