"""From a ballot to one delta: the rules in order, then the merge, then the leash.

    chain(*rules, merge=…) → Aggregator:   ballot → rule → … → rule → merge → Δ ← c + min(1, τ/‖Δ−c‖)(Δ−c)

A merge that is linear in the rows stays n numbers until its one sum; any other is taken leaf by leaf. The leash holds
wherever a rule gave a centre c and a radius τ, whatever the merge did (docs/protocol.md, merge and leash).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from capibara.consensus.ballot import Aggregator, Ballot, Merge, Place, Rule, Survey, Verdict
from capibara.consensus.row_algebra import cosines, distance_from, draw_to, gram_matrix, materialise, weighted_sum
from capibara.types import PyTree


def chain(*rules: Rule, merge: Merge) -> Aggregator:
    """Rules in order, then the merge, then the leash where a rule gave a centre.

    Cost: one pass over the deltas for the sum of a linear merge and nothing else; otherwise what the merge costs, a
    pass for the cosines and, behind a centre, two for the leash.
    """

    def init(params: PyTree) -> PyTree:
        return tuple(rule.init(params) for rule in rules)

    def apply(ballot: Ballot, state: PyTree, key: Any) -> tuple[PyTree, Verdict, PyTree]:
        entered, raw = ballot.weights > 0, ballot.gram
        states, info = [], {}
        for rule, one in zip(rules, state, strict=True):
            ballot, one, more = rule.apply(ballot, one, key)
            states.append(one)
            info |= more
        own = info.pop("own", None)
        if own is not None and not merge.mean:
            ballot, info = ballot._replace(rows=own.rows), info | {"tau": own.tau, "clipped": own.clipped}
        backing = entered & info.get("backing", ballot.weights > 0)
        delta, v, leash = merge_ballot(ballot, merge, info.get("centre"), info.get("tau"), key)
        verdict = Verdict(
            backing=backing,
            coefficients=v,
            coefficient_start=None if v is None else max(0.0, 1.0 - float(v.sum())),
            centre=info.get("centre"),
            tau=info.get("tau"),
            distance=info.get("distance"),
            clipped=info.get("clipped"),
            leash=leash,
            cosine=cosines(ballot.stack, delta, v, raw),
            norms=np.sqrt(np.diagonal(raw)),
        )
        return delta, verdict, tuple(states)

    least = max((rule.least for rule in rules), default=1)
    return Aggregator("+".join([*(rule.name for rule in rules), merge.name]), init, apply, least, merge.score)


def merge_ballot(
    ballot: Ballot, merge: Merge, centre: np.ndarray | None, tau: float | None, key: Any = None
) -> tuple[PyTree, np.ndarray | None, float | None]:
    """The merge of a ballot's rows, leashed.

    Args:
      ballot: As the rules left it.
      merge: What is done with the rows that count.
      centre: c, float64[n] over the raw deltas; None where no rule gave one.
      tau: The radius of the leash; None for no leash.
      key: Typed PRNG key, for merges that draw lots.

    Returns:
      The merged delta; its coefficients float64[n] over the raw deltas, None where the merge is not linear; and the
      factor by which it was drawn to c, None where there is no leash.
    """
    keep = ballot.weights > 0
    if merge.weights is not None:
        given = np.where(keep, ballot.weights, 0.0)
        if merge.score in ballot.scores and (keep & (ballot.scores[merge.score] > 0)).any():
            given = np.where(keep, ballot.scores[merge.score], 0.0)
        w = np.where(keep, merge.weights(given), 0.0)
        v = w @ ballot.rows[:, : len(w)]
        return weighted_sum(v, ballot.stack, ballot.gram), v, None if centre is None else 1.0
    if merge.combine is not None and not merge.per_tensor:
        v = _combined(ballot, merge.combine, ballot.gram)
        factor = None
        if centre is not None and tau is not None:
            gap = v - centre
            factor = _leash(float(np.sqrt(max(gap @ ballot.gram @ gap, 0.0))), tau)
            v = v if factor == 1.0 else centre + factor * gap
        return weighted_sum(v, ballot.stack, ballot.gram), v, factor
    delta = _by_leaf(ballot, merge, key)
    if centre is None or tau is None:
        return delta, None, None
    middle = weighted_sum(centre, ballot.stack, ballot.gram)
    factor = _leash(distance_from(delta, middle), tau)
    return (delta if factor == 1.0 else draw_to(middle, delta, factor)), None, factor


def capped(weights: np.ndarray) -> np.ndarray:
    """Weights normalised to 1 of which none is above 2/m; what is cut is shared by the others in proportion.

    A node that claims many samples would otherwise own the merge. m counts the weights above 0.
    """
    w = weights / weights.sum()
    most = 2.0 / max((w > 0).sum(), 1)
    for _ in range(len(w)):
        over = w > most * (1 + 1e-12)
        if not over.any():
            break
        fixed = over | (w == most)
        free = ~fixed & (w > 0)
        w = np.where(fixed, most, w)
        if free.any():
            w = np.where(free, w * (1.0 - w[fixed].sum()) / w[free].sum(), w)
    return w / w.sum()


def _leash(strayed: float, tau: float) -> float:
    return 1.0 if strayed <= tau else tau / strayed


def _combined(ballot: Ballot, combine: Callable[[np.ndarray, np.ndarray], np.ndarray], gram: np.ndarray) -> np.ndarray:
    """float64[n] over the raw deltas of what `combine` makes of the rows that count; `gram` is that of the deltas."""
    chosen = np.flatnonzero(ballot.weights > 0)
    part = ballot.rows[chosen][:, : len(gram)]
    return combine(capped(ballot.weights[chosen]), part @ gram @ part.T) @ part


def _by_leaf(ballot: Ballot, merge: Merge, key: Any) -> PyTree:
    keep = ballot.weights > 0

    def rows(leaf: jax.Array) -> jax.Array:
        return materialise(ballot.rows, keep, leaf, ballot.gram)

    if merge.leaf is not None:
        by_coordinate = merge.leaf
        return jax.tree.map(lambda leaf: by_coordinate(rows(leaf)), ballot.stack)
    leaves, structure = jax.tree.flatten(ballot.stack)
    if merge.combine is not None:
        used, merged = (ballot.rows[keep][:, : len(keep)] != 0).any(axis=0), []
        for leaf in leaves:
            gram = gram_matrix(leaf, used)
            merged.append(weighted_sum(_combined(ballot, merge.combine, gram), leaf, gram))
    else:
        assert merge.prepare is not None
        chosen = np.flatnonzero(keep)
        survey = Survey(capped(ballot.weights[chosen]), chosen, lambda: map(rows, leaves), key)
        one = merge.prepare(survey)
        merged = [one(rows(leaf), Place(number)) for number, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, merged)
