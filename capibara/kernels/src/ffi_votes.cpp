// Handlers of the vote's kernels. Shapes were checked where the program was traced; dtypes are checked here.
#include <vector>

#include "ffi_dtype.hpp"
#include "votes.hpp"

namespace ffi = xla::ffi;

namespace capibara {
namespace {

std::vector<const void*> rows_of(ffi::AnyBuffer& stack, Dtype dtype) {
    const int64_t n = stack.dimensions()[0], bytes = stack.dimensions()[1] * (dtype == FLOAT32 ? 4 : 2);
    std::vector<const void*> rows(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) rows[i] = static_cast<const char*>(stack.untyped_data()) + i * bytes;
    return rows;
}

ffi::Error gram_call(ffi::ThreadPool pool, ffi::AnyBuffer stack, ffi::Buffer<ffi::F32> weights, ffi::Result<ffi::AnyBuffer> out) {
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

ffi::Error weighted_sum_call(ffi::ThreadPool pool, ffi::AnyBuffer stack, ffi::Buffer<ffi::F32> weights, ffi::Result<ffi::Buffer<ffi::F32>> out) {
    Dtype dtype;
    if (ffi::Error error = read_dtype(stack, &dtype); error.failure()) return error;
    weighted_sum(pool, dtype, rows_of(stack, dtype), weights.typed_data(), stack.dimensions()[1], out->typed_data());
    return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(capibara_gram, gram_call,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Arg<ffi::Buffer<ffi::F32>>().Ret<ffi::AnyBuffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(capibara_weighted_sum, weighted_sum_call,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Arg<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::F32>>());

}  // namespace capibara
