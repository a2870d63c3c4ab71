"""Convex functions of merge weights: minimisation over the simplex in float64, with a bound on how far off it is.

    F(w) = f(w) + Ω(w),   Σw = 1, w ≥ 0        gap(w) = ⟨g, w⟩ + Ω(w) − min_s (⟨g, s⟩ + Ω(s)) ≥ F(w) − min F,  g = ∇f(w)

The gap needs f convex and nothing else; it holds at every iterate, so stopping early costs accuracy, not honesty.
Weights are short vectors on the host: NumPy, unlike the proximal operators on trees in `capibara.transforms.prox`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

ARMIJO = 1e-4
IDLE = 10
"""Steps in a row that do not lessen the gap before the search ends: only rounding is left."""

MANY_LEAVE = 0.2
"""Share of a face beyond which its coordinates do not leave one by one: the search begins at a corner and adds."""

TO_THE_EDGE = 0.99
"""Share of the way to the boundary that one step may go where the penalty has no gradient there."""


class Penalty(NamedTuple):
    """A convex pull Ω towards prior weights.

    Attributes:
      name: `none`, `kl` or `l2`.
      strength: λ.
      prior: float64[M], where an optimisation starts as well.
      value: `(w) -> Ω(w)`.
      gradient: `(w) -> float64[M]`.
      curvature: `(w) -> float64[M]`, the diagonal of its Hessian, which has no other entries.
      linear_minimum: `(g) -> min over the simplex of ⟨g, s⟩ + Ω(s)`, in closed form.
    """

    name: str
    strength: float
    prior: np.ndarray
    value: Callable[[np.ndarray], float]
    gradient: Callable[[np.ndarray], np.ndarray]
    curvature: Callable[[np.ndarray], np.ndarray]
    linear_minimum: Callable[[np.ndarray], float]


class Smooth(NamedTuple):
    """A convex f with its derivatives.

    Attributes:
      value: `(w) -> f(w)`.
      derivatives: `(w) -> (f, gradient float64[M], Hessian float64[M, M])`.
      gap: `(w, gradient) -> bound on f(w) − min f`, where f alone is minimised: sharper than ⟨g, w⟩ − min g.
      gradient: `(w) -> gradient`, where that is cheaper than the Hessian.
    """

    value: Callable[[np.ndarray], float]
    derivatives: Callable[[np.ndarray], tuple[float, np.ndarray, np.ndarray]]
    gap: Callable[[np.ndarray, np.ndarray], float] | None = None
    gradient: Callable[[np.ndarray], np.ndarray] | None = None


class Solution(NamedTuple):
    """Weights and what is certain of them.

    Attributes:
      weights: float64[M].
      value: F(weights), penalty included.
      loss: f(weights), without the penalty.
      gap: Bound on value − min F; meaningful where f is convex.
      iterations: Steps taken.
      converged: Whether the gap came below the tolerance.
    """

    weights: np.ndarray
    value: float
    loss: float
    gap: float
    iterations: int
    converged: bool


def no_penalty(prior: np.ndarray) -> Penalty:
    """Ω = 0; the prior is only where one starts."""
    zeros = np.zeros(len(prior))
    return Penalty("none", 0.0, prior, lambda w: 0.0, lambda w: zeros, lambda w: zeros, lambda g: float(g.min()))


def kl_penalty(strength: float, prior: np.ndarray) -> Penalty:
    """Ω = λ Σ wᵢ log(wᵢ/uᵢ), u > 0; min_s ⟨g, s⟩ + Ω(s) = −λ log Σ uᵢ exp(−gᵢ/λ)."""

    def value(w: np.ndarray) -> float:
        used = w > 0
        return strength * float(w[used] @ np.log(w[used] / prior[used]))

    def linear_minimum(g: np.ndarray) -> float:
        least = g.min()
        return float(least - strength * np.log(prior @ np.exp(-(g - least) / strength)))

    return Penalty(
        "kl",
        strength,
        prior,
        value,
        lambda w: strength * (np.log(w / prior) + 1),
        lambda w: strength / w,
        linear_minimum,
    )


def l2_penalty(strength: float, prior: np.ndarray) -> Penalty:
    """Ω = λ/2 ‖w − u‖²; the linear minimum lies at the projection of u − g/λ onto the simplex."""

    def value(w: np.ndarray) -> float:
        return 0.5 * strength * float((w - prior) @ (w - prior))

    def linear_minimum(g: np.ndarray) -> float:
        s = project(prior - g / strength)
        return float(g @ s) + value(s)

    everywhere = np.full(len(prior), strength)
    return Penalty("l2", strength, prior, value, lambda w: strength * (w - prior), lambda w: everywhere, linear_minimum)


def project(x: np.ndarray) -> np.ndarray:
    """The nearest point of the simplex, by sorting; Duchi et al. 2008."""
    descending = np.sort(x)[::-1]
    excess = (np.cumsum(descending) - 1) / np.arange(1, len(x) + 1)
    w = np.maximum(x - excess[np.flatnonzero(descending > excess)[-1]], 0.0)
    return w / w.sum()


def linear_gap(w: np.ndarray, gradient: np.ndarray, penalty: Penalty) -> float:
    """The gap of the module's head, from f's gradient at w; never below 0."""
    return max(0.0, float(gradient @ w) + penalty.value(w) - penalty.linear_minimum(gradient))


def minimise(
    smooth: Smooth, penalty: Penalty, start: np.ndarray, *, max_iterations: int = 100, tolerance: float = 1e-9
) -> Solution:
    """Projected Newton: each step goes towards the exact minimum over the simplex of F's quadratic model.

    Cost: one Hessian a step, O(M³) for the model's minimum, one value for each halving of the step.
    Fails when: f is not convex; the gap then bounds nothing.
    """
    w, lower, iterations, least, idle = start, -np.inf, 0, np.inf, 0
    while True:
        loss, gradient, hessian = smooth.derivatives(w)
        value = loss + penalty.value(w)
        lower = max(lower, value - gap_of(smooth, penalty, w, gradient))
        idle, least = (0, value - lower) if value - lower < least else (idle + 1, least)
        if value - lower <= tolerance or iterations >= max_iterations or idle == IDLE:
            break
        moved = _newton_step(smooth, penalty, w, value, gradient, hessian)
        if moved is None:
            break
        w, iterations = moved, iterations + 1
    if penalty.name == "kl":
        w, loss, value, lower = _without_dust(smooth, penalty, w, (loss, value, lower))
    return Solution(w, value, loss, max(0.0, value - lower), iterations, value - lower <= tolerance)


def gap_of(smooth: Smooth, penalty: Penalty, w: np.ndarray, gradient: np.ndarray) -> float:
    """The sharpest bound there is on F(w) − min F."""
    if penalty.strength == 0 and smooth.gap is not None:
        return smooth.gap(w, gradient)
    return linear_gap(w, gradient, penalty)


def quadratic_minimum(hessian: np.ndarray, gradient: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The x of the simplex with the least ⟨g, x − start⟩ + ½ (x − start)ᵀH(x − start), H positive semidefinite.

    An active set: minimise over the face of the positive coordinates, stop at its edge, free the coordinate with the
    most negative reduced gradient. All is reckoned from `start`, so that near the optimum nothing cancels. A ridge of
    1e-12 of each coordinate's own size (they may differ by 1e10 under KL) decides between equal minima.
    """
    spread = max(float(np.ptp(gradient)), 1e-300)
    h = hessian + 1e-12 * np.diag(np.diagonal(hessian) + spread)
    x, free, from_corner = start.copy(), start > 0, False
    for _ in range(4 * len(x) + 8):
        while True:
            face = np.flatnonzero(free)
            reduced = gradient + h @ (x - start)
            target = x[face] + _face_step(h[np.ix_(face, face)], reduced[face])
            if not from_corner and (target <= 0).sum() > MANY_LEAVE * len(face):
                from_corner, best = True, int(np.argmin(gradient - h @ start + 0.5 * np.diagonal(h)))
                x, free = np.eye(len(x))[best], np.arange(len(x)) == best
                continue
            if target.min() > 0:
                x = np.zeros_like(x)
                x[face] = target / target.sum()
                break
            at = x[face]
            down = target <= 0
            reach = at[down] / np.maximum(at[down] - target[down], 1e-300)
            x[face] = np.maximum(at + reach.min() * (target - at), 0.0)
            out = face[down][reach <= reach.min()]
            x[out], free[out] = 0.0, False
            if not free.any():  # rounding only
                return start
        reduced = gradient + h @ (x - start)
        rounding = 1e-15 * float((np.abs(gradient) + np.abs(h) @ np.abs(x - start)).max())
        entering = int(np.argmin(reduced))
        if free[entering] or reduced[entering] >= reduced @ x - rounding:
            break
        free[entering] = True
    return x / x.sum()


