"""The smallest problem that trains, votes and can be gated: a line fitted to points, five numbers in two leaves.

    plan = tiny.plan(num_nodes=5);  state = first_state(plan, tiny.first_params())

Nothing here takes time to compile, so that every fault of a round can be had on the `inline` engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from capibara.consensus.config import ConsensusConfig
from capibara.engines.base import Engine
from capibara.round_state import RoundPlan
from capibara.strategies.plain import plain
from capibara.training import vocabulary
from capibara.types import Batch, Objective, PyTree

TRUTH = np.array([1.0, -2.0, 0.5, 3.0], np.float32)


class Points:
    """`capibara.types.Source`: noisy points of one plane; node i sees x shifted by i, so that nodes differ."""

    tokens_per_sequence = 1
    train_tokens = 1000
    vocab_size = 2

    def batches(self, *, round: int, draw: int, node: int, steps: int, batch_size: int) -> Batch:
        return _points(np.random.default_rng([1, round, draw, node]), (steps, batch_size), 0.1 * node)

    def held_out(self, split: str, *, round: int, draw: int, count: int) -> Batch:
        return _points(np.random.default_rng([2, len(split), round, draw]), (count,), 0.0)

    def num_sequences(self, split: str) -> int:
        return 1000


def _points(rng: np.random.Generator, shape: tuple[int, ...], shift: float) -> Batch:
    x = (rng.normal(size=(*shape, 4)) + shift).astype(np.float32)
    y = (x @ TRUTH + 1.0 + 0.1 * rng.normal(size=shape)).astype(np.float32)
    return {"x": x, "y": y}


def _errors(params: PyTree, batch: Batch) -> jax.Array:
    return 0.1 * (batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2


OBJECTIVE = Objective(
    lambda params, batch, key: (jnp.mean(_errors(params, batch)), {}),
    lambda params, batch: (_errors(params, batch), jnp.ones(batch["y"].shape, jnp.float32)),
)
STRATEGY = plain(OBJECTIVE, optax.sgd(0.2, momentum=0.5))


def first_params() -> PyTree:
    return {"w": jnp.zeros(4), "b": jnp.zeros(())}


def plan(*, engine: Engine | str = "inline", clock: Callable[[], float] = lambda: 0.0, **config: Any) -> RoundPlan:
    """A plan over the points; keywords are those of `ConsensusConfig`, with 3 local steps."""
    consensus = ConsensusConfig(**{"num_nodes": 5, "local_steps": 3, "engine": engine, **config})
    return RoundPlan(
        config=consensus,
        objective=OBJECTIVE,
        strategies=(STRATEGY,),
        engine=vocabulary.engine(consensus),
        aggregator=vocabulary.aggregator(consensus),
        outer=vocabulary.outer(consensus),
        source=Points(),
        batch_size=4,
        key=jax.random.key(consensus.seed),
        config_digest="tiny",
        attack=vocabulary.attack(consensus),
        vocab_size=2,
        clock=clock,
    )
