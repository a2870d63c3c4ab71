"""`merge_strategy = "convex_optimization"`: in a round the rows are merged by the mixture's weights.

    vote ► rows that back ► log-probabilities of θ + Δᵢ on the split `merge` ► shares of the mixture ► Σ wᵢ rowᵢ

The split is disjoint from the gates' and from the test split. The rows that are merged are the nodes' own as the vote
clipped them, and shares are convex, so the leash holds whatever the shares are; the final gate judges the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from capibara.consensus.ballot import Merge
from capibara.consensus.combine import checked_weights
from capibara.consensus.convex import mixture
from capibara.consensus.evidence import held_out, read_logs
from capibara.consensus.simplex import kl_penalty
from capibara.tree import tree_add
from capibara.types import Batch, Objective, PyTree

NAME = "convex_optimization"
SCORE = "mixture_shares"
"""Of the ballot; where it has none, rows count by their weights."""

STRENGTH = 0.01
"""λ of the pull to equal shares, the default of `ConvexityController`: without it shares fit the noise of the split."""


def convex_optimization() -> Merge:
    """Σ wᵢ rowᵢ with the mixture's shares of the rows that count, or their weights where there are no shares.

    Tolerates: nothing by itself; it stands behind a vote, and a convex sum of clipped rows stays within the leash.
    Cost: a forward pass a node over the split `merge`, and the vote twice.
    Fails when: the split is so small that shares are noise; they then stay near equal.
    """
    return Merge(NAME, weights=lambda w: w / w.sum(), score=SCORE)


def mixture_shares(
    objective: Objective, params: PyTree, stack: PyTree, backing: np.ndarray, batch: Batch
) -> tuple[np.ndarray, dict[str, Any]] | None:
    """Shares float64[n] of the rows that back, and what the certificate says of them.

    A row whose losses are not finite has share 0; None where that leaves no row.

    Args:
      objective: Losses of the nodes' models.
      params: θ.
      stack: Raw deltas, leaves [n, ...].
      backing: bool[n].
      batch: Sequences of the split `merge`.
    """
    held, columns, used, tokens = held_out(batch), [], [], np.zeros(0)
    for i in np.flatnonzero(backing):
        logs, rows = read_logs(objective, tree_add(params, jax.tree.map(lambda leaf: leaf[i], stack)), held)  # noqa: B023
        if np.isfinite(logs).all():
            columns.append(logs)
            used.append(i)
            tokens = rows.tokens
    if not used:
        return None
    found = mixture(np.stack(columns, axis=1), tokens, kl_penalty(STRENGTH, np.full(len(used), 1 / len(used))))
    shares = np.zeros(len(backing))
    shares[used] = found.weights
    return shares, {"shares": shares.tolist(), "value": found.value, "gap": found.gap, "targets": float(tokens.sum())}


def recorded_shares(line: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The scores of a ballot that repeats a certificate's vote; empty where the line has no shares.

    Raises:
      ConfigError: If what it has is no shares of its nodes.
    """
    entry = line["extensions"].get(NAME)
    if not isinstance(entry, Mapping):
        return {}
    return {SCORE: checked_weights(entry.get("shares"), len(line["nodes"]), "the certificate's shares")}
