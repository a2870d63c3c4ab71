// Every kernel for one instruction set: compiled once for each, with its flags and its own namespace CAPIBARA_ISA.
//
// Nothing that other translation units share may be instantiated here (inline functions of the standard library): the
// linker keeps one copy of those, perhaps the one with instructions that another machine lacks.
#include "activation.hpp"
#include "attention_backward.hpp"
#include "cross_entropy.hpp"
#include "few_rows.hpp"
#include "gram.hpp"
#include "norm.hpp"
#include "peak.hpp"
#include "rounded.hpp"
#include "sorted_mean.hpp"
#include "table.hpp"
#include "weighted_sum.hpp"

namespace CAPIBARA_ISA {

#define CAPIBARA_BOTH(kernel) {{kernel<float>, kernel<uint16_t>}}

const capibara::Kernels& table() {
    static constexpr capibara::Kernels found = {
        CAPIBARA_NAME,
        multiply_adds,
        CAPIBARA_BOTH(gram),
        CAPIBARA_BOTH(weighted_sum),
        CAPIBARA_BOTH(sorted_mean),
        CAPIBARA_BOTH(moved),
        CAPIBARA_BOTH(rounded),
        CAPIBARA_BOTH(attention_forward),
        CAPIBARA_BOTH(attention_backward),
        CAPIBARA_BOTH(rms_norm_forward),
        CAPIBARA_BOTH(rms_norm_backward),
        CAPIBARA_BOTH(silu_forward),
        CAPIBARA_BOTH(silu_backward),
        CAPIBARA_BOTH(gelu_forward),
        CAPIBARA_BOTH(gelu_backward),
        CAPIBARA_BOTH(swiglu_forward),
        CAPIBARA_BOTH(swiglu_backward),
        CAPIBARA_BOTH(cross_entropy_begin),
        CAPIBARA_BOTH(cross_entropy_scores),
        CAPIBARA_BOTH(cross_entropy_slopes),
        CAPIBARA_BOTH(cross_entropy_end),
        cross_entropy_merge,
        {few_rows<float>, few_rows<uint16_t>, few_rows<int8_t>},
    };
    return found;
}

}  // namespace CAPIBARA_ISA
