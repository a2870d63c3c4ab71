"""A small problem with unequal nodes for end-to-end tests: handwritten digits, an MLP 64-32-10, Dirichlet shares.

    plan = digits.plan(ConsensusConfig(num_nodes=8, local_steps=5))
    for state, line in digits.run(plan, 50): ...

A "sequence" is one example and holds one token, so every loss is in nats an example.
The data are the 1,797 images of 8 × 8 pixels that scikit-learn carries (Alpaydin & Kaynak 1998); the file is read
without importing scikit-learn, which takes longer than all the rest.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from capibara.consensus.config import ConsensusConfig
from capibara.engines.base import Engine
from capibara.errors import DataError
from capibara.round import run_round
from capibara.round_state import RoundPlan, RoundState, first_state
from capibara.strategies.plain import plain
from capibara.training import vocabulary
from capibara.types import Batch, Objective, PyTree, Strategy

HELD_OUT = {"gate": 240, "merge": 60, "final_gate": 240, "test": 297}
"""Examples of each held-out split; the other 960 are for training."""

LEAST = 8
"""Examples that a node holds at least: shares are drawn again until it is so."""


class Digits:
    """`capibara.types.Source` over the digits.

    Every class is dealt to the nodes in shares drawn from Dirichlet(γ): at γ = .33 most nodes lack several classes.

    Args:
      num_nodes: Nodes that share the training examples.
      gamma: γ; None deals the examples evenly and at random.
      seed: Of dealing and drawing; the held-out splits do not depend on it.
    """

    tokens_per_sequence = 1
    vocab_size = 10

    def __init__(self, num_nodes: int = 8, *, gamma: float | None = 0.33, seed: int = 0):
        self.seed = seed
        images, labels = digits()
        order = np.random.default_rng(0).permutation(len(labels))
        ends = np.cumsum([*HELD_OUT.values()])
        parts = dict(zip((*HELD_OUT, "train"), np.split(order, ends), strict=True))
        self.train = parts.pop("train")
        self.splits, self.images, self.labels = parts, images, labels
        self.train_tokens = len(self.train)
        self.nodes = _deal(labels, self.train, num_nodes, gamma, np.random.default_rng([seed, 1]))

    def batches(self, *, round: int, draw: int, node: int, steps: int, batch_size: int) -> Batch:
        """`x` float32[steps, B, 64] in [0, 1] and `targets` int32[steps, B], drawn with replacement."""
        chosen = np.random.default_rng([self.seed, 2, round, draw, node]).integers(
            0, len(self.nodes[node]), (steps, batch_size)
        )
        return self._batch(self.nodes[node][chosen])

    def held_out(self, split: str, *, round: int, draw: int, count: int) -> Batch:
        """`count` different examples of a split."""
        if count > len(self.splits[split]):
            raise DataError(f"The split {split!r} has {len(self.splits[split])} examples; {count} were asked for.")
        random = np.random.default_rng([self.seed, 3, [*HELD_OUT].index(split), round, draw])
        return self._batch(random.choice(self.splits[split], count, replace=False))

    def num_sequences(self, split: str) -> int:
        """Examples in a held-out split."""
        return len(self.splits[split])

    def _batch(self, index: np.ndarray) -> Batch:
        return {"x": self.images[index], "targets": self.labels[index]}


def objective() -> Objective:
    """Cross entropy of the MLP. The same object every time, so that what was compiled for it is found again."""
    return _OBJECTIVE


def first_params(seed: int = 0) -> dict[str, jax.Array]:
    """The MLP as it begins: He-normal matrices, zero biases; 2,410 numbers in four leaves."""
    random = np.random.default_rng([seed, 4])
    shapes = {"hidden": (64, 32), "output": (32, 10)}
    weights = {f"{k}.kernel": random.normal(0, np.sqrt(2 / s[0]), s).astype(np.float32) for k, s in shapes.items()}
    biases = {f"{k}.bias": np.zeros(s[1], np.float32) for k, s in shapes.items()}
    return {name: jnp.asarray(value) for name, value in (weights | biases).items()}


def logits(params: PyTree, x: Any) -> jax.Array:
    """float32[..., 10]."""
    hidden = jax.nn.relu(x @ params["hidden.kernel"] + params["hidden.bias"])
    return hidden @ params["output.kernel"] + params["output.bias"]


def accuracy(params: PyTree, source: Digits | None = None) -> float:
    """The share of the test split that is told right."""
    images, labels = digits()
    test = (source or Digits(1, gamma=None)).splits["test"]
    return float((np.asarray(logits(params, images[test])).argmax(-1) == labels[test]).mean())


def sgd(learning_rate: float = 0.1, momentum: float = 0.5) -> Strategy:
    """SGD with momentum on the digits; one object per setting, so that it is compiled once."""
    return _sgd(learning_rate, momentum)


def plan(
    config: ConsensusConfig,
    *,
    gamma: float | None = 0.33,
    batch_size: int = 32,
    strategies: tuple[Strategy, ...] | None = None,
    engine: Engine | None = None,
    source: Any = None,
    clock: Any = time.perf_counter,
) -> RoundPlan:
    """Everything `run_round` needs to run `config` on the digits; `config.split` is not read, `gamma` is."""
    return RoundPlan(
        config=config,
        objective=objective(),
        strategies=strategies or (sgd(),),
        engine=engine or vocabulary.engine(config),
        aggregator=vocabulary.aggregator(config),
        outer=vocabulary.outer(config),
        source=source or Digits(config.num_nodes, gamma=gamma, seed=config.seed),
        batch_size=batch_size,
        key=jax.random.key(config.seed),
        config_digest="digits",
        attack=vocabulary.attack(config),
        vocab_size=Digits.vocab_size,
        clock=clock,
    )


def run(plan: RoundPlan, num_rounds: int, *, seed: int = 0) -> Iterator[tuple[RoundState, dict[str, Any]]]:
    """States and certificate lines of a run without a disk; a round that finds no quorum goes on to new draws."""
    state, seen, draw = first_state(plan, first_params(seed)), defaultdict(dict), 0
    while state.round < num_rounds:
        before = state.round
        state, record = run_round(plan, state, first_draw=draw, past_digests=seen)
        draw = record.line["draw"] + 1 if state.round == before else 0
        if state.round > before:
            for node in record.line["nodes"]:
                seen[node["id"]].setdefault(node["digest"], before)
        yield state, record.line


@cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """float32[1797, 64] images in [0, 1] and their int32[1797] classes; not to be written to."""
    spec = find_spec("sklearn")
    assert spec is not None and spec.origin is not None, "the tests need scikit-learn: pip install scikit-learn"
    rows = np.loadtxt(Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",", dtype=np.float32)
    images, labels = rows[:, :-1] / np.float32(16), rows[:, -1].astype(np.int32)
    images.flags.writeable = labels.flags.writeable = False
    return images, labels


def _losses(params: PyTree, batch: Batch) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, batch["x"]), batch["targets"])


def _loss(params: PyTree, batch: Batch, key: Any) -> tuple[jax.Array, dict[str, Any]]:
    return _losses(params, batch).mean(), {}


def _sequence_losses(params: PyTree, batch: Batch) -> tuple[jax.Array, jax.Array]:
    losses = _losses(params, batch)
    return losses, jnp.ones_like(losses)


_OBJECTIVE = Objective(_loss, _sequence_losses)


@cache
def _sgd(learning_rate: float, momentum: float) -> Strategy:
    return plain(_OBJECTIVE, optax.sgd(learning_rate, momentum=momentum), name="sgd")


def _deal(
    labels: np.ndarray, train: np.ndarray, num_nodes: int, gamma: float | None, random: np.random.Generator
) -> list[np.ndarray]:
    if gamma is None:
        return np.array_split(random.permutation(train), num_nodes)
    for _ in range(10_000):
        shares: list[list[np.ndarray]] = [[] for _ in range(num_nodes)]
        for label in range(10):
            members = random.permutation(train[labels[train] == label])
            cuts = np.cumsum(random.dirichlet(np.full(num_nodes, gamma)))[:-1] * len(members)
            for mine, part in zip(shares, np.split(members, cuts.astype(int)), strict=True):
                mine.append(part)
        nodes = [np.concatenate(mine) for mine in shares]
        if min(map(len, nodes)) >= LEAST:
            return nodes
    raise DataError(f"No deal of {len(train)} examples with gamma = {gamma} gives {num_nodes} nodes {LEAST} each.")
