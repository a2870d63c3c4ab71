"""Attacks on what a node returns. m and s are the mean and the standard deviation of the honest rows, by coordinate.

Each says what it needs to know, what it beats, and what its strength means. Where a rule is said to be beaten, the
measurement is in docs/quality.md or the source.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from capibara.consensus.attacks.base import Attack, AttackView, honest_deviation, honest_mean, own_rows, replace_rows
from capibara.consensus.row_algebra import gram_matrix
from capibara.errors import ConfigError
from capibara.types import PyTree


def sign_flip(strength: float = 1.0) -> Attack:
    """Submits −strength · own delta: honest training, sent backwards (Allen-Zhu et al. 2021, sign flipping).

    Needs: nothing but its own delta.
    Beats: the median, and the trimmed mean at f/n = .4, on unequal data.
    Strength: the factor; 1.
    """
    return _of_own("sign_flip", strength, lambda leaf: -np.float32(strength) * leaf)


def scale(strength: float = 10.0) -> Attack:
    """Submits strength · own delta; −10 is the gross liar of `capibara demo`.

    Needs: nothing but its own delta.
    Beats: the mean.
    Strength: the factor; 10.
    """
    return _of_own("scale", strength, lambda leaf: np.float32(strength) * leaf)


def nan() -> Attack:
    """Submits NaN everywhere.

    Needs: nothing.
    Beats: whatever does not look before it sums.
    Strength: none.
    """
    return _of_own("nan", None, lambda leaf: jnp.full_like(leaf, jnp.nan))


def gaussian(strength: float = 10.0) -> Attack:
    """Submits noise of length strength · ‖m‖, drawn anew by every hostile node (Blanchard et al. 2017, the Gaussian
    attack).

    Needs: the length of m.
    Beats: the mean.
    Strength: the length in units of ‖m‖; 10.
    """

    def forge(view: AttackView, state: PyTree, key: Any) -> tuple[PyTree, PyTree]:
        noise = _noise(honest_mean(view), np.float32(strength), jax.random.split(key, len(view.hostile)))
        return replace_rows(view.stack, view.hostile, noise), state

    return Attack(_named("gaussian", strength), forge=forge)


def alie(strength: float | None = None) -> Attack:
    """Submits m − z·s: a little is enough (Baruch et al. 2019, preventing convergence).

    With h = ⌊n/2⌋ + 1 − (hostile nodes) helpers needed for a majority, the largest shift that still looks ordinary is
    z = Φ⁻¹((honest − h) / honest); at least 0.3, since on few nodes it would be 0.

    Needs: m and s.
    Beats: the mean and Krum, with its strength searched (`optimised`); weak at its own z.
    Strength: z; the z above.
    """

    def forge(view: AttackView, state: PyTree, key: Any) -> tuple[PyTree, PyTree]:
        z = usual_shift(len(view.honest), len(view.hostile)) if strength is None else strength
        mean = honest_mean(view)
        return shifted(view, mean, honest_deviation(view, mean), z), state

    return Attack(_named("alie", strength), forge=forge)


def ipm(strength: float = 0.1) -> Attack:
    """Submits −ε·m: the inner product of the merge with m shrinks or turns (Xie et al. 2020, fall of empires).

    Needs: m.
    Beats: Krum and the geometric median; with ε searched the strongest on most robust rules.
    Strength: ε; 0.1.
    """

    def forge(view: AttackView, state: PyTree, key: Any) -> tuple[PyTree, PyTree]:
        return reversed_mean(view, honest_mean(view), strength), state

    return Attack(_named("ipm", strength), forge=forge)


def min_max(strength: float | None = None) -> Attack:
    """Submits m − γ·s, γ as large as hides it (Shejwalkar & Houmansadr 2021, Min-Max with perturbation −s).

    The largest γ at which no honest row is further away than the two honest rows furthest from each other, in closed
    form from the Gram matrix, where the paper halves intervals.

    Needs: all honest deltas.
    Beats: rules that judge by distance: Krum, multi-Krum, Bulyan.
    Strength: γ itself; the γ above.
    """

    def forge(view: AttackView, state: PyTree, key: Any) -> tuple[PyTree, PyTree]:
        mean = honest_mean(view)
        deviation = honest_deviation(view, mean)
        return shifted(view, mean, deviation, _largest_shift(view, mean, deviation, strength)), state

    return Attack(_named("min_max", strength), forge=forge)


def mimic(strength: float = 0) -> Attack:
    """All submit, to the bit, the delta of the same honest node (Karimireddy et al. 2022, mimic).

    That node's data then count 1 + (hostile nodes) times.

    Needs: one honest delta.
    Beats: rules that trust agreement, a little, on unequal data.
    Strength: which of the honest nodes, counted from 0 and modulo their number; 0.

    Raises:
      ConfigError: If the strength is no whole number.
    """
    if strength != int(strength):
        raise ConfigError(f"The strength of the attack 'mimic' counts honest nodes; got {strength:g}. Write mimic:0.")

    def forge(view: AttackView, state: PyTree, key: Any) -> tuple[PyTree, PyTree]:
        chosen = view.honest[int(strength) % len(view.honest)]
        return replace_rows(view.stack, view.hostile, jax.tree.map(lambda leaf: leaf[chosen], view.stack)), state

    return Attack(_named("mimic", strength), forge=forge)


def copy() -> Attack:
    """Each submits, to the bit, the delta of an honest node of its own: a free rider.

    The k-th hostile node copies the k-th honest one, modulo their number, so that digests repeat within a round.

    Needs: the honest deltas.
    Beats: nothing; it does no work and is recorded under `duplicates`.
    Strength: none.
    """

    def forge(view: AttackView, state: PyTree, key: Any) -> tuple[PyTree, PyTree]:
        chosen = np.array([view.honest[k % len(view.honest)] for k in range(len(view.hostile))])
        return replace_rows(view.stack, view.hostile, jax.tree.map(lambda leaf: leaf[chosen], view.stack)), state

    return Attack("copy", forge=forge)


def stale() -> Attack:
    """Trains once and submits its own first delta in every later round: a free rider whose digest repeats.

    Needs: nothing but its own delta.
    Beats: whatever does not remember digests; a repeated one has the reason `stale`.
    Strength: none.
    """

    def init(zeros: PyTree, hostile: tuple[int, ...]) -> PyTree:
        rows = jax.tree.map(lambda leaf: jnp.zeros((len(hostile), *leaf.shape), leaf.dtype), zeros)
        return {"first": rows, "seen": jnp.zeros((), jnp.int32)}

    def forge(view: AttackView, state: PyTree, key: Any) -> tuple[PyTree, PyTree]:
        first = state["seen"] == 0
        rows = jax.tree.map(lambda old, new: jnp.where(first, new, old), state["first"], own_rows(view))
        return replace_rows(view.stack, view.hostile, rows), {"first": rows, "seen": state["seen"] + 1}

    return Attack("stale", init=init, forge=forge)


def usual_shift(num_honest: int, num_hostile: int) -> float:
    """ALIE's z for n = honest + hostile nodes; at least 0.3."""
    helpers = (num_honest + num_hostile) // 2 + 1 - num_hostile
    share = (num_honest - helpers) / num_honest
    return max(NormalDist().inv_cdf(share), 0.3) if 0 < share < 1 else 0.3


