"""Passes over a stack of deltas: products of its rows, and combinations of them.

    ⟨Δᵢ, Δⱼ⟩   Σᵢ vᵢ Δᵢ   Σⱼ rows[i, j] Δⱼ   ‖Δ − c‖   cos(Δᵢ, Δ)

Products and their sums are taken in float64, block by block; deltas stay float32. A row that is not used is selected
out, not multiplied by 0, so that nothing it holds (NaN, 1e30) reaches the others.

On one CPU device `capibara.kernels.arrays` does the first two: it reads the stack once and compiles nothing, and the
sum has the same bits on every machine, with native kernels and without. On other devices, and for products without
native kernels, XLA does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from capibara.kernels import arrays
from capibara.kernels.library import library
from capibara.types import PyTree

BLOCK_COLUMNS = 2**12
"""Columns of one product: 8 float64 rows of this length stay in a core's cache of 1 MB."""

BLOCKS = 8
"""Products at a time; with the rows' float64 copies a step holds n · 2¹⁵ · 12 bytes, 3 MB for 8 rows."""

ALIGNED = 16
"""JAX shares memory that begins at a multiple of so many float32 numbers; what does not, it copies."""


def gram_matrix(stack: PyTree, weights: Any) -> np.ndarray:
    """float64[n, n]: ⟨Δᵢ, Δⱼ⟩ over all leaves, products and sums in float64; zeros in rows with weight 0.

    Float32 products would be useless here: deltas of near-equal nodes cancel (docs/protocol.md, vote, step 1).
    """
    keep, leaves = np.asarray(weights) > 0, jax.tree.leaves(stack)
    if library() is not None and all(map(_in_memory, leaves)):
        return sum((arrays.gram(_flat(leaf), keep, wide=True) for leaf in leaves), np.zeros((len(keep), len(keep))))
    with jax.enable_x64(True):
        return np.asarray(_gram(leaves, jnp.asarray(keep)))


def weighted_sum(coefficients: Any, stack: PyTree, gram: np.ndarray | None = None) -> PyTree:
    """Σᵢ vᵢ Δᵢ, leaf by leaf; a row with coefficient 0 contributes nothing, whatever it holds.

    On one CPU device summed in float64 in the order of the rows and rounded once to float32. Elsewhere in float32: rows
    far from 1 are scaled by a power of two first, so that a coefficient of 1e-40 on a row of length 1e20 is not lost to
    float32's range. Cost: one pass over the stack.
    """
    v = np.asarray(coefficients, np.float64)
    if all(map(_in_memory, jax.tree.leaves(stack))):
        return jax.tree.map(lambda leaf: _summed(v, leaf), stack)
    scale = _power_of_two(gram, len(v))
    return _weighted(stack, (1 / scale).astype(np.float32), (v * scale).astype(np.float32), jnp.asarray(v != 0))


def materialise(rows: np.ndarray, keep: np.ndarray, leaf: jax.Array, gram: np.ndarray | None = None) -> jax.Array:
    """float32[m, ...]: the m rows of a leaf that count, as the combinations that `rows` says."""
    chosen = np.flatnonzero(keep)
    part = rows[chosen][:, : len(keep)]
    if np.array_equal(part, np.eye(len(keep))[chosen]):
        return leaf if keep.all() else leaf[chosen]
    scale = _power_of_two(gram, len(keep))
    used = jnp.asarray((part != 0).any(axis=0))
    return _materialised((part * scale).astype(np.float32), (1 / scale).astype(np.float32), used, leaf)


def distance_from(delta: PyTree, centre: PyTree) -> float:
    """‖Δ − c‖ over all leaves, sums in float64."""
    with jax.enable_x64(True):
        return float(jnp.sqrt(_squared_distance(delta, centre)))


