"""The debug truth: nodes one after another, nothing compiled, every fault a node can have can be had here."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from capibara.consensus.validate import admit
from capibara.engines.base import Assignment, Cohort, Kept, Returned, node_key, train_state
from capibara.loop import local_steps
from capibara.tree import tree_sub
from capibara.types import PyTree


class InlineEngine:
    """Runs the asked nodes one by one in this process, without `jit`.

    Args:
      deliver: `(node, attempt, delta) -> anything`: what arrives of a delta. The seam for faults: it may raise
        (the node crashed), sleep on the injected clock (late) or return another tree.
      clock: Seconds, monotonic.
    """

    name = "inline"

    def __init__(
        self,
        deliver: Callable[[int, int, PyTree], Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.deliver = deliver or (lambda node, attempt, delta: delta)
        self.clock = clock

    def map(self, cohorts: tuple[Cohort, ...], assignment: Assignment) -> Returned:
        """Trains the asked nodes in order; a node that raises is `crashed` and the others go on."""
        place = {node: (c, k) for c, cohort in enumerate(cohorts) for k, node in enumerate(cohort.nodes)}
        num_nodes = len(place)
        zeros = jax.tree.map(jnp.zeros_like, assignment.start)
        rows, reasons, params = [zeros] * num_nodes, {}, None
        losses = np.full((num_nodes, assignment.steps), np.nan, np.float32)
        kept = list(assignment.kept)
        seconds = np.full(num_nodes, np.nan)
        for node in assignment.ask:
            c, k = place[node]
            mine = jax.tree.map(lambda leaf, k=k: leaf[k], assignment.kept[c])
            began = self.clock()
            try:
                delta, after, losses[node], params = self._train(cohorts[c], mine, assignment, node)
                delta = self.deliver(node, assignment.attempt, delta)
            except Exception as error:  # noqa: BLE001 - a node may fail in any way; the round goes on without it
                reasons[node] = "crashed"
                error.add_note(f"node {node} in round {assignment.round}, attempt {assignment.attempt}")
                self.last_error = error
                continue
            seconds[node] = self.clock() - began
            if assignment.deadline_s is not None and seconds[node] > assignment.deadline_s:
                reasons[node] = "late"
            elif reason := admit(delta, assignment.start):
                reasons[node] = reason
            else:
                rows[node] = delta
                kept[c] = jax.tree.map(lambda all_, one, k=k: all_.at[k].set(one), kept[c], after)
        stack = jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *rows)
        return Returned(stack, tuple(kept), reasons, losses, seconds, params if num_nodes == 1 else None)

    last_error: Exception | None = None

    def _train(self, cohort: Cohort, kept: Kept, assignment: Assignment, node: int):
        batches = assignment.batches(node)
        keys = jax.random.split(node_key(assignment.key, assignment.round, assignment.draw, node), assignment.steps)
        with jax.disable_jit():
            state, infos = local_steps(cohort.strategy.step, train_state(assignment.start, kept), batches, keys)
        delta = tree_sub(state.params, assignment.start)
        return delta, Kept(state.step, state.inner), np.asarray(infos["loss"]), state.params
