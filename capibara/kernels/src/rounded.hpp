// float32 to a row of another dtype.
#pragma once

#include "calls.hpp"
#include "rows.hpp"

namespace CAPIBARA_ISA {

template <class T>
void rounded(const capibara::Rounded& call, int64_t task) {
    const int64_t first = task * call.block, last = call.length - first < call.block ? call.length : first + call.block;
    const float* in = call.in;
    T* out = static_cast<T*>(call.out);
    const bool aligned = reinterpret_cast<uintptr_t>(in) % sizeof(float) == 0 && reinterpret_cast<uintptr_t>(out) % sizeof(T) == 0;
    if (aligned)  // the compiler makes vectors of this loop alone
        for (int64_t k = first; k < last; ++k) from_float(in[k], out + k);
    else
        for (int64_t k = first; k < last; ++k) {
            T x;
            from_float(one(in, k), &x);
            put(out, k, x);
        }
}

}  // namespace CAPIBARA_ISA