def cosines(stack: PyTree, delta: PyTree, v: np.ndarray | None, gram: np.ndarray) -> np.ndarray:
    """float64[n]: the cosine of every Δᵢ to Δ; NaN where either is zero or the row's weight was 0.

    Args:
      stack: Raw deltas, leaves float32[n, ...].
      delta: Δ, leaves [...].
      v: Coefficients float64[n] with Δ = Σ vᵢΔᵢ, where there are any: then no pass over the data is needed.
      gram: float64[n, n], as `gram_matrix` gives it.
    """
    norms = np.sqrt(np.diagonal(gram))
    if v is not None:
        products, length = gram @ v, np.sqrt(max(v @ gram @ v, 0.0))
    else:
        with jax.enable_x64(True):
            found, squared = _products(stack, delta, jnp.asarray(norms > 0))
        products, length = np.asarray(found), float(np.sqrt(squared))
    scale = norms * length
    return np.divide(products, scale, out=np.full(len(norms), np.nan), where=scale > 0).clip(-1, 1)


def cosine(a: PyTree, b: PyTree) -> float:
    """cos(a, b) over all leaves, sums in float64; NaN where either is zero. Cost: one pass over both."""
    with jax.enable_x64(True):
        product, a_squared, b_squared = map(float, _inner_products(a, b))
    length = np.sqrt(a_squared) * np.sqrt(b_squared)
    return float(np.clip(product / length, -1, 1)) if length > 0 else float("nan")


def draw_to(centre: PyTree, delta: PyTree, factor: float) -> PyTree:
    """c + factor · (Δ − c), leaf by leaf in float32."""
    return _drawn(delta, centre, np.float32(factor))


def _in_memory(leaf: Any) -> bool:
    """Whether the kernels for NumPy arrays can read a leaf where it lies."""
    if leaf.dtype not in (jnp.float32, jnp.bfloat16):
        return False
    return isinstance(leaf, np.ndarray) or [device.platform for device in leaf.devices()] == ["cpu"]


def _flat(leaf: Any) -> np.ndarray:
    return np.asarray(leaf).reshape(leaf.shape[0], math.prod(leaf.shape[1:]))


def _summed(v: np.ndarray, leaf: Any) -> jax.Array:
    """Σᵢ vᵢ Δᵢ of one leaf, in memory that JAX takes over without a copy."""
    count = math.prod(leaf.shape[1:])
    room = np.empty(count + ALIGNED, np.float32)
    start = -room.ctypes.data % (4 * ALIGNED) // 4
    found = arrays.weighted_sum(_flat(leaf), v, room[start : start + count]).reshape(leaf.shape[1:])
    # an array that was free to move stays so: a committed one would compile the next round's programs anew
    held = leaf.sharding if getattr(leaf, "committed", False) else None
    return jax.device_put(found, held, may_alias=True)


def _power_of_two(gram: np.ndarray | None, count: int) -> np.ndarray:
    norms = np.ones(count) if gram is None else np.sqrt(np.diagonal(gram))
    return np.exp2(np.round(np.log2(np.where(norms > 0, norms, 1.0))).clip(-100, 100))


@jax.jit
def _gram(leaves: list[jax.Array], keep: jax.Array) -> jax.Array:
    total = jnp.zeros((keep.shape[0], keep.shape[0]), jnp.float64)
    for leaf in leaves:
        total = total + _leaf_gram(leaf.reshape(leaf.shape[0], -1), keep)
    return total


def _leaf_gram(flat: jax.Array, keep: jax.Array) -> jax.Array:
    n, d = flat.shape

    def add(first: Any, total: jax.Array, width: int) -> jax.Array:
        blocks = BLOCKS if width == BLOCK_COLUMNS * BLOCKS else 1
        part = jax.lax.dynamic_slice(flat, (0, first), (n, width)).reshape(n, blocks, -1)
        part = jnp.where(keep[:, None, None], part, 0).astype(jnp.float64)
        return total + jax.lax.dot_general(part, part, (((2,), (2,)), ((1,), (1,)))).sum(0)

    return _over_blocks(add, jnp.zeros((n, n), jnp.float64), d)


