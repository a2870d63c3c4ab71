"""Where the nodes run: the one seam between a round and the machines under it.

    Engine.map(assignment) -> Returned

An assignment holds the round's start θ, what each node keeps to itself, its batches and its key. What comes back is
the stack of deltas Δᵢ = θᵢ − θ, what each node keeps from now on, and for a node without a usable delta the reason.
Nothing in an assignment depends on where it runs, so the same assignment gives the same answer on every engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from capibara.types import Batch, PyTree, Strategy, TrainState


class Cohort(NamedTuple):
    """The nodes that train by one strategy; their kept states are stacked along a leading axis, in this order."""

    strategy: Strategy
    nodes: tuple[int, ...]


class Kept(NamedTuple):
    """What nodes keep between rounds: steps taken so far int32[k], and the strategy's inner state [k, ...]."""

    step: Any
    inner: PyTree


class Assignment(NamedTuple):
    """One round's work for every node.

    Attributes:
      start: θ, float32 leaves.
      kept: One `Kept` per cohort.
      batches: `node -> batch` with leaves [H, B, ...]; the same answer on every call.
      key: The run's key; node i trains with `node_key(key, round, draw, i)`.
      round: Index of the round, from 0.
      draw: Which draw of batches; advances when a round has to be trained anew.
      attempt: How often this round has been asked for, from 0.
      steps: H, local steps.
      ask: The nodes to ask; the others are left alone.
      deadline_s: Seconds a node may take, without compilation; None for no limit.
    """

    start: PyTree
    kept: tuple[Kept, ...]
    batches: Callable[[int], Batch]
    key: Any
    round: int
    draw: int
    attempt: int
    steps: int
    ask: tuple[int, ...]
    deadline_s: float | None


class Returned(NamedTuple):
    """What came back.

    Attributes:
      stack: Deltas, leaves float32[n, ...]; zeros for a node that was not asked or is named in `reasons`.
      kept: Like `Assignment.kept`; a node without a usable delta keeps what it had.
      reasons: Node id to reason, for asked nodes without a usable delta (`late`, `crashed`, `wrong_shape`, …).
      losses: float32[n, H] training losses, NaN where there are none.
      seconds: float64[n] a node took, NaN where nodes do not run one by one.
      params: θᵢ itself when there is a single node, whose model is taken as it is; None otherwise.
    """

    stack: PyTree
    kept: tuple[Kept, ...]
    reasons: dict[int, str]
    losses: np.ndarray
    seconds: np.ndarray
    params: PyTree | None = None


class Engine(Protocol):
    """Runs the nodes. `needs_deadline` is False where all nodes run as one program and none can be late."""

    name: str

    def map(self, cohorts: tuple[Cohort, ...], assignment: Assignment) -> Returned:
        """Lets every asked node take its H steps from `assignment.start`."""
        ...


def node_key(key: Any, round: Any, draw: Any, node: Any) -> Any:
    """The key node `node` trains with: a function of (run key, round, draw, node) and of nothing else."""
    for part in (round, draw, node):
        key = jax.random.fold_in(key, part)
    return key


def deal(strategies: tuple[Strategy, ...], num_nodes: int) -> tuple[Cohort, ...]:
    """Deals strategies to the nodes round-robin and groups the nodes by strategy."""
    used = strategies[:num_nodes]
    return tuple(Cohort(s, tuple(range(k, num_nodes, len(used)))) for k, s in enumerate(used))


def first_kept(cohorts: tuple[Cohort, ...], params: PyTree) -> tuple[Kept, ...]:
    """What the nodes keep before their first round."""
    return tuple(_stacked(fresh(cohort.strategy, params), len(cohort.nodes)) for cohort in cohorts)


def fresh(strategy: Strategy, params: PyTree) -> Kept:
    """What a node keeps that has never trained: step 0 and the strategy's initial inner state."""
    state = strategy.init(params)
    return Kept(jnp.asarray(state.step, jnp.int32), state.inner)


def renew(cohorts: tuple[Cohort, ...], kept: tuple[Kept, ...], nodes: set[int], params: PyTree) -> tuple[Kept, ...]:
    """`kept` with the given nodes starting afresh from `params`."""
    return select_kept(cohorts, nodes, first_kept(cohorts, params), kept) if nodes else kept


def select_kept(
    cohorts: tuple[Cohort, ...], nodes: set[int], chosen: tuple[Kept, ...], other: tuple[Kept, ...]
) -> tuple[Kept, ...]:
    """What `chosen` holds for the given nodes and `other` for the rest."""
    return tuple(
        _select(np.array([node in nodes for node in cohort.nodes]), new, old)
        for cohort, new, old in zip(cohorts, chosen, other, strict=True)
    )


def join(cohorts: tuple[Cohort, ...], held: Returned, again: Returned, nodes: tuple[int, ...]) -> Returned:
    """What was delivered before, with the answers of the nodes that have been asked again."""
    asked = np.isin(np.arange(len(held.seconds)), nodes)
    return Returned(
        _select(asked, again.stack, held.stack),
        select_kept(cohorts, set(nodes), again.kept, held.kept),
        {i: reason for i, reason in held.reasons.items() if i not in nodes} | again.reasons,
        np.where(asked[:, None], again.losses, held.losses),
        np.where(asked, again.seconds, held.seconds),
        again.params,
    )


def train_state(start: PyTree, kept: Kept) -> TrainState:
    """The state a node's H steps begin with."""
    return TrainState(kept.step, start, kept.inner)


def _stacked(tree: PyTree, count: int) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.repeat(jnp.asarray(leaf)[None], count, axis=0), tree)


def _select(chosen: np.ndarray, new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(chosen.reshape(chosen.shape + (1,) * (a.ndim - 1)), a, b), new, old)
