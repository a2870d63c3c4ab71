"""Softmax over some of the numbers of a row: masked, the largest k, within segments; and the sparse ones.

    softmax   pᵢ ∝ exp xᵢ              sparsemax   p = max(x − τ, 0)              Martins & Astudillo 2016
                                       entmax15    p = max(x/2 − τ, 0)²           Peters et al. 2019

τ makes the row sum to 1 and is found exactly, by sorting. All gradients are exact; what is left out gets none.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from capibara.errors import ConfigError, unknown_name

NEVER = -jnp.inf


def sparse_softmax(
    x: Any, *, mask: Any = None, top_k: int | None = None, segments: Any = None, kind: str = "softmax"
) -> jax.Array:
    """Probabilities along the last axis, zero where a number takes no part.

    A row (or segment) in which nothing takes part is all zeros. Statistics are float32.

    Cost: one pass for `mask`, a partial sort for `top_k`, a sort for the sparse kinds.

    Args:
      x: [..., n] scores, any floating dtype.
      mask: bool, broadcasts to x; False takes no part.
      top_k: Only the k largest of a row take part (of equal ones the first).
      segments: int[..., n] in [0, n): the softmax is taken within each segment of a row. Only with `kind="softmax"`.
      kind: `softmax`, `sparsemax` or `entmax15`.

    Returns:
      [..., n] in the dtype of x.

    Raises:
      ConfigError: If x has no axis or no floating dtype, top_k is below 1, or the kind is unknown.

    Example:
      >>> sparse_softmax([3.0, 1.0, 2.0], top_k=1).tolist()
      [1.0, 0.0, 0.0]
    """
    x = jnp.asarray(x)
    if x.ndim == 0 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ConfigError(f"sparse_softmax needs floating scores [..., n]; got {x.dtype}{x.shape}.")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k is 1 or more; got {top_k}.")
    kinds = {"softmax": _softmax, "sparsemax": _sparsemax, "entmax15": _entmax15}
    if kind not in kinds:
        raise ConfigError(unknown_name("kind", kind, kinds))
    if segments is not None and kind != "softmax":
        raise ConfigError(f"segments go with kind='softmax' only; got kind={kind!r}. Call it once a segment instead.")
    if x.size == 0:
        return x
    wide = x.astype(jnp.float32)
    if mask is not None:
        wide = jnp.where(jnp.asarray(mask, bool), wide, NEVER)
    if top_k is not None and top_k < x.shape[-1]:
        wide = jnp.where(_largest(wide, top_k), wide, NEVER)
    if segments is not None:
        return _within(wide, jnp.broadcast_to(jnp.asarray(segments), x.shape)).astype(x.dtype)
    return kinds[kind](wide).astype(x.dtype)


def _softmax(x: jax.Array) -> jax.Array:
    return _shares(x, _finite(x.max(-1, keepdims=True)), lambda e: e.sum(-1, keepdims=True))


def _within(x: jax.Array, segments: jax.Array) -> jax.Array:
    n = x.shape[-1]

    def row(x: jax.Array, ids: jax.Array) -> jax.Array:
        highest = _finite(jax.ops.segment_max(x, ids, n))[ids]
        return _shares(x, highest, lambda e: jax.ops.segment_sum(e, ids, n)[ids])

    return jax.vmap(row)(x.reshape(-1, n), segments.reshape(-1, n)).reshape(x.shape)


def _shares(x: jax.Array, highest: jax.Array, total: Any) -> jax.Array:
    taking = x != NEVER
    e = jnp.where(taking, jnp.exp(jnp.where(taking, x, 0.0) - jax.lax.stop_gradient(highest)), 0.0)
    whole = total(e)
    return e / jnp.where(whole == 0, 1.0, whole)


def _largest(x: jax.Array, k: int) -> jax.Array:
    chosen = jax.lax.top_k(jax.lax.stop_gradient(x), k)[1]
    rows = chosen.reshape(-1, k)
    hit = jnp.zeros((rows.shape[0], x.shape[-1]), bool).at[jnp.arange(rows.shape[0])[:, None], rows].set(True)
    return hit.reshape(x.shape)


@jax.custom_vjp
def _sparsemax(x: jax.Array) -> jax.Array:
    taking, z, ordered, count = _ordered(x)
    sums = jnp.cumsum(jnp.where(ordered == NEVER, 0.0, ordered), -1)
    inside = (ordered != NEVER) & (1 + count * ordered > sums)
    k = jnp.maximum(inside.sum(-1, keepdims=True), 1)
    threshold = (jnp.take_along_axis(sums, k - 1, -1) - 1) / k
    return jnp.where(taking, jnp.maximum(z - threshold, 0.0), 0.0)


def _sparsemax_backward(p: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    inside = (p > 0).astype(p.dtype)
    mean = (grad * inside).sum(-1, keepdims=True) / jnp.maximum(inside.sum(-1, keepdims=True), 1.0)
    return ((grad - mean) * inside,)


@jax.custom_vjp
def _entmax15(x: jax.Array) -> jax.Array:
    taking, z, ordered, count = _ordered(x / 2)
    known = jnp.where(ordered == NEVER, 0.0, ordered)
    mean, square = jnp.cumsum(known, -1) / count, jnp.cumsum(known**2, -1) / count
    spread = (1 - count * (square - mean**2)) / count
    thresholds = mean - jnp.sqrt(jnp.maximum(spread, 0.0))
    inside = (ordered != NEVER) & (thresholds <= ordered)
    k = jnp.maximum(inside.sum(-1, keepdims=True), 1)
    threshold = jnp.take_along_axis(thresholds, k - 1, -1)
    return jnp.where(taking, jnp.maximum(z - threshold, 0.0) ** 2, 0.0)


def _entmax15_backward(p: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    root = jnp.sqrt(p)
    whole = root.sum(-1, keepdims=True)
    return (root * (grad - (grad * root).sum(-1, keepdims=True) / jnp.where(whole == 0, 1.0, whole)),)


_sparsemax.defvjp(lambda x: (_sparsemax(x),) * 2, _sparsemax_backward)
_entmax15.defvjp(lambda x: (_entmax15(x),) * 2, _entmax15_backward)


def _ordered(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Who takes part, the scores less their highest, those from high to low, and 1, 2, … n."""
    taking = x != NEVER
    z = jnp.where(taking, x - _finite(x.max(-1, keepdims=True)), NEVER)
    return taking, z, -jnp.sort(-z, axis=-1), jnp.arange(1, x.shape[-1] + 1, dtype=x.dtype)


def _finite(highest: jax.Array) -> jax.Array:
    return jnp.where(highest == NEVER, 0.0, highest)
