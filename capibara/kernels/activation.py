"""Activations with a gate: native kernels on a CPU, the same formulas in plain JAX elsewhere.

    silu(x) = x · σ(x)        gelu(x) = x · σ(2 √(2/π) (x + 0.044715 x³))        swiglu(gate, up) = silu(gate) · up

The GELU is the tanh form: (1 + tanh(z/2)) / 2 = σ(z). The native kernels (`src/activation.hpp`) compute in float32 and
round once; they are elementwise, so nothing depends on threads. References: Hendrycks & Gimpel 2016, Elfwing et al.
2017, Shazeer 2020.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from capibara.errors import ConfigError
from capibara.kernels.library import native

DTYPES = (jnp.float32, jnp.bfloat16)


def silu(x: jax.Array) -> jax.Array:
    """x · σ(x), differentiable; NaN at −∞, as the product is.

    Example:
      >>> silu(jnp.array([0.0, 20.0])).tolist()
      [0.0, 20.0]
    """
    return (_silu if _may_call(x) else _plain_silu)(x)


def gelu(x: jax.Array) -> jax.Array:
    """x · σ(2 √(2/π) (x + 0.044715 x³)), the tanh form of x · Φ(x), differentiable; NaN at −∞, as the product is.

    Native in bfloat16 only: in float32 XLA's tanh is as fast (`benchmarks/layers.py`).

    Example:
      >>> gelu(jnp.array([0.0, 20.0])).tolist()
      [0.0, 20.0]
    """
    return (_gelu if x.dtype == jnp.bfloat16 and _may_call(x) else _plain_gelu)(x)


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) · up, differentiable: both gradients need one pass and one exponential a number.

    Args:
      gate: Of any shape, float32 or bfloat16; another dtype takes the plain path.
      up: Of gate's shape and dtype.

    Returns:
      An array like gate.

    Raises:
      ConfigError: If they differ in shape or dtype.

    Example:
      >>> swiglu(jnp.array([20.0]), jnp.array([0.5])).tolist()
      [10.0]
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ConfigError(
            f"gate and up have one shape and dtype; got {gate.dtype}{list(gate.shape)} and {up.dtype}{list(up.shape)}."
        )
    return (_swiglu if _may_call(gate) else _plain_swiglu)(gate, up)


def _may_call(x: jax.Array) -> bool:
    return x.size > 0 and x.dtype in DTYPES and native()


@jax.custom_vjp
def _plain_silu(x: jax.Array) -> jax.Array:
    return x * jax.nn.sigmoid(x)


def _plain_silu_backward(x: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    gate = jax.nn.sigmoid(x)
    return (grad * gate * (1 + x * (1 - gate)),)


_plain_silu.defvjp(lambda x: (_plain_silu(x), x), _plain_silu_backward)


def _plain_gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


def _plain_swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    return _plain_silu(gate) * up


def _with_kernels(name: str, plain: Callable[..., jax.Array]) -> Any:
    """`plain` with the kernels `capibara_{name}_forward` and `_backward` on a CPU; second derivatives are plain."""

    def call(*arrays: jax.Array) -> jax.Array:
        kernel = jax.ffi.ffi_call(f"capibara_{name}_forward", _like(arrays[0]), vmap_method="broadcast_all")
        return jax.lax.platform_dependent(*arrays, cpu=kernel, default=plain)

    def pulled_back(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        def kernel(*arrays: jax.Array) -> tuple[jax.Array, ...]:
            shapes = tuple(_like(x) for x in arrays[:-1])
            return tuple(jax.ffi.ffi_call(f"capibara_{name}_backward", shapes, vmap_method="broadcast_all")(*arrays))

        return jax.lax.platform_dependent(*arrays, cpu=kernel, default=plain_gradients)

    def plain_gradients(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        *given, grad = arrays
        return jax.vjp(plain, *given)[1](grad)

    gradients = jax.custom_vjp(pulled_back)
    gradients.defvjp(
        lambda *arrays: (gradients(*arrays), arrays), lambda arrays, pull: jax.vjp(plain_gradients, *arrays)[1](pull)
    )
    function = jax.custom_vjp(call)
    function.defvjp(lambda *arrays: (function(*arrays), arrays), lambda arrays, grad: gradients(*arrays, grad))
    return function


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


_silu = _with_kernels("silu", _plain_silu)
_gelu = _with_kernels("gelu", _plain_gelu)
_swiglu = _with_kernels("swiglu", _plain_swiglu)
