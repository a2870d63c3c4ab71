// All handlers of XLA's foreign function interface, by the names under which the files ffi_*.cpp define them.
#include "ffi.hpp"

#include "xla/ffi/api/ffi.h"

#define CAPIBARA_HANDLERS(each)               \
    each(capibara_gram)                       \
    each(capibara_weighted_sum)               \
    each(capibara_attention_forward)          \
    each(capibara_attention_backward)         \
    each(capibara_rms_norm)                   \
    each(capibara_residual_rms_norm)          \
    each(capibara_rms_norm_backward)          \
    each(capibara_silu_forward)               \
    each(capibara_silu_backward)              \
    each(capibara_gelu_forward)               \
    each(capibara_gelu_backward)              \
    each(capibara_swiglu_forward)             \
    each(capibara_swiglu_backward)            \
    each(capibara_cross_entropy_losses)       \
    each(capibara_cross_entropy_gradients)    \
    each(capibara_few_rows)

#define CAPIBARA_DECLARED(name) XLA_FFI_DECLARE_HANDLER_SYMBOL(name);
CAPIBARA_HANDLERS(CAPIBARA_DECLARED)

namespace capibara {

const Handler* handlers() {
#define CAPIBARA_LISTED(name) {#name, reinterpret_cast<void*>(name)},
    static const Handler found[] = {CAPIBARA_HANDLERS(CAPIBARA_LISTED){nullptr, nullptr}};
    return found;
}

}  // namespace capibara
