"""Attention: the native kernel where there is one, and the same function in plain JAX where there is none.

    O = softmax(scale · Q Kᵀ, where allowed) V

The native kernel (`src/attention.hpp`) goes tile by tile and keeps nothing of the size T × S; plain JAX makes the whole
matrix of scores. Both sum in float32. Shapes: B sequences, T queries, S keys, N heads, K key/value heads, H head size.
References: Milakov & Gimelshein 2018 (running softmax), Dao et al. 2022 (FlashAttention, algorithm 4).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from capibara.errors import ConfigError
from capibara.kernels.library import native

DTYPES = (jnp.float32, jnp.bfloat16)


class Sight(NamedTuple):
    """Which keys a query sees, apart from segments; hashable, so a jitted program is made for each.

    Attributes:
      causal: Query t sees no key after t + S − T.
      window: And no key before t + S − T − window + 1; 0 is no limit.
      scale: Of the scores.
    """

    causal: bool
    window: int
    scale: float


def fast_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    segment_ids: Any = None,
    bias: Any = None,
    window: int | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Grouped-query attention, differentiable, in memory O(T + S) on a CPU with the native kernels.

    A query that sees no key gives zeros. The last query always stands at the last key: with fewer queries than keys,
    query t is at position t + S − T. The same bits for any number of threads; another instruction set may differ in the
    last ones. A second derivative, a `bias` and another backend than CPU take the plain path, which makes the scores
    [B, N, T, S].

    Cost: 4 · B · N · T · S · H operations forward (half when causal), 10 backward.

    Args:
      q: [B, T, N, H], float32 or bfloat16.
      k: [B, S, K, H], where K divides N: query head i reads key head i · K // N.
      v: [B, S, K, H].
      causal: Whether a query sees no key after its own position.
      segment_ids: int[B, T] where T = S, or a pair int[B, T], int[B, S]: only equal ones see each other.
      bias: Broadcasts to [B, N, T, S] and is added to the scores.
      window: A query sees its own and the window − 1 keys before it (and, if not causal, all after it).
      scale: Of the scores; H^-1/2 by default.

    Returns:
      [B, T, N, H] in the dtype of q.

    Raises:
      ConfigError: If shapes or dtypes do not fit each other.

    Example:
      >>> q = k = v = np.ones((1, 3, 2, 8), np.float32)
      >>> fast_attention(q, k, v, causal=True).shape
      (1, 3, 2, 8)
    """
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    _check(q, k, v, window)
    segments = _segments(segment_ids, q.shape, k.shape)
    sight = Sight(bool(causal), int(window or 0), float(q.shape[-1] ** -0.5 if scale is None else scale))
    if q.size == 0 or k.size == 0:
        return jnp.zeros_like(q)
    if bias is None and native():
        empty = jnp.zeros(0, jnp.int32)
        return _attention(q, k, v, *(segments or (empty, empty)), sight)[0]
    return _plain(q, k, v, segments, bias, sight)


