"""Merge weights for a metric that has no gradient, such as accuracy: line searches over one model's share at a time.

    w ← (1 − α) w + α eᵢ,  from wᵢ = 0 to wᵢ = 1 by golden section,  i in turn

An evaluation that is no better than w is thrown away, so the metric never gets worse. There is no certificate: the
label is `none`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

GOLDEN = (np.sqrt(5) - 1) / 2


class Search(NamedTuple):
    """Attributes:
    weights: The best that was seen.
    value: The metric there.
    evaluations: How often the metric was asked.
    """

    weights: np.ndarray
    value: float
    evaluations: int


def search(
    metric: Callable[[np.ndarray], float], start: np.ndarray, *, max_evaluations: int = 100, line: int = 6
) -> Search:
    """Minimises a metric over the simplex.

    Tolerates: steps and plateaus of the metric; NaN, which counts as the worst.
    Cost: `max_evaluations` evaluations at most, `line` a model and sweep. Stops after a sweep without improvement.
    Fails when: the metric has several basins along a line; a golden section sees one.

    Args:
      metric: `(weights float64[M]) -> number`, lower is better; asked once for each point.
      start: Where to begin; its value is asked first.
      max_evaluations: ≥ 1.
      line: Evaluations of one line search.
    """
    count = 0

    def ask(w: np.ndarray) -> float:
        nonlocal count
        count += 1
        value = float(metric(w))
        return value if np.isfinite(value) else np.inf

    best, value = start, ask(start)
    improved = True
    while improved and count < max_evaluations:
        improved = False
        for i in range(len(start)):
            budget = min(line, max_evaluations - count)
            w, found = _golden(ask, best, np.eye(len(start))[i], budget)
            if found < value:
                best, value, improved = w, found, True
    return Search(best, value, count)


def _golden(
    ask: Callable[[np.ndarray], float], w: np.ndarray, corner: np.ndarray, budget: int
) -> tuple[np.ndarray, float]:
    """The best of at most `budget` points on the line through w and a corner, across the simplex."""
    own = float(w @ corner)
    low, high, seen = -own / (1 - own) if own < 1 else 0.0, 1.0, dict[float, float]()

    def point(alpha: float) -> np.ndarray:
        moved = np.maximum((1 - alpha) * w + alpha * corner, 0.0)
        return moved / moved.sum()

    def at(alpha: float) -> float:
        if alpha not in seen:
            seen[alpha] = ask(point(alpha)) if len(seen) < budget else np.inf
        return seen[alpha]

    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    while len(seen) < budget:
        if at(left) <= at(right):
            high, right = right, left
            left = high - GOLDEN * (high - low)
        else:
            low, left = left, right
            right = low + GOLDEN * (high - low)
    if not seen:
        return w, np.inf
    alpha = min(seen, key=lambda key: seen[key])
    return point(alpha), seen[alpha]
