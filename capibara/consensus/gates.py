"""The quality gate and the final gate: paired differences of held-out loss, innocent until proven bad.

    d = L(θ + αΔ) − L(θ) per sequence;   out when  mean d − 2·SE > −ln(quality_threshold)  and most shards agree

A fuse for broken nodes, not a judge of merit: it must not pick winners (docs/voting.md, the gate).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from capibara.types import Batch, Objective, PyTree


class GateVerdict(NamedTuple):
    """The quality of n rows.

    Attributes:
      passed: bool[n].
      quality: float64[n] in [0, 1], min(1, exp(−mean d)); NaN where the loss is not finite.
      mean: float64[n] token-weighted mean d in nats a token.
      se: float64[n] its standard error (ddof 1).
      shard_means: float64[n, K].
    """

    passed: np.ndarray
    quality: np.ndarray
    mean: np.ndarray
    se: np.ndarray
    shard_means: np.ndarray


class FinalVerdict(NamedTuple):
    """θ' against its parent θ and against the anchor, nats a token."""

    passed: bool
    parent_mean: float
    parent_se: float
    anchor_mean: float
    anchor_se: float


def gate_differences(
    objective: Objective, params: PyTree, stack: PyTree, batch: Batch, alpha: float
) -> tuple[np.ndarray, np.ndarray]:
    """Summed loss of θ + αΔᵢ minus that of θ, for every node and sequence.

    Returns:
      float64[n, count] differences in nats, and float64[count] tokens. Cost: (n+1) forward passes over the batch.
    """
    sums, base, tokens = _gate(params, stack, batch, np.float32(alpha), losses=objective.sequence_losses)
    return np.asarray(sums, np.float64) - np.asarray(base, np.float64), np.asarray(tokens, np.float64)


def judge(differences: np.ndarray, tokens: np.ndarray, num_shards: int, limit: float) -> GateVerdict:
    """Who passes the gate.

    Args:
      differences: float64[n, count] summed losses, see `gate_differences`.
      tokens: float64[count].
      num_shards: K; the sequences are cut into K shards of equal size.
      limit: −ln(quality_threshold), nats a token.
    """
    mean, se = paired(differences, tokens)
    shards = differences.reshape(len(differences), num_shards, -1).sum(-1) / tokens.reshape(num_shards, -1).sum(-1)
    finite = np.isfinite(differences).all(axis=1)
    with np.errstate(invalid="ignore", over="ignore"):
        proven = (mean - 2 * se > limit) & ((shards > limit).sum(axis=1) > num_shards / 2)
        quality = np.minimum(1.0, np.exp(-mean))
    return GateVerdict(finite & ~proven, quality, mean, se, shards)


def final_gate(
    objective: Objective, parent: PyTree, anchor: PyTree, candidate: PyTree, batch: Batch, limit: float
) -> FinalVerdict:
    """Refuses θ' when it is not finite, or shown to be worse than its parent or than the anchor by more than `limit`.

    Cost: three forward passes over the batch; two where the anchor is the parent itself, as after every improvement.
    """
    losses = partial(sequence_sums, objective)
    new, tokens = losses(candidate, batch)
    before = losses(parent, batch)[0]
    best = before if anchor is parent else losses(anchor, batch)[0]
    verdicts = [paired((new - old)[None], tokens) for old in (before, best)]
    (parent_mean, parent_se), (anchor_mean, anchor_se) = ((float(m[0]), float(s[0])) for m, s in verdicts)
    harmful = parent_mean - 2 * parent_se > limit or anchor_mean - 2 * anchor_se > limit
    passed = bool(np.isfinite(new).all()) and not harmful and all(
        bool(np.all(np.isfinite(leaf))) for leaf in jax.tree.leaves(candidate)
    )
    return FinalVerdict(passed, parent_mean, parent_se, anchor_mean, anchor_se)


def sequence_sums(objective: Objective, params: PyTree, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """float64[count] summed loss and tokens of each sequence, from one compiled forward pass."""
    sums, tokens = _sums(params, batch, losses=objective.sequence_losses)
    return np.asarray(sums, np.float64), np.asarray(tokens, np.float64)


def paired(differences: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Token-weighted mean of [n, count] summed differences, and its standard error (ratio estimator, ddof 1)."""
    count = differences.shape[1]
    with np.errstate(invalid="ignore", over="ignore"):
        mean = differences.sum(axis=1) / tokens.sum()
        residual = differences - mean[:, None] * tokens
        se = np.sqrt((residual**2).sum(axis=1) * count / max(count - 1, 1)) / tokens.sum()
    return mean, se


@partial(jax.jit, static_argnames="losses")
def _gate(params: PyTree, stack: PyTree, batch: Batch, alpha: Any, *, losses: Any):
    def node(delta: PyTree) -> jax.Array:
        return losses(jax.tree.map(lambda p, d: p + alpha * d, params, delta), batch)[0]

    base, tokens = losses(params, batch)
    if jax.default_backend() == "cpu":
        return jax.lax.map(node, stack), base, tokens
    return jax.vmap(node)(stack), base, tokens


@partial(jax.jit, static_argnames="losses")
def _sums(params: PyTree, batch: Batch, *, losses: Any):
    return losses(params, batch)
