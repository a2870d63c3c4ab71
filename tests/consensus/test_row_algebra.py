"""The passes over the data: the Gram matrix, weighted sums, materialised rows and distances."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rows import as_row, as_stack

from capibara.consensus import row_algebra
from capibara.consensus.row_algebra import cosine, distance_from, gram_matrix, materialise, weighted_sum


@pytest.fixture(params=("kernels", "XLA"), autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernels for arrays in memory, and XLA, which serves all other devices."""
    if request.param == "XLA":
        monkeypatch.setattr(row_algebra, "_in_memory", lambda leaf: False)
    return request.param


@pytest.fixture
def deltas() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(6, 9)).astype(np.float32)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_gram_is_the_float64_product_of_the_rows(deltas, scale):
    deltas = deltas * np.float32(scale)
    expected = deltas.astype(np.float64) @ deltas.astype(np.float64).T
    np.testing.assert_allclose(gram_matrix(as_stack(deltas), np.ones(6)), expected, rtol=1e-13, atol=1e-13 * scale**2)


def test_gram_sees_differences_that_float32_products_would_lose():
    """Rows that differ by 1e-4 of their length: float32 squared distances are worthless there, float64 ones are not."""
    random = np.random.default_rng(1)
    deltas = (random.normal(size=4000) + 1e-4 * random.normal(size=(3, 4000))).astype(np.float32)
    gram = gram_matrix({"w": jnp.asarray(deltas)}, np.ones(3))
    exact = np.sum((deltas[0].astype(np.float64) - deltas[1]) ** 2)
    assert gram[0, 0] + gram[1, 1] - 2 * gram[0, 1] == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 16, 24, 200])
def test_gram_does_not_depend_on_where_blocks_end(monkeypatch, columns):
    monkeypatch.setattr(row_algebra, "BLOCK_COLUMNS", 4)
    monkeypatch.setattr(row_algebra, "BLOCKS", 2)
    row_algebra._gram.clear_cache()
    deltas = np.random.default_rng(columns).normal(size=(3, columns)).astype(np.float32)
    expected = deltas.astype(np.float64) @ deltas.astype(np.float64).T
    np.testing.assert_allclose(gram_matrix({"w": jnp.asarray(deltas)}, np.ones(3)), expected, rtol=1e-12, atol=1e-12)
    row_algebra._gram.clear_cache()


@pytest.mark.parametrize("rubbish", [np.nan, np.inf, 1e30])
def test_rows_that_do_not_count_are_selected_out_not_multiplied(deltas, rubbish):
    weights = np.array([1, 0, 1, 1, 1, 1.0])
    plain = gram_matrix(as_stack(deltas), weights)
    deltas[1] = rubbish
    assert gram_matrix(as_stack(deltas), weights).tobytes() == plain.tobytes()
    assert not plain[1].any() and not plain[:, 1].any()
    total = as_row(weighted_sum(weights / 5, as_stack(deltas)))
    np.testing.assert_allclose(total, deltas[[0, 2, 3, 4, 5]].mean(axis=0), rtol=1e-5, atol=1e-7)


def test_a_huge_row_with_a_tiny_coefficient_is_not_lost(deltas):
    """1e-40 is below float32's range, 1e20 · 1e-20 is not: the sum is scaled by powers of two first."""
    deltas[2] *= np.float32(1e20)
    stack, v = as_stack(deltas), np.array([0.1, 0.1, 1e-20, 0.1, 0.1, 0.1])
    expected = v @ deltas.astype(np.float64)
    np.testing.assert_allclose(as_row(weighted_sum(v, stack, gram_matrix(stack, np.ones(6)))), expected, rtol=1e-5)
    tiny = deltas * np.float32(1e-20)
    v = np.array([0.1, 0.1, 1e-25, 0.1, 0.1, 0.1])
    gram = gram_matrix(as_stack(tiny), np.ones(6))
    np.testing.assert_allclose(as_row(weighted_sum(v, as_stack(tiny), gram)), v @ tiny.astype(np.float64), rtol=1e-5)


def test_materialised_rows_are_their_combinations(deltas):
    rows = np.random.default_rng(2).dirichlet(np.ones(7), size=6)
    keep = np.array([True, True, False, True, True, False])
    rows[:, 2] = 0
    deltas[2] = np.nan
    expected = rows[keep][:, [0, 1, 3, 4, 5]].astype(np.float64) @ deltas[[0, 1, 3, 4, 5]].astype(np.float64)
    found = materialise(rows, keep, jnp.asarray(deltas))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("absent", [(), (1, 4)])
def test_untouched_rows_are_materialised_bit_for_bit(deltas, absent):
    keep = ~np.isin(np.arange(6), absent)
    found = materialise(np.eye(6, 7), keep, jnp.asarray(deltas))
    assert np.asarray(found).tobytes() == deltas[keep].tobytes()


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_cosines_add_up_over_leaves_at_any_length(deltas, scale):
    one, other = ({"a": d[:4], "b": {"c": d[4:, None]}} for d in deltas[:2] * np.float32(scale))
    a, b = deltas[:2].astype(np.float64)
    assert cosine(one, other) == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-6)
    assert np.isnan(cosine(one, {"a": np.zeros(4, np.float32), "b": {"c": np.zeros((5, 1), np.float32)}}))


def test_distances_add_up_over_leaves(deltas):
    one, other = ({"a": d[:4], "b": {"c": d[4:, None]}} for d in (deltas[0], deltas[1]))
    expected = np.linalg.norm(deltas[0].astype(np.float64) - deltas[1])
    assert distance_from(one, other) == pytest.approx(expected, rel=1e-12)


def test_both_ways_to_sum_give_the_same_numbers(deltas, monkeypatch):
    v = np.array([0.2, 0, -0.5, 1, 0.25, 0.05])
    deltas[1] = np.nan
    ours = as_row(weighted_sum(v, as_stack(deltas)))
    monkeypatch.setattr(row_algebra, "_in_memory", lambda leaf: True)
    used = np.flatnonzero(v)
    exact = (v[used] @ deltas[used].astype(np.float64)).astype(np.float32)
    np.testing.assert_array_equal(as_row(weighted_sum(v, as_stack(deltas))), exact)
    np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-6)


def test_the_sum_is_an_array_of_jax_that_owns_its_memory(deltas):
    """Large enough to be shared without a copy: later sums do not write over it."""
    rows = np.random.default_rng(2).normal(size=(2, 100, 1000)).astype(np.float32)
    first = weighted_sum([1.0, 0.0], {"w": jnp.asarray(rows)})["w"]
    for _ in range(5):
        weighted_sum([0.0, 1.0], {"w": jnp.asarray(rows)})
    np.testing.assert_array_equal(first, rows[0])


def test_the_sum_is_committed_to_a_device_only_where_the_stack_was(deltas):
    """A committed array in place of one that is not would compile every program of the next round anew."""
    free = jnp.asarray(deltas)
    held = jax.device_put(free, jax.devices()[0])
    assert [weighted_sum(np.ones(6), leaf).committed for leaf in (free, held)] == [False, True]
