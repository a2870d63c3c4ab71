"""The merged network itself as a function of its weights: F(w) = L(Σ wᵢθᵢ) + Ω(w), which nobody promises to be convex.

    P3  a few projected-gradient steps on F                     a backward pass and M inner products each
    P4  F(u) + ⟨g, d⟩ + ½ dᵀHd, d = w − u, minimised exactly      g and the M×M matrix H from M Hessian-vector products

The gap of a point of F says that no direction goes down from there (`stationarity`), and no more. That of the quadratic
is global for the quadratic, which is F only near u (`conditional`). Probes look for a violation of convexity; finding
none proves nothing. Reference for H from M products: Pearlmutter 1994; MAP (2024) fits it from evaluations instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from capibara.consensus.evidence import TOKENS_AT_ONCE, HeldOut, pieces
from capibara.consensus.simplex import Penalty, Smooth, Solution, linear_gap, minimise, project
from capibara.errors import ConfigError
from capibara.types import Objective, PyTree

LARGEST_STEPS = 10
TOKENS_OF_A_PRODUCT = 512
"""At once in a Hessian-vector product, which keeps what several gradients keep."""

SHRINK = 0.25


class WeightSpace(NamedTuple):
    """L(Σ wᵢθᵢ) on held-out data with its derivatives in w.

    Attributes:
      stack: Leaves [M, ...]; all models in memory.
      objective: Its `sequence_losses` are differentiated.
      held: The data; the loss is that of all targets of all domains together.
    """

    stack: PyTree
    objective: Objective
    held: HeldOut

    def value(self, w: np.ndarray) -> float:
        """Mean loss in nats a target. Cost: one forward pass."""
        return float(self._sum(_value, w)[0])

    def slope(self, w: np.ndarray) -> tuple[float, np.ndarray]:
        """Mean loss and its gradient float64[M]. Cost: one forward and one backward pass."""
        value, gradient = self._sum(_slope, w)
        return float(value), gradient

    def derivatives(self, w: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """Mean loss, gradient and Hessian float64[M, M]. Cost: M Hessian-vector products, each 2 to 4 gradients."""
        value, gradient, hessian = self._sum(_curve, w, TOKENS_OF_A_PRODUCT)
        return float(value), gradient, (hessian + hessian.T) / 2

    def _sum(self, what: Any, w: np.ndarray, tokens_at_once: int = TOKENS_AT_ONCE) -> list[np.ndarray]:
        totals, tokens = None, 0.0
        for batch in self.held.batches:
            for piece, own in pieces(batch, tokens_at_once):
                keep = np.arange(len(jax.tree.leaves(dict(piece))[0])) < own
                found, counted = what(
                    jnp.asarray(w, jnp.float32), self.stack, piece, keep, losses=self.objective.sequence_losses
                )
                found = [np.asarray(one, np.float64) for one in found]
                totals = found if totals is None else [a + b for a, b in zip(totals, found, strict=True)]
                tokens += float(counted)
        assert totals is not None
        return [total / tokens for total in totals]


class ConvexityProbe(NamedTuple):
    """What was looked at for a violation of convexity in weight space.

    Attributes:
      midpoints: Segments tried.
      violations: Segments whose middle lies above the mean of its ends.
      least_curvature: λmin of the Hessian along the simplex at each point looked at; empty where none was.
    """

    midpoints: int
    violations: int
    least_curvature: tuple[float, ...] = ()


def weight_space(trees: Sequence[PyTree], objective: Objective, held: HeldOut) -> WeightSpace:
    """The function for these models; they are stacked in float32."""
    models = [trees[i] for i in range(len(trees))]
    stack = jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf, jnp.float32) for leaf in leaves]), *models)
    return WeightSpace(stack, objective, held)


def refine(space: WeightSpace, penalty: Penalty, start: np.ndarray, *, steps: int = LARGEST_STEPS) -> Solution:
    """P3: projected gradient from `start` with backtracking; never ends above where it began.

    Cost: a gradient and about two forward passes a step.
    Returns: the gap is ⟨g, w⟩ + Ω(w) − min(⟨g, s⟩ + Ω(s)) at the end: 0 at a stationary point, no distance to optimum.

    Raises:
      ConfigError: If more than 10 steps are asked for: a longer search is training on the validation data.
    """
    if not 0 <= steps <= LARGEST_STEPS:
        raise ConfigError(f"A refinement takes 0 to {LARGEST_STEPS} steps; got {steps}. More would fit the noise.")
    w, step = start, 1.0
    loss, gradient = space.slope(w)
    taken = 0
    for _ in range(steps):
        value = loss + penalty.value(w)
        slope = gradient + _finite_gradient(penalty, w)
        moved = None
        for _ in range(8):
            candidate = project(w - step * slope)
            gain = float(slope @ (candidate - w))
            if gain >= 0:
                break
            if space.value(candidate) + penalty.value(candidate) <= value + 1e-4 * gain:
                moved = candidate
                break
            step *= SHRINK
        if moved is None:
            break
        w, step, taken = moved, step * 2, taken + 1
        loss, gradient = space.slope(w)
    gap = linear_gap(w, gradient, penalty)
    return Solution(w, loss + penalty.value(w), loss, gap, taken, gap <= 1e-6)


def quadratic(
    space: WeightSpace, penalty: Penalty, *, max_iterations: int = 100, tolerance: float = 1e-9
) -> tuple[Solution, float]:
    """P4: the minimum of the second-order model of L at the prior, and λmin of its Hessian along the simplex.

    Where λmin is negative the model is no convex problem; it is then shifted by −λmin·½‖d‖², and callers must say so.
    The loss of the solution is the model's, to be compared with the merged network's.
    """
    u = penalty.prior
    loss, gradient, hessian = space.derivatives(u)
    least = least_curvature(hessian)
    along = np.eye(len(u)) - 1 / len(u)  # what H does across the simplex, where no weights are, may be concave
    h = along @ hessian @ along + max(0.0, -least) * np.eye(len(u)) * (1 + 1e-9)

    def value(w: np.ndarray) -> float:
        d = w - u
        return loss + float(gradient @ d) + 0.5 * float(d @ h @ d)

    smooth = Smooth(value, lambda w: (value(w), gradient + h @ (w - u), h))
    return minimise(smooth, penalty, u, max_iterations=max_iterations, tolerance=tolerance), least


def least_curvature(hessian: np.ndarray) -> float:
    """Smallest eigenvalue among directions that keep Σw; 0 for one model."""
    m = len(hessian)
    if m == 1:
        return 0.0
    basis = np.linalg.qr(np.eye(m)[:, 1:] - 1 / m)[0]
    return float(np.linalg.eigvalsh(basis.T @ hessian @ basis)[0])


def _finite_gradient(penalty: Penalty, w: np.ndarray) -> np.ndarray:
    """The penalty's gradient; a weight of 0 under KL pulls as one of 1e-12 does, instead of infinitely."""
    return penalty.gradient(np.maximum(w, 1e-12) if penalty.name == "kl" else w)


