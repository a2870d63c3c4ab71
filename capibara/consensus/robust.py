"""The classic robust rules: those that pick or weigh rows see the Gram matrix; those that see coordinates are merges.

m rows with weight above 0 enter; each rule checks its bound with m. A row that is not picked still backs the commit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from capibara.consensus import mixing, networks
from capibara.consensus.ballot import Ballot, Merge, Rule
from capibara.errors import ConfigError
from capibara.types import PyTree


def geometric_median(f: int) -> Rule:
    """Weighs rows so that their sum is the geometric median of the deltas (Weiszfeld on the Gram matrix).

    Tolerates: f of m ≥ 2f+1 rows.
    Cost: one pass for the Gram matrix, one for the sum.
    Fails when: the honest spread is large: the median then follows the densest group (Pillutla et al. 2022).
    """

    def weigh(gram: np.ndarray, keep: np.ndarray) -> np.ndarray:
        with jax.enable_x64(True):
            return np.asarray(_median_weights(gram, keep))

    return _weighing("geometric_median", f, 2 * f + 1, weigh)


def centered_clipping(f: int, steps: int = 3) -> Rule:
    """v ← v + meanᵢ (Δᵢ − v) min(1, τ/‖Δᵢ − v‖), from the start, τ the median distance; Karimireddy et al. 2021.

    Tolerates: f of m ≥ 2f+1 rows.
    Cost: one pass for the Gram matrix, one for the sum.
    Fails when: f/m is large, or colluders stay inside τ in one direction.
    """
    _check(f)

    def apply(ballot: Ballot, state: PyTree, key: Any) -> tuple[Ballot, PyTree, dict[str, Any]]:
        keep = _enough("centered_clipping", ballot, f, 2 * f + 1)
        with jax.enable_x64(True):
            v = np.asarray(_clipped_mean(ballot.gram, keep, steps=steps))
        return _replace_by(ballot, v), state, {"backing": keep}

    return Rule("centered_clipping", lambda params: (), apply, 2 * f + 1)


def krum(f: int) -> Rule:
    """Picks the row with the least sum of squared distances to its m−f−2 nearest others; Blanchard et al. 2017.

    Tolerates: f of m ≥ 2f+3 rows.
    Cost: one pass for the Gram matrix.
    Fails when: data are unequal: one node's model is taken whole.
    """
    return _weighing("krum", f, 2 * f + 3, lambda gram, keep: _picked(krum_scores(gram, keep, f), keep, 1))


def multi_krum(f: int) -> Rule:
    """The mean of the m−f rows with the best Krum scores; Blanchard et al. 2017, §4.

    Tolerates: f of m ≥ 2f+3 rows.
    Cost: one pass for the Gram matrix, one for the sum.
    Fails when: data are unequal: the f most different honest nodes are dropped in every round.
    """
    return _weighing(
        "multi_krum", f, 2 * f + 3, lambda gram, keep: _picked(krum_scores(gram, keep, f), keep, int(keep.sum()) - f)
    )


def bulyan(f: int) -> Rule:
    """Picks m−2f rows by repeated Krum; `bulyan_merge` then averages around the median. El Mhamdi et al. 2018, Alg. 1.

    Tolerates: f of m ≥ 4f+3 rows.
    Cost: one pass for the Gram matrix, one over coordinates.
    Fails when: data are unequal, as Krum.
    """
    _check(f)

    def apply(ballot: Ballot, state: PyTree, key: Any) -> tuple[Ballot, PyTree, dict[str, Any]]:
        keep = _enough("bulyan", ballot, f, 4 * f + 3)
        chosen, rest = np.zeros_like(keep), keep.copy()
        for _ in range(int(keep.sum()) - 2 * f):
            best = int(np.argmin(np.where(rest, krum_scores(ballot.gram, rest, f), np.inf)))
            chosen[best], rest[best] = True, False
        return ballot._replace(weights=np.where(chosen, 1.0, 0.0)), state, {"backing": keep}

    return Rule("bulyan", lambda params: (), apply, 4 * f + 3)


def bulyan_merge(f: int) -> Merge:
    """Of θ picked rows, the mean of the θ−2f values of each coordinate that are closest to the median."""
    return Merge("bulyan", leaf=lambda rows: networks.mean_around_median(rows, max(rows.shape[0] - 2 * f, 1)))


def coordinates(name: str, f: int) -> Rule:
    """The rule beside a coordinate-wise merge (`trimmed_mean`, `median`): checks m ≥ 2f+1, all rows back.

    Tolerates: what the merge does, f of m ≥ 2f+1 rows.
    Cost: nothing beyond the merge.
    Fails when: data are unequal and the attack follows the honest spread (ALIE).
    """
    _check(f)

    def apply(ballot: Ballot, state: PyTree, key: Any) -> tuple[Ballot, PyTree, dict[str, Any]]:
        return ballot, state, {"backing": _enough(name, ballot, f, 2 * f + 1)}

    return Rule(name, lambda params: (), apply, 2 * f + 1)


def krum_scores(gram: np.ndarray, keep: np.ndarray, f: int) -> np.ndarray:
    """float64[n]: sum of squared distances to the m−f−2 nearest other kept rows (at least one); inf outside `keep`.

    Two rows that are each other's nearest tie exactly when one neighbour counts, as in the last picks of Bulyan. A
    billionth of the distances to all kept rows is added, so that the order of the nodes does not decide.
    """
    squared = np.diagonal(gram)[:, None] + np.diagonal(gram)[None, :] - 2 * gram
    squared = np.where(keep[None, :], np.maximum(squared, 0.0), np.inf)
    np.fill_diagonal(squared, np.inf)
    count = max(int(keep.sum()) - f - 2, 1)
    scores = np.sort(squared, axis=1)[:, :count].sum(axis=1)
    everything = np.where(np.isfinite(squared), squared, 0.0).sum(axis=1)
    return np.where(keep, scores + 1e-9 * everything, np.inf)


def _weighing(
    name: str, f: int, least: int, weigh: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> Rule:
    _check(f)

    def apply(ballot: Ballot, state: PyTree, key: Any) -> tuple[Ballot, PyTree, dict[str, Any]]:
        keep = _enough(name, ballot, f, least)
        return _replace_by(ballot, weigh(ballot.gram, keep)), state, {"backing": keep}

    return Rule(name, lambda params: (), apply, least)


def _replace_by(ballot: Ballot, v: np.ndarray) -> Ballot:
    """Every row that counts becomes Σ vᵢΔᵢ: a rule that has found its point leaves the merge nothing to choose."""
    row = np.append(v, 1.0 - v.sum())
    return ballot._replace(rows=np.where((ballot.weights > 0)[:, None], row, ballot.rows))


def _picked(scores: np.ndarray, keep: np.ndarray, count: int) -> np.ndarray:
    chosen = np.argsort(np.where(keep, scores, np.inf), kind="stable")[:count]
    return np.where(np.isin(np.arange(len(keep)), chosen), 1.0 / count, 0.0)


def _enough(name: str, ballot: Ballot, f: int, least: int) -> np.ndarray:
    keep = ballot.weights > 0
    if keep.sum() < least:
        raise ConfigError(f"{name} with f = {f} needs at least {least} rows that count; got {int(keep.sum())}.")
    return keep


def _check(f: int) -> None:
    if f < 0:
        raise ConfigError(f"f is a number of nodes, 0 or more; got {f}.")


@jax.jit
def _median_weights(gram: jax.Array, keep: jax.Array) -> jax.Array:
    longest = jnp.sqrt(jnp.where(keep, jnp.diagonal(gram), 0.0).max())
    return mixing.geometric_median(jnp.diag(keep.astype(gram.dtype)), gram, keep, mixing.FLOOR * longest)


@partial(jax.jit, static_argnames="steps")
def _clipped_mean(gram: jax.Array, keep: jax.Array, *, steps: int) -> jax.Array:
    identity, m = jnp.eye(len(keep), dtype=gram.dtype), keep.sum()

    def step(_: int, v: jax.Array) -> jax.Array:
        distance = mixing.distances(identity, v, gram)
        tau = mixing.order_statistic(distance, keep, (m + 1) // 2)
        factor = jnp.where(keep, jnp.minimum(1.0, tau / jnp.maximum(distance, 1e-200)), 0.0) / m.astype(gram.dtype)
        return v + factor - factor.sum() * v

    return jax.lax.fori_loop(0, steps, step, jnp.zeros(len(keep), gram.dtype))
