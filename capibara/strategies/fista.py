"""Convex linear models to a proven optimum: accelerated proximal gradient with the true Fenchel duality gap (tier T0).

    P(W) = (1/N) Σ ℓ(xᵢW, yᵢ) + r(W)          D(α) = −(1/N) Σ ℓ*(αᵢ) − r*(−Xᵀα/N)          gap = P − D ≥ P − P*

α = ∇ℓ at W, shrunk until r* is finite. Beck & Teboulle 2009 with the restart of O'Donoghue & Candès 2015; everything in
float64. Data fit into memory as X float64[N, d].
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from capibara.core.linear import LOSSES, LinearLoss
from capibara.errors import ConfigError, unknown_name
from capibara.transforms.prox import Prox

CHECK_EVERY = 10
"""Iterations between two looks at the gap, which costs as much as one of them."""


class ConvexFit(NamedTuple):
    """A solution and how far from optimal it can be.

    Attributes:
      weights: float64[d, C].
      value: P at the weights.
      dual_gap: P − D ≥ P − P*, the certificate.
      lower_bound: D ≤ P*.
      iterations: Gradient steps.
      converged: Whether the gap is at most the tolerance.
      certificate: `global`.
    """

    weights: np.ndarray
    value: float
    dual_gap: float
    lower_bound: float
    iterations: int
    converged: bool
    certificate: str = "global"


def fista(
    x: Any,
    y: Any,
    loss: str | LinearLoss,
    prox: Prox,
    *,
    start: Any = None,
    tolerance: float = 1e-8,
    max_iterations: int = 10_000,
) -> ConvexFit:
    """Fits W of a linear model.

    Guarantee: `value` is within `dual_gap` of the optimum, whenever it stops.
    Fails when: r* is finite at 0 alone (no regulariser): the lower bound is then that of ℓ, and the gap far too wide.
    Cost: two products with X an iteration; O(N d) memory.

    Args:
      x: float[N, d]; a column of ones gives an intercept, which is regularised like any other weight.
      y: float[N] or [N, C] for `squared`, 0 or 1 for `logistic`, class numbers for `softmax`.
      loss: `squared`, `logistic`, `softmax`, or a `LinearLoss`.
      prox: The regulariser r, or an indicator.
      start: float[d, C], zeros if None.
      tolerance: Of the gap.
      max_iterations: Most gradient steps.

    Raises:
      ConfigError: For an unknown loss, no rows, shapes that do not fit or numbers that are not finite.
    """
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise ConfigError(unknown_name("loss", loss, LOSSES))
        loss = LOSSES[loss]()
    x, y, columns = _checked(x, y, loss)
    weights = np.zeros((x.shape[1], columns)) if start is None else np.asarray(start, np.float64)
    if weights.shape != (x.shape[1], columns):
        raise ConfigError(f"start has shape {weights.shape}; the data need {(x.shape[1], columns)}.")
    with jax.enable_x64(True):
        curvature = loss.smoothness * np.linalg.norm(x, 2) ** 2 / len(x)
        found = _solve(x, y, weights, curvature, tolerance, max_iterations, loss=loss, prox=prox)
        best, value, lower, iterations = (np.asarray(part) for part in found)
    gap = max(float(value - lower), 0.0)
    return ConvexFit(best, float(value), gap, float(lower), int(iterations), gap <= tolerance)


def _checked(x: Any, y: Any, loss: LinearLoss) -> tuple[np.ndarray, np.ndarray, int]:
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or not x.size:
        raise ConfigError(f"x is a matrix [examples, features] with at least one of each; got shape {x.shape}.")
    y = np.asarray(y)
    if len(y) != len(x):
        raise ConfigError(f"x has {len(x)} examples and y {len(y)}; each example needs one target.")
    if not np.isfinite(x).all() or not np.isfinite(y).all():
        raise ConfigError("x and y must be finite; remove examples with NaN or inf first.")
    if loss.classes:
        if y.ndim != 1 or not np.equal(y, np.floor(y)).all() or y.min() < 0:
            raise ConfigError(f"{loss.name} needs class numbers 0, 1, … as y[N]; got {y.dtype} of shape {y.shape}.")
        return x, y.astype(np.int64), int(y.max()) + 1
    y = y.astype(np.float64).reshape(len(y), -1)
    if loss.name == "logistic" and not np.isin(y, (0.0, 1.0)).all():
        raise ConfigError("logistic needs targets 0 or 1; for more classes use softmax.")
    return x, y, y.shape[1]


@partial(jax.jit, static_argnames=("loss", "prox"))
def _solve(
    x: Any, y: Any, start: Any, curvature: Any, tolerance: Any, most: Any, *, loss: LinearLoss, prox: Prox
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    rows = x.shape[0]
    step = 1 / jnp.maximum(curvature, 1e-300)

    def both(w: jax.Array) -> tuple[jax.Array, jax.Array]:
        """P and D at w."""
        z = x @ w
        value = loss.value(z, y).mean() + prox.value(w)
        alpha = loss.gradient(z, y)
        u = -(x.T @ alpha) / rows
        s = prox.shrink(u)
        return value, -loss.conjugate(s * alpha, y).mean() - prox.conjugate(s * u)

    def descend(_: int, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        w, ahead, t = carry
        gradient = x.T @ loss.gradient(x @ ahead, y) / rows
        new = prox.apply(ahead - step * gradient, step)
        uphill = jnp.vdot(ahead - new, new - w) > 0
        longer = jnp.where(uphill, 1.0, (1 + jnp.sqrt(1 + 4 * t * t)) / 2)
        inertia = jnp.where(uphill, 0.0, (t - 1) / longer)
        return new, new + inertia * (new - w), longer

    def look(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        inner, best, value, lower, done = carry
        inner = jax.lax.fori_loop(0, CHECK_EVERY, descend, inner)
        here, bound = both(inner[0])
        better = here < value
        best = jnp.where(better, inner[0], best)
        return inner, best, jnp.where(better, here, value), jnp.maximum(lower, bound), done + CHECK_EVERY

    def goes_on(carry: tuple[Any, ...]) -> jax.Array:
        return (carry[2] - carry[3] > tolerance) & (carry[4] < most)

    begin = prox.apply(start, step)
    value, bound = both(begin)
    first = ((begin, begin, jnp.ones((), x.dtype)), begin, value, bound, jnp.zeros((), jnp.int64))
    _, best, value, lower, done = jax.lax.while_loop(goes_on, look, first)
    return best, value, lower, done
