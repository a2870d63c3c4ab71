"""A vote over finished models, which share no start: the reference point is their coordinate-wise median.

    r = median of the models,  Δᵢ = θᵢ − r,  the default vote without ARC,  result r + Δ
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from capibara.consensus import merging, networks
from capibara.consensus.aggregate import chain
from capibara.consensus.ballot import Ballot, Rule, Verdict, open_ballot
from capibara.consensus.gates import GateVerdict, gate_differences, judge
from capibara.consensus.record import strictest
from capibara.consensus.validate import admit, finite_rows
from capibara.consensus.voting import byzantine_tolerant
from capibara.errors import ConfigError, QuorumError
from capibara.tree import tree_add
from capibara.types import Batch, Objective, PyTree

AGREE = 1e-9
"""Votes over permuted models may differ in the order of float64 sums only."""


class ModelVote(NamedTuple):
    """The outcome of a vote over models.

    Attributes:
      merged: The consensus, a tree like the models.
      num_faulty: f, how many models may be arbitrarily wrong.
      reasons: One for each model: `backed`, or why it does not count.
      coefficients: float64[n] shares of the models' deltas in the result; the rest stays on the median.
      verdict: Distances, radius and the rest of the vote; None where one model was left.
      quality: The gate's findings, where there was validation data.
      recomputed: How many votes over permuted models agreed.
    """

    merged: PyTree
    num_faulty: int
    reasons: list[str]
    coefficients: np.ndarray
    verdict: Verdict | None
    quality: GateVerdict | None
    recomputed: int


def vote_models(
    models: list[PyTree],
    f: int,
    *,
    verification_rounds: int = 3,
    objective: Objective | None = None,
    batch: Batch | None = None,
    quality_threshold: float = 0.85,
) -> ModelVote:
    """The default vote over trees of the same structure.

    Tolerates: f arbitrary models of n > 2f. The median is within the honest models' range in every coordinate.
    Cost: one pass for the median, two for the vote; the Gram matrix is the same for every recomputation.
    Fails when: the models come from different initialisations: the middle of unrelated models is no model.

    Args:
      models: Trees of float arrays.
      f: Models that may be arbitrarily wrong.
      verification_rounds: Recomputations on permuted models that must agree.
      objective: Losses for the gate; without it or without `batch` there is no gate.
      batch: Held-out sequences.
      quality_threshold: Of the gate.

    Raises:
      ConfigError: If there are no models, or their trees differ.
      QuorumError: If fewer than n − f models count.
    """
    n = len(models)
    if n == 0:
        raise ConfigError("There are no models to vote on; give at least one.")
    for i, model in enumerate(models):
        if reason := admit(model, models[0]):
            raise ConfigError(f"Model {i} cannot be voted on beside model 0: {reason.replace('_', ' ')}.")
    stack = jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf, jnp.float32) for leaf in leaves]), *models)
    finite = np.asarray(finite_rows(stack))
    if finite.sum() < n - f:
        raise _too_few(["backed" if good else "not_finite" for good in finite], n - f)
    middle = jax.tree.map(lambda leaf: networks.median(leaf[np.flatnonzero(finite)]), stack)
    deltas = jax.tree.map(lambda leaf, m: leaf - m, stack, middle)
    flags, quality = [("not_finite", ~finite)], None
    if objective is not None and batch is not None:
        differences, tokens = gate_differences(objective, middle, deltas, batch, min(0.5, 2 / n))
        quality = judge(differences, tokens, _shards(len(tokens), verification_rounds), -np.log(quality_threshold))
        flags.append(("low_quality", ~quality.passed))
    reasons = strictest(flags, n)
    if reasons.count("backed") < n - f:
        raise _too_few(reasons, n - f)
    weights = np.array([reason == "backed" for reason in reasons], np.float64)
    vote = chain(byzantine_tolerant(f, clip_norms=False), merge=merging.uniform())
    ballot = open_ballot(deltas, weights)
    delta, verdict, _ = vote.apply(ballot, vote.init(middle), None)
    assert verdict.coefficients is not None
    _recompute(byzantine_tolerant(f, clip_norms=False), ballot, verdict.coefficients, verification_rounds)
    reasons = strictest([*flags, ("outvoted", ~verdict.backing)], n)
    merged = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), tree_add(middle, delta), models[0])
    return ModelVote(merged, f, reasons, verdict.coefficients, verdict, quality, verification_rounds)


def vote_gram(
    rule: Rule, gram: np.ndarray, finite: np.ndarray, f: int, *, verification_rounds: int = 3
) -> tuple[np.ndarray, list[str]]:
    """The same vote by any rule that sees products alone, where the models themselves are larger than memory.

    Args:
      rule: A rule that weighs or combines rows, as `byzantine_tolerant(f, clip_norms=False)`.
      gram: float64[n, n], ⟨θᵢ − r, θⱼ − r⟩ with r the coordinate-wise median of the models that count.
      finite: bool[n], the models that count; the others' products are 0.
      f: Models that may be arbitrarily wrong.
      verification_rounds: Recomputations on permuted models that must agree.

    Returns:
      Coefficients v[n] of the deltas, so that the result is r + Σ vᵢ(θᵢ − r), and for each model `backed` or why it
      does not count.

    Raises:
      QuorumError: If fewer than n − f models count, or a recomputation does not agree.
    """
    n = len(gram)
    flags = [("not_finite", ~finite)]
    if finite.sum() < n - f:
        raise _too_few(strictest(flags, n), n - f)
    ballot = Ballot({}, finite.astype(np.float64), np.eye(n, n + 1), gram, {})
    vote = chain(rule, merge=merging.uniform())
    _, verdict, _ = vote.apply(ballot, vote.init({}), None)
    assert verdict.coefficients is not None
    _recompute(rule, ballot, verdict.coefficients, verification_rounds)
    return verdict.coefficients, strictest([*flags, ("outvoted", ~verdict.backing)], n)


def _recompute(rule: Rule, ballot: Ballot, expected: np.ndarray, rounds: int) -> None:
    mean = merging.uniform().weights
    assert mean is not None
    lengths = np.diagonal(ballot.gram)[ballot.weights > 0]
    scale = max(float(np.median(lengths)), 1e-300)  # not the longest: one lie of 1e20 would make any two votes agree
    for seed in range(rounds):
        order = np.random.default_rng(seed).permutation(len(expected))
        turned = ballot._replace(weights=ballot.weights[order], gram=ballot.gram[np.ix_(order, order)])
        after, _, _ = rule.apply(turned, (), None)
        v = np.empty(len(expected))
        v[order] = mean(after.weights) @ after.rows[:, :-1]
        gap = v - expected
        if gap @ ballot.gram @ gap > AGREE * scale:
            raise QuorumError(f"Recomputation {seed + 1} of {rounds} of the vote, over permuted models, did not agree.")


def _shards(count: int, wanted: int) -> int:
    return next(k for k in range(min(wanted, count), 0, -1) if count % k == 0)


def _too_few(reasons: list[str], needed: int) -> QuorumError:
    named = ", ".join(f"model {i}: {r}" for i, r in enumerate(reasons) if r != "backed")
    return QuorumError(
        f"{reasons.count('backed')} of {len(reasons)} models count and {needed} are needed ({named}). "
        "Leave the others out.",
        dict(enumerate(reasons)),
    )
