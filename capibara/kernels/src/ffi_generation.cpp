// Handlers of XLA's foreign function interface for the kernels of generation.
#include "parallel.hpp"
#include "table.hpp"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace capibara {
namespace {

// Columns of a task: a multiple of 128, and at least 128 KB of the matrix, so that handing it to a thread pays.
int64_t few_rows_block(int64_t inner, int64_t bytes) {
    const int64_t columns = (int64_t{1} << 17) / (inner * bytes + 1) + 1;
    return (columns + 127) / 128 * 128;
}

ffi::Error few_rows_handler(ffi::ThreadPool pool, bool by_columns, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer w, ffi::Buffer<ffi::F32> scale,
                            ffi::Result<ffi::Buffer<ffi::F32>> out) {
    int type, bytes;
    switch (w.element_type()) {
        case ffi::F32: type = FLOAT32, bytes = 4; break;
        case ffi::BF16: type = BFLOAT16, bytes = 2; break;
        case ffi::S8: type = INT8, bytes = 1; break;
        default: return ffi::Error::InvalidArgument("The matrix is float32, bfloat16 or int8.");
    }
    const int64_t rows = x.dimensions()[0], inner = x.dimensions()[1], columns = out->dimensions()[1];
    const int64_t block = few_rows_block(inner, bytes);
    const FewRows call{x.typed_data(), w.untyped_data(), scale.element_count() ? scale.typed_data() : nullptr, rows, inner, columns, block, by_columns,
                       out->typed_data()};
    const auto kernel = kernels().few_rows[type];
    parallel_for(pool, rows ? (columns + block - 1) / block : 0, [&](int64_t task) { kernel(call, task); });
    return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(capibara_few_rows, few_rows_handler,
                       ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<bool>("by_columns").Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::AnyBuffer>()
                           .Arg<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::F32>>());

}  // namespace capibara
