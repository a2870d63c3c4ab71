"""Convex linear models: the same optimum as scikit-learn and closed forms, and a gap that never lies."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import Lasso, LogisticRegression

from capibara.errors import ConfigError
from capibara.strategies.fista import fista
from capibara.transforms.projections import l2_ball, non_negative
from capibara.transforms.prox import elastic_net, group_lasso, l1, ridge, zero


def regression(seed: int = 0, rows: int = 60, columns: int = 12):
    random = np.random.default_rng(seed)
    x = random.normal(size=(rows, columns))
    truth = np.where(np.arange(columns) < 3, 2.0, 0.0)
    return x, x @ truth + 0.3 * random.normal(size=rows)


def classes(seed: int = 0):
    random = np.random.default_rng(seed)
    x = random.normal(size=(90, 5))
    return x, np.argmax(x[:, :3] + 0.7 * random.normal(size=(90, 3)), axis=1)


def test_lasso_is_scikit_learns():
    """Both minimise (1/2N)‖y − Xw‖² + λ‖w‖₁."""
    x, y = regression()
    found = fista(x, y, "squared", l1(0.1), tolerance=1e-10)
    peer = Lasso(alpha=0.1, fit_intercept=False, tol=1e-12, max_iter=100_000).fit(x, y)
    value = 0.5 * np.mean((y - x @ peer.coef_) ** 2) + 0.1 * np.abs(peer.coef_).sum()
    assert found.converged and abs(found.value - value) < 1e-8
    assert np.array_equal(found.weights[:, 0] != 0, peer.coef_ != 0)


def test_ridge_is_its_closed_form():
    x, y = regression(1)
    expected = np.linalg.solve(x.T @ x / len(x) + 0.3 * np.eye(x.shape[1]), x.T @ y / len(x))
    found = fista(x, y, "squared", ridge(0.3), tolerance=1e-13)
    np.testing.assert_allclose(found.weights[:, 0], expected, atol=1e-6)


def test_logistic_is_scikit_learns():
    """Theirs is Σ ℓ + ‖w‖²/2C; ours divides by N, so λ = 1/(CN)."""
    x, y = classes()
    y = (y == 0).astype(float)
    peer = LogisticRegression(C=2.0, fit_intercept=False, tol=1e-10, max_iter=10_000).fit(x, y)
    found = fista(x, y, "logistic", ridge(1 / (2.0 * len(x))), tolerance=1e-12)
    np.testing.assert_allclose(found.weights[:, 0], peer.coef_[0], atol=1e-4)


def test_softmax_with_l1_leaves_no_descent():
    """Optimality of each weight: |∇| ≤ λ where it is 0, ∇ = −λ sign elsewhere."""
    x, y = classes()
    found = fista(x, y, "softmax", l1(0.02), tolerance=1e-11)
    z = x @ found.weights
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    gradient = x.T @ (p - np.eye(3)[y]) / len(x)
    zero_weights = found.weights == 0
    assert found.converged and 0 < zero_weights.sum() < zero_weights.size
    assert np.abs(gradient[zero_weights]).max() <= 0.02 + 1e-5
    np.testing.assert_allclose(gradient[~zero_weights], -0.02 * np.sign(found.weights[~zero_weights]), atol=1e-5)


def test_group_lasso_of_an_orthogonal_design_is_analytic():
    """With XᵀX = N·1 the solution is the operator applied to Xᵀy/N, rows of W as groups."""
    random = np.random.default_rng(2)
    x = np.linalg.qr(random.normal(size=(40, 6)))[0] * np.sqrt(40)
    y = random.normal(size=(40, 3))
    start = x.T @ y / 40
    length = np.linalg.norm(start, axis=1, keepdims=True)
    expected = np.maximum(1 - 0.15 / length, 0) * start
    found = fista(x, y, "squared", group_lasso(0.15, axis=1), tolerance=1e-13)
    np.testing.assert_allclose(found.weights, expected, atol=1e-6)


def test_least_squares_in_a_ball_solves_the_secular_equation():
    x, y = regression(3)
    found = fista(x, y, "squared", l2_ball(1.0), tolerance=1e-12)
    w = found.weights[:, 0]
    assert np.linalg.norm(w) == pytest.approx(1.0, abs=1e-9)
    residual = x.T @ (y - x @ w) / len(x)  # = μ w with μ ≥ 0
    mu = residual @ w
    assert mu > 0
    np.testing.assert_allclose(residual, mu * w, atol=1e-5)


@pytest.mark.parametrize("prox", [l1(0.05), ridge(0.1), elastic_net(0.05, 0.1), l2_ball(0.7)], ids=lambda p: p.name)
@pytest.mark.parametrize("loss", ["squared", "logistic", "softmax"])
def test_the_gap_bounds_the_distance_to_the_optimum_at_any_time(loss, prox):
    x, y = classes(4)
    y = y if loss == "softmax" else (y > 0).astype(float)
    best = fista(x, y, loss, prox, tolerance=1e-12).value
    for iterations in (0, 10, 30, 100):
        found = fista(x, y, loss, prox, tolerance=0.0, max_iterations=iterations)
        assert found.value - best <= found.dual_gap + 1e-12
        assert found.lower_bound <= best + 1e-12


def test_the_error_keeps_to_fistas_rate():
    """P_k − P* ≤ 2L‖W* − W₀‖²/(k + 1)²: Beck & Teboulle 2009, Theorem 4.4 (restarts only help)."""
    x, y = regression(5, rows=30, columns=60)
    prox = l1(0.01)
    best = fista(x, y, "squared", prox, tolerance=1e-14, max_iterations=100_000)
    bound = 2 * np.linalg.norm(x, 2) ** 2 / len(x) * np.sum(best.weights**2)
    for k in (10, 20, 40, 80):
        found = fista(x, y, "squared", prox, tolerance=0.0, max_iterations=k)
        assert found.iterations == k and found.value - best.value <= bound / (k + 1) ** 2


def test_a_start_at_the_optimum_stays_there():
    x, y = regression()
    first = fista(x, y, "squared", l1(0.1), tolerance=1e-12)
    again = fista(x, y, "squared", l1(0.1), start=first.weights, tolerance=1e-9)
    assert again.iterations == 0 or again.value <= first.value + 1e-12


def test_targets_that_demand_a_sign_are_met_under_a_constraint():
    x, y = regression(6)
    found = fista(x, -y, "squared", non_negative(), max_iterations=2000)
    assert (found.weights >= 0).all()


def test_without_a_regulariser_the_gap_is_wide_but_true():
    x, y = regression()
    found = fista(x, y, "squared", zero(), max_iterations=500)
    best = 0.5 * np.mean((y - x @ np.linalg.lstsq(x, y, rcond=None)[0]) ** 2)
    assert not found.converged and found.lower_bound <= best <= found.value + 1e-12


@pytest.mark.parametrize(
    ("x", "y", "loss", "expected"),
    [
        (np.zeros((0, 3)), np.zeros(0), "squared", "at least one of each; got shape"),
        (np.zeros((4, 3)), np.zeros(5), "squared", "4 examples and y 5"),
        (np.full((4, 3), np.nan), np.zeros(4), "squared", "must be finite"),
        (np.ones((4, 3)), np.full(4, 0.5), "logistic", "targets 0 or 1"),
        (np.ones((4, 3)), np.full(4, 0.5), "softmax", "class numbers"),
        (np.ones((4, 3)), np.zeros(4), "hinge", "Unknown loss 'hinge'"),
    ],
)
def test_unusable_data_are_refused(x, y, loss, expected):
    with pytest.raises(ConfigError, match=expected):
        fista(x, y, loss, ridge(1.0))
