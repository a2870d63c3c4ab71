"""SiLU, GELU and SwiGLU against float64 NumPy: every instruction set, dtype and size, and plain JAX.

Bounds, u = 2⁻²⁴: the exponential is off by 2 u · 2 at most, which with the sum, the quotient and the products around it
makes 12 u of each magnitude that is added; GELU's z is off by 5 u of itself, which the exponential multiplies. bfloat16
rounds once more, by 2⁻⁸. Below z = −87.33 the kernels take σ for 0: 100 · 2e-38 at most is missing.
"""

from __future__ import annotations

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capibara.errors import ConfigError
from capibara.kernels import activation, library
from capibara.kernels.activation import gelu, silu, swiglu

SETS = library.instruction_sets()
U, LOST = 2.0**-24, 1e-35
SIZES = (1, 7, 16, 33, 40_001)
ROUNDING = {"float32": 0.0, "bfloat16": 2.0**-8}
CASES = (("silu", "float32"), ("swiglu", "float32"), *((name, "bfloat16") for name in ("silu", "gelu", "swiglu")))
"""Where the kernels run: GELU in float32 is XLA's."""

FUNCTIONS = {"silu": lambda x, up: silu(x), "gelu": lambda x, up: gelu(x), "swiglu": swiglu}

needs_native = pytest.mark.skipif(not SETS, reason="the native kernels were not built, or are turned off")


@lru_cache
def program(name: str):
    """The value and the gradients of x and up; one program serves all sets."""

    def run(x, up, grad):
        out, back = jax.vjp(FUNCTIONS[name], x, up)
        return (out, *back(grad))

    return jax.jit(run)


def inputs(size: int, dtype: str = "float32"):
    """Numbers of order 1 to 100, and some of any size; a factor and what comes back, of order 1."""
    rng = np.random.default_rng(size)
    x = rng.normal(size=size) * 10.0 ** rng.uniform(-2, 2, size)
    x[3::50] *= 10.0 ** rng.uniform(-30, 30, x[3::50].shape)
    return [jnp.asarray(array, dtype) for array in (x, *rng.normal(size=(2, size)))]


def oracle(name: str, x: np.ndarray, up: np.ndarray, grad: np.ndarray):
    """Value, gradient of x, gradient of up, each with a bound in units of u."""
    edge = 100 if name == "gelu" else 700  # beyond, σ is 0 or 1, and nothing overflows
    limited = np.clip(x, -edge, edge)
    root = 2 * (2 / np.pi) ** 0.5 * (name == "gelu")
    z = root * (limited + 0.044715 * limited**3) if root else limited
    steep = root * (limited + 3 * 0.044715 * limited**3) if root else limited
    with np.errstate(over="ignore"):
        on, off = 1 / (1 + np.exp(-z)), 1 / (1 + np.exp(z))
    up = up if name == "swiglu" else np.ones_like(up)
    steps = 12 + (6 * np.minimum(abs(z), 100) if root else 0.0)
    value, slope, size = x * on, on * (1 + steep * off), on * (1 + abs(steep) * off)
    to_up = grad * value * (name == "swiglu")
    return (
        (value * up, steps * abs(value * up)),
        (grad * up * slope, steps * abs(grad * up) * size),
        (to_up, steps * abs(to_up)),
    )


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_values_and_gradients_are_the_formulas(forced: str, name: str, dtype: str):
    for size in SIZES:
        arrays = inputs(size, dtype)
        wide = (np.asarray(array, np.float64) for array in arrays)
        for found, (wanted, steps) in zip(program(name)(*arrays), oracle(name, *wide), strict=True):
            assert found.dtype == dtype
            bound = steps * U + ROUNDING[dtype] * (abs(wanted) + steps * U) + LOST
            assert np.all(abs(np.asarray(found, np.float64) - wanted) <= bound)


