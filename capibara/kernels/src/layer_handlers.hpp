// The handlers of ffi_layers.cpp, listed once: `each(name)` for their declarations and for the table in ffi.cpp.
#pragma once

#define CAPIBARA_LAYER_HANDLERS(each) \
    each(capibara_rms_norm) \
    each(capibara_residual_rms_norm) \
    each(capibara_rms_norm_backward) \
    each(capibara_silu_forward) \
    each(capibara_silu_backward) \
    each(capibara_gelu_forward) \
    each(capibara_gelu_backward) \
    each(capibara_swiglu_forward) \
    each(capibara_swiglu_backward)