def masked_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, allowed: jax.Array, scale: float | None = None
) -> jax.Array:
    """Plain attention under any mask or bias: `allowed` is bool or a float bias, broadcast to [B, N, T, S].

    The N/K query heads of a group stand below each other, so that keys and values are never repeated and each product
    is one batched dot. Scores and softmax in float32. A row without a True gives the mean of the values.
    """
    B, T, N, H = q.shape
    S, K = k.shape[1], k.shape[2]
    stacked = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B * K, N // K * T, H)
    keys, values = (x.transpose(0, 2, 1, 3).reshape(B * K, S, H) for x in (k, v))
    scores = _batched(stacked, keys, 2).reshape(B, K, N // K, T, S) * (H**-0.5 if scale is None else scale)
    allowed = allowed.reshape((1,) * (4 - allowed.ndim) + allowed.shape)
    grouped = (1, 1) if allowed.shape[1] == 1 else (K, N // K)
    allowed = allowed.reshape(allowed.shape[0], *grouped, *allowed.shape[2:])
    scores = jnp.where(allowed, scores, -1e30) if allowed.dtype == bool else scores + allowed.astype(jnp.float32)
    shares = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    weights = (shares / shares.sum(-1, keepdims=True)).astype(v.dtype)
    mixed = _batched(weights.reshape(B * K, N // K * T, S), values, 1).astype(v.dtype)
    return mixed.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _attended(q, k, v, q_segments, k_segments, sight: Sight) -> Any:
    """Output [B, T, N, H] and log-partition float32[B, N, T]; nothing may be derived from the second."""

    def kernel(*arrays: jax.Array) -> Any:
        shapes = (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(_rows(q), jnp.float32))
        return _call("capibara_attention_forward", shapes, sight)(*arrays)

    def plain(q, k, v, q_segments, k_segments) -> Any:
        return _plain(q, k, v, _given(q_segments, k_segments), None, sight), jnp.zeros(_rows(q), jnp.float32)

    return jax.lax.platform_dependent(q, k, v, q_segments, k_segments, cpu=kernel, default=plain)


def _attention_forward(q, k, v, q_segments, k_segments, sight):
    out, partition = _attention(q, k, v, q_segments, k_segments, sight)
    return (out, partition), (q, k, v, q_segments, k_segments, out, partition)


def _attention_backward(sight, saved, grads):
    return (*_gradients(*saved, grads[0], sight), None, None)


_attention: Any = jax.custom_vjp(_attended, nondiff_argnums=(5,))
_attention.defvjp(_attention_forward, _attention_backward)


def _pulled_back(q, k, v, q_segments, k_segments, out, partition, grad, sight: Sight) -> Any:
    """Of q, k and v."""

    def kernel(*arrays: jax.Array) -> Any:
        shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v))
        return tuple(_call("capibara_attention_backward", shapes, sight)(*arrays))

    def plain(q, k, v, q_segments, k_segments, out, partition, grad) -> Any:
        return _plain_gradients(q, k, v, q_segments, k_segments, grad, sight)

    return jax.lax.platform_dependent(
        q, k, v, q_segments, k_segments, out, partition, grad, cpu=kernel, default=plain
    )


def _gradients_forward(q, k, v, q_segments, k_segments, out, partition, grad, sight):
    found = _gradients(q, k, v, q_segments, k_segments, out, partition, grad, sight)
    return found, (q, k, v, q_segments, k_segments, grad)


def _gradients_backward(sight, saved, pull):
    """`out` and `partition` are functions of q, k and v; what flows through them is counted there."""
    q, k, v, q_segments, k_segments, grad = saved

    def first(q, k, v, grad) -> Any:
        return _plain_gradients(q, k, v, q_segments, k_segments, grad, sight)

    to_q, to_k, to_v, to_grad = jax.vjp(first, q, k, v, grad)[1](pull)
    return to_q, to_k, to_v, None, None, None, None, to_grad


_gradients: Any = jax.custom_vjp(_pulled_back, nondiff_argnums=(8,))
_gradients.defvjp(_gradients_forward, _gradients_backward)


def _plain_gradients(q, k, v, q_segments, k_segments, grad, sight: Sight):
    segments = _given(q_segments, k_segments)
    return jax.vjp(lambda q, k, v: _plain(q, k, v, segments, None, sight), q, k, v)[1](grad)


def _plain(q, k, v, segments: Any, bias: Any, sight: Sight) -> jax.Array:
    T, S = q.shape[1], k.shape[1]
    here, there = jnp.arange(T)[:, None] + S - T, jnp.arange(S)[None, :]
    allowed = jnp.ones((1, 1, T, S), bool)
    if sight.causal:
        allowed &= there <= here
    if sight.window:
        allowed &= there > here - sight.window
    if segments is not None:
        allowed &= (segments[0][:, :, None] == segments[1][:, None, :])[:, None]
    mask = allowed if bias is None else jnp.where(allowed, jnp.asarray(bias, jnp.float32), -1e30)
    mixed = masked_attention(q, k, v, mask, sight.scale)
    return jnp.where(allowed.any(-1)[:, 0, :, None, None], mixed, jnp.zeros((), mixed.dtype))


def _call(name: str, shapes: Any, sight: Sight) -> Any:
    call = jax.ffi.ffi_call(name, shapes, vmap_method="broadcast_all")
    return partial(call, causal=np.bool_(sight.causal), window=np.int64(sight.window), scale=np.float32(sight.scale))


def _rows(q: jax.Array) -> tuple[int, int, int]:
    return q.shape[0], q.shape[2], q.shape[1]


def _given(q_segments: jax.Array, k_segments: jax.Array) -> tuple[jax.Array, jax.Array] | None:
    return (q_segments, k_segments) if q_segments.size else None


def _segments(ids: Any, q: tuple[int, ...], k: tuple[int, ...]) -> tuple[jax.Array, jax.Array] | None:
    if ids is None:
        return None
    pair = tuple(jnp.asarray(part) for part in (ids if isinstance(ids, tuple) else (ids, ids)))
    for part, wanted in zip(pair, (q[:2], k[:2]), strict=True):
        if part.shape != wanted or not jnp.issubdtype(part.dtype, jnp.integer):
            raise ConfigError(
                f"segment_ids are integers of shape {wanted} here; got {part.dtype}{part.shape}. Give (ids of the "
                "queries, ids of the keys) where their lengths differ."
            )
    return pair[0].astype(jnp.int32), pair[1].astype(jnp.int32)


def _check(q: jax.Array, k: jax.Array, v: jax.Array, window: int | None) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ConfigError(
            f"Attention needs q [B, T, N, H] and k and v [B, S, K, H]; got {q.shape}, {k.shape} and {v.shape}."
        )
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ConfigError(f"{q.shape[2]} query heads cannot share {k.shape[2]} key heads evenly; make it a divisor.")
    if not (q.dtype == k.dtype == v.dtype) or q.dtype not in DTYPES:
        raise ConfigError(f"q, k and v are all float32 or all bfloat16; got {q.dtype}, {k.dtype} and {v.dtype}.")
    if window is not None and window < 1:
        raise ConfigError(f"window is 1 or more keys; got {window}. Leave it out for no limit.")


def _batched(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    return jax.lax.dot_general(a, b, (((2,), (axis,)), ((0,), (0,))), preferred_element_type=jnp.float32)
