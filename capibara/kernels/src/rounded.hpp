// float32 to a row of another dtype.
#pragma once

#include "calls.hpp"
#include "rows.hpp"

namespace CAPIBARA_ISA {

template <class T>
void rounded(const capibara::Rounded& call, int64_t task) {
    const int64_t first = task * call.block, last = call.length - first < call.block ? call.length : first + call.block;
    T* out = static_cast<T*>(call.out);
    for (int64_t k = first; k < last; ++k) {
        T x;
        from_float(one(call.in, k), &x);
        put(out, k, x);
    }
}

}  // namespace CAPIBARA_ISA