def _face_step(h: np.ndarray, reduced: np.ndarray) -> np.ndarray:
    """The step δ with Σδ = 0 to the minimum of a face, signs free; scaled so that H has a diagonal of ones."""
    m, scale = len(reduced), 1 / np.sqrt(np.diagonal(h))
    border = scale / scale.max()
    system = np.zeros((m + 1, m + 1))
    system[:m, :m], system[m, :m], system[:m, m] = h * scale * scale[:, None], border, border
    right = np.append((reduced.min() - reduced) * scale, 0.0)
    try:
        return scale * np.linalg.solve(system, right)[:m]
    except np.linalg.LinAlgError:
        return scale * np.linalg.lstsq(system, right, rcond=None)[0][:m]


def _newton_step(
    smooth: Smooth, penalty: Penalty, w: np.ndarray, value: float, gradient: np.ndarray, hessian: np.ndarray
) -> np.ndarray | None:
    slope = gradient + penalty.gradient(w)
    curved = hessian + np.diag(penalty.curvature(w))
    direction = quadratic_minimum(curved, slope, w) - w
    descent = float((slope - slope @ w) @ direction)  # Σ direction = 0 but for rounding, which a constant would magnify
    if not descent < 0:
        return None
    step = 1.0
    if penalty.name == "kl" and (down := direction < 0).any():
        step = min(1.0, TO_THE_EDGE * float((-w[down] / direction[down]).min()))
    rounding = 1e-14 * max(1.0, abs(value))  # of a sum in float64: near the end Newton gains less than this
    for _ in range(50):
        candidate = np.maximum(w + step * direction, 0.0)
        candidate /= candidate.sum()
        if smooth.value(candidate) + penalty.value(candidate) <= value + ARMIJO * step * descent + rounding:
            return candidate
        step /= 2
    return None


def _without_dust(
    smooth: Smooth, penalty: Penalty, w: np.ndarray, found: tuple[float, float, float]
) -> tuple[np.ndarray, float, float, float]:
    """Weights that can only be rounding (below 1e-9 of 1/M) become 0 where that leaves the value as good."""
    loss, value, lower = found
    kept = np.where(w < 1e-9 / len(w), 0.0, w)
    kept /= kept.sum()
    again = smooth.value(kept)
    if again + penalty.value(kept) <= value + 1e-9:
        return kept, again, again + penalty.value(kept), lower
    return w, loss, value, lower
