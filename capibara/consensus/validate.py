"""What is checked of a delta before it may enter the vote: its tree, its shapes, its type, its numbers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from capibara.types import PyTree

REASONS = (
    "late",
    "crashed",
    "duplicate_identity",
    "wrong_structure",
    "wrong_shape",
    "wrong_dtype",
    "not_finite",
    "stale",
    "wrong_count",
    "failed_audit",
    "benched",
    "joining",
    "low_quality",
    "outvoted",
    "backed",
)
"""Every reason a certificate can give for a node, in order of precedence; the last one means that it counts."""


def admit(delta: Any, template: PyTree) -> str | None:
    """The reason why what a node returned cannot be stacked with the others, or None where it can.

    Args:
      delta: Whatever arrived; nothing is assumed about it.
      template: The start θ, whose structure, shapes and dtypes a delta must have.

    Returns:
      `wrong_structure`, `wrong_shape`, `wrong_dtype` or None. Finiteness is checked for all rows at once by
      `finite_rows`.
    """
    if jax.tree.structure(delta) != jax.tree.structure(template):
        return "wrong_structure"
    pairs = list(zip(jax.tree.leaves(delta), jax.tree.leaves(template), strict=True))
    if any(not isinstance(got, (np.ndarray, jax.Array, np.generic)) for got, _ in pairs):
        return "wrong_dtype"
    if any(got.shape != want.shape for got, want in pairs):
        return "wrong_shape"
    if any(got.dtype != want.dtype for got, want in pairs):
        return "wrong_dtype"
    return None


@jax.jit
def finite_rows(stack: PyTree) -> jax.Array:
    """bool[n]: which rows hold nothing but finite numbers. One pass over the stack."""
    checks = [jnp.isfinite(leaf).reshape(leaf.shape[0], -1).all(axis=1) for leaf in jax.tree.leaves(stack)]
    return jnp.stack(checks).all(axis=0)


def duplicate_groups(digests: dict[int, str], norms: np.ndarray) -> list[list[int]]:
    """Groups of nodes that sent the same bytes; zero deltas are exempt. They are recorded, not punished.

    Args:
      digests: Of the deltas that arrived, by node.
      norms: float64[n] lengths of the deltas; NaN where one is not finite.
    """
    groups: dict[str, list[int]] = {}
    for node, digest in digests.items():
        if norms[node] != 0:
            groups.setdefault(digest, []).append(node)
    return [group for group in groups.values() if len(group) > 1]
