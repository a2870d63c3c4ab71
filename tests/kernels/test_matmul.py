"""The product with its neighbours against NumPy, in all layouts and both dtypes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capibara.errors import ConfigError
from capibara.kernels import matmul
from capibara.kernels.matmul import dot, optimized_matmul


@pytest.mark.parametrize("first", (False, True))
@pytest.mark.parametrize("second", (False, True))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_every_layout_is_the_product(first: bool, second: bool, dtype: str):
    rng = np.random.default_rng(0)
    a, b, bias = rng.normal(size=(2, 5, 7)), rng.normal(size=(7, 3)), rng.normal(size=3)
    a, b = (np.asarray(jnp.asarray(x, dtype), np.float64) for x in (a, b))
    given = (a.swapaxes(1, 2) if first else a), (b.T if second else b)
    found = optimized_matmul(
        *(jnp.asarray(x, dtype) for x in given), transpose=(first, second), bias=bias, activation="relu",
        out_dtype=jnp.float32,
    )  # fmt: skip
    np.testing.assert_allclose(found, np.maximum(a @ b + bias, 0), atol=1e-5)


def test_bfloat16_sums_in_float32():
    """Summed in bfloat16, 4096 ones would stop at 256."""
    ones = jnp.ones((1, 4096), jnp.bfloat16)
    assert float(optimized_matmul(ones, ones, transpose=(False, True))[0, 0]) == 4096


def test_gradients_are_those_of_the_product():
    rng = np.random.default_rng(1)
    a, b, pull = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((4, 6), (6, 5), (4, 5)))
    to_a, to_b = jax.grad(lambda a, b: (optimized_matmul(a, b) * pull).sum(), (0, 1))(a, b)
    np.testing.assert_allclose(to_a, pull @ b.T, atol=1e-5)
    np.testing.assert_allclose(to_b, a.T @ pull, atol=1e-5)


def test_nothing_in_gives_zeros_or_nothing():
    assert optimized_matmul(jnp.zeros((0, 3)), jnp.zeros((3, 2))).shape == (0, 2)
    assert not np.asarray(optimized_matmul(jnp.zeros((4, 0)), jnp.zeros((0, 2)))).any()


@pytest.mark.parametrize(
    ("a", "options"),
    (
        (jnp.ones((2, 4)), {}),
        (jnp.ones((2, 3), int), {}),
        (jnp.ones((2, 3)), {"activation": "rely"}),
        (jnp.ones((2, 3)), {"bias": jnp.ones(2)}),
    ),
)
def test_what_does_not_fit_is_an_error(a, options: dict):
    with pytest.raises(ConfigError):
        optimized_matmul(a, jnp.ones((3, 5)), **options)


@pytest.mark.parametrize("widens", (False, True))
def test_widened_or_not_the_sums_are_those_of_float32(widens: bool, monkeypatch: pytest.MonkeyPatch):
    """Products of two bfloat16 numbers are exact in float32; 300 additions of 2⁻²⁴ each, in any order."""
    monkeypatch.setattr(matmul, "widens", lambda: widens)
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((200, 300), (300, 5)))
    exact, most = np.asarray(a, np.float64) @ np.asarray(b, np.float64), 300 * 2**-24
    found = jax.jit(lambda a, b: dot(a, b, (1,), (0,)))(a, b)
    assert found.dtype == jnp.float32
    assert np.all(abs(found - exact) <= most * (abs(np.asarray(a, np.float64)) @ abs(np.asarray(b, np.float64))))
    to_a, to_b = jax.grad(lambda a, b: dot(a, b, (1,), (0,)).sum(), (0, 1))(a, b)
    assert to_a.dtype == to_b.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float64(to_a), np.float64(b).sum(1)[None].repeat(200, 0), rtol=2**-7, atol=1e-6)
    stacked = jax.vmap(lambda a: dot(a, b, (1,), (0,)))(jnp.stack([a, a]))
    np.testing.assert_allclose(stacked[1], exact, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "expected"),
    (
        ("GenuineIntel sse4_2", False),
        ("GenuineIntel avx2", True),
        ("GenuineIntel avx2 avx512_bf16", True),
        ("GenuineIntel avx2 avx512_bf16 amx_bf16", False),
        ("AuthenticAMD avx2", True),
        ("AuthenticAMD avx2 avx512_bf16", False),
        ("CPU implementer : 0x41 Features : bf16", False),
    ),
)
def test_which_processors_widen(words: str, expected: bool, monkeypatch: pytest.MonkeyPatch):
    matmul.widens.cache_clear()
    monkeypatch.setattr(matmul.Path, "read_text", lambda path: words)
    monkeypatch.setattr(matmul.Path, "exists", lambda path: True)
    try:
        assert matmul.widens() is expected
    finally:
        matmul.widens.cache_clear()
