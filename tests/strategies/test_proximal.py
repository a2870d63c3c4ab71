"""Proximal point and proximal Adam: solutions within their own bounds, and honesty where a bound cannot be had."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from capibara.errors import ConfigError
from capibara.strategies.fista import fista
from capibara.strategies.proximal_adam import METRIC_FLOOR, proximal_adam
from capibara.strategies.proximal_point import proximal_point
from capibara.transforms.prox import l1, ridge
from capibara.types import Objective

pytestmark = pytest.mark.slow  # compilation: every test has a strategy of its own

SPECTRUM = np.float32([-1.0, -0.3, 0.2, 0.7, 1.5, 4.0])
TILT = np.float32([0.3, -0.2, 0.5, 0.1, -0.4, 0.2])


def function(f) -> Objective:
    """An objective of the parameters alone."""
    return Objective(lambda params, batch, key: (f(params["w"]), {}), lambda params, batch: (None, None))


QUADRATIC = function(lambda w: 0.5 * jnp.sum(SPECTRUM * w**2) + jnp.vdot(TILT, w))
WELL = function(lambda w: jnp.sum(w**4 - w**2))


def run(strategy, w, count: int):
    """States and infos of `count` steps."""
    state, step = strategy.init({"w": jnp.asarray(w, jnp.float32)}), jax.jit(strategy.step)
    for k in range(count):
        state, info = step(state, {"x": jnp.zeros(1)}, jax.random.fold_in(jax.random.key(0), k))
        yield state, {name: float(value) for name, value in info.items()}


def test_a_step_solves_its_problem_within_the_bound_it_reports():
    """For a quadratic f the problem has the closed solution (A + 1/η)⁻¹(θ/η − b); all six products make ρ̂ exact."""
    start = np.float32([1.0, -0.5, 0.3, 2.0, -1.0, 0.7])
    strategy = proximal_point(QUADRATIC, kappa=2.0, inner_steps=12, radius=10.0)
    ((state, info),) = run(strategy, start, 1)
    assert info["certified"] == 1 and info["violations"] == 0
    assert info["weak_convexity"] == pytest.approx(1.0, abs=1e-4)
    strength = info["inverse_eta"]
    exact = (strength * start - TILT) / (SPECTRUM + strength)

    def value(w):
        return 0.5 * np.sum(SPECTRUM * w**2) + TILT @ w + strength / 2 * np.sum((w - start) ** 2)

    excess = value(np.asarray(state.params["w"])) - value(exact)
    assert -1e-5 <= excess <= info["suboptimality"] + 1e-5
    assert info["suboptimality"] < 0.05 * (value(start) - value(exact))
    assert info["decrease"] == pytest.approx(value(start) - value(np.asarray(state.params["w"])), abs=1e-4)


def test_more_inner_steps_tighten_the_bound():
    start = np.float32([1.0, -0.5, 0.3, 2.0, -1.0, 0.7])
    bounds = [
        next(run(proximal_point(QUADRATIC, inner_steps=k, radius=10.0), start, 1))[1]["suboptimality"]
        for k in (3, 6, 12)
    ]
    assert bounds[0] > bounds[1] > bounds[2]


def test_a_double_well_is_descended_without_a_step_up_to_a_stationary_point():
    """f = w⁴ − w² has minima at ±1/√2; the Moreau gradient goes to 0."""
    values, infos = [], []
    for state, info in run(proximal_point(WELL, measure_every=1, radius=1.0), [0.2, -1.4], 40):
        w = np.asarray(state.params["w"])
        values.append(float(np.sum(w**4 - w**2)))
        infos.append(info)
    assert all(b <= a + 1e-5 for a, b in zip(values, values[1:], strict=False))
    np.testing.assert_allclose(np.abs(w), np.sqrt(0.5), atol=1e-2)
    assert infos[-1]["moreau"] < 0.05 * infos[0]["moreau"]


def test_curvature_that_was_underestimated_is_found_out_and_paid_for():
    """At w = 0.6 the well is convex (12w² − 2 > 0), so ρ̂ = 0; pushed to the top it is not: ρ must be raised."""
    pushed = function(lambda w: jnp.sum(w**4 - w**2) + 6.0 * jnp.sum(w))
    ((_, info),) = run(proximal_point(pushed, radius=100.0, max_redos=12), [0.6, 0.6], 1)
    assert info["weak_convexity"] == 0 and info["redos"] > 0 and info["certified"] == 1


def test_a_step_that_cannot_be_certified_is_not_taken():
    pushed = function(lambda w: jnp.sum(w**4 - w**2) + 6.0 * jnp.sum(w))
    ((state, info),) = run(proximal_point(pushed, radius=1e-6, max_redos=0), [0.6, 0.6], 1)
    assert info["certified"] == 0 and info["decrease"] == 0
    np.testing.assert_array_equal(state.params["w"], np.float32([0.6, 0.6]))
    assert float(state.inner.inverse_eta) > info["inverse_eta"]


def test_a_loss_that_is_not_finite_changes_nothing_and_is_counted():
    broken = function(lambda w: jnp.sum(w) * jnp.nan)
    for strategy in (proximal_point(broken), proximal_adam(broken, ridge(0.1), 0.1)):
        ((state, info),) = run(strategy, [1.0, 2.0], 1)
        assert info["skipped"] == 1
        np.testing.assert_array_equal(state.params["w"], np.float32([1.0, 2.0]))
        assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(state.inner))


def test_a_penalty_is_part_of_the_problem():
    """With an L1 term large enough the solution of every problem is 0."""
    *_, (state, info) = run(proximal_point(QUADRATIC, prox=l1(50.0), radius=10.0), np.full(6, 0.2), 60)
    np.testing.assert_array_equal(state.params["w"], np.zeros(6))
    assert info["certified"] == 1


def test_one_step_of_proximal_adam_by_hand():
    start, rate, weight = np.float64([1.0, -0.02, 3.0]), 0.1, 0.5
    f = function(lambda w: jnp.vdot(jnp.float32([0.5, -1.0, 2.0]), w))
    ((state, _),) = run(proximal_adam(f, l1(0.3), rate, anchor_weight=weight, clip_norm=None), start, 1)
    g = np.float64([0.5, -1.0, 2.0])  # the anchor is the start: no pull yet
    d = np.maximum(np.abs(g), METRIC_FLOOR * np.sqrt(np.mean(g**2))) + 1e-8  # one step: √v̂ = |g|, m̂ = g
    moved = start - rate * g / d
    expected = np.sign(moved) * np.maximum(np.abs(moved) - rate * 0.3 / d, 0)
    np.testing.assert_allclose(state.params["w"], expected, rtol=1e-5)


def test_proximal_adam_finds_the_lasso_with_its_zeros():
    random = np.random.default_rng(0)
    x = random.normal(size=(80, 8)).astype(np.float32)
    y = x @ np.float32([2, -1, 0, 0, 0, 0, 0.5, 0]) + 0.1 * random.normal(size=80).astype(np.float32)
    f = function(lambda w: 0.5 * jnp.mean((x @ w - y) ** 2))
    schedule = optax.cosine_decay_schedule(0.05, 600)
    strategy = proximal_adam(f, l1(0.1), schedule, anchor_weight=0.0)
    *_, (state, _) = run(strategy, np.zeros(8), 600)
    w, best = np.asarray(state.params["w"], np.float64), fista(x, y, "squared", l1(0.1), tolerance=1e-10)
    value = 0.5 * np.mean((x @ w - y) ** 2) + 0.1 * np.abs(w).sum()
    assert value - best.value < 1e-4
    assert np.array_equal(w != 0, best.weights[:, 0] != 0)


def test_a_coordinate_that_never_had_a_gradient_is_not_wiped_out():
    f = function(lambda w: jnp.sum(w[:2] ** 2))
    ((state, _),) = run(proximal_adam(f, ridge(0.01), 1e-2, anchor_weight=0.0), [1.0, 1.0, 1.0], 1)
    assert 0.9 < float(state.params["w"][2]) < 1.0


def test_the_anchor_moves_when_due_and_the_ball_holds():
    f = function(lambda w: 10.0 * jnp.sum(w))
    strategy = proximal_adam(f, ridge(1e-6), 0.5, anchor_every=3, radius=0.1)
    anchors = [np.float32([3.0, 4.0])]
    for k, (state, info) in enumerate(run(strategy, anchors[0], 7), 1):
        before = anchors[-1]
        assert np.linalg.norm(np.asarray(state.params["w"]) - before) <= 0.1 * np.linalg.norm(before) * (1 + 1e-5)
        assert np.array_equal(state.inner.anchor["w"], state.params["w"]) == (k % 3 == 0)
        if k % 3 == 0:
            anchors.append(np.asarray(state.inner.anchor["w"]))
            assert info["moreau"] == pytest.approx(0.01 * np.linalg.norm(anchors[-1] - before), rel=1e-4)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: proximal_point(WELL, kappa=1.0), "kappa > 1"),
        (lambda: proximal_point(WELL, inner_steps=1), "inner_steps ≥ 2"),
        (lambda: proximal_adam(WELL, l1(1.0), 0.1, anchor_every=0), "anchor_every ≥ 1"),
        (lambda: proximal_adam(WELL, l1(1.0), 0.1, radius=0.0), "radius > 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(make, expected):
    with pytest.raises(ConfigError, match=expected):
        make()
