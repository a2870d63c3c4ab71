// The kernels of one instruction set, as functions to call. A new kernel is a line here and one in kernels.cpp.
#pragma once

#include "calls.hpp"

namespace capibara {

enum Dtype { FLOAT32, BFLOAT16, NUM_DTYPES };
constexpr int INT8 = NUM_DTYPES;  // of weights only

template <class Call>
struct Kernel {
    void (*of[NUM_DTYPES])(const Call&, int64_t task);
};

struct Kernels {
    const char* name;  // of the instruction set
    int64_t (*multiply_adds)(int64_t rounds);
    Kernel<Gram> gram;
    Kernel<WeightedSum> weighted_sum;
    Kernel<SortedMean> sorted_mean;
    Kernel<Moved> moved;
    Kernel<Rounded> rounded;
    Kernel<AttentionForward> attention_forward;
    Kernel<AttentionBackward> attention_backward;
    void (*few_rows[INT8 + 1])(const FewRows&, int64_t task);
};

// The sets that were built and that this machine runs, best first; null behind the last one.
const Kernels* const* usable();

// What runs now: the best set, until `use` names another. `use` is false for a name that is not usable.
const Kernels& kernels();
bool use(const char* name);

}  // namespace capibara
