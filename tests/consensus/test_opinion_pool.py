"""The log-opinion pool against an interior-point solver; pieces change nothing."""

from __future__ import annotations

import cones
import numpy as np
import pytest

from capibara.consensus import opinion_pool as pools
from capibara.consensus.opinion_pool import opinion_pool
from capibara.consensus.simplex import Penalty, kl_penalty, l2_penalty, no_penalty


def problem(T: int = 12, V: int = 5, M: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities [T, V, M] and targets."""
    rng = np.random.default_rng(seed)
    z = 1.5 * rng.normal(size=(T, V, M)) + rng.normal(size=(T, V, 1))
    z -= np.log(np.exp(z).sum(axis=1, keepdims=True))
    return z, rng.integers(0, V, T)


def penalty_of(kind: str, prior: np.ndarray) -> Penalty:
    return {"none": lambda s, u: no_penalty(u), "kl": kl_penalty, "l2": l2_penalty}[kind](0.05, prior)


@pytest.mark.parametrize("kind", ["none", "kl", "l2"])
@pytest.mark.parametrize("seed", range(2))
def test_the_value_is_the_optimum_of_an_interior_point_solver(kind, seed):
    z, y = problem(seed=seed)
    prior = np.random.default_rng(seed).dirichlet(np.ones(4)) * 0.8 + 0.05
    found = opinion_pool(lambda: [(z, y, np.ones(len(y)))], penalty_of(kind, prior))
    assert found.converged and found.gap < 1e-8
    assert found.value == pytest.approx(cones.best_pool(z, y, kind, 0.05, prior), abs=cones.ACCURACY)


def test_pieces_and_blocks_change_nothing(monkeypatch):
    z, y = problem(T=30)
    penalty, ones = no_penalty(np.full(4, 0.25)), np.ones(30)
    whole = opinion_pool(lambda: [(z, y, ones)], penalty)
    monkeypatch.setattr(pools, "ROW_NUMBERS", 3 * z.shape[1] * z.shape[2])
    cut = opinion_pool(lambda: iter([(z[:11], y[:11], ones[:11]), (z[11:], y[11:], ones[11:])]), penalty)
    np.testing.assert_allclose(cut.weights, whole.weights, atol=1e-9)
    assert cut.value == pytest.approx(whole.value, abs=1e-12)


def test_the_pool_is_below_the_mean_of_the_models_and_its_gap_holds_when_cut_short():
    """f is convex and at a corner the loss of a model."""
    z, y = problem(T=40, seed=3)
    losses = -z[np.arange(40), y].mean(axis=0)
    penalty, read = no_penalty(np.full(4, 0.25)), lambda: [(z, y, np.ones(40))]
    best = opinion_pool(read, penalty)
    assert best.value <= losses.min() + best.gap
    short = opinion_pool(read, penalty, max_iterations=1)
    assert short.iterations == 1 and short.value - best.value <= short.gap
