"""The merged network as a function of its weights, on models where the answer is known."""

from __future__ import annotations

import bigram
import numpy as np
import pytest
from bigram import OBJECTIVE

from capibara.consensus.evidence import held_out, read_logs
from capibara.consensus.opinion_pool import model_pieces, opinion_pool
from capibara.consensus.simplex import kl_penalty, no_penalty, project
from capibara.consensus.weight_space import WeightSpace, least_curvature, quadratic, refine, weight_space
from capibara.errors import ConfigError

LANGUAGE = bigram.chain(0)
HELD = held_out(bigram.text(LANGUAGE, 40))
UNIFORM = np.full(4, 0.25)


@pytest.fixture(scope="module")
def tables() -> list[dict]:
    return [bigram.table(LANGUAGE, noise=0.4 + 0.3 * i, seed=i) for i in range(4)]


@pytest.fixture(scope="module")
def space(tables):
    return weight_space(tables, OBJECTIVE, HELD)


def test_the_derivatives_are_those_of_the_merged_networks_loss(space):
    w, step = np.array([0.1, 0.2, 0.3, 0.4]), 1e-2
    value, slope, hessian = space.derivatives(w)
    assert value == pytest.approx(space.value(w), rel=1e-6)
    np.testing.assert_allclose(space.slope(w)[1], slope, atol=1e-6)
    for i, e in enumerate(np.eye(4)):  # float32 values: the second-order error of the step is about 1e-4
        assert slope[i] == pytest.approx((space.value(w + step * e) - space.value(w - step * e)) / (2 * step), abs=1e-3)
        bend = (space.slope(w + step * e)[1] - space.slope(w - step * e)[1]) / (2 * step)
        np.testing.assert_allclose(hessian[i], bend, atol=2e-3)


def test_the_value_is_the_loss_of_the_merge(space, tables):
    """Also where the data come in several pieces, the last one filled up."""
    w = np.array([0.5, 0.5, 0.0, 0.0])
    merged = {"W": (tables[0]["W"] + tables[1]["W"]) / 2}
    logs, rows = read_logs(OBJECTIVE, merged, HELD)
    assert space.value(w) == pytest.approx(rows.loss(logs), rel=1e-6)


def test_pieces_change_nothing(space, monkeypatch):
    w = np.array([0.1, 0.2, 0.3, 0.4])
    whole = space.derivatives(w)
    monkeypatch.setattr("capibara.consensus.evidence.TOKENS_AT_ONCE", 12 * 16)
    cut = space.derivatives(w)  # 16, 16 and 8 sequences
    for a, b in zip(whole, cut, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_for_tables_a_refinement_ends_at_the_pools_optimum(space, tables):
    """There the logits of the merge are the merge of the logits: the pool's global optimum is the network's."""
    best = opinion_pool(model_pieces(tables, OBJECTIVE, HELD), no_penalty(UNIFORM))
    found = refine(space, no_penalty(UNIFORM), UNIFORM)
    assert found.iterations <= 10
    assert best.value - 1e-6 <= found.value <= best.value + 2e-3
    assert found.value - best.value <= found.gap + 1e-6  # L is convex here, so the gap is more than stationarity


def test_a_refinement_never_ends_above_its_start(space):
    for start in (*np.eye(4), UNIFORM):
        for penalty in (no_penalty(UNIFORM), kl_penalty(0.1, UNIFORM)):
            found = refine(space, penalty, start, steps=3)
            assert found.value <= space.value(start) + penalty.value(start) + 1e-6
            assert abs(found.weights.sum() - 1) < 1e-9 and (found.weights >= 0).all()


def test_the_quadratic_model_is_near_where_models_are_near(tables):
    """Its value at its optimum against the merged network's, for deltas a tenth as long."""
    near = [{"W": tables[0]["W"] + np.float32(0.1) * (one["W"] - tables[0]["W"])} for one in tables]
    space = weight_space(near, OBJECTIVE, HELD)
    found, least = quadratic(space, no_penalty(UNIFORM))
    assert least >= 0 and found.converged
    assert found.loss == pytest.approx(space.value(found.weights), abs=1e-4)


def test_curvature_along_the_simplex_ignores_the_direction_that_leaves_it():
    assert least_curvature(np.array([[3.0]])) == 0.0
    hessian = np.diag([1.0, 2.0, 4.0]) - 50 * np.ones((3, 3))  # −150 along (1, 1, 1), where no weights are
    basis = np.array([[1, -1, 0], [1, 1, -2]]) / np.sqrt([[2], [6]])
    assert least_curvature(hessian) == pytest.approx(np.linalg.eigvalsh(basis @ hessian @ basis.T)[0])


def test_a_concave_stretch_is_found():
    """Between a hidden layer and its permuted twin the loss has a barrier: its Hessian is negative there."""
    model = bigram.hidden(LANGUAGE)
    pair = [model, bigram.twin(model)]
    _, least = quadratic(weight_space(pair, OBJECTIVE, HELD), no_penalty(np.array([0.5, 0.5])))
    assert least < 0


@pytest.mark.parametrize("bend", [0.0, 40.0])
def test_what_the_hessian_does_across_the_simplex_changes_no_weight(bend: float):
    """dᵀ(H − c·11ᵀ)d = dᵀHd where Σd = 0; with c large the diagonal of H is negative, as on a trained network."""
    rng = np.random.default_rng(0)
    half, slope = rng.normal(size=(5, 5)), rng.normal(size=5)
    hessian, u = half @ half.T, np.full(5, 0.2)

    class Known(WeightSpace):
        def derivatives(self, w: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
            return 1.0, slope, hessian - bend

    found, least = quadratic(Known({}, OBJECTIVE, HELD), no_penalty(u))
    w, step = u, 1 / np.linalg.eigvalsh(hessian)[-1]
    for _ in range(20000):
        w = project(w - step * (slope + hessian @ (w - u)))
    assert found.converged and least > 0
    np.testing.assert_allclose(found.weights, w, atol=1e-6)
    assert found.loss == pytest.approx(1 + slope @ (w - u) + 0.5 * (w - u) @ hessian @ (w - u), abs=1e-9)


def test_long_refinements_are_refused(space):
    with pytest.raises(ConfigError, match="0 to 10 steps; got 11"):
        refine(space, no_penalty(UNIFORM), UNIFORM, steps=11)
