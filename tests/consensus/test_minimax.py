"""The worst domain against an interior-point solver, brute force and its own saddle gap."""

from __future__ import annotations

import cones
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capibara.consensus.convex import mixture, mixture_loss
from capibara.consensus.minimax import minimax
from capibara.consensus.simplex import Penalty, kl_penalty, l2_penalty, no_penalty
from capibara.errors import ConfigError


def problem(seed: int, sizes: tuple[int, ...] = (30, 12, 20), M: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Models that are each better on a domain of their own."""
    rng = np.random.default_rng(seed)
    domain = np.repeat(np.arange(len(sizes)), sizes)
    logs = -(rng.gamma(2, 1, (len(domain), 1)) + np.abs(rng.normal(size=(len(domain), M))))
    logs[np.arange(len(domain)), domain % M] += 0.7
    return np.minimum(logs, -1e-3), domain


def penalty_of(kind: str, prior: np.ndarray) -> Penalty:
    return {"none": lambda s, u: no_penalty(u), "kl": kl_penalty, "l2": l2_penalty}[kind](0.05, prior)


@pytest.mark.parametrize("kind", ["none", "kl", "l2"])
def test_the_value_is_the_optimum_of_an_interior_point_solver(kind):
    logs, domain = problem(0)
    prior = np.full(5, 0.2)
    found = minimax(logs, np.ones(len(logs)), domain, penalty_of(kind, prior)).solution
    assert found.converged and found.gap < 1e-8
    assert found.value == pytest.approx(cones.best_minimax(logs, domain, kind, 0.05, prior), abs=cones.ACCURACY)


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from(("none", "kl", "l2")), st.integers(1, 300))
def test_the_saddle_gap_bounds_what_any_weights_gain(seed, kind, limit):
    """Also where the search is cut short."""
    logs, domain = problem(seed)
    penalty = penalty_of(kind, np.full(5, 0.2))
    found = minimax(logs, np.ones(len(logs)), domain, penalty, max_iterations=limit).solution
    parts = [mixture_loss(logs[domain == d]) for d in range(3)]
    others = np.concatenate([np.eye(5), np.random.default_rng(seed).dirichlet(np.full(5, 0.5), 30)])
    values = [max(part.value(s) for part in parts) + penalty.value(s) for s in others]
    assert found.value == pytest.approx(max(part.value(found.weights) for part in parts) + penalty.value(found.weights))
    assert found.value - found.gap <= min(values) + 1e-10
    assert found.iterations <= limit


def test_the_domains_that_decide_are_equally_bad():
    """Complementary slackness: a domain that counts has the loss of the worst."""
    logs, domain = problem(1)
    saddle = minimax(logs, np.ones(len(logs)), domain, no_penalty(np.full(5, 0.2)))
    worst = saddle.losses.max()
    assert saddle.domains.sum() == pytest.approx(1) and (saddle.domains > 1e-3).sum() >= 2
    np.testing.assert_allclose(saddle.losses[saddle.domains > 1e-3], worst, atol=1e-7)


def test_no_domain_is_left_behind():
    """The mean forgets a small domain; the maximum does not."""
    logs, domain = problem(2, sizes=(300, 6))
    mean = mixture(logs).weights
    both = minimax(logs, np.ones(len(logs)), domain, no_penalty(np.full(5, 0.2)))
    small = mixture_loss(logs[domain == 1])
    assert both.losses.max() < max(small.value(mean), mixture_loss(logs[domain == 0]).value(mean)) - 0.01


def test_one_domain_is_the_mixture_problem():
    logs, _ = problem(3)
    one = minimax(logs, np.ones(len(logs)), np.zeros(len(logs), int), no_penalty(np.full(5, 0.2)))
    assert one.solution.value == pytest.approx(mixture(logs).value, abs=1e-9)


def test_a_domain_without_a_target_is_refused():
    logs, domain = problem(4)
    with pytest.raises(ConfigError, match="Domain 1 has no target"):
        minimax(logs, np.ones(len(logs)), np.where(domain == 1, 2, domain), no_penalty(np.full(5, 0.2)))
