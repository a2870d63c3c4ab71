"""The mixture problem against an interior-point solver and closed forms; its gap at every iterate."""

from __future__ import annotations

import cones
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capibara.consensus.convex import FLOOR, jensen_gap, mixture, mixture_loss
from capibara.consensus.simplex import Penalty, kl_penalty, l2_penalty, linear_gap, no_penalty
from capibara.errors import ConfigError

KINDS = ("none", "kl", "l2")


def penalty_of(kind: str, prior: np.ndarray, strength: float = 0.05) -> Penalty:
    return {"none": lambda s, u: no_penalty(u), "kl": kl_penalty, "l2": l2_penalty}[kind](strength, prior)


def logs_of(T: int, M: int, seed: int = 0, spread: float = 1.0) -> np.ndarray:
    """Log-probabilities of models that agree on what is hard and differ in skill and in what they know."""
    rng = np.random.default_rng(seed)
    return -(rng.gamma(2, 1, (T, 1)) + np.abs(spread * rng.normal(size=(T, M))) + 0.1 * rng.random(M))


def prior_of(M: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, 1]).dirichlet(np.full(M, 2.0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_the_value_is_the_optimum_of_an_interior_point_solver(kind, seed):
    logs, prior = logs_of(60, 5, seed), prior_of(5, seed)
    found = mixture(logs, penalty=penalty_of(kind, prior))
    assert found.converged and found.gap < 1e-8
    assert found.value == pytest.approx(cones.best_mixture(logs, kind, 0.05, prior), abs=cones.ACCURACY)


@settings(max_examples=60)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(KINDS),
    st.integers(1, 9),
    st.integers(1, 40),
    st.sampled_from((1e-6, 0.1, 1.0, 30.0)),
)
def test_the_gap_bounds_what_any_weights_gain(seed, kind, M, T, spread):
    """At the end, and at every point on the way: value − gap ≤ F(s) for all s on the simplex."""
    rng = np.random.default_rng(seed)
    logs, prior = logs_of(T, M, seed % 1000, spread), rng.dirichlet(np.ones(M)) * 0.9 + 0.1 / M
    penalty = penalty_of(kind, prior)
    smooth = mixture_loss(logs)
    others = np.concatenate([np.eye(M), rng.dirichlet(np.full(M, 0.3), 20), [prior]])
    values = [smooth.value(s) + penalty.value(s) for s in others]
    found = mixture(logs, penalty=penalty)
    assert found.converged
    assert found.value <= min(values) + found.gap + 1e-12
    for w in (prior, rng.dirichlet(np.ones(M))):
        value, slope, _ = smooth.derivatives(w)
        bound = jensen_gap(w, slope) if kind == "none" else linear_gap(w, slope, penalty)
        assert value + penalty.value(w) - bound <= min(*values, found.value) + 1e-9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [1, 3, 21])
def test_a_search_cut_short_has_a_gap_that_still_holds(kind, limit):
    logs, prior = logs_of(300, 12, 4), prior_of(12, 4)
    best = mixture(logs, penalty=penalty_of(kind, prior), tolerance=1e-14).value
    found = mixture(logs, penalty=penalty_of(kind, prior), max_iterations=limit, tolerance=1e-14)
    assert found.iterations <= limit
    assert limit > 1 or found.gap > 1e-5  # far from done
    assert -1e-12 <= found.value - best <= found.gap + 1e-12


def test_two_models_on_a_coin_have_a_closed_form():
    """p = a w + b (1 − w) for heads and its complement for tails: the mixture predicts the observed frequency."""
    heads, a, b = 0.6, 0.9, 0.2
    logs = np.log([[a, b], [1 - a, 1 - b]])
    found = mixture(logs, np.array([heads, 1 - heads]))
    assert found.weights[0] == pytest.approx((heads - b) / (a - b), abs=1e-6)
    assert found.value == pytest.approx(-(heads * np.log(heads) + (1 - heads) * np.log(1 - heads)), abs=1e-12)


def test_the_derivatives_are_those_of_the_loss():
    logs, rng = logs_of(40, 4), np.random.default_rng(0)
    smooth, w, step = mixture_loss(logs), rng.dirichlet(np.ones(4)), 1e-5
    value, slope, hessian = smooth.derivatives(w)
    assert value == smooth.value(w)
    for i, e in enumerate(np.eye(4)):
        ahead, behind = smooth.derivatives(w + step * e), smooth.derivatives(w - step * e)
        assert slope[i] == pytest.approx((ahead[0] - behind[0]) / (2 * step), abs=1e-8)
        np.testing.assert_allclose(hessian[i], (ahead[1] - behind[1]) / (2 * step), rtol=1e-6, atol=1e-8)


