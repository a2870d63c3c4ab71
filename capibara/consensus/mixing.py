"""The steps of the default vote, each on n×n numbers: clip by norm (ARC), mix neighbours (NNM), find the centre, clip.

Row i of a coefficient matrix `rows` [n, n] stands for Σⱼ rows[i, j] Δⱼ. Rows outside `keep` are zero throughout. All
functions are traced in float64, with n static, and f and the number m of kept rows dynamic.

References: ARC, Allouah et al. 2024 (arXiv 2405.14432, Alg. 1). NNM, Allouah et al. 2023 (arXiv 2302.01772, Alg. 2).
Geometric median, Pillutla et al. 2022 (smoothed Weiszfeld).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

TIE = 1e-6
"""Relative difference below which two neighbours' distances count as tied; clipping makes exact ties common."""

FLOOR = 2.0**-40
"""Distances below this share of the largest clipped norm are rounding; nobody is clipped or outvoted for them."""

ROUNDING = 2.0**-44
"""A squared distance below this share of the squared lengths it is the difference of is rounding, and counts as 0.

Float64 Gram entries of 1e7 products are good to about 2⁻⁴⁶. Without this, copies of one row drift apart by 1e-8 of
their length, are ordered by chance, and one of them may find itself outvoted."""

WEISZFELD_STEPS = 32


def adaptive_clip(gram: jax.Array, keep: jax.Array, f: jax.Array) -> tuple[jax.Array, jax.Array]:
    """ARC: the k = ⌊2(f/m)(m−f)⌋ longest deltas are clipped to the (k+1)-th length.

    Returns:
      Factors [n] (0 outside `keep`), and the largest length after clipping.
    """
    m = keep.sum()
    norms = jnp.where(keep, jnp.sqrt(jnp.diagonal(gram)), 0.0)
    k = (2 * f * (m - f)) // jnp.maximum(m, 1)
    limit = -jnp.sort(-norms)[k]
    factors = jnp.where(norms > limit, limit / jnp.where(norms > 0, norms, 1.0), 1.0)
    return jnp.where(keep, factors, 0.0), limit


def nearest_mean(rows: jax.Array, gram: jax.Array, keep: jax.Array, f: jax.Array, floor: jax.Array) -> jax.Array:
    """NNM: every row becomes the mean of its m−f nearest, itself included; rows tied at the edge share what is left."""
    count = keep.sum() - f
    distance = jnp.where(keep[None, :], pairwise(rows, gram), jnp.inf)
    edge = jnp.take_along_axis(jnp.sort(distance, axis=1), jnp.full((len(keep), 1), count - 1), axis=1)
    slack = TIE * edge + floor
    inside = distance < edge - slack
    tied = ~inside & (distance <= edge + slack)
    left = count - inside.sum(axis=1, keepdims=True)
    share = jnp.where(inside, 1.0, jnp.where(tied, left / jnp.maximum(tied.sum(axis=1, keepdims=True), 1), 0.0))
    return jnp.where(keep[:, None], share / jnp.asarray(count, share.dtype), 0.0) @ rows


def geometric_median(rows: jax.Array, gram: jax.Array, keep: jax.Array, floor: jax.Array) -> jax.Array:
    """float64[n] coefficients of the point with the least sum of distances to the kept rows."""

    def step(_: int, centre: jax.Array) -> jax.Array:
        pull = jnp.where(keep, 1.0 / jnp.maximum(distances(rows, centre, gram), jnp.maximum(floor, 1e-200)), 0.0)
        return (pull / pull.sum()) @ rows

    return jax.lax.fori_loop(0, WEISZFELD_STEPS, step, _equal(keep, rows.dtype) @ rows)


def clip_to(
    rows: jax.Array, centre: jax.Array, gram: jax.Array, keep: jax.Array, f: jax.Array, floor: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws each row to within τ of the centre, τ the (m−f)-th smallest distance.

    Returns:
      The clipped rows, the factors [n] and τ.
    """
    distance = distances(rows, centre, gram)
    tau = order_statistic(distance, keep, keep.sum() - f)
    far = (distance > tau) & (distance > floor)
    factors = jnp.where(far, tau / jnp.where(far, distance, 1.0), 1.0)
    return jnp.where(keep[:, None], centre + factors[:, None] * (rows - centre), 0.0), factors, tau


def distances(rows: jax.Array, centre: jax.Array, gram: jax.Array) -> jax.Array:
    """‖rowᵢ − c‖ [n]."""
    return lengths(rows - centre, gram)


def pairwise(rows: jax.Array, gram: jax.Array) -> jax.Array:
    """‖rowᵢ − rowⱼ‖ [n, n]."""
    return lengths(rows[:, None] - rows[None, :], gram)


def lengths(gaps: jax.Array, gram: jax.Array) -> jax.Array:
    """‖Σⱼ gapⱼ Δⱼ‖ of coefficient vectors [..., n]; exactly 0 where it is not above rounding."""
    squared = jnp.sum((gaps @ gram) * gaps, axis=-1)
    bound = jnp.abs(gaps) @ jnp.sqrt(jnp.diagonal(gram))
    return jnp.sqrt(jnp.where(squared > ROUNDING * bound**2, squared, 0.0))


def order_statistic(values: jax.Array, keep: jax.Array, rank: jax.Array) -> jax.Array:
    """The `rank`-th smallest (1 = smallest) of the kept values."""
    return jnp.sort(jnp.where(keep, values, jnp.inf))[rank - 1]


def _equal(keep: jax.Array, dtype: Any) -> jax.Array:
    return keep.astype(dtype) / keep.sum().astype(dtype)
