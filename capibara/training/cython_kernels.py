"""The specification's name for the kernels: attention, products and sparse softmax, for arrays in or outside `jit`.

    fast_attention      native C++ on a CPU where it was built (`capibara doctor` says), plain JAX elsewhere
    optimized_matmul    XLA's dot, summed in float32, with bias and activation
    sparse_softmax      plain JAX: masked, top-k, within segments, sparsemax, entmax-1.5

Equivalent to:
    from capibara.kernels.attention import fast_attention
    from capibara.kernels.matmul import optimized_matmul
    from capibara.kernels.softmax import sparse_softmax
"""

from __future__ import annotations

from capibara.kernels.attention import fast_attention
from capibara.kernels.matmul import optimized_matmul
from capibara.kernels.softmax import sparse_softmax

__all__ = ["fast_attention", "optimized_matmul", "sparse_softmax"]