def test_rows_count_as_often_as_their_shares_say():
    logs, shares = logs_of(20, 3), np.random.default_rng(0).integers(1, 4, 20)
    np.testing.assert_allclose(
        mixture(logs, shares).weights, mixture(np.repeat(logs, shares, axis=0)).weights, atol=1e-6
    )


def test_a_useless_model_has_no_weight():
    """One worse than another on every token: weight 0, exactly without a penalty and with L2, and with KL too."""
    logs = logs_of(200, 3)
    logs = np.concatenate([logs, logs.min(axis=1, keepdims=True) - 5], axis=1)
    for kind in KINDS:
        assert mixture(logs, penalty=penalty_of(kind, np.full(4, 0.25), 0.01)).weights[3] == 0


def test_a_model_that_finds_every_target_impossible_has_no_weight():
    logs = np.concatenate([logs_of(50, 2), np.full((50, 1), -np.inf)], axis=1)
    found = mixture(logs)
    assert found.weights[2] == 0 and found.value == pytest.approx(mixture(logs[:, :2]).value, abs=1e-9)


def test_what_all_models_find_impossible_has_a_finite_price():
    logs = np.concatenate([logs_of(9, 2), np.full((1, 2), -np.inf)])
    assert mixture(logs).value == pytest.approx(0.9 * mixture(logs[:9]).value - 0.1 * FLOOR, abs=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_identical_models_leave_the_weights_where_trust_put_them(kind):
    logs, prior = np.tile(logs_of(30, 1), (1, 6)), prior_of(6, 0)
    found = mixture(logs, penalty=penalty_of(kind, prior))
    np.testing.assert_allclose(found.weights, prior, atol=1e-9)
    assert found.converged and found.value == pytest.approx(-logs[:, 0].mean(), abs=1e-12)


def test_near_duplicates_do_not_slow_the_search():
    """The fixed point alone needs thousands of steps there."""
    rng = np.random.default_rng(1)
    logs = logs_of(2000, 4)
    logs = np.concatenate([logs, logs, logs + 1e-5 * rng.normal(size=logs.shape)], axis=1)
    for kind in KINDS:
        found = mixture(logs, penalty=penalty_of(kind, np.full(12, 1 / 12)))
        assert found.converged and found.iterations < 40


def test_one_model_is_its_own_optimum():
    for kind in KINDS:
        found = mixture(logs_of(5, 1), penalty=penalty_of(kind, np.ones(1)))
        assert found.weights.tolist() == [1.0] and found.converged and found.iterations == 0


def test_two_hundred_models_and_few_tokens():
    logs, prior = logs_of(100, 200), np.full(200, 1 / 200)
    for kind in KINDS:
        found = mixture(logs, penalty=penalty_of(kind, prior))
        assert found.converged and abs(found.weights.sum() - 1) < 1e-12 and (found.weights >= 0).all()


def test_no_gap_is_claimed_below_the_precision_of_the_numbers():
    logs = logs_of(50, 3)
    exact, rounded = mixture(logs), mixture(logs.astype(np.float32))
    assert exact.gap < 1e-8 < 1e-7 < rounded.gap
    assert abs(exact.value - rounded.value) < rounded.gap


def test_a_strong_pull_keeps_the_trust_weights():
    logs, prior = logs_of(50, 4), prior_of(4, 2)
    for kind in ("kl", "l2"):
        np.testing.assert_allclose(mixture(logs, penalty=penalty_of(kind, prior, 1e4)).weights, prior, atol=1e-3)


def test_what_cannot_be_a_problem_is_said():
    logs = logs_of(4, 2)
    with pytest.raises(ConfigError, match=r"at least one of each; got \(0, 2\)"):
        mixture(logs[:0])
    with pytest.raises(ConfigError, match="2 models and 3 prior weights"):
        mixture(logs, penalty=no_penalty(np.full(3, 1 / 3)))
    logs[1, 1] = np.nan
    with pytest.raises(ConfigError, match=r"models \[1\] are NaN"):
        mixture(logs)
