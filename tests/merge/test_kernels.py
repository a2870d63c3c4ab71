"""Middles and products of blocks against float64 and against each other, where the fast ways could lose something."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capibara.merge import kernels, middles
from capibara.merge.middles import middle

BF16 = ml_dtypes.bfloat16
EPSILON = {np.float32: 2e-6, np.float64: 1e-14}
"""Runs of 4,096 products in the rows' precision: some 16 roundings deep, of the product of two lengths."""


def opened(models: np.ndarray, dtype: str) -> kernels.Rows:
    rows = kernels.Rows(len(models), np.float64 if dtype == "F64" else np.float32)
    rows.open([m.view(np.uint8) for m in models], [dtype] * len(models), [models.dtype.itemsize] * len(models))
    return rows


@pytest.mark.parametrize("scale", [1e-25, 1e-3, 1.0, 1e25])
@pytest.mark.parametrize("precision", [np.float32, np.float64])
def test_products_of_differences_from_the_first_row_are_those_of_float64(scale, precision):
    """Squares of 1e-25 and 1e25 are outside float32."""
    rng = np.random.default_rng(0)
    models = (scale * (rng.normal(size=20_000) + 0.1 * rng.normal(size=(6, 20_000)))).astype(precision)
    rows = opened(models, "F64" if precision is np.float64 else "F32")
    found, bad = kernels.gram(rows, 0, 20_000, range(6), "first")
    deltas = models.astype(np.float64) - models[0]
    lengths = np.sqrt(np.einsum("id,id->i", deltas, deltas))
    error = np.abs(found - deltas @ deltas.T)
    assert not bad.any() and (error <= EPSILON[precision] * np.outer(lengths, lengths)).all()


def test_a_row_that_is_not_finite_is_named_and_so_is_one_that_is_too_far():
    models = np.random.default_rng(1).normal(size=(5, 1000)).astype(np.float32)
    models[3, 7] = np.nan
    found, bad = kernels.gram(opened(models, "F32"), 0, 1000, range(5), "first")
    assert bad.tolist() == [False, False, False, True, False] and not found.any()
    models[3, 7], models[0, 7], models[2, 7] = 0.0, 3e38, -3e38
    assert kernels.gram(opened(models, "F32"), 0, 1000, range(5), "first")[1].tolist() == [
        False, False, True, False, False,
    ]  # fmt: skip


@pytest.mark.parametrize("reference", ["first", "median", "zero"])
def test_one_row_has_products_too(reference):
    models = np.arange(8, dtype=np.float32)[None]
    found, bad = kernels.gram(opened(models, "F32"), 0, 8, [0], reference)
    assert found.tolist() == [[140.0 if reference == "zero" else 0.0]] and not bad.any()


@pytest.mark.parametrize(("far", "expected"), [(10.0, True), (1e3, False)])
def test_a_first_row_far_from_all_others_is_noticed(far, expected):
    models = np.random.default_rng(2).normal(size=(7, 5000)).astype(np.float32)
    models[0] += far
    products, _ = kernels.gram(opened(models, "F32"), 0, 5000, range(7), "first")
    assert kernels.conditioned(products) is expected


@given(st.integers(1, 9), st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=60, deadline=None)
def test_bfloat16_is_sorted_as_its_numbers_are(count, seed, with_nan):
    """Any bits: denormals, both zeros, infinities; NaN where one is among the numbers of a middle."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**16, (count, 400)).astype(np.uint16)
    if not with_nan:
        bits[(bits & 0x7FFF) > 0x7F80] = 0x8000
    low, high = (count - 1) // 2, count // 2 + 1
    with np.errstate(invalid="ignore", over="ignore"):
        found = middle(opened(bits, "BF16"), 0, 400, low, high, None)
        wanted = np.sort(bits.view(BF16).astype(np.float32), axis=0)[low:high]
        wanted = wanted[0] if len(wanted) == 1 else (wanted[0] + wanted[1]) / np.float32(2)
    if with_nan:
        clean = ~np.isnan(bits.view(BF16).astype(np.float32)).any(axis=0)
        np.testing.assert_array_equal(found[clean], wanted[clean])
        assert np.isnan(found[~clean]).all()
    else:
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("native", (True, False))
def test_one_scratch_serves_tensors_of_different_types(native, monkeypatch):
    """Layers in bfloat16 beside norms in float32, sorted in turn."""
    if not native:
        monkeypatch.setattr(middles, "library", lambda: None)
    rng = np.random.default_rng(0)
    rows = kernels.Rows(3, np.float32)
    for dtype, name in ((BF16, "BF16"), (np.float32, "F32"), (BF16, "BF16"), (np.float16, "F16")):
        models = rng.normal(size=(3, 500)).astype(dtype)
        rows.open([m.view(np.uint8) for m in models], [name] * 3, [models.dtype.itemsize] * 3)
        np.testing.assert_array_equal(kernels.median(rows, 0, 500, ""), np.sort(models, axis=0)[1].astype(np.float32))


@pytest.mark.parametrize("n", (3, 49, 200))
def test_the_mean_of_equal_models_is_that_model(n):
    """In float32; float64 models change by up to n units in the last place."""
    model = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    np.testing.assert_array_equal(kernels.mean(opened(np.repeat(model[None], n, 0), "F32"), 0, 1000, ""), model)
    found = kernels.mean(opened(np.repeat(model[None].astype(np.float64), n, 0), "F64"), 0, 1000, "")
    np.testing.assert_array_max_ulp(found, model.astype(np.float64), n)


def test_coefficients_of_zero_give_zeros():
    rows = opened(np.ones((2, 5), np.float32), "F32")
    assert kernels.linear(lambda name: np.zeros(2))(rows, 0, 5, "").tolist() == [0.0] * 5
