"""A product with what usually stands beside it: transposes, a bias, an activation, another dtype of the result.

Sums are float32 whatever comes in, and the bias and the activation are applied before the result is rounded. The dot
is XLA's: on CPU its float32 dot reaches about 90 % of a core's peak, which leaves a kernel of our own nothing to win.

bfloat16 on an x86 processor without a fast instruction for it is widened to float32 first: the same products, summed in
float32 as before. `benchmarks/bfloat16.py` measures both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from capibara.errors import ConfigError, unknown_name

ROWS_TO_WIDEN = 128
"""Of a product: with fewer, as in generation, reading b twice costs more than the faster instruction saves."""

ACTIVATIONS = {"relu": jax.nn.relu, "gelu": jax.nn.gelu, "silu": jax.nn.silu}


def dot(a: jax.Array, b: jax.Array, of_a: Sequence[int], of_b: Sequence[int]) -> jax.Array:
    """Sums over axes `of_a` of a and `of_b` of b, in float32: the other axes of a, then those of b.

    Args:
      a: float32 or bfloat16.
      b: Of a's dtype.
      of_a: Axes that are summed over.
      of_b: Those of b that they meet.
    """

    def plain(a: jax.Array, b: jax.Array) -> jax.Array:
        axes = ((tuple(of_a), tuple(of_b)), ((), ()))
        return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)

    rows = math.prod(a.shape) // max(1, math.prod(a.shape[axis] for axis in of_a))
    if a.dtype != jnp.bfloat16 or rows < ROWS_TO_WIDEN or not widens():
        return plain(a, b)
    return jax.lax.platform_dependent(
        a, b, cpu=lambda a, b: plain(a.astype(jnp.float32), b.astype(jnp.float32)), default=plain
    )


@lru_cache(maxsize=1)
def widens() -> bool:
    """Whether this processor multiplies bfloat16 faster after widening it: x86 without AMX, and not AMD's AVX-512."""
    path = Path("/proc/cpuinfo")
    words = set(path.read_text().split("\n\n")[0].split()) if path.exists() else set[str]()
    return "avx2" in words and "amx_bf16" not in words and not {"AuthenticAMD", "avx512_bf16"} <= words


def optimized_matmul(
    a: Any,
    b: Any,
    *,
    transpose: tuple[bool, bool] = (False, False),
    bias: Any = None,
    activation: str | None = None,
    out_dtype: Any = None,
) -> jax.Array:
    """activation(a · b + bias), summed in float32; differentiable.

    Cost: 2 · M · K · N operations for each leading index of a.

    Args:
      a: [..., M, K], float32 or bfloat16; [..., K, M] where its transpose is taken.
      b: [K, N] of the same dtype; [N, K] where its transpose is taken. Or a `Matrix`, int8 perhaps, which says itself
        how it stands; then nothing is differentiable and a is not transposed.
      transpose: Whether to take a's and b's transpose.
      bias: [N].
      activation: `relu`, `gelu` (tanh form) or `silu`.
      out_dtype: Of the result; a's by default.

    Returns:
      [..., M, N].

    Raises:
      ConfigError: If shapes or dtypes do not fit, or the activation is unknown.

    Example:
      >>> optimized_matmul([[1.0, 2.0]], [[3.0], [4.0]], bias=[1.0]).tolist()
      [[12.0]]
    """
    from capibara.kernels.few_rows import Matrix
    from capibara.kernels.int8 import int8_matmul

    a = jnp.asarray(a)
    if isinstance(b, Matrix):
        if any(transpose):
            raise ConfigError("A Matrix says itself how it stands, and a is [..., M, K]: leave `transpose` out.")
        return _finished(int8_matmul(a, b), bias, activation, out_dtype or a.dtype)
    b = jnp.asarray(b)
    if a.dtype != b.dtype or a.dtype not in (jnp.float32, jnp.bfloat16):
        raise ConfigError(f"a and b are both float32 or both bfloat16; got {a.dtype} and {b.dtype}.")
    if a.ndim < 2 or b.ndim != 2 or a.shape[-2 if transpose[0] else -1] != b.shape[1 if transpose[1] else 0]:
        raise ConfigError(
            f"a [..., M, K] and b [K, N] do not fit: got {a.shape} and {b.shape} with transpose={tuple(transpose)}."
        )
    found = dot(a, b, (a.ndim - 2 if transpose[0] else a.ndim - 1,), (1 if transpose[1] else 0,))
    return _finished(found, bias, activation, out_dtype or a.dtype)


def _finished(found: jax.Array, bias: Any, activation: str | None, dtype: Any) -> jax.Array:
    if activation is not None and activation not in ACTIVATIONS:
        raise ConfigError(unknown_name("activation", activation, ACTIVATIONS))
    columns = found.shape[-1]
    if bias is not None and np.shape(bias) != (columns,):
        raise ConfigError(f"bias has one number for each of the {columns} columns; got shape {np.shape(bias)}.")
    if bias is not None:
        found = found + jnp.asarray(bias, jnp.float32)
    if activation is not None:
        found = ACTIVATIONS[activation](found)
    return found.astype(dtype)
