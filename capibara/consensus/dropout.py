"""Merges that draw lots: entries of task vectors are dropped at random, and what stays is drawn out to make up for it.

    DARE    each entry stays with one chance → rescale → mean
    DELLA   the larger an entry, the better its chance → rescale → elect a sign → mean of those that have it

The lots hang on the round's key, the node, the tensor and the coordinate, so a vote can be repeated, and a file cut
into blocks draws the same ones. References are to arXiv.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from capibara.consensus.ballot import Merge, Place, Survey
from capibara.consensus.magnitudes import check_density, check_key, first_of, magnitude_ranks, row_seeds, uniforms
from capibara.consensus.task_vectors import check_scale, each, elected, float32, row_sum
from capibara.errors import ConfigError


def dare(density: float = 0.5, *, norm_matched: bool = False, elect: bool = False, scale: float = 1.0) -> Merge:
    """DARE: entries stay with probability `density`, each row by lots of its own; Yu et al. 2024 (2311.03099).

    What stays is divided by `density` (§3, the paper's 1/(1−p): the expectation is τᵢ), or, with `norm_matched`,
    rescaled so that the tensor's L1 norm is what it was (mergekit's variant; it needs whole tensors). Then
    scale · Σ wᵢτ̃ᵢ, or with `elect` the election and the mean of TIES. The lots are a hash of key, node, tensor and
    coordinate: the same key gives the same merge, whatever blocks a file is cut into.

    Tolerates: nothing by itself; dropping 1 − density of a lie leaves its mean what it was.
    Cost: one pass, in blocks of any length; two passes and whole tensors when norm-matched.
    Fails when: deltas are not small and redundant: at a low density the noise, √(1/density − 1) of a row, swamps them.
      Renaming the nodes renames their lots, so node order matters beyond rounding below a density of 1.

    Raises:
      ConfigError: If `density` is not in (0, 1] or `scale` not finite; from the merge, if there is no key.
    """
    name = "dare_norm" if norm_matched else "dare_ties" if elect else "dare"
    check_density(name, density)
    check_scale(name, scale)

    def prepare(survey: Survey):
        check_key(name, survey.key)
        shares, kept, by = float32(survey.weights), np.float32(density), np.float32(scale)

        def leaf(rows: jax.Array, place: Place) -> jax.Array:
            seeds = row_seeds(survey.key, survey.nodes, place.leaf)
            return _dare(rows, seeds, first_of(place), kept, shares, by, norm_matched=norm_matched, elect=elect)

        return leaf

    return Merge(name, prepare=prepare, whole_tensors=norm_matched)


def della(density: float = 0.5, epsilon: float = 0.2, scale: float = 1.0) -> Merge:
    """DELLA: the smaller an entry, the likelier it is dropped; then TIES' election. Deep et al. 2024 (2406.11617, §3).

    MagPrune: among the k entries of a tensor's last axis, rank r = 0 the largest magnitude, an entry is dropped with
    pᵣ = (1 − density) − epsilon/2 + epsilon · r/k and otherwise divided by 1 − pᵣ. Then the sign of Σ wᵢτ̃ᵢ is elected
    and the rows that have it averaged. A vector is one group; lots as in `dare`.

    Tolerates: as `ties`.
    Cost: one pass over each tensor and a sort along its last axis; whole tensors.
    Fails when: as `dare`.

    Raises:
      ConfigError: If `density` is not in (0, 1], or some pᵣ would leave [0, 1); from the merge, if there is no key.
    """
    check_density("della", density)
    check_scale("della", scale)
    drop = 1.0 - density
    if not (0 <= epsilon and epsilon / 2 <= drop + 1e-9 and drop + epsilon / 2 <= 1 + 1e-9):
        raise ConfigError(
            f"della: chances of {drop:g} ± epsilon/2 must lie within 0 and 1; got epsilon = {epsilon}. "
            f"At density = {density} it may be at most {2 * min(drop, density):g}."
        )

    def prepare(survey: Survey):
        check_key("della", survey.key)
        shares, by = float32(survey.weights), np.float32(scale)
        lowest, spread = np.float32(max(drop - epsilon / 2, 0.0)), np.float32(epsilon)

        def leaf(rows: jax.Array, place: Place) -> jax.Array:
            seeds = row_seeds(survey.key, survey.nodes, place.leaf)
            ranks = magnitude_ranks(rows if rows.ndim > 1 else rows[:, None]).reshape(rows.shape)
            group = np.float32(rows.shape[-1] if rows.ndim > 1 else 1)
            return _della(rows, jnp.asarray(ranks) / group, seeds, first_of(place), lowest, spread, shares, by)

        return leaf

    return Merge("della", prepare=prepare, whole_tensors=True)


@partial(jax.jit, static_argnames=("norm_matched", "elect"))
def _dare(
    rows: jax.Array,
    seeds: jax.Array,
    first: jax.Array,
    density: jax.Array,
    shares: jax.Array,
    scale: jax.Array,
    *,
    norm_matched: bool,
    elect: bool,
) -> jax.Array:
    kept = jnp.where(uniforms(seeds, first, rows.shape) < density, rows, 0)
    if norm_matched:
        axes = tuple(range(1, rows.ndim))
        largest = jnp.abs(rows).max(axis=axes, keepdims=True)
        unit = jnp.where(largest > 0, largest, 1)  # sums of 1e38 would overflow
        before, after = (jnp.sum(jnp.abs(x / unit), axis=axes, keepdims=True) for x in (rows, kept))
        kept = kept * jnp.where(after > 0, before / jnp.where(after > 0, after, 1), 1)
    else:
        kept = kept / density
    return scale * (elected(kept, shares) if elect else row_sum(each(shares, rows) * kept))


@jax.jit
def _della(
    rows: jax.Array,
    ranks: jax.Array,
    seeds: jax.Array,
    first: jax.Array,
    lowest: jax.Array,
    spread: jax.Array,
    shares: jax.Array,
    scale: jax.Array,
) -> jax.Array:
    drop = lowest + spread * ranks
    kept = jnp.where(uniforms(seeds, first, rows.shape) >= drop, rows / (1 - drop), 0)
    return scale * elected(kept, shares)
