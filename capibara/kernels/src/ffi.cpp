// Handlers of XLA's foreign function interface. Shapes were checked where the program was traced; dtypes are checked here.
#include "ffi.hpp"

#include <vector>

#include "votes.hpp"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

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

// [..., length, heads, size]: what stands before is one batch.
AttentionArray attention_array(ffi::AnyBuffer array) {
    const auto shape = array.dimensions();
    const size_t rank = shape.size();
    const int64_t size = shape[rank - 1], token = shape[rank - 2] * size;
    return {array.untyped_data(), shape[rank - 3] * token, token, size};
}

AttentionShape attention_shape(ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::Buffer<ffi::S32> q_segments, ffi::Buffer<ffi::S32> k_segments, bool causal,
                               int64_t window, float scale) {
    const auto queries = q.dimensions(), keys = k.dimensions();
    const size_t rank = queries.size();
    int64_t batch = 1;
    for (size_t i = 0; i + 3 < rank; ++i) batch *= queries[i];
    const bool given = q_segments.element_count() > 0;
    return {batch, queries[rank - 3], keys[rank - 3], queries[rank - 2], keys[rank - 2], queries[rank - 1], scale, causal, window,
            given ? q_segments.typed_data() : nullptr, given ? k_segments.typed_data() : nullptr};
}

ffi::Error attention_forward_handler(ffi::ThreadPool pool, bool causal, int64_t window, float scale, ffi::AnyBuffer q, ffi::AnyBuffer k,
                                     ffi::AnyBuffer v, ffi::Buffer<ffi::S32> q_segments, ffi::Buffer<ffi::S32> k_segments,
                                     ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::Buffer<ffi::F32>> partition) {
    Dtype dtype;
    if (ffi::Error error = read_dtype(q, &dtype); error.failure()) return error;
    const AttentionForward call{attention_shape(q, k, q_segments, k_segments, causal, window, scale), attention_array(q), attention_array(k),
                                attention_array(v), attention_array(*out), partition->typed_data()};
    const auto kernel = kernels().attention_forward.of[dtype];
    parallel_for(pool, call.shape.batch * call.shape.heads, [&](int64_t task) { kernel(call, task); });
    return ffi::Error::Success();
}

ffi::Error attention_backward_handler(ffi::ThreadPool pool, bool causal, int64_t window, float scale, ffi::AnyBuffer q, ffi::AnyBuffer k,
                                      ffi::AnyBuffer v, ffi::Buffer<ffi::S32> q_segments, ffi::Buffer<ffi::S32> k_segments, ffi::AnyBuffer out,
                                      ffi::Buffer<ffi::F32> partition, ffi::AnyBuffer grad, ffi::Result<ffi::AnyBuffer> dq,
                                      ffi::Result<ffi::AnyBuffer> dk, ffi::Result<ffi::AnyBuffer> dv) {
    Dtype dtype;
    if (ffi::Error error = read_dtype(q, &dtype); error.failure()) return error;
    const AttentionBackward call{attention_shape(q, k, q_segments, k_segments, causal, window, scale),
                                 attention_array(q),
                                 attention_array(k),
                                 attention_array(v),
                                 attention_array(out),
                                 attention_array(grad),
                                 attention_array(*dq),
                                 attention_array(*dk),
                                 attention_array(*dv),
                                 partition.typed_data()};
    const auto kernel = kernels().attention_backward.of[dtype];
    parallel_for(pool, call.shape.batch * call.shape.kv_heads, [&](int64_t task) { kernel(call, task); });
    return ffi::Error::Success();
}

#define CAPIBARA_ATTENTION \
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<bool>("causal").Attr<int64_t>("window").Attr<float>("scale")

XLA_FFI_DEFINE_HANDLER(call_gram, gram_handler,
                       ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Arg<ffi::Buffer<ffi::F32>>().Ret<ffi::AnyBuffer>());
XLA_FFI_DEFINE_HANDLER(call_weighted_sum, weighted_sum_handler,
                       ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Arg<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::F32>>());
XLA_FFI_DEFINE_HANDLER(call_attention_forward, attention_forward_handler,
                       CAPIBARA_ATTENTION.Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::Buffer<ffi::S32>>()
                           .Arg<ffi::Buffer<ffi::S32>>().Ret<ffi::AnyBuffer>().Ret<ffi::Buffer<ffi::F32>>());
XLA_FFI_DEFINE_HANDLER(call_attention_backward, attention_backward_handler,
                       CAPIBARA_ATTENTION.Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::Buffer<ffi::S32>>()
                           .Arg<ffi::Buffer<ffi::S32>>().Arg<ffi::AnyBuffer>().Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::AnyBuffer>()
                           .Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>());

}  // namespace

const Handler* handlers() {
    static const Handler found[] = {
        {"capibara_gram", reinterpret_cast<void*>(call_gram)},
        {"capibara_weighted_sum", reinterpret_cast<void*>(call_weighted_sum)},
        {"capibara_attention_forward", reinterpret_cast<void*>(call_attention_forward)},
        {"capibara_attention_backward", reinterpret_cast<void*>(call_attention_backward)},
        {"capibara_few_rows", few_rows_function()},
        {nullptr, nullptr},
    };
    return found;
}

}  // namespace capibara
