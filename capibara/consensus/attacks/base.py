"""What an attack is: it knows every honest row and the rule in use, and acts on what its nodes return or train on.

What it returns passes the same validation, gate and vote as anyone's.
"""

from __future__ import annotations

from collections.abc import Callable
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
      init: `(zero delta, hostile) -> state` of arrays, checkpointed; None for no state.
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


def honest_mean(view: AttackView) -> PyTree:
    """The mean of the honest rows, leaf by leaf."""
    weights = _weights(view)
    return jax.tree.map(lambda leaf: jnp.einsum("n,n...->...", weights, leaf), view.stack)


def honest_deviation(view: AttackView) -> PyTree:
    """The coordinate-wise standard deviation (ddof 0) of the honest rows."""
    weights, mean = _weights(view), honest_mean(view)
    return jax.tree.map(
        lambda leaf, m: jnp.sqrt(jnp.einsum("n,n...->...", weights, (leaf - m) ** 2)), view.stack, mean
    )


def _weights(view: AttackView) -> jax.Array:
    n = len(view.hostile) + len(view.honest)
    return jnp.asarray(np.isin(np.arange(n), view.honest) / len(view.honest), jnp.float32)
