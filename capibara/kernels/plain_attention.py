"""Attention in plain JAX, with all scores at once: the reference of the kernels, and what runs where there are none.

Shapes: B sequences, T queries, S keys, N heads, K key/value heads, H head size.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from capibara.kernels.rotary import rotate


class Sight(NamedTuple):
    """What is fixed of a call; hashable, so a jitted program is made for each.

    Attributes:
      causal: Query t sees no key after t + S − T.
      window: And no key before t + S − T − window + 1; 0 is no limit.
      scale: Of the scores.
      kv_heads: K.
      self_segments: Whether the segments of queries and keys are the same, so that with T = S each sees its own key.
    """

    causal: bool
    window: int
    scale: float
    kv_heads: int
    self_segments: bool = False


class Arrays(NamedTuple):
    """What goes in; None where it is not given.

    Attributes:
      q: [B, T, N, H]; or packed, [B, T, N + 2K, H], the heads of q, k and v in this order, where k and v are None.
      k: [B, S, K, H].
      v: [B, S, K, H].
      q_segments: int32[B, T].
      k_segments: int32[B, S].
      bias: Four axes, each that of [B, N, T, S] or 1; float32 or the dtype of q.
      cos: float32[B or 1, S, H / 2], angles of RoPE at the keys; a query stands at a key.
      sin: The same.
    """

    q: jax.Array
    k: jax.Array | None = None
    v: jax.Array | None = None
    q_segments: jax.Array | None = None
    k_segments: jax.Array | None = None
    bias: jax.Array | None = None
    cos: jax.Array | None = None
    sin: jax.Array | None = None


def plain_attention(arrays: Arrays, sight: Sight) -> jax.Array:
    """[B, T, N, H], zeros for a query that sees nothing; see `fast_attention`.

    A number that is not finite reaches the queries that see its key, all of whose row is NaN, and no other: it is 0 in
    the products (0 · NaN would be NaN), and the rows are marked afterwards. No gradient comes back through such a row.
    Turned queries and keys are rounded to their dtype; the kernel keeps them in float32.
    """
    q, k, v = turned(unpacked(arrays, sight))
    seen = visible(arrays, q.shape[1], k.shape[1], sight)
    finite_q, finite_k, finite_v = (jnp.isfinite(x) for x in (q, k, v))
    q, k, v = (jnp.where(jnp.isfinite(x), x, jnp.zeros((), x.dtype)) for x in (q, k, v))
    mixed = masked_attention(q, k, v, seen, sight.scale, arrays.bias)
    broken_keys = ~(finite_k.all(-1) & finite_v.all(-1)).swapaxes(1, 2)[:, :, None, None]
    of_head = seen[:, :, None] if seen.shape[1] == 1 else seen.reshape(seen.shape[0], k.shape[2], -1, *seen.shape[2:])
    broken = (of_head & broken_keys).any(-1)
    broken = jnp.broadcast_to(broken, (q.shape[0], k.shape[2], q.shape[2] // k.shape[2], q.shape[1]))
    broken = broken.reshape(q.shape[0], q.shape[2], q.shape[1]).swapaxes(1, 2) | ~finite_q.all(-1)
    seeing = seen.any(-1).swapaxes(1, 2)[..., None]
    mixed = jnp.where(broken[..., None], jnp.full((), jnp.nan, mixed.dtype), mixed)
    return jnp.where(seeing, mixed, jnp.zeros((), mixed.dtype))


def masked_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    allowed: jax.Array,
    scale: float | None = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Plain attention under any mask: `allowed` is bool and broadcasts to [B, N, T, S], as does a bias of the scores.

    The N/K query heads of a group stand below each other, so that keys and values are never repeated and each product
    is one batched dot. Scores and softmax in float32. A row without a True gives zeros.
    """
    B, T, N, H = q.shape
    S, K = k.shape[1], k.shape[2]

    def grouped(x: jax.Array) -> jax.Array:
        x = x.reshape((1,) * (4 - x.ndim) + x.shape)
        return x.reshape(x.shape[0], *((1, 1) if x.shape[1] == 1 else (K, N // K)), *x.shape[2:])

    stacked = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B * K, N // K * T, H)
    keys, values = (x.transpose(0, 2, 1, 3).reshape(B * K, S, H) for x in (k, v))
    scores = _batched(stacked, keys, 2).reshape(B, K, N // K, T, S) * (H**-0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + grouped(bias).astype(jnp.float32)
    scores = jnp.where(grouped(allowed), scores, -jnp.inf)  # no bias is lower
    highest = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    shares = jnp.exp(scores - jnp.where(highest == -jnp.inf, 0, highest))
    total = shares.sum(-1, keepdims=True)
    weights = (shares / jnp.where(total == 0, 1, total)).astype(v.dtype)
    mixed = _batched(weights.reshape(B * K, N // K * T, S), values, 1).astype(v.dtype)
    return mixed.reshape(B, K, N // K, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def unpacked(arrays: Arrays, sight: Sight) -> Arrays:
    """The same with q, k and v apart."""
    if arrays.k is not None:
        return arrays
    heads = arrays.q.shape[2] - 2 * sight.kv_heads
    q, k, v = jnp.split(arrays.q, (heads, heads + sight.kv_heads), axis=2)
    return arrays._replace(q=q, k=k, v=v)


def turned(arrays: Arrays) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q, k and v, the first two turned by the angles, if there are any."""
    q, k, v, cos, sin = arrays.q, arrays.k, arrays.v, arrays.cos, arrays.sin
    assert k is not None and v is not None
    if cos is None or sin is None:
        return q, k, v
    T = q.shape[1]
    return rotate(q, cos[:, cos.shape[1] - T :], sin[:, sin.shape[1] - T :]), rotate(k, cos, sin), v


def visible(arrays: Arrays, T: int, S: int, sight: Sight) -> jax.Array:
    """bool, four axes, each that of [B, N, T, S] or 1: which keys a query sees by position, segment and bias."""
    here, there = jnp.arange(T)[:, None] + S - T, jnp.arange(S)[None, :]
    seen = jnp.ones((1, 1, T, S), bool)
    if sight.causal:
        seen &= there <= here
    if sight.window:
        seen &= there > here - sight.window
    if arrays.q_segments is not None and arrays.k_segments is not None:
        seen &= (arrays.q_segments[:, :, None] == arrays.k_segments[:, None, :])[:, None]
    if arrays.bias is not None:
        seen &= arrays.bias != -jnp.inf
    return seen


def _batched(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    return jax.lax.dot_general(a, b, (((2,), (axis,)), ((0,), (0,))), preferred_element_type=jnp.float32)
