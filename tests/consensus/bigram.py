"""The smallest language models: the next token from the last one, as a table or through a hidden layer.

    table   logits = W[x]              linear in the parameters: averaging models is averaging logits, and L is convex
    hidden  logits = tanh(E[x]) O      the units of a hidden layer may be permuted: averaging such twins ruins them
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from capibara.types import Batch, Objective, PyTree

V, HIDDEN = 7, 8


def _logits(params: PyTree, batch: Batch) -> jax.Array:
    if "W" in params:
        return params["W"][batch["tokens"]]
    return jnp.tanh(params["E"][batch["tokens"]]) @ params["O"]


def _token_losses(params: PyTree, batch: Batch) -> tuple[jax.Array, jax.Array]:
    shares = jax.nn.log_softmax(_logits(params, batch))
    return -jnp.take_along_axis(shares, batch["targets"][..., None], -1)[..., 0], batch["mask"]


def _sequence_losses(params: PyTree, batch: Batch) -> tuple[jax.Array, jax.Array]:
    losses, mask = _token_losses(params, batch)
    return jnp.where(mask, losses, 0).sum(1), mask.astype(jnp.float32).sum(1)


def _loss(params: PyTree, batch: Batch, key: object) -> tuple[jax.Array, dict]:
    sums, tokens = _sequence_losses(params, batch)
    return sums.sum() / tokens.sum(), {}


def _errors(params: PyTree, batch: Batch) -> tuple[jax.Array, jax.Array]:
    wrong = (_logits(params, batch).argmax(-1) != batch["targets"]) & batch["mask"]
    return wrong.astype(jnp.float32).sum(1), batch["mask"].astype(jnp.float32).sum(1)


OBJECTIVE = Objective(_loss, _sequence_losses, _token_losses, _logits)
SEQUENCES_ONLY = Objective(_loss, _sequence_losses)
ERRORS = Objective(_loss, _errors)
"""A metric without gradients: the share of targets that are not the likeliest word."""


def chain(seed: int) -> np.ndarray:
    """Transition chances float64[V, V] of a language."""
    return np.random.default_rng([seed, 7]).dirichlet(np.full(V, 0.4), V)


def text(chances: np.ndarray, count: int, length: int = 12, seed: int = 0) -> dict[str, np.ndarray]:
    """Sequences of a language; a few targets at the ends do not count."""
    rng = np.random.default_rng(seed)
    steps = chances.cumsum(axis=1)
    tokens = np.empty((count, length + 1), np.int32)
    tokens[:, 0] = rng.integers(0, V, count)
    for t in range(length):
        tokens[:, t + 1] = np.minimum((rng.random(count)[:, None] > steps[tokens[:, t]]).sum(1), V - 1)
    mask = np.arange(length) < rng.integers(length - 3, length + 1, count)[:, None]
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:].copy(), "mask": mask}


def table(chances: np.ndarray, noise: float = 0.0, seed: int = 0) -> dict[str, np.ndarray]:
    """A table that knows a language but for some noise."""
    noise_ = noise * np.random.default_rng([seed, 8]).normal(size=(V, V))
    return {"W": (np.log(chances + 1e-3) + noise_).astype(np.float32)}


def hidden(chances: np.ndarray, seed: int = 0, steps: int = 150) -> dict[str, np.ndarray]:
    """A hidden layer fitted to a language by gradient descent."""
    rng = np.random.default_rng([seed, 9])
    params = {"E": rng.normal(size=(V, HIDDEN)), "O": rng.normal(size=(HIDDEN, V))}
    params = {name: leaf.astype(np.float32) for name, leaf in params.items()}
    return jax.tree.map(np.asarray, _fit(params, chances.astype(np.float32), steps=steps))


def twin(params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same function with its hidden units in another order and of opposite sign."""
    order = np.roll(np.arange(HIDDEN), 3)
    return {"E": -params["E"][:, order], "O": -params["O"][order]}


def _fit(params: PyTree, chances: np.ndarray, *, steps: int) -> PyTree:
    def loss(p):
        return -(chances * jax.nn.log_softmax(jnp.tanh(p["E"]) @ p["O"])).sum(1).mean()

    @jax.jit
    def run(p):
        down = lambda _, q: jax.tree.map(lambda a, g: a - 0.5 * g, q, jax.grad(loss)(q))  # noqa: E731
        return jax.lax.fori_loop(0, steps, down, p)

    return run(params)
