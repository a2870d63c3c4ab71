"""What an attack is: it knows every honest row and the rule in use, and acts on what its nodes return or train on.

What it returns passes the same validation, gate and vote as anyone's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from capibara.types import Batch, PyTree


class AttackView(NamedTuple):
    """What the attacker sees.

    Attributes:
      stack: All deltas, leaves float32[n, ...]; the hostile rows hold what honest training gave.
      hostile: Node ids it controls.
      honest: The others.
      f: Nodes that the vote tolerates.
      round: Index of the round.
      aggregate: The rule in use, `(stack) -> merged delta`.
      start: θ.
    """

    stack: PyTree
    hostile: tuple[int, ...]
    honest: tuple[int, ...]
    f: int
    round: int
    aggregate: Callable[[PyTree], PyTree]
    start: PyTree


class Attack(NamedTuple):
    """A simulated attack.

    Attributes:
      name: With its strength, for records.
      init: `(zero delta, hostile) -> state` of arrays, checkpointed; None where there is nothing to remember, and the
        state is then ().
      forge: `(view, state, key) -> (stack, state)`: replaces the hostile rows; None where only data are touched.
      poison: `(batch, vocab_size) -> batch`: changes what the hostile nodes train on; None where rows are forged.
    """

    name: str
    init: Callable[[PyTree, tuple[int, ...]], PyTree] | None = None
    forge: Callable[[AttackView, PyTree, Any], tuple[PyTree, PyTree]] | None = None
    poison: Callable[[Batch, int], Batch] | None = None


def replace_rows(stack: PyTree, hostile: tuple[int, ...], rows: PyTree) -> PyTree:
    """The stack with every hostile row replaced: by one row for all, or by rows [len(hostile), ...]."""
    where = np.array(hostile, np.int32)
    return jax.tree.map(lambda leaf, row: leaf.at[where].set(row.astype(leaf.dtype)), stack, rows)


def own_rows(view: AttackView) -> PyTree:
    """What honest training gave the hostile nodes, leaves [len(hostile), ...]."""
    where = np.array(view.hostile, np.int32)
    return jax.tree.map(lambda leaf: leaf[where], view.stack)


def honest_mean(view: AttackView) -> PyTree:
    """m, the mean of the honest rows, leaf by leaf in one pass; what the hostile rows hold does not matter."""
    return _mean(view.stack, honest=view.honest)


def honest_deviation(view: AttackView, mean: PyTree) -> PyTree:
    """s, the coordinate-wise standard deviation (ddof 0) of the honest rows around `mean`, in one pass."""
    return _deviation(view.stack, mean, honest=view.honest)


@partial(jax.jit, static_argnames="honest")
def _mean(stack: PyTree, *, honest: tuple[int, ...]) -> PyTree:
    return jax.tree.map(lambda leaf: sum(leaf[i] for i in honest) / np.float32(len(honest)), stack)


@partial(jax.jit, static_argnames="honest")
def _deviation(stack: PyTree, mean: PyTree, *, honest: tuple[int, ...]) -> PyTree:
    def one(leaf: jax.Array, m: jax.Array) -> jax.Array:
        return jnp.sqrt(sum((leaf[i] - m) ** 2 for i in honest) / np.float32(len(honest)))

    return jax.tree.map(one, stack, mean)
