"""RMSNorm, alone and of a sum: native kernels on a CPU, the same formula in plain JAX elsewhere.

    s = x + residual        y = s / √(mean s² + eps) · scale        (Zhang & Sennrich 2019)

Statistics are float32 and y is rounded once. The native kernels (`src/norm.hpp`) read a row once, forward and backward;
what else flows back into s is added in the same pass. Shapes: D width.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from capibara.errors import ConfigError
from capibara.kernels.library import native

DTYPES = (jnp.float32, jnp.bfloat16)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / √(mean x² + eps) · scale over the last axis, differentiable.

    On a CPU with the native kernels the gradient of scale is the same for any number of threads. A second derivative is
    plain JAX. `vmap` runs natively, whether scale is mapped or not.

    Args:
      x: [..., D], float32 or bfloat16; another dtype takes the plain path.
      scale: [D], of any dtype: it is read in float32.
      eps: Added to the mean of the squares.

    Returns:
      [..., D] in the dtype of x.

    Raises:
      ConfigError: If scale has another length than x's last axis.

    Example:
      >>> rms_norm(jnp.array([[2.0, -2.0]]), jnp.array([1.0, 4.0]), 0.0).round(3).tolist()
      [[1.0, -4.0]]
    """
    wide = _checked(x, scale)
    if x.size == 0 or x.dtype not in DTYPES or not native():
        return _plain(x, wide, eps)
    return _norm(float(eps))(x, wide)


def residual_rms_norm(
    x: jax.Array, residual: jax.Array | None, scale: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array]:
    """The sum s = x + residual and `rms_norm(s, scale, eps)`; its gradients need one pass.

    Args:
      x: [..., D], float32 or bfloat16; another dtype takes the plain path.
      residual: Of x's shape and dtype. None: the sum is x itself, for a value that goes past the norm as well.
      scale: [D], of any dtype: it is read in float32.
      eps: Added to the mean of the squares.

    Returns:
      s and y, both [..., D] in the dtype of x; y is that of the rounded s.

    Raises:
      ConfigError: If shapes or dtypes do not fit each other.

    Example:
      >>> s, y = residual_rms_norm(jnp.array([1.0, -3.0]), jnp.array([1.0, 1.0]), jnp.ones(2), 0.0)
      >>> s.tolist(), y.round(3).tolist()
      ([2.0, -2.0], [1.0, -1.0])
    """
    wide = _checked(x, scale)
    if residual is not None and (x.shape != residual.shape or x.dtype != residual.dtype):
        raise ConfigError(
            f"x and residual have one shape and dtype; got {x.dtype}{list(x.shape)} and "
            f"{residual.dtype}{list(residual.shape)}."
        )
    if x.size == 0 or x.dtype not in DTYPES or not native():
        total = x if residual is None else x + residual
        return total, _plain(total, wide, eps)
    return _kept(float(eps))(x, wide) if residual is None else _summed(float(eps))(x, residual, wide)


@lru_cache(64)
def _norm(eps: float) -> Any:
    norm = jax.custom_vjp(partial(_forward, eps))
    norm.defvjp(lambda x, scale: (norm(x, scale), (x, scale)), lambda saved, grad: _gradients(eps)(*saved, grad, None))
    return norm


@lru_cache(64)
def _kept(eps: float) -> Any:
    """x and its norm, so that the backward pass adds what flows into both."""
    kept = jax.custom_vjp(lambda x, scale: (x, _forward(eps, x, scale)))
    kept.defvjp(
        lambda x, scale: (kept(x, scale), (x, scale)),
        lambda saved, grads: _gradients(eps)(*saved, grads[1], grads[0]),
    )
    return kept


@lru_cache(64)
def _summed(eps: float) -> Any:
    summed = jax.custom_vjp(partial(_sum_and_norm, eps))

    def forward(x, residual, scale):
        total, y = summed(x, residual, scale)
        return (total, y), (total, scale)  # total is a function of x and residual; what flows through it counts there

    def backward(saved, grads):
        to_sum, to_scale = _gradients(eps)(*saved, grads[1], grads[0])
        return to_sum, to_sum, to_scale

    summed.defvjp(forward, backward)
    return summed


@lru_cache(64)
def _gradients(eps: float) -> Any:
    """Of s and scale: through the norm from `grad`, and into s what stands `beside` it, which may be None."""

    def first(s, scale, grad, beside):
        arrays = s, scale, grad, jnp.zeros(0, s.dtype) if beside is None else beside
        return jax.lax.platform_dependent(
            *arrays, cpu=partial(_backward_call, eps), default=partial(_plain_gradients, eps)
        )

    def second(saved, pull):
        s, scale, grad, beside = saved
        if beside is not None:
            return jax.vjp(partial(_plain_gradients, eps), s, scale, grad, beside)[1](pull)
        alone = partial(_plain_gradients, eps, beside=jnp.zeros(0, s.dtype))
        return (*jax.vjp(alone, s, scale, grad)[1](pull), None)

    gradients = jax.custom_vjp(first)
    gradients.defvjp(lambda *arrays: (gradients(*arrays), arrays), second)
    return gradients


def _forward(eps: float, x: jax.Array, scale: jax.Array) -> jax.Array:
    call = _call("capibara_rms_norm", jax.ShapeDtypeStruct(x.shape, x.dtype), eps)
    return jax.lax.platform_dependent(x, scale, cpu=call, default=lambda x, scale: _plain(x, scale, eps))


def _sum_and_norm(eps: float, x: jax.Array, residual: jax.Array, scale: jax.Array) -> Any:
    def plain(x, residual, scale) -> Any:
        total = x + residual
        return total, _plain(total, scale, eps)

    call = _call("capibara_residual_rms_norm", (jax.ShapeDtypeStruct(x.shape, x.dtype),) * 2, eps)
    return jax.lax.platform_dependent(x, residual, scale, cpu=lambda *arrays: tuple(call(*arrays)), default=plain)


def _backward_call(eps: float, s, scale, grad, beside) -> Any:
    shapes = tuple(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (s, scale))
    return tuple(_call("capibara_rms_norm_backward", shapes, eps)(s, scale, grad, beside))


def _plain_gradients(eps: float, s, scale, grad, beside) -> Any:
    to_s, to_scale = jax.vjp(lambda s, scale: _plain(s, scale, eps), s, scale)[1](grad)
    return to_s + beside if beside.size else to_s, to_scale


def _plain(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    wide = x.astype(jnp.float32)
    mean = jnp.einsum("...d,...d->...", wide, wide)[..., None] / x.shape[-1]
    return (wide * jax.lax.rsqrt(mean + eps) * scale).astype(x.dtype)


def _call(name: str, shapes: Any, eps: float) -> Any:
    return partial(jax.ffi.ffi_call(name, shapes, vmap_method="broadcast_all"), eps=np.float32(eps))


def _checked(x: jax.Array, scale: jax.Array) -> jax.Array:
    """The scale in float32."""
    if x.ndim == 0 or scale.shape != x.shape[-1:]:
        raise ConfigError(
            f"scale has one number for each of the last axis of x{list(x.shape)}; got {list(scale.shape)}."
        )
    return scale.astype(jnp.float32)