def _over_blocks(add: Callable[[Any, jax.Array, int], jax.Array], zero: jax.Array, columns: int) -> jax.Array:
    """Sums `add(first column, total, width)` over a leaf, so that float64 copies never exceed a block."""
    step = BLOCK_COLUMNS * BLOCKS
    whole, total = columns // step, zero
    if whole:
        # Two loops that do not depend on each other: XLA runs them on two cores (benchmarks/vote.py).
        for first, last in [(0, whole // 2), (whole // 2, whole)] if whole > 1 else [(0, 1)]:
            total = total + jax.lax.fori_loop(first, last, lambda i, part: add(i * step, part, step), zero)
    return add(whole * step, total, columns % step) if columns % step else total


@jax.jit
def _weighted(stack: PyTree, down: jax.Array, up: jax.Array, keep: jax.Array) -> PyTree:
    def one(leaf: jax.Array) -> jax.Array:
        total = jnp.zeros(leaf.shape[1:], jnp.float32)
        for i in range(leaf.shape[0]):
            total = total + jnp.where(keep[i], (leaf[i] * down[i]) * up[i], 0)
        return total

    return jax.tree.map(one, stack)


@jax.jit
def _materialised(part: jax.Array, down: jax.Array, used: jax.Array, leaf: jax.Array) -> jax.Array:
    flat = leaf.reshape(leaf.shape[0], -1)
    clean = jnp.where(used[:, None], flat * down[:, None], 0)
    return jnp.matmul(part, clean, precision="highest").reshape(part.shape[0], *leaf.shape[1:])


@jax.jit
def _squared_distance(delta: PyTree, centre: PyTree) -> jax.Array:
    def one(a: jax.Array, b: jax.Array) -> jax.Array:
        gap = (a.astype(jnp.float64) - b.astype(jnp.float64)).ravel()
        return gap @ gap

    return jnp.asarray(sum(jax.tree.leaves(jax.tree.map(one, delta, centre))))


@jax.jit
def _products(stack: PyTree, delta: PyTree, keep: jax.Array) -> tuple[jax.Array, jax.Array]:
    found, squared = jnp.zeros(keep.shape[0], jnp.float64), jnp.zeros((), jnp.float64)
    for leaf, one in zip(jax.tree.leaves(stack), jax.tree.leaves(delta), strict=True):
        rows, flat = leaf.reshape(leaf.shape[0], -1), one.ravel()

        def add(first: Any, total: jax.Array, width: int, rows: jax.Array = rows, flat: jax.Array = flat) -> jax.Array:
            part = jax.lax.dynamic_slice(rows, (0, first), (rows.shape[0], width))
            clean = jnp.where(keep[:, None], part, 0).astype(jnp.float64)
            return total + clean @ jax.lax.dynamic_slice(flat, (first,), (width,)).astype(jnp.float64)

        found = _over_blocks(add, found, flat.shape[0])
        squared = squared + jnp.sum(jnp.square(flat.astype(jnp.float64)))
    return found, squared


@jax.jit
def _inner_products(a: PyTree, b: PyTree) -> tuple[jax.Array, jax.Array, jax.Array]:
    """⟨a, b⟩, ⟨a, a⟩ and ⟨b, b⟩."""

    def over_leaves(x: PyTree, y: PyTree) -> jax.Array:
        parts = jax.tree.map(lambda u, v: u.astype(jnp.float64).ravel() @ v.astype(jnp.float64).ravel(), x, y)
        return jnp.asarray(sum(jax.tree.leaves(parts)))

    return over_leaves(a, b), over_leaves(a, a), over_leaves(b, b)


@jax.jit
def _drawn(delta: PyTree, middle: PyTree, factor: jax.Array) -> PyTree:
    return jax.tree.map(lambda a, b: b + factor * (a - b), delta, middle)
