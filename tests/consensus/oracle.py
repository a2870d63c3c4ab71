"""The default vote written down again from docs/protocol.md, slowly: vectors in float64 NumPy, no Gram matrix.

Nothing here comes from `capibara`. Every row is carried twice, as the vector it is and as the coefficients over the raw
deltas that make it, so that distances are those of vectors and the outcome is an n-vector all the same.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

Rows = list[tuple[np.ndarray, np.ndarray]]
"""Pairs of a vector float64[d] and its coefficients float64[n]."""


class Outcome(NamedTuple):
    """What the vote decided; `merged`, `radius` and `coefficients` are those of the merge that was asked for."""

    coefficients: np.ndarray | None
    merged: np.ndarray
    centre: np.ndarray
    centre_coefficients: np.ndarray
    tau: float
    distance: np.ndarray
    backing: np.ndarray
    before_clipping: dict[int, np.ndarray]
    leash: float


def vote(
    deltas: np.ndarray,
    f: int,
    *,
    weights: np.ndarray | None = None,
    merge_rows: str = "own",
    merge: str = "mean",
    outvote_at: float = 3.0,
    clip_norms: bool = True,
) -> Outcome:
    """Steps 1 to 7 and the leash; `merge` is `mean`, `trimmed_mean` or `median`, weights are sample counts."""
    n = len(deltas)
    weights = np.ones(n) if weights is None else np.asarray(weights, np.float64)
    everyone = [i for i in range(n) if weights[i] > 0]
    raw: Rows = [(deltas[i].astype(np.float64), np.eye(n)[i]) for i in range(n)]
    assert len(everyone) > 2 * f > 0

    mixed, centre, floor = _centre(raw, everyone, f, clip_norms)
    own = {i: _norm(raw[i][0] - centre[0]) for i in everyone}
    m = len(everyone)
    limit = max(outvote_at * _smallest(own.values(), m - f), _smallest(own.values(), m - max(f - (n - m), 0)))
    left = [i for i in everyone if not (own[i] > limit and own[i] > floor)]
    entered = everyone
    if len(left) < len(everyone) and len(left) > 2 * f:
        entered = left
        mixed, centre, floor = _centre(raw, left, f, clip_norms)
        own = {i: _norm(raw[i][0] - centre[0]) for i in everyone}

    equal = len({weights[i] for i in everyone}) == 1
    chosen = mixed if merge == "mean" and merge_rows == "mixed" and equal else {i: raw[i] for i in entered}
    tau, clipped = _clip(chosen, centre, len(entered) - f, floor)
    distance = np.array([own.get(i, np.nan) for i in range(n)])
    backing = np.array([i in left for i in range(n)])
    before = {i: chosen[i][0] for i in entered}
    if merge == "mean":
        share = _capped({i: weights[i] for i in left})
        merged = sum(share[i] * clipped[i][0] for i in left)
        v = sum(share[i] * clipped[i][1] for i in left)
        return Outcome(v, merged, centre[0], centre[1], tau, distance, backing, before, 1.0)
    ordered = np.sort(np.array([clipped[i][0] for i in left]), axis=0)
    m = len(left)
    trim = min(f, (m - 1) // 2) if merge == "trimmed_mean" else (m - 1) // 2
    merged = ordered[trim : m - trim].mean(axis=0)
    strayed = _norm(merged - centre[0])
    leash = 1.0 if strayed <= tau else tau / strayed
    merged = centre[0] + leash * (merged - centre[0])
    return Outcome(None, merged, centre[0], centre[1], tau, distance, backing, before, leash)


def _centre(raw: Rows, kept: list[int], f: int, clip_norms: bool):
    """Steps 2 to 4 over the rows `kept`: the mixed rows, the centre, and the floor on distances."""
    m = len(kept)
    norms = sorted((_norm(raw[i][0]) for i in kept), reverse=True)
    bound = norms[math.floor(2 * f * (m - f) / m)] if clip_norms else norms[0]
    clipped = {}
    for i in kept:
        factor = bound / _norm(raw[i][0]) if _norm(raw[i][0]) > bound else 1.0
        clipped[i] = (factor * raw[i][0], factor * raw[i][1])
    floor = 2.0**-40 * bound

    mixed = {}
    for i in kept:
        away = {j: _norm(clipped[i][0] - clipped[j][0]) for j in kept}
        edge = _smallest(away.values(), m - f)
        slack = 1e-6 * edge + floor
        inside = [j for j in kept if away[j] < edge - slack]
        tied = [j for j in kept if j not in inside and away[j] <= edge + slack]
        share = {j: 1.0 for j in inside} | {j: (m - f - len(inside)) / len(tied) for j in tied}
        mixed[i] = tuple(sum(s * clipped[j][part] for j, s in share.items()) / (m - f) for part in (0, 1))

    centre = tuple(sum(mixed[i][part] for i in kept) / m for part in (0, 1))
    for _ in range(32):
        pull = {i: 1 / max(_norm(mixed[i][0] - centre[0]), floor, 1e-200) for i in kept}
        total = sum(pull.values())
        centre = tuple(sum(pull[i] / total * mixed[i][part] for i in kept) for part in (0, 1))
    return mixed, centre, floor


def _clip(rows: dict, centre, rank: int, floor: float):
    away = {i: _norm(row[0] - centre[0]) for i, row in rows.items()}
    tau = _smallest(away.values(), rank)
    clipped = {}
    for i, row in rows.items():
        factor = tau / away[i] if away[i] > tau and away[i] > floor else 1.0
        clipped[i] = tuple(centre[part] + factor * (row[part] - centre[part]) for part in (0, 1))
    return tau, clipped


def _capped(weights: dict[int, float]) -> dict[int, float]:
    """Normalised, none above 2/m; what is cut off goes to the others in proportion."""
    m, fixed = len(weights), set()
    while True:
        free = {i: w for i, w in weights.items() if i not in fixed}
        rest = 1 - len(fixed) * 2 / m
        share = {i: rest * w / sum(free.values()) for i, w in free.items()} | dict.fromkeys(fixed, 2 / m)
        over = {i for i in free if share[i] > 2 / m * (1 + 1e-12)}
        if not over:
            return share
        fixed |= over


def _norm(x: np.ndarray) -> float:
    biggest = float(np.abs(x).max(initial=0.0))
    return 0.0 if biggest == 0 else biggest * math.sqrt(float(((x / biggest) ** 2).sum()))


def _smallest(values, rank: int) -> float:
    return sorted(values)[rank - 1]