def shifted(view: AttackView, mean: PyTree, deviation: PyTree, z: float) -> PyTree:
    """The stack whose hostile rows are m − z·s."""
    row = jax.tree.map(lambda m, s: m - np.float32(z) * s, mean, deviation)
    return replace_rows(view.stack, view.hostile, row)


def reversed_mean(view: AttackView, mean: PyTree, strength: float) -> PyTree:
    """The stack whose hostile rows are −strength · m."""
    return replace_rows(view.stack, view.hostile, jax.tree.map(lambda m: -np.float32(strength) * m, mean))


def _largest_shift(view: AttackView, mean: PyTree, deviation: PyTree, strength: float | None) -> float:
    """γ: every honest row i asks for ‖m − Δᵢ‖² − 2γ⟨m − Δᵢ, s⟩ + γ²‖s‖² ≤ D², D the honest diameter."""
    if strength is not None:
        return strength
    h, honest = len(view.honest), np.array(view.honest)
    rows = jax.tree.map(
        lambda leaf, m, s: jnp.concatenate([leaf[honest], m[None], s[None]]), view.stack, mean, deviation
    )
    gram = gram_matrix(rows, np.ones(h + 2))
    squares = np.diagonal(gram)
    widest = (squares[:h, None] + squares[None, :h] - 2 * gram[:h, :h]).max()
    a = squares[h + 1]
    if a == 0:
        return 0.0
    b = -2 * (gram[h, h + 1] - gram[:h, h + 1])
    c = squares[h] - 2 * gram[:h, h] + squares[:h] - widest
    largest = (-b + np.sqrt(np.maximum(b * b - 4 * a * c, 0.0))) / (2 * a)
    return float(max(largest.min(), 0.0))


@jax.jit
def _noise(mean: PyTree, strength: jax.Array, keys: jax.Array) -> PyTree:
    """One row per key, as long as strength · mean."""
    length = jnp.abs(strength) * optax.tree.norm(mean)

    def row(key: jax.Array) -> PyTree:
        drawn = optax.tree.random_like(key, mean)
        return jax.tree.map(lambda leaf: leaf * (length / optax.tree.norm(drawn)), drawn)

    return jax.lax.map(row, keys)


def _of_own(name: str, strength: float | None, change: Callable[[jax.Array], jax.Array]) -> Attack:
    def forge(view: AttackView, state: PyTree, key: Any) -> tuple[PyTree, PyTree]:
        return replace_rows(view.stack, view.hostile, jax.tree.map(change, own_rows(view))), state

    return Attack(_named(name, strength), forge=forge)


def _named(name: str, strength: float | None) -> str:
    return name if strength is None else f"{name}:{strength:g}"
