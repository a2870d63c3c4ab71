"""The outer optimiser against its recursion by hand, and the table of its learning rates."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from capibara.strategies.outer import NESTEROV_AT_30, outer_learning_rate, outer_nesterov, outer_sgd


def applied(outer: optax.GradientTransformation, deltas: np.ndarray) -> list[np.ndarray]:
    """θ after each merged delta, from zero, with −Δ as the gradient, as a round does it."""
    theta = {"w": jnp.zeros(deltas.shape[1])}
    state, path = outer.init(theta), []
    for delta in deltas:
        updates, state = outer.update({"w": jnp.asarray(-delta)}, state, theta)
        theta = optax.apply_updates(theta, updates)
        path.append(np.asarray(theta["w"]))
    return path


@pytest.fixture(scope="module")
def deltas() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)


def test_sgd_with_rate_one_takes_the_merge_as_it_is(deltas):
    np.testing.assert_allclose(applied(outer_sgd(), deltas), np.cumsum(deltas, axis=0), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(applied(outer_sgd(), deltas)[0], deltas[0])


@pytest.mark.parametrize(("rate", "momentum"), [(0.7, 0.9), (0.4, 0.5)])
def test_nesterov_is_its_recursion(deltas, rate: float, momentum: float):
    """b ← μb + Δ, θ ← θ + η(Δ + μb), in float64."""
    theta, b, expected = np.zeros(5), np.zeros(5), []
    for delta in deltas.astype(np.float64):
        b = momentum * b + delta
        theta = theta + rate * (delta + momentum * b)
        expected.append(theta)
    got = applied(outer_nesterov(rate, momentum), deltas)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got[0], (1 + momentum) * rate * deltas[0], rtol=1e-6)


TABLE = {
    # n: η at H = 1, 30, 100, 500
    1: (0.3, 0.4, 0.451, 0.530),
    2: (0.427, 0.6, 0.677, 0.795),
    3: (0.427, 0.6, 0.677, 0.795),
    4: (0.427, 0.6, 0.677, 0.795),
    6: (0.510, 0.717, 0.809, 0.950),
    8: (0.569, 0.8, 0.902, 1.0),
    64: (0.569, 0.8, 0.902, 1.0),
}
"""Charles et al. 2025 at H = 30 (1: .4, 2 and 4: .6, 8: .8), between by log₂ n, times (H/30)^0.1, in [.3, 1]."""


@pytest.mark.parametrize("num_nodes", TABLE)
def test_the_table_of_rates(num_nodes: int):
    got = [outer_learning_rate(num_nodes, steps) for steps in (1, 30, 100, 500)]
    assert got == pytest.approx(TABLE[num_nodes], abs=6e-4)


def test_the_published_rates_are_met_exactly_and_rates_rise_with_nodes_and_steps():
    assert {n: outer_learning_rate(n, 30) for n in NESTEROV_AT_30} == {1: 0.4, 2: 0.6, 4: 0.6, 8: 0.8}
    rates = np.array([[outer_learning_rate(n, h) for h in (1, 5, 30, 100, 1000)] for n in range(1, 20)])
    assert (np.diff(rates, axis=0) >= 0).all() and (np.diff(rates, axis=1) >= 0).all()
    assert rates.min() >= 0.3 and rates.max() <= 1.0


def test_the_state_is_a_tree_that_a_checkpoint_can_hold(deltas):
    state = outer_nesterov(0.7).init({"w": jnp.zeros(5)})
    assert [leaf.shape for leaf in jax.tree.leaves(state)] == [(5,)]
