"""The mixture problem: which weights give M language models the best joint likelihood, and how far from it are these?

    min over the simplex of  f(w) + Ω(w),    f(w) = −Σₜ aₜ log Σᵢ wᵢ pₜᵢ,    pₜᵢ = pᵢ(yₜ | xₜ)

f is convex (−log of a linear function), so a bound on the distance to the global optimum is cheap and always valid:
with cᵢ = Σₜ aₜ pₜᵢ / pₜ(w) and no penalty,  f(w) − min f ≤ log maxᵢ cᵢ  (Jensen), and with one the closed forms of
`capibara.consensus.simplex`. Only the log-probabilities of the targets are needed, M numbers a token.

What the bound says and does not say:
  (i) The gap certifies the surrogate on this validation sample.
  (ii) It does not certify the merged network.
  (iii) The ensemble optimum is not a lower bound for the merge.

References: Cover 1984 (the fixed point), Csiszár & Tusnády 1984 (its monotonicity).
"""

from __future__ import annotations

import numpy as np

from capibara.consensus.simplex import Penalty, Smooth, Solution, gap_of, minimise, no_penalty
from capibara.errors import ConfigError

FLOOR = -100.0
"""Nats. A target that a model thinks impossible counts as this unlikely: a finite price, and e¹⁰⁰ fits in float64."""

ROWS_AT_ONCE = 2**13
"""Rows of one block of the Hessian: its copy stays small however many tokens there are."""

MULTIPLICATIVE_STEPS = 20
"""Fixed-point steps before Newton's: they need no step size and come near the optimum from anywhere."""


def mixture(
    logs: np.ndarray,
    shares: np.ndarray | None = None,
    penalty: Penalty | None = None,
    *,
    max_iterations: int = 100,
    tolerance: float = 1e-9,
) -> Solution:
    """Weights of the best mixture of M models.

    Without a penalty: EM, that is Cover's fixed point w ← w∘c, then projected Newton; with one, projected Newton.

    Tolerates: a model that is no use: its cᵢ is below 1 and its weight 0.
    Cost: a fixed-point step reads the T·M matrix twice; a Newton step takes T·M² products.
    Fails when: a log-probability is NaN or +∞; leave such a model out (`capibara.consensus.evidence` does).

    Args:
      logs: float[T, M] log-probabilities of the targets; below −100 they count as −100.
      shares: float[T] what each row counts, normalised here; equal by default.
      penalty: Ω, see `kl_penalty` and `l2_penalty`; none by default, from equal weights.
      max_iterations: Steps of both kinds together. The gap is valid wherever it stops.
      tolerance: Gap at which it stops.

    Returns:
      Weights with the value and its gap. The gap includes the resolution of the numbers given: with float32
      log-probabilities it is never below about 1e-7 of their size.

    Raises:
      ConfigError: If there is no row or no model, or a number is not finite.

    Example:
      >>> import numpy as np
      >>> found = mixture(np.log([[0.8, 0.1], [0.2, 0.7], [0.8, 0.1]]))
      >>> found.weights.round(3).tolist(), found.gap < 1e-9
      ([0.886, 0.114], True)
    """
    logs = np.asarray(logs)
    if logs.ndim != 2 or 0 in logs.shape:
        raise ConfigError(
            f"The mixture problem needs log-probabilities [targets, models] of at least one of each; got {logs.shape}."
        )
    if np.isnan(logs).any() or (logs == np.inf).any():
        bad = np.flatnonzero((np.isnan(logs) | (logs == np.inf)).any(axis=0)).tolist()
        raise ConfigError(f"Log-probabilities of models {bad} are NaN or infinite; leave these models out.")
    penalty = penalty or no_penalty(np.full(logs.shape[1], 1 / logs.shape[1]))
    if logs.shape[1] != len(penalty.prior):
        raise ConfigError(f"There are {logs.shape[1]} models and {len(penalty.prior)} prior weights; give one each.")
    smooth = mixture_loss(logs, shares)
    w, steps = penalty.prior, 0
    if penalty.strength == 0:
        w, steps = _fixed_point(smooth, penalty, w, min(MULTIPLICATIVE_STEPS, max_iterations), tolerance)
    found = minimise(smooth, penalty, w, max_iterations=max_iterations - steps, tolerance=tolerance)
    return found._replace(gap=found.gap + resolution(logs, found.loss), iterations=found.iterations + steps)


def mixture_loss(logs: np.ndarray, shares: np.ndarray | None = None) -> Smooth:
    """f with its derivatives; the gradient is −c. Arguments as for `mixture`."""
    a = np.full(len(logs), 1.0) if shares is None else np.asarray(shares, np.float64)
    a = a / a.sum()
    p = np.maximum(np.asarray(logs, np.float64), FLOOR)
    most = p.max(axis=1)
    p -= most[:, None]
    np.exp(p, out=p)
    base = float(a @ most)

    def value(w: np.ndarray) -> float:
        return -base - float(a @ np.log(p @ w))

    def gradient(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mixed = p @ w
        return -((a / mixed) @ p), mixed

    def derivatives(w: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        slope, mixed = gradient(w)
        hessian = np.zeros((p.shape[1], p.shape[1]))
        pull = np.sqrt(a) / mixed
        for first in range(0, len(p), ROWS_AT_ONCE):
            block = slice(first, first + ROWS_AT_ONCE)
            scaled = p[block] * pull[block, None]
            hessian += scaled.T @ scaled
        return -base - float(a @ np.log(mixed)), slope, hessian

    return Smooth(value, derivatives, jensen_gap, lambda w: gradient(w)[0])


def jensen_gap(w: np.ndarray, gradient: np.ndarray) -> float:
    """log maxᵢ cᵢ, from the gradient −c: what f(w) is above its minimum at most."""
    return float(np.log(max(-gradient.min(), 1.0)))


def resolution(logs: np.ndarray, loss: float) -> float:
    """What the precision of the given numbers lets no gap go below, in nats."""
    kind = logs.dtype if np.issubdtype(logs.dtype, np.floating) else np.dtype(np.float64)
    return float(np.finfo(kind).eps) * max(1.0, abs(loss))


def _fixed_point(
    smooth: Smooth, penalty: Penalty, w: np.ndarray, steps: int, tolerance: float
) -> tuple[np.ndarray, int]:
    assert smooth.gradient is not None
    for step in range(steps):
        gradient = smooth.gradient(w)
        if gap_of(smooth, penalty, w, gradient) <= tolerance:
            return w, step
        w = w * -gradient
        w = w / w.sum()
    return w, steps
