"""Attacks on what a node returns. m and s are the mean and the standard deviation of the honest rows."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from capibara.consensus.attacks.base import Attack, AttackView, honest_deviation, honest_mean, replace_rows
from capibara.consensus.ballot import gram_matrix
from capibara.types import PyTree


def sign_flip(strength: float = 1.0) -> Attack:
    """Submits −strength · own delta: honest training, sent backwards. Needs nothing. Beats the median at f/n = .4."""
    return _of_own("sign_flip", strength, lambda rows: jax.tree.map(lambda leaf: -strength * leaf, rows))


def scale(strength: float = 10.0) -> Attack:
    """Submits strength · own delta; −10 is the gross liar of the demo. Needs nothing. Beats the mean."""
    return _of_own("scale", strength, lambda rows: jax.tree.map(lambda leaf: strength * leaf, rows))


def gaussian(strength: float = 10.0) -> Attack:
    """Submits noise of length strength · ‖m‖. Needs m. Beats the mean."""

    def forge(view: AttackView, state: PyTree, key: Any) -> tuple[PyTree, PyTree]:
        length = strength * optax.global_norm(honest_mean(view))
        leaves, structure = jax.tree.flatten(view.stack)
        noise = [
            jax.random.normal(k, (len(view.hostile), *leaf.shape[1:]))
            for k, leaf in zip(jax.random.split(key, len(leaves)), leaves, strict=True)
        ]
        norms = jnp.sqrt(sum(jnp.einsum("nd,nd->n", x.reshape(len(x), -1), x.reshape(len(x), -1)) for x in noise))
        scaled = [x * (length / norms).reshape(-1, *[1] * (x.ndim - 1)) for x in noise]
        return replace_rows(view.stack, view.hostile, jax.tree.unflatten(structure, scaled)), state

    return Attack(_named("gaussian", strength), forge=forge)


def alie(strength: float | None = None) -> Attack:
    """Submits m − z·s, z = strength, or the largest shift that still looks ordinary (Baruch et al. 2019, Alg. 3).

    z = max(Φ⁻¹((n−f−h)/(n−f)), 0.3) with h = ⌊n/2⌋ + 1 − f. Needs m and s. Beats the mean and Krum.
    """

    def forge(view: AttackView, state: PyTree, key: Any) -> tuple[PyTree, PyTree]:
        z = usual_shift(len(view.honest), len(view.hostile)) if strength is None else strength
        return _shift_by_deviation(view, z), state

    return Attack(_named("alie", strength), forge=forge)


def ipm(strength: float = 0.1) -> Attack:
    """Submits −strength · m, the inner-product manipulation (Xie et al. 2020, §3). Needs m. Beats Krum and medians."""

    def forge(view: AttackView, state: PyTree, key: Any) -> tuple[PyTree, PyTree]:
        return _against_mean(view, strength), state

    return Attack(_named("ipm", strength), forge=forge)


def mimic(strength: float | None = None) -> Attack:
    """All submit the delta of one honest node, number `strength` of the honest (0): Karimireddy et al. 2022, §3.

    Over-represents one node's data. Needs one honest delta. Beats rules that trust agreement.
    """

    def forge(view: AttackView, state: PyTree, key: Any) -> tuple[PyTree, PyTree]:
        chosen = view.honest[int(strength or 0) % len(view.honest)]
        return replace_rows(view.stack, view.hostile, jax.tree.map(lambda leaf: leaf[chosen], view.stack)), state

    return Attack(_named("mimic", strength), forge=forge)


def copy(strength: float | None = None) -> Attack:
    """Each submits, to the bit, the delta of an honest node of its own: a free rider. Needs the honest deltas."""

    def forge(view: AttackView, state: PyTree, key: Any) -> tuple[PyTree, PyTree]:
        chosen = np.array([view.honest[k % len(view.honest)] for k in range(len(view.hostile))])
        return replace_rows(view.stack, view.hostile, jax.tree.map(lambda leaf: leaf[chosen], view.stack)), state

    return Attack("copy", forge=forge)


def nan(strength: float | None = None) -> Attack:
    """Submits NaN everywhere. Needs nothing. Beats every rule that does not check."""
    return _of_own("nan", None, lambda rows: jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), rows))


def stale(strength: float | None = None) -> Attack:
    """Trains once and submits its first delta in every later round: a free rider. Needs nothing."""

    def init(zeros: PyTree, hostile: tuple[int, ...]) -> PyTree:
        rows = jax.tree.map(lambda leaf: jnp.zeros((len(hostile), *leaf.shape), leaf.dtype), zeros)
        return {"first": rows, "seen": jnp.zeros((), jnp.int32)}

    def forge(view: AttackView, state: PyTree, key: Any) -> tuple[PyTree, PyTree]:
        own = jax.tree.map(lambda leaf: leaf[np.array(view.hostile)], view.stack)
        rows = jax.tree.map(lambda old, new: jnp.where(state["seen"] > 0, old, new), state["first"], own)
        return replace_rows(view.stack, view.hostile, rows), {"first": rows, "seen": state["seen"] + 1}

    return Attack("stale", init=init, forge=forge)


def min_max(strength: float | None = None) -> Attack:
    """Submits m − γ·s with the largest γ (or strength) at which its farthest honest row is no farther than two honest
    rows are from each other (Shejwalkar & Houmansadr 2021, §IV-B.2). Needs all honest deltas. Beats distance rules."""

    def forge(view: AttackView, state: PyTree, key: Any) -> tuple[PyTree, PyTree]:
        return _shift_by_deviation(view, _largest_shift(view) if strength is None else strength), state

    return Attack(_named("min_max", strength), forge=forge)


def usual_shift(num_honest: int, num_hostile: int) -> float:
    """ALIE's z for n = honest + hostile nodes; at least 0.3."""
    n = num_honest + num_hostile
    helpers = n // 2 + 1 - num_hostile
    share = (num_honest - helpers) / num_honest
    return max(NormalDist().inv_cdf(share) if 0 < share < 1 else 0.3, 0.3)