@needs_native
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_plain_jax_is_the_same_function(monkeypatch: pytest.MonkeyPatch, name: str, dtype: str):
    """It loses some units of 1 + |x| where it takes 1 − σ and 1 + tanh; in bfloat16 every step rounds by 2⁻⁸."""
    arrays = [jnp.clip(array, -50, 50) for array in inputs(1000, dtype)]
    native = program(name)(*arrays)
    monkeypatch.setattr(activation, "native", lambda: False)
    out, back = jax.vjp(FUNCTIONS[name], *arrays[:2])
    unit = 16 * U if dtype == "float32" else 8 * 2.0**-8
    x, up, grad = (abs(np.asarray(array, np.float64)) for array in arrays)
    for found, wanted in zip(native, (out, *back(arrays[2])), strict=True):
        difference = np.asarray(found, np.float64) - np.asarray(wanted, np.float64)
        assert np.all(abs(difference) <= unit * (1 + x) * (1 + up) * (1 + grad))


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_infinity_and_nan_are_those_of_the_product(forced: str, name: str, dtype: str):
    """∞ · σ(∞) = ∞, −∞ · σ(−∞) is −∞ · 0, and the largest numbers stay what they are."""
    largest = float(jnp.finfo(dtype).max)
    x = jnp.asarray([jnp.inf, -jnp.inf, jnp.nan, largest, -largest, 0.0, -0.0], dtype)
    out, slope, _ = program(name)(x, jnp.ones_like(x), jnp.ones_like(x))
    np.testing.assert_array_equal(np.asarray(out, np.float64), [np.inf, np.nan, np.nan, largest, 0, 0, 0])
    assert np.signbit(np.asarray(out, np.float64)[[4, 6]]).all()
    np.testing.assert_array_equal(np.asarray(slope[3:], np.float64), [1, 0, 0.5, 0.5])
    assert np.isnan(np.asarray(slope[2], np.float64))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_and_their_products_with_a_direction_are_autodiffs_in_float64(name: str):
    """Reverse over reverse, of numbers of order 1 to 10 in float32: 1e-5."""
    x, up, grad, *ways = (jnp.asarray(a, jnp.float32) for a in np.random.default_rng(0).normal(size=(5, 50)))

    def plain(x, up):
        z = 2 * (2 / np.pi) ** 0.5 * (x + 0.044715 * x**3) if name == "gelu" else x
        return x * jax.nn.sigmoid(z) * (up if name == "swiglu" else 1)

    def both(function, x, up, grad, ways):
        slopes = jax.grad(lambda x, up: (jnp.tanh(function(x, up)) * grad).sum(), (0, 1))
        product = jax.grad(lambda *a: sum((g * d).sum() for g, d in zip(slopes(*a), ways, strict=True)), (0, 1))
        return jax.jit(slopes)(x, up), jax.jit(product)(x, up)

    found = both(FUNCTIONS[name], x, up, grad, ways)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(array, np.float64)) for array in (x, up, grad, *ways)]
        wanted = both(plain, *wide[:3], wide[3:])
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert one.dtype == jnp.float32 and other.dtype == np.float64
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)


@needs_native
def test_vmap_and_scan_are_loops():
    for name, dtype in CASES[1:4]:
        x, up, grad = (array.reshape(3, 11) for array in inputs(33, dtype))
        run = program(name)
        wanted = [run(*arrays) for arrays in zip(x, up, grad, strict=True)]
        scanned = jax.jit(lambda *a, run=run: jax.lax.scan(lambda c, a: (c, run(*a)), 0, a)[1])(x, up, grad)
        for found in (jax.jit(jax.vmap(run))(x, up, grad), scanned):
            for one, parts in zip(found, zip(*wanted, strict=True), strict=True):
                np.testing.assert_array_equal(one, jnp.stack(parts))
        shared = jax.vmap(run, (0, None, 0))(x, up[1], grad)
        np.testing.assert_array_equal(shared[0][2], run(x[2], up[1], grad[2])[0])


def test_nothing_in_gives_nothing_out_and_other_dtypes_take_the_plain_path():
    for name, function in FUNCTIONS.items():
        assert program(name)(*[jnp.zeros((2, 0))] * 3)[1].shape == (2, 0)
        half = jnp.full(3, 2.0, jnp.float16)
        assert function(half, half).dtype == jnp.float16
        np.testing.assert_allclose(silu(half), np.full(3, 2 / (1 + np.exp(-2.0))), rtol=2**-9)


def test_gate_and_up_that_do_not_fit_are_one_sentence():
    for up in (jnp.ones(2), jnp.ones(3, jnp.bfloat16)):
        with pytest.raises(ConfigError, match=r"one shape and dtype; got float32\[3\] and"):
            swiglu(jnp.ones(3), up)
