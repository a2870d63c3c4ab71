"""The embedded default: all nodes of a cohort in one compiled program on one device.

    one jit:  map over nodes ( scan over H steps )

On CPU the map is `lax.map`, which holds one node's activations at a time; on accelerators it is `vmap`, which fills
the device. `benchmarks/stacked.py` measures both on the machine at hand.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from capibara.engines.base import Assignment, Cohort, Kept, Returned, node_key, train_state
from capibara.loop import local_steps
from capibara.tree import tree_sub
from capibara.types import PyTree


class StackedEngine:
    """Runs every node of a cohort inside one program. No node can be late, crash or return another tree here.

    Args:
      over: `map` (one node at a time), `vmap` (all at once), or None for what suits the backend.
    """

    name = "stacked"

    def __init__(self, over: Literal["map", "vmap"] | None = None):
        self.over = over

    def map(self, cohorts: tuple[Cohort, ...], assignment: Assignment) -> Returned:
        """Trains all nodes; `ask` and `deadline_s` do not apply, since one program answers for all."""
        over = self.over or suited(jax.default_backend())
        num_nodes = sum(len(cohort.nodes) for cohort in cohorts)
        parts, kept, params = [], [], None
        losses = None
        for cohort, before in zip(cohorts, assignment.kept, strict=True):
            batches = _gather([assignment.batches(node) for node in cohort.nodes])
            keys = _keys(assignment.key, assignment.round, assignment.draw, np.array(cohort.nodes))
            deltas, after, loss, params = _train(
                assignment.start, before, batches, keys, step=cohort.strategy.step, over=over, alone=num_nodes == 1
            )
            parts.append(deltas)
            kept.append(after)
            if losses is None:
                losses = np.full((num_nodes, loss.shape[1]), np.nan, np.float32)
            losses[list(cohort.nodes)] = np.asarray(loss)
        assert losses is not None
        stack = parts[0] if len(parts) == 1 else _interleave(cohorts, parts, num_nodes)
        return Returned(stack, tuple(kept), {}, losses, np.full(num_nodes, np.nan), params)


def suited(backend: str) -> Literal["map", "vmap"]:
    """How a backend goes over the nodes where nothing else is asked for."""
    return "map" if backend == "cpu" else "vmap"


@partial(jax.jit, static_argnames=("step", "over", "alone"))
def _train(start: PyTree, kept: Kept, batches: PyTree, keys: Any, *, step: Any, over: str, alone: bool):
    def node(args: tuple[Kept, PyTree, Any]):
        mine, batch, key = args
        steps = len(jax.tree.leaves(batch)[0])
        state, infos = local_steps(step, train_state(start, mine), batch, jax.random.split(key, steps))
        trained = state.params if alone else None
        return tree_sub(state.params, start), Kept(state.step, state.inner), infos["loss"], trained

    work = (kept, batches, keys)
    deltas, kept, losses, trained = jax.lax.map(node, work) if over == "map" else jax.vmap(node)(work)
    return deltas, kept, losses, jax.tree.map(lambda leaf: leaf[0], trained)


@jax.jit
def _keys(key: Any, round: Any, draw: Any, nodes: Any) -> Any:
    return jax.vmap(lambda node: node_key(key, round, draw, node))(nodes)


def _gather(batches: list[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


def _interleave(cohorts: tuple[Cohort, ...], parts: list[PyTree], num_nodes: int) -> PyTree:
    order = np.argsort(np.concatenate([np.array(cohort.nodes) for cohort in cohorts]))
    assert len(order) == num_nodes
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[order], *parts)
