// Handlers of attention. Shapes were checked where the program was traced; dtypes are checked here.
//
// Arrays may have further axes in front (vmap): an axis is as long as that of the results, or 1 where all share it. So
// nothing is copied for a map over some of the arrays. Empty k and v: q is packed, [..., T, N + 2 K, H].
#include <cstring>
#include <vector>

#include "ffi_dtype.hpp"
#include "parallel.hpp"

namespace ffi = xla::ffi;

namespace capibara {
namespace {

using Dimensions = ffi::Span<const int64_t>;
using Ids = ffi::Buffer<ffi::S32>;
using Floats = ffi::Buffer<ffi::F32>;

// Where each batch begins in an array with the axes `shape`, of which the last `inner` belong to one batch.
std::vector<int64_t> firsts(Dimensions batches, Dimensions shape, size_t inner) {
    int64_t count = 1, stride = 1;
    for (size_t i = 0; i < batches.size(); ++i) count *= batches[i];
    for (size_t i = shape.size() - inner; i < shape.size(); ++i) stride *= shape[i];
    std::vector<int64_t> found(static_cast<size_t>(count), 0);
    int64_t repeat = 1;  // numbers of batches that axes further in make
    for (size_t axis = batches.size(); axis-- > 0;) {
        if (shape[axis] > 1) {
            for (int64_t b = 0; b < count; ++b) found[b] += b / repeat % batches[axis] * stride;
            stride *= shape[axis];
        }
        repeat *= batches[axis];
    }
    return found;
}

// Everything of a call but its results, and what the structs point to.
struct Arguments {
    Dimensions batches;
    std::vector<int64_t> at_q, at_k, at_v, at_query_segments, at_key_segments, at_bias, at_cos, at_sin;
    AttentionArray q, k, v;
    AttentionShape shape{};
    bool packed;

    Arguments(Dimensions result, int64_t kv_heads, bool causal, int64_t window, float scale, ffi::AnyBuffer q_in, ffi::AnyBuffer k_in,
              ffi::AnyBuffer v_in, Ids q_segments, Ids k_segments, ffi::AnyBuffer bias, Floats cos, Floats sin)
        : batches(result.begin(), result.size() - 3), packed(k_in.element_count() == 0) {
        const Dimensions queries = q_in.dimensions(), keys = packed ? queries : k_in.dimensions();
        const size_t rank = queries.size();
        at_q = firsts(batches, queries, 3);
        at_k = firsts(batches, keys, 3);
        at_v = packed ? at_k : firsts(batches, v_in.dimensions(), 3);
        const int64_t size = queries[rank - 1], heads = queries[rank - 2] - (packed ? 2 * kv_heads : 0);
        views(q_in, k_in, v_in, at_q.data(), at_k.data(), at_v.data(), heads, kv_heads, packed, &q, &k, &v);
        shape.batch = static_cast<int64_t>(at_q.size());
        shape.queries = queries[rank - 3], shape.keys = keys[rank - 3];
        shape.heads = heads, shape.kv_heads = kv_heads, shape.size = size;
        shape.scale = scale, shape.causal = causal, shape.window = window;
        if (q_segments.element_count() > 0) {
            at_query_segments = firsts(batches, q_segments.dimensions(), 1);
            at_key_segments = firsts(batches, k_segments.dimensions(), 1);
            shape.query_segments = {q_segments.typed_data(), at_query_segments.data()};
            shape.key_segments = {k_segments.typed_data(), at_key_segments.data()};
        }
        if (bias.element_count() > 0) {
            at_bias = firsts(batches, bias.dimensions(), 3);
            shape.bias = bias_of(bias.untyped_data(), bias.element_type() == ffi::F32, at_bias.data(), bias.dimensions());
        }
        if (cos.element_count() > 0) {
            at_cos = firsts(batches, cos.dimensions(), 2), at_sin = firsts(batches, sin.dimensions(), 2);
            shape.angles = {cos.typed_data(), sin.typed_data(), at_cos.data(), at_sin.data()};
        }
    }
    Arguments(const Arguments&) = delete;

