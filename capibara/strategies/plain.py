"""The plain strategy: AdamW with clipping, accumulation, an optional average of the weights, and a NaN guard."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from capibara.types import Batch, Objective, PyTree, Strategy, TrainState


class Inner(NamedTuple):
    """What the plain strategy keeps: optimiser state, and the running average of the parameters (or ())."""

    optimizer: PyTree
    average: PyTree


def adamw(
    learning_rate: float | optax.Schedule,
    *,
    weight_decay: float = 0.1,
    beta1: float = 0.9,
    beta2: float = 0.95,
    clip_norm: float | None = 1.0,
) -> optax.GradientTransformation:
    """AdamW behind a clip by global norm; decay on matrices only (norms and biases are left alone)."""

    def matrices(params: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)

    optimizer = optax.adamw(learning_rate, b1=beta1, b2=beta2, weight_decay=weight_decay, mask=matrices)
    return optimizer if clip_norm is None else optax.chain(optax.clip_by_global_norm(clip_norm), optimizer)


def plain(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    accumulation_steps: int = 1,
    ema_decay: float | None = None,
    name: str = "plain",
) -> Strategy:
    """Gradient steps on the objective.

    A step whose loss or gradient is not finite leaves parameters and moments as they were and counts as skipped.

    Args:
      objective: What is minimised.
      optimizer: Any optax transformation.
      accumulation_steps: The batch is cut into this many parts whose gradients are averaged, each part weighted by its
        tokens: the gradient of the whole batch with the memory of a part.
      ema_decay: Keeps an exponential average of the parameters (`average(state)`), or None.
      name: For records.

    Returns:
      A strategy whose info holds `loss`, `gradient_norm` and `skipped`.
    """

    def init(params: PyTree) -> TrainState:
        average = params if ema_decay is not None else ()
        return TrainState(jnp.zeros((), jnp.int32), params, Inner(optimizer.init(params), average))

    def gradients(params: PyTree, batch: Batch, key: Any) -> tuple[jax.Array, PyTree]:
        value_and_grad = jax.value_and_grad(objective.loss, has_aux=True)
        if accumulation_steps == 1:
            (loss, _), grads = value_and_grad(params, batch, key)
            return loss, grads
        parts = jax.tree.map(lambda leaf: leaf.reshape(accumulation_steps, -1, *leaf.shape[1:]), batch)

        def add(carry: Any, part: Any) -> tuple[Any, None]:
            piece, piece_key = part
            (loss, _), grads = value_and_grad(params, piece, piece_key)
            weight = _tokens(piece)
            total = jax.tree.map(lambda a, g: a + weight * g, carry[1], grads)
            return (carry[0] + weight * loss, total, carry[2] + weight), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        start = (jnp.zeros(()), zeros, jnp.zeros(()))
        (loss, total, weight), _ = jax.lax.scan(add, start, (parts, jax.random.split(key, accumulation_steps)))
        weight = jnp.maximum(weight, 1.0)
        return loss / weight, jax.tree.map(lambda g: g / weight, total)

    def step(state: TrainState, batch: Batch, key: Any) -> tuple[TrainState, dict[str, Any]]:
        loss, grads = gradients(state.params, batch, key)
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, moments = optimizer.update(grads, state.inner.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        average = state.inner.average
        if ema_decay is not None:
            average = optax.incremental_update(params, average, 1.0 - ema_decay)
        new = TrainState(state.step + 1, params, Inner(moments, average))
        old = state._replace(step=state.step + 1)
        new = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)
        return new, {"loss": loss, "gradient_norm": norm, "skipped": (~good).astype(jnp.int32)}

    return Strategy(name, init, step)


def average(state: TrainState) -> PyTree:
    """The running average of the parameters, or the parameters where the strategy keeps none."""
    kept = getattr(state.inner, "average", ())
    return kept if jax.tree.leaves(kept) else state.params


def _tokens(batch: Batch) -> jax.Array:
    if "mask" in batch:
        return batch["mask"].sum().astype(jnp.float32)
    return jnp.asarray(float(jax.tree.leaves(batch)[0].shape[0]))
