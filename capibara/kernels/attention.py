"""Attention: the native kernel where there is one, and the same function in plain JAX where there is none.

    O = softmax(scale · R(Q) R(K)ᵀ + bias, where allowed) V        R: RoPE, where it is asked for

The native kernel (`src/attention.hpp`) goes tile by tile and keeps nothing of the size T × S; plain JAX makes the whole
matrix of scores. Both sum in float32. Shapes: B sequences, T queries, S keys, N heads, K key/value heads, H head size.
References: Milakov & Gimelshein 2018 (running softmax), Dao et al. 2022 (FlashAttention, algorithm 4).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from capibara.errors import ConfigError
from capibara.kernels.attention_rules import attended
from capibara.kernels.plain_attention import Arrays, Sight

DTYPES = (jnp.float32, jnp.bfloat16)


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
    rotary: Any = None,
) -> jax.Array:
    """Grouped-query attention, differentiable, in memory O(T + S) on a CPU with the native kernels.

    A query that sees no key gives zeros. The last query always stands at the last key: with fewer queries than keys,
    query t is at position t + S − T. What a query does not see has no influence on its row, a NaN neither; a row that
    sees one is NaN. The same bits for any number of threads; another instruction set may differ in the last ones. A
    second derivative takes the plain path, which makes the scores [B, N, T, S], as do other backends.

    Cost: 4 · B · N · T · S · H operations forward (half when causal), 10 backward. The gradient of a bias is summed in
    float32 in an array of the bias's own shape, and only where it is asked for. Axes that the bias shares are summed by
    one task after another: a bias of one batch and one head leaves work for one thread.

    Args:
      q: [B, T, N, H], float32 or bfloat16.
      k: [B, S, K, H], where K divides N: query head i reads key head i · K // N.
      v: [B, S, K, H].
      causal: Whether a query sees no key after its own position.
      segment_ids: int[B, T] where T = S, or a pair int[B, T], int[B, S]: only equal ones see each other.
      bias: Added to the scores: broadcasts to [B, N, T, S] and is never expanded. −inf hides the key.
      window: A query sees its own and the window − 1 keys before it (and, if not causal, all after it).
      scale: Of the scores; H^-1/2 by default. It does not apply to the bias.
      rotary: Cosines and sines of `rotary_angles`, float32[B or 1, S, H / 2] each, for T ≤ S: queries and keys are
        turned as they are read, in float32, and not rounded in between. Their gradients are turned back; the angles
        have none.

    Returns:
      [B, T, N, H] in the dtype of q.

    Raises:
      ConfigError: If shapes or dtypes do not fit each other.

    Example:
      >>> q = k = v = jnp.ones((1, 3, 2, 8))
      >>> fast_attention(q, k, v, causal=True).shape
      (1, 3, 2, 8)
    """
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ConfigError(
            f"Attention needs q [B, T, N, H] and k and v [B, S, K, H]; got {q.shape}, {k.shape} and {v.shape}."
        )
    if not (q.dtype == k.dtype == v.dtype) or q.dtype not in DTYPES:
        raise ConfigError(f"q, k and v are all float32 or all bfloat16; got {q.dtype}, {k.dtype} and {v.dtype}.")
    sizes = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    arrays, sight = _given(
        Arrays(q, k, v), sizes, k.shape[2], causal=causal, segment_ids=segment_ids, bias=bias, window=window,
        scale=scale, rotary=rotary,
    )  # fmt: skip
    return attended(arrays, sight) if q.size and k.size else jnp.zeros_like(q)


def packed_attention(
    qkv: Any,
    num_heads: int,
    kv_heads: int,
    *,
    causal: bool = False,
    segment_ids: Any = None,
    bias: Any = None,
    window: int | None = None,
    scale: float | None = None,
    rotary: Any = None,
) -> jax.Array:
    """`fast_attention` of one array: the kernel reads q, k and v from it where they lie, and writes one gradient.

    So a product with weights [D, (N + 2K) · H] needs no split, and its gradient no concatenation.

    Args:
      qkv: [B, T, (N + 2K) · H], float32 or bfloat16: the heads of q, then those of k, then those of v.
      num_heads: N.
      kv_heads: K, a divisor of N.
      causal: This and the others as for `fast_attention`, with S = T.
      segment_ids: See there.
      bias: See there.
      window: See there.
      scale: See there.
      rotary: See there.

    Returns:
      [B, T, N, H] in the dtype of qkv.

    Raises:
      ConfigError: If shapes or dtypes do not fit each other.

    Example:
      >>> packed_attention(jnp.ones((1, 3, (4 + 2 + 2) * 8)), 4, 2, causal=True).shape
      (1, 3, 4, 8)
    """
    qkv = jnp.asarray(qkv)
    heads = num_heads + 2 * kv_heads
    if min(num_heads, kv_heads) < 1 or qkv.ndim != 3 or qkv.shape[2] % heads:
        raise ConfigError(
            f"Packed attention needs qkv [B, T, (N + 2 · K) · H] and N, K ≥ 1; got {qkv.shape}, N = {num_heads} and "
            f"K = {kv_heads}."
        )
    if qkv.dtype not in DTYPES:
        raise ConfigError(f"qkv is float32 or bfloat16; got {qkv.dtype}.")
    B, T, width = qkv.shape
    arrays, sight = _given(
        Arrays(qkv.reshape(B, T, heads, width // heads)), (B, num_heads, T, T), kv_heads, causal=causal,
        segment_ids=segment_ids, bias=bias, window=window, scale=scale, rotary=rotary,
    )  # fmt: skip
    return attended(arrays, sight) if qkv.size else jnp.zeros((B, T, num_heads, width // heads), qkv.dtype)


def _given(
    arrays: Arrays, sizes: tuple[int, int, int, int], kv_heads: int, *, causal, segment_ids, bias, window, scale, rotary
):
    """All that goes in, checked; `sizes` are B, N, T and S."""
    B, N, T, S = sizes
    size = arrays.q.shape[-1]
    if kv_heads == 0 or N % kv_heads:
        raise ConfigError(f"{N} query heads cannot share {kv_heads} key heads evenly; make it a divisor.")
    if window is not None and window < 1:
        raise ConfigError(f"window is 1 or more keys; got {window}. Leave it out for no limit.")
    arrays = arrays._replace(**_segments(segment_ids, (B, T), (B, S)), bias=_bias(bias, sizes, arrays.q.dtype))
    if rotary is not None:
        arrays = arrays._replace(**_angles(rotary, B, T, S, size))
    scale = float(size**-0.5 if scale is None else scale)
    return arrays, Sight(bool(causal), int(window or 0), scale, kv_heads, not isinstance(segment_ids, tuple))


def _segments(ids: Any, queries: tuple[int, int], keys: tuple[int, int]) -> dict[str, jax.Array]:
    if ids is None:
        return {}
    pair = tuple(jnp.asarray(part) for part in (ids if isinstance(ids, tuple) else (ids, ids)))
    for part, wanted in zip(pair, (queries, keys), strict=True):
        if part.shape != wanted or not jnp.issubdtype(part.dtype, jnp.integer):
            raise ConfigError(
                f"segment_ids are integers of shape {wanted} here; got {part.dtype}{part.shape}. Give (ids of the "
                "queries, ids of the keys) where their lengths differ."
            )
    return {"q_segments": pair[0].astype(jnp.int32), "k_segments": pair[1].astype(jnp.int32)}


def _bias(bias: Any, sizes: tuple[int, ...], dtype: Any) -> jax.Array | None:
    if bias is None:
        return None
    bias = jnp.asarray(bias)
    shape = (1,) * (4 - bias.ndim) + bias.shape
    if len(shape) != 4 or any(have not in (1, full) for have, full in zip(shape, sizes, strict=True)):
        raise ConfigError(f"A bias broadcasts to [B, N, T, S], {sizes} here; got {bias.shape}.")
    if not jnp.issubdtype(bias.dtype, jnp.floating):
        raise ConfigError(f"A bias is of floats; got {bias.dtype}. Of a mask, give jnp.where(mask, 0.0, -jnp.inf).")
    return bias.reshape(shape).astype(bias.dtype if bias.dtype == dtype else jnp.float32)


def _angles(rotary: Any, B: int, T: int, S: int, size: int) -> dict[str, jax.Array]:
    cos, sin = (jax.lax.stop_gradient(jnp.asarray(part, jnp.float32)) for part in rotary)
    if cos.shape != sin.shape or cos.shape not in ((B, S, size // 2), (1, S, size // 2)) or size % 2 or T > S:
        raise ConfigError(
            f"rotary is (cosines, sines) of shape {(B, S, size // 2)} or {(1, S, size // 2)}, for heads of even size "
            f"and no more queries than keys; got {cos.shape} and {sin.shape} for {T} queries of size {size}."
        )
    return {"cos": cos, "sin": sin}
