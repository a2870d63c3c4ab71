// Every kernel for one instruction set: compiled once for each, with its flags and its own namespace CAPIBARA_ISA.
//
// Nothing that other translation units share may be instantiated here (inline functions of the standard library): the
// linker keeps one copy of those, perhaps the one with instructions that another machine lacks.
#include "attention.hpp"
#include "few_rows.hpp"
#include "gram.hpp"
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
        {few_rows<float>, few_rows<uint16_t>, few_rows<int8_t>},
    };
    return found;
}

}  // namespace CAPIBARA_ISA
