// The handlers of the cross-entropy of a linear head: chunk after chunk, each in parallel over segments of the vocabulary.
#include "parallel.hpp"
#include "table.hpp"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace capibara {
namespace {

struct Plan {  // made in cross_entropy.py, never from the number of threads
    int64_t chunk, tile, segments;
};

int64_t whole(int64_t count, int64_t of) { return (count + of - 1) / of * of; }

ffi::Error run(ffi::ThreadPool& pool, float z_loss, const Plan& plan, const ffi::AnyBuffer& hidden, const ffi::AnyBuffer& head,
               const int32_t* targets, const float* weights, float* losses, float* partition, void* to_hidden, float* to_head,
               float* scratch, int64_t available) {
    const auto dtype_of = [](const ffi::AnyBuffer& array) { return array.element_type() == ffi::BF16 ? BFLOAT16 : FLOAT32; };
    for (const ffi::AnyBuffer* array : {&hidden, &head})
        if (array->element_type() != ffi::BF16 && array->element_type() != ffi::F32)
            return ffi::Error::InvalidArgument("The native kernels take float32 or bfloat16.");
    const Dtype hidden_dtype = dtype_of(hidden), head_dtype = dtype_of(head);
    const int64_t M = hidden.dimensions()[0], D = hidden.dimensions()[1], V = head.dimensions()[0];
    CrossEntropy call{};
    call.head = head.untyped_data();
    call.narrow = hidden_dtype == BFLOAT16 && head_dtype == FLOAT32;
    call.vocabulary = V, call.width = D, call.z_loss = z_loss, call.kept = to_head != nullptr;
    call.tile = plan.tile, call.segments = plan.segments;
    const int64_t chunk = plan.chunk, tiles = (V + call.tile - 1) / call.tile, wide = whole(D, 16), room = whole(chunk, 16);
    float* next = scratch;
    const auto take = [&next](int64_t count) {
        float* found = next;
        next += whole(count, 16);
        return found;
    };
    call.room = room;
    call.hidden_columns = take(D * room), call.hidden_rows = take(room * wide);
    call.places = reinterpret_cast<int32_t*>(take(room)), call.chosen = take(room);
    call.tops = take(tiles * room), call.sums = take(tiles * room);
    call.shares = take((call.kept ? V : call.segments * call.tile) * room);
    call.to_hidden = call.kept ? take(call.segments * room * wide) : nullptr;
    call.to_head = to_head;
    if (next - scratch > available) return ffi::Error::Internal("cross_entropy.py gives too little scratch memory.");
    const Kernels& set = kernels();
    for (int64_t start = 0; start < M; start += chunk) {
        const auto row = [&](const void* array) {
            return static_cast<char*>(const_cast<void*>(array)) + start * D * (hidden_dtype == BFLOAT16 ? 2 : 4);
        };
        call.tokens = M - start < chunk ? M - start : chunk;
        call.first = start == 0;
        call.hidden = row(hidden.untyped_data());
        call.targets = targets + start, call.losses = losses + start, call.partition = partition + start;
        set.cross_entropy_begin.of[hidden_dtype](call, 0);
        parallel_for(pool, call.segments, [&](int64_t task) { set.cross_entropy_scores.of[head_dtype](call, task); });
        set.cross_entropy_merge(call, 0);
        if (!call.kept) continue;
        call.weights = weights + start;
        call.hidden_out = row(to_hidden);
        parallel_for(pool, call.segments, [&](int64_t task) { set.cross_entropy_slopes.of[head_dtype](call, task); });
        set.cross_entropy_end.of[hidden_dtype](call, 0);
    }
    return ffi::Error::Success();
}

using Floats = ffi::Buffer<ffi::F32>;
using Integers = ffi::Buffer<ffi::S32>;

ffi::Error losses_handler(ffi::ThreadPool pool, int64_t chunk, int64_t tile, int64_t segments, ffi::AnyBuffer hidden, ffi::AnyBuffer head, Integers targets,
                          ffi::Result<Floats> losses, ffi::Result<Floats> partition, ffi::Result<Floats> scratch) {
    return run(pool, 0.0f, {chunk, tile, segments}, hidden, head, targets.typed_data(), nullptr, losses->typed_data(), partition->typed_data(), nullptr, nullptr,
               scratch->typed_data(), static_cast<int64_t>(scratch->element_count()));
}

ffi::Error gradients_handler(ffi::ThreadPool pool, float z_loss, int64_t chunk, int64_t tile, int64_t segments, ffi::AnyBuffer hidden,
                             ffi::AnyBuffer head, Integers targets, Floats weights, ffi::Result<Floats> losses, ffi::Result<Floats> partition, ffi::Result<ffi::AnyBuffer> to_hidden,
                             ffi::Result<Floats> to_head, ffi::Result<Floats> scratch) {
    return run(pool, z_loss, {chunk, tile, segments}, hidden, head, targets.typed_data(), weights.typed_data(), losses->typed_data(), partition->typed_data(),
               to_hidden->untyped_data(), to_head->typed_data(), scratch->typed_data(), static_cast<int64_t>(scratch->element_count()));
}

}  // namespace

#define CAPIBARA_PLAN Attr<int64_t>("chunk").Attr<int64_t>("tile").Attr<int64_t>("segments")

XLA_FFI_DEFINE_HANDLER_SYMBOL(capibara_cross_entropy_losses, losses_handler,
                       ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().CAPIBARA_PLAN.Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<Integers>()
                           .Ret<Floats>().Ret<Floats>().Ret<Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(capibara_cross_entropy_gradients, gradients_handler,
                       ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<float>("z_loss").CAPIBARA_PLAN.Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()
                           .Arg<Integers>().Arg<Floats>().Ret<Floats>().Ret<Floats>().Ret<ffi::AnyBuffer>().Ret<Floats>().Ret<Floats>());

}  // namespace capibara