def _loss_sum(w: jax.Array, stack: PyTree, batch: Any, keep: Any, losses: Any) -> tuple[jax.Array, jax.Array]:
    merged = jax.tree.map(lambda leaf: jnp.tensordot(w, leaf, axes=1), stack)
    sums, tokens = losses(merged, batch)
    return jnp.where(keep, sums, 0).sum(), jnp.where(keep, tokens, 0).sum()


@partial(jax.jit, static_argnames="losses")
def _value(w, stack, batch, keep, *, losses):
    total, tokens = _loss_sum(w, stack, batch, keep, losses)
    return (total,), tokens


@partial(jax.jit, static_argnames="losses")
def _slope(w, stack, batch, keep, *, losses):
    (total, tokens), gradient = jax.value_and_grad(_loss_sum, has_aux=True)(w, stack, batch, keep, losses)
    return (total, gradient), tokens


@partial(jax.jit, static_argnames="losses")
def _curve(w, stack, batch, keep, *, losses):
    def slope(v):
        (total, tokens), gradient = jax.value_and_grad(_loss_sum, has_aux=True)(v, stack, batch, keep, losses)
        return gradient, (total, tokens)

    def product(direction):  # reverse over reverse: models may hold custom_vjp functions, which have no forward mode
        return jax.grad(lambda v: slope(v)[0] @ direction)(w)

    gradient, (total, tokens) = slope(w)
    return (total, gradient, jax.lax.map(product, jnp.eye(w.shape[0], dtype=w.dtype))), tokens
