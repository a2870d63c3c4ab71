"""No domain left behind: the mixture weights whose worst domain is best.

    min_w max_d  f_d(w) + Ω(w) = max_v min_w  Σ v_d f_d(w) + Ω(w),    f_d the mixture loss of domain d, v on the simplex

Convex in w and linear in v. The maximum is smoothed, τ log Σ exp(f_d/τ), and τ goes to 0; for the v = softmax(f/τ) that
belongs to w the gap of `Σ v_d f_d` bounds the right-hand side from below, so at any time

    saddle gap(w) = max_d f_d(w) − Σ v_d f_d(w) + gap_v(w) ≥ value − optimum
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from capibara.consensus.convex import jensen_gap, mixture_loss, resolution
from capibara.consensus.simplex import Penalty, Smooth, Solution, linear_gap, minimise
from capibara.errors import ConfigError

SMOOTHING = tuple(10.0**-k for k in range(1, 10))
"""Temperatures τ; a maximum over D domains is smoothed by at most τ log D. Below 1e-9 softmax(f/τ) is rounding."""


class Saddle(NamedTuple):
    """Attributes:
    solution: Weights; its value is that of the worst domain and its gap the saddle gap.
    domains: float64[D] what each domain counts at the saddle point, v.
    losses: float64[D] loss of each domain.
    """

    solution: Solution
    domains: np.ndarray
    losses: np.ndarray


def minimax(
    logs: np.ndarray,
    tokens: np.ndarray,
    domain: np.ndarray,
    penalty: Penalty,
    *,
    max_iterations: int = 100,
    tolerance: float = 1e-8,
) -> Saddle:
    """Weights for the worst of D domains.

    Tolerates: useless models, as the mixture problem does; domains of very different size, which count alike.
    Cost: a Newton step of the mixture problem, about 5 a temperature.
    Fails when: a domain is noise that no model predicts: it then is the worst and decides alone.

    Args:
      logs: float[rows, M] log-probabilities of the targets.
      tokens: float[rows] what a row counts within its domain.
      domain: int[rows], 0 … D−1, each at least once.
      penalty: Ω.
      max_iterations: Newton steps of all temperatures together; the gap is valid wherever they stop.
      tolerance: Saddle gap at which it stops.

    Raises:
      ConfigError: If a domain has no row.
    """
    counts = np.bincount(domain)
    if not counts.all():
        raise ConfigError(f"Domain {int(np.argmin(counts))} has no target; leave it out.")
    parts = [mixture_loss(logs[domain == d], tokens[domain == d]) for d in range(len(counts))]
    w, steps, lower = penalty.prior, 0, -np.inf
    best: Solution | None = None
    chosen, losses = np.full(len(parts), 1 / len(parts)), np.zeros(len(parts))
    for temperature in SMOOTHING:
        found = minimise(
            _smoothed(parts, temperature),
            penalty,
            np.maximum(w, 1e-9) / np.maximum(w, 1e-9).sum() if penalty.name == "kl" else w,
            max_iterations=max_iterations - steps,
            tolerance=max(temperature / 10, tolerance / 10),
        )
        w, steps = found.weights, steps + found.iterations
        each = [part.derivatives(w) for part in parts]
        now = np.array([one[0] for one in each])
        v = _soft(now, temperature)
        slope = v @ np.stack([one[1] for one in each])
        below = linear_gap(w, slope, penalty) if penalty.strength else jensen_gap(w, slope)
        lower = max(lower, float(v @ now) + penalty.value(w) - below)
        value = float(now.max()) + penalty.value(w)
        if best is None or value < best.value:
            best = Solution(w, value, float(now.max()), 0.0, steps, False)
            chosen, losses = v, now
        if best.value - lower <= tolerance or steps >= max_iterations:
            break
    assert best is not None
    gap = max(0.0, best.value - lower)
    solution = best._replace(
        gap=gap + resolution(np.asarray(logs), best.loss), iterations=steps, converged=gap <= tolerance
    )
    return Saddle(solution, chosen, losses)


def _soft(losses: np.ndarray, temperature: float) -> np.ndarray:
    v = np.exp((losses - losses.max()) / temperature)
    return v / v.sum()


def _smoothed(parts: list[Smooth], temperature: float) -> Smooth:
    """τ log Σ exp(f_d/τ): gradient Σ v_d g_d, Hessian Σ v_d H_d + Cov_v(g)/τ."""

    def soft_maximum(losses: np.ndarray) -> float:
        return float(losses.max() + temperature * np.log(np.exp((losses - losses.max()) / temperature).sum()))

    def value(w: np.ndarray) -> float:
        return soft_maximum(np.array([part.value(w) for part in parts]))

    def derivatives(w: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        each = [part.derivatives(w) for part in parts]
        losses, slopes = np.array([one[0] for one in each]), np.stack([one[1] for one in each])
        v = _soft(losses, temperature)
        slope = v @ slopes
        hessian = sum(share * one[2] for share, one in zip(v, each, strict=True))
        apart = slopes - slope
        return soft_maximum(losses), slope, hessian + (apart * (v / temperature)[:, None]).T @ apart

    return Smooth(value, derivatives)
