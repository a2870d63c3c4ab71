"""Proximal point on any smooth model: every step minimises a problem that is convex where it is solved, and says so.

    F(θ) = f(θ; batch) + r(θ) + (1/2η) ‖θ − θ_k‖²,   1/η = κ ρ̂,   θ in the ball ‖θ − θ_k‖ ≤ R

f is ρ-weakly convex on a ball (C² activations), so F is μ = (1/η − ρ)-strongly convex there; ρ̂ comes from Lanczos with
a stated probability of failure. Between the points that the inner solver visits the inequality of strong convexity is
checked; one violation, or a step out of the ball, doubles 1/η and with it the ρ that is assumed, 1/(κη), and solves
again ("convex until proven guilty", Carmon et al. 2017; catalyst adaptation, Paquette et al. 2018). What is certified
is each step on its batch, not the training.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from capibara.errors import ConfigError
from capibara.transforms.lanczos import extreme_eigenvalues
from capibara.transforms.prox import Prox, zero
from capibara.tree import tree_add, tree_sub
from capibara.types import Batch, Objective, PyTree, Strategy, TrainState

FLOOR = 1e-3
"""1/η is at least this share of the largest curvature: at a point where f is convex the step must still be bounded."""

LEAST = 1e-6
"""1/η where f has no curvature at all."""


class ProximalState(NamedTuple):
    """What the strategy keeps.

    Attributes:
      inverse_eta: 1/η as the last step left it.
      weak_convexity: ρ̂ at the last measurement.
      smoothness: Upper bound on the largest eigenvalue of ∇²f at the last measurement.
    """

    inverse_eta: jax.Array
    weak_convexity: jax.Array
    smoothness: jax.Array


class Solution(NamedTuple):
    """An inner solve: where it ended, and what was seen on the way."""

    params: PyTree
    value: jax.Array
    mapping: jax.Array
    violations: jax.Array
    moved: jax.Array


def proximal_point(
    objective: Objective,
    *,
    prox: Prox | None = None,
    kappa: float = 2.0,
    inner_steps: int = 10,
    radius: float = 0.1,
    measure_every: int = 20,
    num_products: int = 40,
    failure: float = 1e-6,
    max_redos: int = 4,
    name: str = "proximal_point",
) -> Strategy:
    """Inexact proximal point with a certificate a step (tier T1).

    Guarantee, with probability 1 − δ for the curvature at the measured point, and for the pairs of points that were
    visited: F falls; F(θ_{k+1}) − min F ≤ `suboptimality`; the Moreau envelope's gradient is at most `moreau` plus the
    inner error. On changing batches the decrease does not add up over steps.

    Fails when: 1/η is large against the gradient (ρ̂ overestimated): steps are then short. More certificate is less
      progress, and κ sets the price.
    Cost: inner_steps + 2 gradients a step, num_products Hessian products every `measure_every` steps.

    Args:
      objective: What is minimised; the loss must be differentiable twice.
      prox: r; none if None.
      kappa: κ > 1.
      inner_steps: Accelerated proximal-gradient steps of one solve.
      radius: R as a share of ‖θ_k‖.
      measure_every: Steps between measurements of the curvature.
      num_products: Of a measurement.
      failure: δ of a measurement.
      max_redos: Doublings of 1/η in one step; after them θ_k stays and the next step begins with the doubled value.
      name: For records.

    Returns:
      A strategy whose info holds `loss`, `decrease`, `suboptimality`, `moreau`, `inverse_eta`, `weak_convexity`,
      `violations`, `redos`, `certified` (0 or 1) and `skipped`.
    """
    if not (kappa > 1 and inner_steps >= 2 and radius > 0 and measure_every >= 1 and max_redos >= 0):
        raise ConfigError(
            "proximal_point needs kappa > 1, inner_steps ≥ 2, radius > 0, measure_every ≥ 1 and max_redos ≥ 0; got "
            f"{kappa}, {inner_steps}, {radius}, {measure_every} and {max_redos}."
        )
    penalty = prox or zero()

    def init(params: PyTree) -> TrainState:
        start = ProximalState(jnp.full((), LEAST), jnp.zeros(()), jnp.zeros(()))
        return TrainState(jnp.zeros((), jnp.int32), params, start)

    def step(state: TrainState, batch: Batch, key: Any) -> tuple[TrainState, dict[str, Any]]:
        centre, drop_key = state.params, jax.random.fold_in(key, 0)

        def loss(params: PyTree) -> jax.Array:
            return objective.loss(params, batch, drop_key)[0]

        def measure(_: ProximalState) -> ProximalState:
            gradient = jax.grad(loss)

            def product(v: PyTree) -> PyTree:
                # Reverse over reverse: gradients of our own (`core.layers`, `core.loss`) have no forward mode.
                return jax.grad(lambda params: optax.tree.vdot(gradient(params), v))(centre)

            found = extreme_eigenvalues(
                product, centre, jax.random.fold_in(key, 1), num_products=num_products, failure=failure
            )
            low = jnp.where(jnp.isfinite(found.lower_bound), found.lower_bound, found.lowest)
            high = jnp.where(jnp.isfinite(found.upper_bound), found.upper_bound, found.highest)
            weak, smooth = jnp.maximum(0.0, -low), jnp.maximum(high, -low)
            strength = jnp.maximum(jnp.maximum(kappa * weak, FLOOR * smooth), LEAST)
            return jax.tree.map(
                lambda new, old: jnp.where(jnp.isfinite(strength), new, old),
                ProximalState(strength, weak, smooth),
                state.inner,
            )

        kept = jax.lax.cond(state.step % measure_every == 0, measure, lambda kept: kept, state.inner)
        first_loss = loss(centre)
        before = first_loss + penalty.value(centre)
        longest = radius * optax.tree.norm(centre)

        def solve(inverse_eta: jax.Array) -> Solution:
            smooth, strength = kept.smoothness + inverse_eta, (1 - 1 / kappa) * inverse_eta
            return _accelerated(loss, penalty, centre, inverse_eta, smooth, strength, inner_steps)

        def good(solution: Solution) -> jax.Array:
            fell = solution.value <= before + _rounding(before)
            return fell & (solution.violations == 0) & (solution.moved <= longest)

        def stronger(inverse_eta: jax.Array, solution: Solution) -> jax.Array:
            """Twice 1/η, or as much as brings a solution that left the ball back to it."""
            return inverse_eta * jnp.maximum(2.0, jnp.nan_to_num(solution.moved / longest, posinf=2.0))

        def attempt(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            inverse_eta, solution, attempts = carry
            inverse_eta = jnp.where(attempts == 0, inverse_eta, stronger(inverse_eta, solution))
            return inverse_eta, solve(inverse_eta), attempts + 1

        def again(carry: tuple[Any, ...]) -> jax.Array:
            _, solution, attempts = carry
            return (attempts == 0) | (~good(solution) & (attempts <= max_redos))

        nothing = Solution(centre, before, jnp.zeros(()), jnp.ones((), jnp.int32), jnp.zeros(()))
        begin = (kept.inverse_eta, nothing, jnp.zeros((), jnp.int32))
        inverse_eta, solution, attempts = jax.lax.while_loop(again, attempt, begin)
        accepted = good(solution) & jnp.isfinite(solution.value)
        params = jax.tree.map(lambda new, old: jnp.where(accepted, new, old), solution.params, centre)
        after = kept._replace(inverse_eta=jnp.where(accepted, inverse_eta, stronger(inverse_eta, solution)))
        return TrainState(state.step + 1, params, after), {
            "loss": first_loss,
            "decrease": jnp.where(accepted, before - solution.value, 0.0),
            "suboptimality": jnp.square(solution.mapping) / (2 * (1 - 1 / kappa) * inverse_eta),
            "moreau": inverse_eta * solution.moved,
            "inverse_eta": inverse_eta,
            "weak_convexity": kept.weak_convexity,
            "violations": solution.violations,
            "redos": attempts - 1,
            "certified": accepted.astype(jnp.int32),
            "skipped": (~jnp.isfinite(first_loss)).astype(jnp.int32),
        }

    return Strategy(name, init, step)


def _accelerated(
    loss: Any, penalty: Prox, centre: PyTree, inverse_eta: Any, smooth: Any, strength: Any, num_steps: int
) -> Solution:
    """Accelerated proximal gradient for a μ-strongly convex, L-smooth F (Nesterov 2018, §2.2), from the centre."""
    ratio = jnp.sqrt(strength / smooth)
    momentum = (1 - ratio) / (1 + ratio)

    def smooth_part(params: PyTree) -> jax.Array:
        gap = tree_sub(params, centre)
        return loss(params) + inverse_eta / 2 * optax.tree.vdot(gap, gap)

    value_and_grad = jax.value_and_grad(smooth_part)

    def visit(carry: tuple[Any, ...], _: None) -> tuple[tuple[Any, ...], None]:
        x, y, before, violations, moved, _ = carry
        value, gradient = value_and_grad(y)
        violations += _violated(before, (y, value, gradient), strength)
        new = penalty.apply(tree_add(y, gradient, -1 / smooth), 1 / smooth)
        mapping = smooth * optax.tree.norm(tree_sub(y, new))
        ahead = tree_add(new, tree_sub(new, x), momentum)
        moved = jnp.maximum(moved, optax.tree.norm(tree_sub(new, centre)))
        return (new, ahead, (y, value, gradient), violations, moved, mapping), None

    first = (centre, *value_and_grad(centre))
    nothing = jnp.zeros((), jnp.int32)
    carry = (centre, centre, first, nothing, jnp.zeros(()), jnp.zeros(()))
    (x, _, last, violations, moved, mapping), _ = jax.lax.scan(visit, carry, None, length=num_steps)
    value = smooth_part(x)
    # The bound from the last mapping needs that F's smooth part stayed below its quadratic model with L.
    y, at_y, gradient = last
    gap = tree_sub(x, y)
    model = at_y + optax.tree.vdot(gradient, gap) + smooth / 2 * optax.tree.vdot(gap, gap)
    violations += (value > model + _rounding(model)).astype(jnp.int32)
    return Solution(x, value + penalty.value(x), mapping, violations, moved)


def _violated(a: tuple[PyTree, jax.Array, PyTree], b: tuple[PyTree, jax.Array, PyTree], strength: Any) -> jax.Array:
    """How many of the two inequalities F(y) ≥ F(x) + ⟨∇F(x), y − x⟩ + μ/2 ‖y − x‖² do not hold, beyond rounding."""
    gap = tree_sub(b[0], a[0])
    curve = strength / 2 * optax.tree.vdot(gap, gap)
    forth = b[1] < a[1] + optax.tree.vdot(a[2], gap) + curve - _rounding(a[1])
    back = a[1] < b[1] - optax.tree.vdot(b[2], gap) + curve - _rounding(b[1])
    return forth.astype(jnp.int32) + back.astype(jnp.int32)


def _rounding(value: jax.Array) -> jax.Array:
    return 8 * jnp.finfo(value.dtype).eps * (1 + jnp.abs(value))
