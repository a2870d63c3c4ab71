// The dtype of an array of XLA, for the kernels that come in two of them.
#pragma once

#include "table.hpp"
#include "xla/ffi/api/ffi.h"

namespace capibara {

inline xla::ffi::Error read_dtype(const xla::ffi::AnyBuffer& array, Dtype* dtype) {
    using namespace xla::ffi;
    if (array.element_type() == F32) return *dtype = FLOAT32, Error::Success();
    if (array.element_type() == BF16) return *dtype = BFLOAT16, Error::Success();
    return Error::InvalidArgument("The native kernels take float32 or bfloat16.");
}

}  // namespace capibara
