"""Adam with proximal operators in its own metric and a moving anchor: the cheap stochastic mode (tier T2).

    g = ∇f + (θ − a)/η,   D = √v̂ + ε,   θ ← prox^D_{α r}( θ − α m̂ / D ),   a ← θ every K steps

m̂ and v̂ are Adam's moments of g. The operator must use the metric of the step (Yun et al. 2021, ProxGen): the
Euclidean one after a preconditioned step minimises something else. The anchor a is a proximal centre that moves
(Davis & Drusvyatskiy 2019: proximal stochastic steps drive the Moreau envelope's gradient to 0 like k^(−1/4)).
Certificate: `stationarity`, nothing global.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from capibara.errors import ConfigError
from capibara.transforms.prox import Prox
from capibara.tree import tree_sub
from capibara.types import Batch, Objective, PyTree, Strategy, TrainState

METRIC_FLOOR = 1e-2
"""D is at least this share of its root mean square: a coordinate that had no gradient yet would otherwise have D = ε,
and any penalty would set it to zero at once (the embedding of a token that has not come)."""


class AnchoredMoments(NamedTuple):
    """Adam's moments, the anchor a, and ‖θ − a‖/η as it was when the anchor last moved."""

    adam: Any
    anchor: PyTree
    moreau: jax.Array


def proximal_adam(
    objective: Objective,
    prox: Prox,
    learning_rate: float | optax.Schedule,
    *,
    anchor_weight: float = 0.01,
    anchor_every: int = 20,
    radius: float | None = None,
    beta1: float = 0.9,
    beta2: float = 0.95,
    epsilon: float = 1e-8,
    clip_norm: float | None = 1.0,
    name: str = "proximal_adam",
) -> Strategy:
    """Proximal Adam around a moving anchor.

    Fails when: a certificate of optimality is wanted: it has none; and `radius` is applied after r's operator, which is
      the operator of their sum only where one of them is inactive.
    Cost: that of Adam, one operator and one more copy of the parameters.

    Args:
      objective: What is minimised.
      prox: r, applied to every leaf.
      learning_rate: α, or a schedule.
      anchor_weight: 1/η ≥ 0.
      anchor_every: K steps between moves of the anchor.
      radius: Keeps θ within this share of ‖a‖ of the anchor; no limit if None.
      beta1: Adam's.
      beta2: Adam's.
      epsilon: Adam's.
      clip_norm: Of the loss's gradient; None does not clip.
      name: For records.

    Returns:
      A strategy whose info holds `loss`, `gradient_norm`, `moreau` and `skipped`.
    """
    if not (anchor_weight >= 0 and anchor_every >= 1 and (radius is None or radius > 0)):
        raise ConfigError(
            "proximal_adam needs anchor_weight ≥ 0, anchor_every ≥ 1 and radius > 0; got "
            f"{anchor_weight}, {anchor_every} and {radius}."
        )
    clip = optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm)
    adam = optax.scale_by_adam(beta1, beta2, epsilon)

    def init(params: PyTree) -> TrainState:
        inner = AnchoredMoments(adam.init(params), params, jnp.zeros(()))
        return TrainState(jnp.zeros((), jnp.int32), params, inner)

    def step(state: TrainState, batch: Batch, key: Any) -> tuple[TrainState, dict[str, Any]]:
        params, inner = state.params, state.inner
        (loss, _), gradient = jax.value_and_grad(objective.loss, has_aux=True)(params, batch, key)
        norm = optax.tree.norm(gradient)
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        gradient, _ = clip.update(gradient, clip.init(params))
        pulled = jax.tree.map(lambda g, p, a: g + anchor_weight * (p - a), gradient, params, inner.anchor)
        moments = cast(optax.ScaleByAdamState, adam.update(pulled, inner.adam)[1])
        rate = learning_rate(state.step) if callable(learning_rate) else learning_rate
        metric = _metric(moments, beta2, epsilon)
        scale = rate / (1 - beta1**moments.count)
        moved = jax.tree.map(lambda p, m, d: p - scale * m / d, params, moments.mu, metric)
        new = prox.apply(moved, rate, metric)
        if radius is not None:
            new = _within(new, inner.anchor, radius * optax.tree.norm(inner.anchor))
        due = (state.step + 1) % anchor_every == 0
        distance = anchor_weight * optax.tree.norm(tree_sub(new, inner.anchor))
        anchor = jax.tree.map(lambda n, a: jnp.where(due, n, a), new, inner.anchor)
        after = AnchoredMoments(moments, anchor, jnp.where(due, distance, inner.moreau))
        after, new = jax.tree.map(lambda a, b: jnp.where(good, a, b), (after, new), (inner, params))
        info = {
            "loss": loss,
            "gradient_norm": norm,
            "moreau": after.moreau,
            "skipped": (~good).astype(jnp.int32),
        }
        return TrainState(state.step + 1, new, after), info

    return Strategy(name, init, step)


def _metric(moments: optax.ScaleByAdamState, beta2: float, epsilon: float) -> PyTree:
    second = jax.tree.map(lambda v: v / (1 - beta2**moments.count), moments.nu)
    count = sum(leaf.size for leaf in jax.tree.leaves(second))
    floor = METRIC_FLOOR * jnp.sqrt(optax.tree.sum(second) / count)
    return jax.tree.map(lambda v: jnp.maximum(jnp.sqrt(v), floor) + epsilon, second)


def _within(params: PyTree, anchor: PyTree, limit: jax.Array) -> PyTree:
    """The point of the ball of radius `limit` around the anchor that is nearest in the Euclidean sense."""
    gap = tree_sub(params, anchor)
    length = optax.tree.norm(gap)
    factor = jnp.where(length > limit, limit / jnp.where(length > limit, length, 1), 1)
    return jax.tree.map(lambda a, g: a + factor * g, anchor, gap)
