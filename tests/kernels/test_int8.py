"""Products of few rows and int8 weights against float64, on every instruction set.

A sum of K products in float32, in any order, is off by at most K · 2⁻²⁴ · Σ |x w| to first order; typical is √K of it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capibara.errors import ConfigError
from capibara.kernels import few_rows, library
from capibara.kernels.few_rows import MOST_ROWS, Matrix, product
from capibara.kernels.int8 import dequantize, int8_matmul, quantize
from capibara.kernels.matmul import optimized_matmul

SETS = library.instruction_sets()
needs_native = pytest.mark.skipif(not SETS, reason="the native kernels were not built, or are turned off")
multiply = jax.jit(product)


def matrix_of(inner: int, columns: int, dtype: str, by_columns: bool) -> Matrix:
    w = jnp.asarray(np.random.default_rng(inner).normal(size=(columns, inner) if by_columns else (inner, columns)))
    return quantize(w, by_columns=by_columns) if dtype == "int8" else Matrix(w.astype(dtype), None, by_columns)


def check(found: jax.Array, x: jax.Array, matrix: Matrix) -> None:
    given, w = np.asarray(x, np.float64), np.asarray(matrix.values.astype(jnp.float32), np.float64)
    w = (w.T if matrix.by_columns else w) * (1 if matrix.scales is None else np.asarray(matrix.scales, np.float64))
    assert found.dtype == jnp.float32 and found.shape == (*x.shape[:-1], w.shape[1])
    bound = (w.shape[0] + 2) * 2.0**-24 * (abs(given) @ abs(w))
    assert np.all(abs(np.asarray(found, np.float64) - given @ w) <= bound)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "int8"))
@pytest.mark.parametrize("by_columns", (False, True))
@pytest.mark.parametrize(("inner", "columns"), ((1, 1), (3, 7), (67, 150), (576, 64), (1031, 19)))
def test_every_set_gives_the_product(forced: str, inner: int, columns: int, by_columns: bool, dtype: str):
    """Sizes beside those of panels, vectors and blocks; rows that are done together and that are left over."""
    matrix = matrix_of(inner, columns, dtype, by_columns)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(13, inner)), jnp.float32)
    whole = multiply(x, matrix)
    check(whole, x, matrix)
    for rows in (1, 2, 3, 4):  # sums do not depend on the rows beside them
        np.testing.assert_array_equal(multiply(x[:rows], matrix), whole[:rows])


@needs_native
@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "int8"))
def test_many_tasks_and_bfloat16_rows_give_the_product(dtype: str):
    """A matrix that more than one thread works at; rows in bfloat16 are widened, not rounded further."""
    for by_columns in (False, True):
        matrix = matrix_of(300, 3000, dtype, by_columns)
        x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 3, 300)), jnp.bfloat16)
        check(multiply(x, matrix), x, matrix)


@pytest.mark.parametrize("dtype", ("float32", "int8"))
@pytest.mark.parametrize("by_columns", (False, True))
def test_plain_jax_is_the_same_function(dtype: str, by_columns: bool, monkeypatch: pytest.MonkeyPatch):
    matrix = matrix_of(40, 30, dtype, by_columns)
    for rows in (3, MOST_ROWS + 1):
        x = jnp.asarray(np.random.default_rng(rows).normal(size=(rows, 40)), jnp.float32)
        check(product(x, matrix), x, matrix)
        with monkeypatch.context() as patch:
            patch.setattr(few_rows, "native", lambda: False)
            check(product(x, matrix), x, matrix)


def test_a_row_does_not_depend_on_how_many_stand_beside_it():
    """Also where there are too many for the kernel; XLA sums in another order, but rounds no weight."""
    rng = np.random.default_rng(4)
    x = jnp.asarray(rng.normal(size=(MOST_ROWS + 1, 200)), jnp.bfloat16)
    matrix = Matrix(jnp.asarray(rng.normal(size=(200, 40)), jnp.float32))
    many, few = jax.jit(product)(x, matrix), jax.jit(product)(x[:MOST_ROWS], matrix)
    np.testing.assert_allclose(many[:MOST_ROWS], few, atol=2e-5)


def test_it_works_under_vmap_and_scan():
    matrix = matrix_of(24, 20, "int8", False)
    x = jnp.asarray(np.random.default_rng(3).normal(size=(5, 2, 24)), jnp.float32)
    check(jax.jit(jax.vmap(lambda row: product(row, matrix)))(x), x, matrix)
    check(jax.lax.scan(lambda carry, row: (carry, product(row, matrix)), 0, x)[1], x, matrix)


def test_nothing_in_gives_zeros_or_nothing():
    assert product(jnp.zeros((0, 3)), Matrix(jnp.zeros((3, 2)))).shape == (0, 2)
    assert product(jnp.zeros((2, 3)), Matrix(jnp.zeros((3, 0)))).shape == (2, 0)
    assert not np.asarray(product(jnp.zeros((4, 0)), Matrix(jnp.zeros((0, 2))))).any()


@pytest.mark.parametrize("by_columns", (False, True))
def test_an_entry_is_off_by_at_most_half_a_step(by_columns: bool):
    w = np.random.default_rng(4).normal(size=(50, 40)).astype(np.float32)
    matrix = quantize(w, by_columns=by_columns)
    assert matrix.values.dtype == jnp.int8 and abs(np.asarray(matrix.values)).max() == 127
    step = np.asarray(matrix.scales)[:, None] if by_columns else np.asarray(matrix.scales)
    assert np.all(abs(np.asarray(dequantize(matrix)) - w) <= step * 0.5001)  # the quotient is rounded too


def test_a_column_of_zeros_stays_zero_and_whole_steps_are_exact():
    w = np.random.default_rng(5).integers(-127, 128, (30, 8)).astype(np.float32) / 64
    w[0], w[:, 3] = 127 / 64, 0
    np.testing.assert_array_equal(dequantize(quantize(w)), w)


def test_the_product_takes_a_bias_and_an_activation():
    matrix = matrix_of(16, 12, "int8", True)
    x, bias = jnp.asarray(np.random.default_rng(6).normal(size=(3, 16)), jnp.bfloat16), jnp.arange(12.0) - 6
    found = optimized_matmul(x, matrix, bias=bias, activation="relu", out_dtype=jnp.float32)
    np.testing.assert_allclose(found, np.maximum(int8_matmul(x, matrix) + bias, 0), rtol=1e-6)
    assert optimized_matmul(x, matrix).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("call", "sentence"),
    (
        (lambda q: quantize(jnp.ones(3)), r"floating matrix; got float32\[3\]"),
        (lambda q: quantize(jnp.ones((3, 2), int)), "got int32"),
        (lambda q: int8_matmul(jnp.ones((2, 4)), q), r"got float32\[2, 4\] and \[3, 2\]"),
        (lambda q: int8_matmul(jnp.ones((2, 3), int), q), "got int32"),
        (lambda q: optimized_matmul(jnp.ones((3, 2)), q, transpose=(True, False)), "leave `transpose` out"),
    ),
)
def test_what_does_not_fit_is_one_clear_error(call, sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        call(quantize(jnp.ones((3, 2))))