def _shift_by_deviation(view: AttackView, z: float) -> PyTree:
    row = jax.tree.map(lambda m, s: m - np.float32(z) * s, honest_mean(view), honest_deviation(view))
    return replace_rows(view.stack, view.hostile, row)


def _against_mean(view: AttackView, strength: float) -> PyTree:
    return replace_rows(
        view.stack, view.hostile, jax.tree.map(lambda m: -np.float32(strength) * m, honest_mean(view))
    )


def _largest_shift(view: AttackView) -> float:
    """γ in closed form: every honest row i gives a quadratic ‖m − Δᵢ‖² − 2γ⟨m − Δᵢ, s⟩ + γ²‖s‖² ≤ D²."""
    mean, deviation = honest_mean(view), honest_deviation(view)
    honest = np.array(view.honest)
    rows = jax.tree.map(
        lambda leaf, m, s: jnp.concatenate([leaf[honest], m[None], s[None]]), view.stack, mean, deviation
    )
    gram = gram_matrix(rows, np.ones(len(honest) + 2))
    h = len(honest)
    squared = np.diagonal(gram)[:h, None] + np.diagonal(gram)[None, :h] - 2 * gram[:h, :h]
    most = squared.max()
    a = gram[h + 1, h + 1]
    if a == 0:
        return 0.0
    b = -2 * (gram[h, h + 1] - gram[:h, h + 1])
    c = gram[h, h] - 2 * gram[:h, h] + np.diagonal(gram)[:h] - most
    roots = (-b + np.sqrt(np.maximum(b * b - 4 * a * c, 0.0))) / (2 * a)
    return float(max(roots.min(), 0.0))


def _of_own(name: str, strength: float | None, change: Any) -> Attack:
    def forge(view: AttackView, state: PyTree, key: Any) -> tuple[PyTree, PyTree]:
        own = jax.tree.map(lambda leaf: leaf[np.array(view.hostile)], view.stack)
        return replace_rows(view.stack, view.hostile, change(own)), state

    return Attack(_named(name, strength), forge=forge)


def _named(name: str, strength: float | None) -> str:
    return name if strength is None else f"{name}:{strength:g}"