    // Of q, k and v, or of their gradients: three arrays, or three parts of the heads of the first.
    static void views(ffi::AnyBuffer q_in, ffi::AnyBuffer k_in, ffi::AnyBuffer v_in, const int64_t* at_q, const int64_t* at_k, const int64_t* at_v,
                      int64_t heads, int64_t kv_heads, bool packed, AttentionArray* q, AttentionArray* k, AttentionArray* v) {
        const int64_t size = q_in.dimensions()[q_in.dimensions().size() - 1], all = packed ? heads + 2 * kv_heads : heads;
        *q = {q_in.untyped_data(), at_q, all * size, size};
        if (!packed) {
            *k = {k_in.untyped_data(), at_k, kv_heads * size, size};
            *v = {v_in.untyped_data(), at_v, kv_heads * size, size};
            return;
        }
        char* data = static_cast<char*>(q_in.untyped_data());
        const int64_t bytes = size * (q_in.element_type() == ffi::F32 ? 4 : 2);
        *k = {data + heads * bytes, at_q, all * size, size};
        *v = {data + (heads + kv_heads) * bytes, at_q, all * size, size};
    }
    static AttentionBias bias_of(void* data, bool wide, const int64_t* first, Dimensions axes) {
        const size_t rank = axes.size();
        const int64_t heads = axes[rank - 3], queries = axes[rank - 2], keys = axes[rank - 1];
        return {data, wide, first, heads > 1 ? queries * keys : 0, queries > 1 ? keys : 0, keys > 1 ? 1 : 0};
    }
};

AttentionArray whole(void* data, const int64_t* first, Dimensions axes) {
    const int64_t size = axes[axes.size() - 1];
    return {data, first, axes[axes.size() - 2] * size, size};
}

ffi::Error forward(ffi::ThreadPool pool, bool causal, int64_t window, float scale, int64_t kv_heads, ffi::AnyBuffer q, ffi::AnyBuffer k,
                   ffi::AnyBuffer v, Ids q_segments, Ids k_segments, ffi::AnyBuffer bias, Floats cos, Floats sin, ffi::Result<ffi::AnyBuffer> out,
                   ffi::Result<Floats> partition) {
    Dtype dtype;
    if (ffi::Error error = read_dtype(q, &dtype); error.failure()) return error;
    const Arguments given(out->dimensions(), kv_heads, causal, window, scale, q, k, v, q_segments, k_segments, bias, cos, sin);
    const auto at_out = firsts(given.batches, out->dimensions(), 3);
    const AttentionForward call{given.shape, given.q, given.k, given.v, whole(out->untyped_data(), at_out.data(), out->dimensions()),
                                partition->typed_data()};
    const auto kernel = kernels().attention_forward.of[dtype];
    parallel_for(pool, call.shape.batch * call.shape.heads, [&](int64_t task) { kernel(call, task); });
    return ffi::Error::Success();
}

ffi::Error backward(ffi::ThreadPool pool, bool causal, int64_t window, float scale, int64_t kv_heads, ffi::AnyBuffer q, ffi::AnyBuffer k,
                    ffi::AnyBuffer v, Ids q_segments, Ids k_segments, ffi::AnyBuffer bias, Floats cos, Floats sin, ffi::AnyBuffer out,
                    Floats partition, ffi::AnyBuffer grad, ffi::Result<ffi::AnyBuffer> dq, ffi::Result<ffi::AnyBuffer> dk,
                    ffi::Result<ffi::AnyBuffer> dv, ffi::Result<Floats> dbias) {
    Dtype dtype;
    if (ffi::Error error = read_dtype(q, &dtype); error.failure()) return error;
    const Arguments given(dq->dimensions(), kv_heads, causal, window, scale, q, k, v, q_segments, k_segments, bias, cos, sin);
    const AttentionShape& shape = given.shape;
    const auto at_out = firsts(given.batches, out.dimensions(), 3), at_grad = firsts(given.batches, grad.dimensions(), 3);
    const auto at_dq = firsts(given.batches, dq->dimensions(), 3);
    const auto at_dk = given.packed ? at_dq : firsts(given.batches, dk->dimensions(), 3);
    const auto at_dv = given.packed ? at_dq : firsts(given.batches, dv->dimensions(), 3);
    const auto at_partition = firsts(given.batches, partition.dimensions(), 2);
    std::vector<int64_t> at_dbias;
    AttentionBackward call{shape, given.q, given.k, given.v, whole(out.untyped_data(), at_out.data(), out.dimensions()),
                           whole(grad.untyped_data(), at_grad.data(), grad.dimensions()), {}, {}, {},
                           {partition.typed_data(), at_partition.data()}, {}, 1, 1};
    Arguments::views(*dq, *dk, *dv, at_dq.data(), at_dk.data(), at_dv.data(), shape.heads, shape.kv_heads, given.packed, &call.dq, &call.dk, &call.dv);
    if (dbias->element_count() > 0) {
        const auto axes = dbias->dimensions();
        const size_t rank = axes.size();
        std::memset(dbias->untyped_data(), 0, dbias->size_bytes());
        at_dbias = firsts(given.batches, axes, 3);
        call.dbias = Arguments::bias_of(dbias->untyped_data(), true, at_dbias.data(), axes);
        if (axes[rank - 4] == 1) call.batches_together = given.batches[given.batches.size() - 1];
        if (axes[rank - 3] == 1) call.heads_together = shape.kv_heads;
    }
    const auto kernel = kernels().attention_backward.of[dtype];
    const int64_t tasks = shape.batch / call.batches_together * (shape.kv_heads / call.heads_together);
    parallel_for(pool, tasks, [&](int64_t task) { kernel(call, task); });
    return ffi::Error::Success();
}

#define CAPIBARA_ATTENTION                                                                                                          \
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<bool>("causal").Attr<int64_t>("window").Attr<float>("scale").Attr<int64_t>("kv_heads") \
        .Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<Ids>().Arg<Ids>().Arg<ffi::AnyBuffer>().Arg<Floats>().Arg<Floats>()

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(capibara_attention_forward, forward, CAPIBARA_ATTENTION.Ret<ffi::AnyBuffer>().Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(capibara_attention_backward, backward,
                       CAPIBARA_ATTENTION.Arg<ffi::AnyBuffer>().Arg<Floats>().Arg<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>()
                           .Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>().Ret<Floats>());

}  // namespace capibara
