"""Merges of task vectors τᵢ = θᵢ − θ₀. In a round the base is the start, so the rows, which are deltas, are the τᵢ.

    task arithmetic   scale · Σ τᵢ
    TIES              trim small entries → elect a sign → mean of those that have it
    breadcrumbs       drop the smallest and the largest entries → scale · Σ
    SCE               keep the coordinates that vary most → weigh by energy → erase the minority → Σ

Where a formula sums, a weight counts as m·wᵢ, 1 for equal weights; where it averages, as wᵢ. The same names hide other
algorithms elsewhere: each docstring says which one this is. The kept share is `density`, in (0, 1], everywhere. Those
that draw lots are in `dropout`.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from capibara.consensus.ballot import Merge, Place, Survey
from capibara.consensus.magnitudes import check_density, count_kept, kth_largest
from capibara.errors import ConfigError


def task_arithmetic(scale: float = 0.4) -> Merge:
    """scale · Σ τᵢ; Ilharco et al. 2023 (arXiv 2212.04089, §2 and §4).

    The sum, not the mean: with m equal rows the merge is scale · m · τ. The paper tunes `scale` on held-out data and
    finds 0.3 to 0.5 good in most cases; 0.4 is what Yadav et al. 2023 take without any.

    Tolerates: nothing by itself: one row moves the sum as far as it likes; in a round the vote's leash bounds it.
    Cost: one pass, in blocks of any length.
    Fails when: there are many rows that agree: the sum overshoots, and only the leash holds it.

    Raises:
      ConfigError: If `scale` is not finite.
    """
    check_scale("task_arithmetic", scale)
    return Merge("task_arithmetic", combine=lambda w, gram: scale * len(w) * w)


def ties(density: float = 0.2, scale: float = 1.0) -> Merge:
    """TIES as in the paper, trimmed over the whole model; Yadav et al. 2023 (arXiv 2306.01708, §4, Alg. 1).

    Per row, entries below the k-th largest magnitude of the whole task vector are dropped, k = ⌊density · d⌋ (entries
    that tie with it stay). The sign of Σ wᵢτ̂ᵢ is elected in each coordinate, and the merge is scale · Σ wᵢτ̂ᵢ / Σ wᵢ
    over the rows whose τ̂ᵢ has that sign; 0 where nothing is left or the sum is 0.

    Tolerates: a minority in sign, coordinate by coordinate, unless it is larger; nothing else by itself.
    Cost: three passes: two count magnitudes, one merges, in blocks of any length once the thresholds are known.
    Fails when: one layer holds all large entries: the trim leaves little of the others; a long row elects every sign.

    Raises:
      ConfigError: If `density` is not in (0, 1] or `scale` not finite.
    """
    check_density("ties", density)
    check_scale("ties", scale)

    def prepare(survey: Survey):
        size = sum(int(np.prod(leaf.shape[1:])) for leaf in survey.leaves())
        low = jnp.asarray(kth_largest(survey.leaves, [count_kept(density, size)])[0])
        shares, by = float32(survey.weights), np.float32(scale)
        return lambda rows, place: _ties(rows, low, shares, by)

    return Merge("ties", prepare=prepare)


def ties_tensor(density: float = 0.2, scale: float = 1.0) -> Merge:
    """TIES trimmed within each tensor, as mergekit and PEFT do it; otherwise as `ties`.

    Signs are elected by the weighted sum, as in mergekit with `normalize: true`; PEFT elects before weighing.

    Tolerates: as `ties`.
    Cost: three passes over each tensor, which must be whole.
    Fails when: as `ties`; and a tensor that no task needed keeps as large a share as any other.

    Raises:
      ConfigError: As `ties`.
    """
    check_density("ties_tensor", density)
    check_scale("ties_tensor", scale)

    def prepare(survey: Survey):
        shares, by = float32(survey.weights), np.float32(scale)

        def leaf(rows: jax.Array, place: Place) -> jax.Array:
            low = kth_largest(lambda: [rows], [count_kept(density, _size(rows))])[0]
            return _ties(rows, jnp.asarray(low), shares, by)

        return leaf

    return Merge("ties_tensor", prepare=prepare, whole_tensors=True)


def breadcrumbs(density: float = 0.9, gamma: float = 0.01, scale: float = 0.4) -> Merge:
    """Model Breadcrumbs: per tensor both tails are dropped; Davari & Belilovsky 2024 (arXiv 2312.06795, §3).

    Of d entries ⌊density · d⌋ stay, but at least one: the ⌊gamma · d⌋ largest magnitudes (outliers) are dropped, and as
    many of the smallest as are left over, ties with what stays excepted; then scale · Σ τ̂ᵢ. Where gamma · d < 1 nothing
    is cut off at the top; an implementation that slices `[low : -0]` there loses the tensor.

    Tolerates: a row's few largest entries, tensor by tensor; nothing else by itself.
    Cost: three passes over each tensor, which must be whole.
    Fails when: what matters is in the outliers; or as `task_arithmetic`.

    Raises:
      ConfigError: If `density` is not in (0, 1], `gamma` not in [0, 1 − density], or `scale` not finite.
    """
    check_density("breadcrumbs", density)
    check_scale("breadcrumbs", scale)
    if not 0 <= gamma <= 1 - density + 1e-9:
        raise ConfigError(f"breadcrumbs: gamma must lie in [0, 1 − density] = [0, {1 - density:g}]; got {gamma}.")

    def prepare(survey: Survey):
        weights = float32(len(survey.weights) * survey.weights)

        def leaf(rows: jax.Array, place: Place) -> jax.Array:
            size = _size(rows)
            kept = count_kept(density, size)
            top = min(math.floor(gamma * size + 1e-9), size - kept)
            high, low = kth_largest(lambda: [rows], [top + 1, top + kept])
            return _band(rows, jnp.asarray(low), jnp.asarray(high), weights, np.float32(scale))

        return leaf

    return Merge("breadcrumbs", prepare=prepare, whole_tensors=True)


def sce(density: float = 0.1, scale: float = 1.0, *, divide: bool = True) -> Merge:
    """SCE, per tensor: select, calculate, erase; Wan et al. 2024 (FuseChat, arXiv 2408.07990, §3).

    Select: the k = ⌊density · d⌋ coordinates in which the rows' variance is largest (ties stay). Calculate:
    ηᵢ = Σ τ̂ᵢ² / Σⱼ Σ τ̂ⱼ² over them. Erase: entries against the sign of Σ τ̂ᵢ. The merge is scale · Σ ηᵢτ̂ᵢ / Σ ηᵢ over
    those that stay, as in mergekit; without `divide` it is the sum alone. The η replace weights, which are ignored.

    Tolerates: nothing by itself: the longest row has the largest weight.
    Cost: three passes over each tensor, which must be whole.
    Fails when: the rows agree: what they share is what is dropped first.

    Raises:
      ConfigError: If `density` is not in (0, 1] or `scale` not finite.
    """
    check_density("sce", density)
    check_scale("sce", scale)

    def prepare(survey: Survey):
        def leaf(rows: jax.Array, place: Place) -> jax.Array:
            variance = _variance(rows)
            low = kth_largest(lambda: [variance[None]], [count_kept(density, _size(rows))])[0, 0]
            with jax.enable_x64(True):
                energy = np.asarray(_energies(rows, variance, low))
            shares = np.full(len(energy), 1 / len(energy)) if energy.sum() == 0 else energy / energy.sum()
            return _erase(rows, variance, low, float32(shares), np.float32(scale), divide=divide)

        return leaf

    return Merge("sce", prepare=prepare, whole_tensors=True)


def check_scale(name: str, scale: float) -> None:
    """Refuses a scale that is no number.

    Raises:
      ConfigError: If it is not finite.
    """
    if not math.isfinite(scale):
        raise ConfigError(f"{name}: scale must be a finite number; got {scale}.")


def _size(rows: jax.Array) -> int:
    return int(np.prod(rows.shape[1:], dtype=np.int64))


def float32(weights: np.ndarray) -> jax.Array:
    """float64 numbers, for float32 rows."""
    return jnp.asarray(weights.astype(np.float32))


def each(values: jax.Array, rows: jax.Array) -> jax.Array:
    """[m] as [m, 1, …], to stand before rows."""
    return values.reshape(-1, *[1] * (rows.ndim - 1))


def row_sum(rows: jax.Array) -> jax.Array:
    """[m, ...] → [...]; on CPU a sum over the first axis is many times slower than adding row to row."""
    total = rows[0]
    for row in rows[1:]:
        total = total + row
    return total


def elected(rows: jax.Array, shares: jax.Array) -> jax.Array:
    """TIES' election and mean: Σ wᵢ rowᵢ / Σ wᵢ over the rows that have the sign of Σ wᵢ rowᵢ."""
    w = each(shares, rows)
    sign = jnp.sign(row_sum(w * rows))
    agree = jnp.where(rows * sign[None] > 0, w, 0)
    share = row_sum(agree)
    return row_sum(agree * rows) / jnp.where(share > 0, share, 1)


