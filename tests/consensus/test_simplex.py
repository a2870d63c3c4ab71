"""The simplex: projection, quadratic minimum and penalties against optimality conditions and finite differences."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capibara.consensus.simplex import (
    Smooth,
    kl_penalty,
    l2_penalty,
    linear_gap,
    minimise,
    no_penalty,
    project,
    quadratic_minimum,
)

SEEDS = st.integers(0, 2**32 - 1)


@given(SEEDS, st.integers(1, 12), st.sampled_from((1e-3, 1.0, 1e3)))
def test_the_projection_is_the_nearest_point(seed, m, scale):
    """Its optimality condition: ⟨x − p, s − p⟩ ≤ 0 for every s, of which the corners are enough."""
    x = scale * np.random.default_rng(seed).normal(size=m)
    p = project(x)
    assert (p >= 0).all() and p.sum() == pytest.approx(1, abs=1e-12)
    assert ((np.eye(m) - p) @ (x - p)).max() <= 1e-9 * max(1.0, scale)


@given(SEEDS, st.integers(1, 12), st.integers(0, 12))
def test_the_quadratic_minimum_meets_its_conditions(seed, m, rank):
    """No corner lies downhill, also where H is singular or 0; from an inner start, a face and a corner."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(rank, m))
    h, slope = root.T @ root, rng.normal(size=m)
    starts = [np.full(m, 1 / m), np.eye(m)[rng.integers(m)], project(rng.normal(size=m))]
    values = []
    for start in starts:
        x = quadratic_minimum(h, h @ start + slope, start)
        assert (x >= 0).all() and x.sum() == pytest.approx(1, abs=1e-12)
        reduced = h @ x + slope
        assert reduced.min() >= reduced @ x - 1e-8 * max(1.0, np.abs(h).max())
        values.append(0.5 * x @ h @ x + slope @ x)
    np.testing.assert_allclose(values, values[0], atol=1e-8 * max(1.0, np.abs(h).max()))


@pytest.mark.parametrize("make", [kl_penalty, l2_penalty])
@given(SEEDS, st.integers(1, 8), st.sampled_from((1e-3, 0.1, 10.0)))
def test_the_linear_minimum_is_attained_and_below_everything_else(make, seed, m, strength):
    rng = np.random.default_rng(seed)
    prior, g = rng.dirichlet(np.full(m, 2.0)) * 0.99 + 0.01 / m, rng.normal(size=m)
    penalty = make(strength, prior)
    least = penalty.linear_minimum(g)
    if make is kl_penalty:
        at = prior * np.exp(-(g - g.min()) / strength)
        at /= at.sum()
    else:
        at = project(prior - g / strength)
    assert least == pytest.approx(g @ at + penalty.value(at), abs=1e-9)
    for s in np.concatenate([np.eye(m), rng.dirichlet(np.ones(m), 10)]):
        assert least <= g @ s + penalty.value(s) + 1e-9


@pytest.mark.parametrize("make", [kl_penalty, l2_penalty])
def test_the_derivatives_of_a_penalty(make):
    rng, step = np.random.default_rng(0), 1e-6
    prior, w = rng.dirichlet(np.ones(4)), rng.dirichlet(np.ones(4))
    penalty = make(0.3, prior)
    assert penalty.value(prior) == pytest.approx(0, abs=1e-15)
    for i, e in enumerate(np.eye(4)):
        ahead, behind = w + step * e, w - step * e
        numeric = (penalty.value(ahead) - penalty.value(behind)) / (2 * step)
        assert penalty.gradient(w)[i] == pytest.approx(numeric, abs=1e-6)
        bend = (penalty.gradient(ahead)[i] - penalty.gradient(behind)[i]) / (2 * step)
        assert penalty.curvature(w)[i] == pytest.approx(bend, rel=1e-4)


def test_without_a_penalty_the_gap_is_frank_and_wolfes():
    w, g = np.array([0.2, 0.8]), np.array([-1.0, 2.0])
    assert linear_gap(w, g, no_penalty(w)) == pytest.approx(g @ w - g.min())


def test_a_quadratic_is_minimised_in_one_step():
    rng = np.random.default_rng(0)
    root, slope = rng.normal(size=(5, 5)), rng.normal(size=5)
    h = root.T @ root
    smooth = Smooth(lambda w: float(0.5 * w @ h @ w + slope @ w), lambda w: (0.0, h @ w + slope, h))
    smooth = smooth._replace(derivatives=lambda w: (smooth.value(w), h @ w + slope, h))
    found = minimise(smooth, no_penalty(np.full(5, 0.2)), np.full(5, 0.2))
    assert found.iterations == 1 and found.converged
    np.testing.assert_allclose(found.weights, quadratic_minimum(h, h[0] + slope, np.eye(5)[0]), atol=1e-9)
