"""The layers of the decoder, written so that XLA on CPU runs them well and any backend runs them right.

Linear layers take bfloat16 or float32 in and sum in float32 (a dot with another output type falls off the fast path
for weight gradients); norms and activations go through `capibara.kernels` and read what they need once. Shapes: B
sequences, T tokens, D width, N heads, K key/value heads, H head size.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from capibara.kernels.activation import silu as silu
from capibara.kernels.activation import swiglu
from capibara.kernels.attention import fast_attention
from capibara.kernels.few_rows import Matrix, product
from capibara.kernels.matmul import dot
from capibara.kernels.norm import residual_rms_norm
from capibara.kernels.norm import rms_norm as rms_norm
from capibara.kernels.plain_attention import masked_attention
from capibara.kernels.rotary import rotary_angles, rotate


def linear(x: jax.Array, kernel: jax.Array | Matrix) -> jax.Array:
    """x[..., D] @ kernel[D, E] → [..., E] in x's dtype, summed in float32; generation gives a `Matrix`."""
    return product(x, kernel).astype(x.dtype) if isinstance(kernel, Matrix) else _linear(x, kernel)


@jax.custom_vjp
def _linear(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return dot(x, kernel.astype(x.dtype), (x.ndim - 1,), (0,)).astype(x.dtype)


def _linear_forward(x: jax.Array, kernel: jax.Array):
    return _linear(x, kernel), (x, kernel)


def _linear_backward(saved: tuple[jax.Array, jax.Array], grad: jax.Array):
    x, kernel = saved
    rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    to_kernel = dot(rows, grads, (0,), (0,))
    to_x = dot(grad, kernel.astype(grad.dtype), (grad.ndim - 1,), (1,))
    return to_x.astype(x.dtype), to_kernel.astype(kernel.dtype)


_linear.defvjp(_linear_forward, _linear_backward)


def rotary(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotates [B, T, N, H] by position, the two halves of a head as pairs (Su et al. 2021, in the order of Llama)."""
    return rotate(x, *rotary_angles(positions, x.shape[-1], theta))


def attention(query: jax.Array, key: jax.Array, value: jax.Array, allowed: jax.Array, angles: Any = None) -> jax.Array:
    """Grouped-query attention: query [B, T, N, H], key and value [B, S, K, H] → [B, T, N, H]; softmax in float32.

    Args:
      query: See above.
      key: See above.
      value: See above.
      allowed: int[B, T], the documents of a training batch: a token sees itself and what stands before it in its own
        (`causal_segments`), and no mask is made. Or bool[B, T, S], any mask.
      angles: With segments: what query and key are still to be turned by (`rotary_angles`).
    """
    if allowed.ndim == 2:
        return fast_attention(query, key, value, causal=True, segment_ids=allowed, rotary=angles)
    return masked_attention(query, key, value, allowed[:, None])


def causal_segments(segments: jax.Array) -> jax.Array:
    """bool[B, T, T]: a token sees itself and what stands before it in its own document; segment 0 is padding.

    The mask that segments stand for, for blocks that need one.
    """
    T = segments.shape[1]
    causal = jnp.tril(jnp.ones((T, T), bool))
    return causal & (segments[:, :, None] == segments[:, None, :])


class AttentionBlock(nnx.Module):
    """Pre-norm grouped-query attention, then pre-norm SwiGLU; the block kind `attention`.

    A block of another kind has the same `__init__(config, rngs)` and `__call__(x, positions, allowed, cache)`, where
    `allowed` is int[B, T] segments (see `attention`) or in generation a mask bool[B, T, S], and `cache` is None, or
    `(keys, values, length)` of generation; it returns `(x, cache)`. In generation the parameters that `matrices` names
    are `Matrix`, perhaps in int8: those that it hands to `linear` and to nothing else.
    """

    matrices = ("query", "key", "value", "out", "gate", "up", "down")

    def __init__(self, config: Any, rngs: nnx.Rngs):
        D, H, N, K = config.width, config.head_size, config.num_heads, config.kv_heads
        deep = config.init_scale / (2 * config.num_layers) ** 0.5
        self.norm_attention = nnx.Param(jnp.ones(D))
        self.query = _matrix(rngs, (D, N * H), config.init_scale)
        self.key = _matrix(rngs, (D, K * H), config.init_scale)
        self.value = _matrix(rngs, (D, K * H), config.init_scale)
        self.out = _matrix(rngs, (N * H, D), deep)
        self.norm_mlp = nnx.Param(jnp.ones(D))
        self.gate = _matrix(rngs, (D, config.hidden_size), config.init_scale)
        self.up = _matrix(rngs, (D, config.hidden_size), config.init_scale)
        self.down = _matrix(rngs, (config.hidden_size, D), deep)
        self.config = config

    def __call__(self, x: jax.Array, positions: jax.Array, allowed: jax.Array, cache: Any = None):
        """[B, T, D] → [B, T, D], and the cache with this block's keys and values."""
        c = self.config
        B, T, _ = x.shape
        x, y = residual_rms_norm(x, None, self.norm_attention[...], c.norm_eps)
        query = linear(y, self.query[...]).reshape(B, T, c.num_heads, c.head_size)
        key = linear(y, self.key[...]).reshape(B, T, c.kv_heads, c.head_size)
        value = linear(y, self.value[...]).reshape(B, T, c.kv_heads, c.head_size)
        angles = rotary_angles(positions, c.head_size, c.rope_theta) if allowed.ndim == 2 and cache is None else None
        if angles is None:  # with segments, attention turns them as it reads them
            query, key = rotary(query, positions, c.rope_theta), rotary(key, positions, c.rope_theta)
        if cache is not None:
            keys, values, length = cache
            key = jax.lax.dynamic_update_slice(keys, key.astype(keys.dtype), (0, length, 0, 0))
            value = jax.lax.dynamic_update_slice(values, value.astype(values.dtype), (0, length, 0, 0))
            cache = (key, value, length + T)
        mixed = attention(query, key, value, allowed, angles).reshape(B, T, -1)
        x, y = residual_rms_norm(x, linear(mixed, self.out[...]), self.norm_mlp[...], c.norm_eps)
        return x + linear(swiglu(linear(y, self.gate[...]), linear(y, self.up[...])), self.down[...]), cache


def _matrix(rngs: nnx.Rngs, shape: tuple[int, int], scale: float) -> nnx.Param:
    return nnx.Param(scale * jax.random.truncated_normal(rngs.params(), -3.0, 3.0, shape))