@jax.jit
def _ties(rows: jax.Array, low: jax.Array, shares: jax.Array, scale: jax.Array) -> jax.Array:
    return scale * elected(jnp.where(jnp.abs(rows) >= each(low, rows), rows, 0), shares)


@jax.jit
def _band(rows: jax.Array, low: jax.Array, high: jax.Array, weights: jax.Array, scale: jax.Array) -> jax.Array:
    size = jnp.abs(rows)
    kept = jnp.where((size >= each(low, rows)) & (size <= each(high, rows)), rows, 0)
    return row_sum(each(weights, rows) * kept) * scale


@jax.jit
def _variance(rows: jax.Array) -> jax.Array:
    """Σᵢ (xᵢ − mean)², scaled by a power of two; of differences to the first row, so that equal rows give exactly 0."""
    largest = jnp.abs(rows).max()
    unit = jnp.exp2(-jnp.round(jnp.log2(jnp.where(largest > 0, largest, 1))).clip(-126, 126))
    gaps = rows * unit - rows[:1] * unit
    spread = gaps - (row_sum(gaps) / np.float32(rows.shape[0]))[None]
    return row_sum(spread * spread)


@jax.jit
def _energies(rows: jax.Array, variance: jax.Array, low: jax.Array) -> jax.Array:
    chosen = jnp.where((variance >= low)[None], rows, 0).astype(jnp.float64)
    return jnp.sum(jnp.square(chosen), axis=tuple(range(1, rows.ndim)))


@partial(jax.jit, static_argnames="divide")
def _erase(
    rows: jax.Array, variance: jax.Array, low: jax.Array, shares: jax.Array, scale: jax.Array, *, divide: bool
) -> jax.Array:
    chosen = jnp.where((variance >= low)[None], rows, 0)
    left = jnp.where(chosen * jnp.sign(row_sum(chosen))[None] > 0, each(shares, rows), 0)
    total = row_sum(left * chosen)
    if divide:
        share = row_sum(left)
        total = total / jnp.where(share > 0, share, 1)
    return scale * total
