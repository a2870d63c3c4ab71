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
    Kernel<NormForward> rms_norm_forward;
    Kernel<NormBackward> rms_norm_backward;
    Kernel<Activation> silu_forward;
    Kernel<Activation> silu_backward;
    Kernel<Activation> gelu_forward;
    Kernel<Activation> gelu_backward;
    Kernel<Activation> swiglu_forward;
    Kernel<Activation> swiglu_backward;
    Kernel<CrossEntropy> cross_entropy_begin, cross_entropy_scores, cross_entropy_slopes, cross_entropy_end;
    void (*cross_entropy_merge)(const CrossEntropy&, int64_t task);
    void (*few_rows[INT8 + 1])(const FewRows&, int64_t task);
};

// The sets that were built and that this machine runs, best first; null behind the last one.
const Kernels* const* usable();

// What runs now: the best set, until `use` names another. `use` is false for a name that is not usable.
const Kernels& kernels();
bool use(const char* name);

}  // namespace capibara
