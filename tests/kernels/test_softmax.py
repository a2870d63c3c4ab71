"""Sparse softmax against its definitions: projections found by bisection, gradients by finite differences."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capibara.errors import ConfigError
from capibara.kernels.softmax import sparse_softmax

ROWS = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=9)
POWERS = {"sparsemax": (1.0, 1.0), "entmax15": (0.5, 2.0)}


def by_bisection(x: np.ndarray, factor: float, power: float) -> np.ndarray:
    low, high = (factor * x).max() - 1, (factor * x).max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (np.maximum(factor * x - middle, 0) ** power).sum() > 1 else (low, middle)
    return np.maximum(factor * x - low, 0) ** power


@pytest.mark.parametrize("kind", POWERS)
@given(row=ROWS)
@settings(max_examples=40, deadline=None)
def test_the_sparse_kinds_are_their_definition(kind: str, row: list[float]):
    """τ by 200 bisections in float64; float32 holds scores of 20 to 1e-6."""
    x = np.asarray(row, np.float32)
    found = sparse_softmax(x, kind=kind)
    np.testing.assert_allclose(found, by_bisection(x.astype(np.float64), *POWERS[kind]), atol=1e-5)


@pytest.mark.parametrize("kind", ("softmax", "sparsemax", "entmax15"))
@pytest.mark.parametrize("top_k", (None, 3))
def test_gradients_are_those_of_the_function(kind: str, top_k: int | None):
    x = jnp.asarray([0.3, -0.2, 0.9, 0.45, -1.0, 0.7])
    pull = jnp.asarray([1.0, -2.0, 0.5, 3.0, 1.5, -1.0])

    def loss(x):
        return (sparse_softmax(x, kind=kind, top_k=top_k) * pull).sum()

    step = 1e-2
    differences = [(loss(x + step * e) - loss(x - step * e)) / (2 * step) for e in jnp.eye(6)]
    np.testing.assert_allclose(jax.grad(loss)(x), differences, atol=1e-3)


def test_top_k_is_the_softmax_of_the_k_largest_and_takes_the_first_of_equal_ones():
    found = np.asarray(sparse_softmax(jnp.asarray([1.0, 5.0, 3.0, 3.0]), top_k=2))
    assert (found > 0).tolist() == [False, True, True, False]
    np.testing.assert_allclose(found[1:3], np.exp([2.0, 0.0]) / (np.exp(2.0) + 1), rtol=1e-6)


def test_masked_numbers_take_no_part_whatever_they_are():
    x = jnp.asarray([[1.0, jnp.nan, 2.0], [jnp.inf, 1.0, jnp.nan]])
    mask = jnp.asarray([[True, False, True], [False, False, False]])
    found, slope = jax.value_and_grad(lambda x: sparse_softmax(x, mask=mask)[0, 0])(x)
    assert found == pytest.approx(1 / (1 + np.e), rel=1e-6) and np.isfinite(slope).all()
    assert not np.asarray(sparse_softmax(x, mask=mask))[1].any()


def test_segments_are_softmaxes_of_their_own():
    x = jnp.asarray([[1.0, 2.0, 3.0, 4.0, 100.0]])
    found = sparse_softmax(x, segments=jnp.asarray([[0, 2, 0, 2, 4]]))
    pairs = np.exp([1.0, 3.0]) / np.exp([1.0, 3.0]).sum(), np.exp([2.0, 4.0]) / np.exp([2.0, 4.0]).sum()
    np.testing.assert_allclose(found[0], [pairs[0][0], pairs[1][0], pairs[0][1], pairs[1][1], 1.0], rtol=1e-6)


@pytest.mark.parametrize("kind", ("softmax", "sparsemax", "entmax15"))
def test_rows_sum_to_one_in_any_dtype_and_empty_ones_stay_empty(kind: str):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 40)), jnp.bfloat16)
    found = sparse_softmax(x, kind=kind)
    assert found.dtype == jnp.bfloat16 and found.shape == x.shape
    np.testing.assert_allclose(np.asarray(found, np.float32).sum(-1), 1, atol=2e-2)
    assert sparse_softmax(jnp.zeros((2, 0)), kind=kind).shape == (2, 0)


@pytest.mark.parametrize(
    "options", ({"kind": "softmux"}, {"top_k": 0}, {"segments": jnp.zeros(3, int), "kind": "sparsemax"})
)
def test_what_does_not_fit_is_an_error(options: dict):
    with pytest.raises(ConfigError):
        sparse_softmax(jnp.ones(3), **options)
    with pytest.raises(ConfigError, match="floating"):
        sparse_softmax(jnp.ones(3, int))
