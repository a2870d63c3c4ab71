"""The classic rules against their definitions, written as loops."""

from __future__ import annotations

import numpy as np
import pytest
from rows import as_row, as_stack

from capibara.consensus import merging, robust
from capibara.consensus.aggregate import chain
from capibara.consensus.ballot import open_ballot
from capibara.errors import ConfigError

N, F = 11, 2


@pytest.fixture(scope="module")
def deltas() -> np.ndarray:
    random = np.random.default_rng(5)
    deltas = (1 + random.normal(size=(N, 6))).astype(np.float32)
    deltas[-2:] = [[50] * 6, [-30, 8, 0, 0, 9, 9]]
    return deltas


def merged(rule, deltas, merge=None, weights=None):
    aggregator = chain(rule, merge=merge or merging.uniform())
    ballot = open_ballot(as_stack(deltas), np.ones(len(deltas)) if weights is None else weights)
    delta, verdict, _ = aggregator.apply(ballot, aggregator.init({}), None)
    return as_row(delta), verdict


def krum_by_loops(deltas: np.ndarray, kept: list[int], f: int) -> dict[int, float]:
    scores = {}
    for i in kept:
        away = sorted(float(((deltas[i].astype(float) - deltas[j]) ** 2).sum()) for j in kept if j != i)
        scores[i] = sum(away[: max(len(kept) - f - 2, 1)])
    return scores


def test_krum_picks_the_row_with_the_least_score(deltas):
    found, verdict = merged(robust.krum(F), deltas)
    scores = krum_by_loops(deltas, list(range(N)), F)
    best = min(scores, key=scores.__getitem__)
    np.testing.assert_allclose(found, deltas[best], rtol=1e-6)
    assert verdict.coefficients.tolist() == pytest.approx(np.eye(N)[best].tolist())


def test_multi_krum_averages_the_best_scores(deltas):
    scores = krum_by_loops(deltas, list(range(N)), F)
    best = sorted(scores, key=scores.__getitem__)[: N - F]
    np.testing.assert_allclose(merged(robust.multi_krum(F), deltas)[0], deltas[best].mean(axis=0), rtol=1e-5)


def test_a_row_that_is_not_picked_still_backs(deltas):
    for rule in (robust.krum(F), robust.multi_krum(F)):
        assert merged(rule, deltas)[1].backing.all()
    assert merged(robust.bulyan(F), deltas, robust.bulyan_merge(F))[1].backing.all()


def test_geometric_median_leaves_no_pull(deltas):
    """At the minimum of Σ‖z − Δᵢ‖ the unit vectors to the rows add up to nothing."""
    found, _ = merged(robust.geometric_median(F), deltas)
    gap = deltas.astype(float) - found
    pull = (gap / np.linalg.norm(gap, axis=1, keepdims=True)).sum(axis=0)
    assert np.linalg.norm(pull) < 1e-3


def test_centered_clipping_is_its_definition(deltas):
    z = np.zeros(6)
    for _ in range(3):
        gap = deltas.astype(float) - z
        away = np.linalg.norm(gap, axis=1)
        tau = np.sort(away)[(N + 1) // 2 - 1]
        z = z + (gap * np.minimum(1, tau / away)[:, None]).mean(axis=0)
    found, verdict = merged(robust.centered_clipping(F), deltas)
    np.testing.assert_allclose(found, z, rtol=1e-5, atol=1e-6)
    assert verdict.coefficient_start == pytest.approx(1 - verdict.coefficients.sum())


def test_bulyan_is_krum_repeated_and_a_mean_around_the_median(deltas):
    left, picked = list(range(N)), []
    for _ in range(N - 2 * F):
        scores = krum_by_loops(deltas, left, F)
        picked.append(min(scores, key=scores.__getitem__))
        left.remove(picked[-1])
    chosen = deltas[sorted(picked)].astype(float)
    near = np.argsort(np.abs(chosen - np.median(chosen, axis=0)), axis=0)[: len(picked) - 2 * F]
    expected = np.take_along_axis(chosen, near, axis=0).mean(axis=0)
    found, _ = merged(robust.bulyan(F), deltas, robust.bulyan_merge(F))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_coordinate_rules_are_their_merge(deltas):
    found, verdict = merged(robust.coordinates("trimmed_mean", F), deltas, merging.trimmed_mean(F))
    np.testing.assert_allclose(found, np.sort(deltas, axis=0)[F : N - F].mean(axis=0), rtol=1e-5)
    assert verdict.backing.all() and verdict.centre is None and verdict.leash is None
    found, _ = merged(robust.coordinates("median", F), deltas, merging.median())
    np.testing.assert_allclose(found, np.median(deltas, axis=0), rtol=1e-6)


def test_a_negative_number_of_faults_is_refused():
    with pytest.raises(ConfigError, match="0 or more; got -1"):
        robust.krum(-1)
