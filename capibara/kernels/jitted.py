"""Gram matrix and weighted sum of stacked rows inside jitted code: XLA calls the kernel; elsewhere plain JAX runs."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from capibara.errors import ConfigError
from capibara.kernels.library import native


def gram(stack: jax.Array, weights: jax.Array) -> jax.Array:
    """Inner products of the rows of float32[n, d] or bfloat16[n, d]; rows of weight 0 are not read on a CPU.

    The native kernel sums in float64. Plain JAX without `jax_enable_x64` sums in float32.

    Returns:
      [n, n] in float64 under `jax_enable_x64`, else the float64 result rounded once to float32. Not differentiable.
    """
    _check(stack, weights)
    wide = jax.dtypes.canonicalize_dtype("float64")
    n = stack.shape[0]

    def kernel(stack, weights):
        shape = jax.ShapeDtypeStruct((n, n), wide)
        return jax.ffi.ffi_call("capibara_gram", shape, vmap_method="sequential")(stack, weights.astype(jnp.float32))

    def plain(stack, weights):
        rows = jnp.where(weights[:, None] != 0, stack.astype(wide), 0)
        return jnp.einsum("id,jd->ij", rows, rows, precision="highest")

    return _on_cpu(kernel, plain, stack, weights)


def weighted_sum(stack: jax.Array, weights: jax.Array) -> jax.Array:
    """Σ weights[i] · stack[i] in float32[d], of float32[n, d] or bfloat16[n, d].

    Rows of weight 0 are not read on a CPU. The native kernel sums in float64 and rounds once, plain JAX sums in
    float32. Not differentiable.
    """
    _check(stack, weights)

    def kernel(stack, weights):
        shape = jax.ShapeDtypeStruct(stack.shape[1:], jnp.float32)
        call = jax.ffi.ffi_call("capibara_weighted_sum", shape, vmap_method="sequential")
        return call(stack, weights.astype(jnp.float32))

    def plain(stack, weights):
        rows = jnp.where(weights[:, None] != 0, stack.astype(jnp.float32), 0)
        return jnp.einsum("i,id->d", weights.astype(jnp.float32), rows, precision="highest")

    return _on_cpu(kernel, plain, stack, weights)


def _on_cpu(kernel, plain, stack: jax.Array, weights: jax.Array) -> jax.Array:
    if not native():
        return plain(stack, weights)
    return jax.lax.platform_dependent(stack, weights, cpu=kernel, default=plain)


def _check(stack: jax.Array, weights: jax.Array) -> None:
    if stack.ndim != 2 or weights.shape != stack.shape[:1] or stack.dtype not in (jnp.float32, jnp.bfloat16):
        raise ConfigError(
            f"Rows are float32[n, d] or bfloat16[n, d] with weights [n]; got {stack.dtype}{list(stack.shape)} and "
            f"{list(weights.shape)}. Flatten and cast them first."
        )
