"""Rounding: to the nearest as ml_dtypes does it, at random without bias, and never dependent on blocks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capibara.merge.cast import Rounding, decode, is_finite
from capibara.merge.tensors import numpy_type

ANY = np.concatenate([
    np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32).view(np.float32),
    np.array([0.0, -0.0, 1.0, 65504.0, 65519.9, 1e-8, 6e-8, 2.0**-24, 3.3e38, 1e-45], np.float32),
])  # fmt: skip


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F64"])
def test_nearest_is_the_reference(dtype):
    finite = ANY[np.isfinite(ANY)]
    with np.errstate(over="ignore"):
        expected = finite.astype(numpy_type(dtype))
    found = Rounding(dtype).encode(finite.copy(), "a", 0).view(numpy_type(dtype))
    np.testing.assert_array_equal(found.view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("precision", [np.float32, np.float64])
def test_decoding_is_exact(dtype, precision):
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.random.default_rng(1).standard_normal(1000).astype(precision).astype(numpy_type(dtype))
    found = decode(values.view(np.uint8), dtype, np.empty(1000, precision))
    np.testing.assert_array_equal(found, values.astype(precision))


@pytest.mark.parametrize(("dtype", "value"), [
    ("BF16", 1.003), ("BF16", -2.7182818), ("BF16", 3e-39), ("F16", 1.0003), ("F16", -0.1), ("F16", 3e-6),
    ("F16", 2e-8), ("F16", 65500.0),
])  # fmt: skip
def test_stochastic_rounding_is_without_bias(dtype, value):
    """Each of n draws is one of two neighbours a step apart, so the mean strays by less than 5 · step / (2√n)."""
    n = 400_000
    x = np.full(n, value, np.float32)
    found = Rounding(dtype, stochastic=True, seed=3).encode(x.copy(), "a", 0).view(numpy_type(dtype))
    neighbours = np.unique(found.astype(np.float64))
    assert len(neighbours) == 2
    step = neighbours[1] - neighbours[0]
    assert neighbours[0] < float(x[0]) < neighbours[1]
    assert abs(found.astype(np.float64).mean() - float(x[0])) < 5 * step / (2 * np.sqrt(n))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_what_fits_is_left_as_it_is(dtype):
    exact = np.random.default_rng(2).standard_normal(5000).astype(numpy_type(dtype))
    exact = np.concatenate([exact, np.array([0, -0.0, 1e-7], np.float32).astype(numpy_type(dtype))])
    found = Rounding(dtype, stochastic=True).encode(exact.astype(np.float32), "a", 0)
    np.testing.assert_array_equal(found, exact.view(np.uint8))


@given(st.lists(st.integers(1, 999), max_size=5), st.sampled_from(["BF16", "F16"]), st.integers(0, 2**63))
def test_blocks_change_nothing(cuts, dtype, seed):
    x = np.random.default_rng(4).standard_normal(1000).astype(np.float32)
    rounding = Rounding(dtype, stochastic=True, seed=seed)
    whole = rounding.encode(x.copy(), "a", 0)
    places = [0, *sorted(set(cuts)), 1000]
    parts = [rounding.encode(x[a:b].copy(), "a", a) for a, b in zip(places[:-1], places[1:], strict=True)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_seeds_and_tensors_draw_apart():
    x = np.full(1000, 1.003, np.float32)
    drawn = [(0, "a"), (1, "a"), (0, "b")]
    draws = [Rounding("BF16", stochastic=True, seed=seed).encode(x.copy(), name, 0) for seed, name in drawn]
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        same = np.mean(draws[i].view(np.uint16) == draws[j].view(np.uint16))
        assert 0.3 < same < 0.9  # 0.53 expected for shares of 0.38 and 0.62


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_infinities_and_nan_are_found(dtype):
    good = np.ones(100, numpy_type(dtype))
    assert is_finite(good.view(np.uint8), dtype)
    for bad in (np.inf, -np.inf, np.nan):
        wrong = good.copy()
        wrong[37] = bad
        assert not is_finite(wrong.view(np.uint8), dtype)
