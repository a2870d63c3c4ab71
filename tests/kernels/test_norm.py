"""RMSNorm, alone, with its residual and beside itself, against float64 NumPy: every instruction set, dtype and size.

Bounds, u = 2⁻²⁴: a lane of the narrowest set sums D / 4 numbers, one task 65 rows, at most 64 tasks; each sum is off by
u · (its length) · (the sum of the magnitudes), and some twenty roundings stand around it. bfloat16 rounds once more, by
2⁻⁸ of the result (8 bits of precision).
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capibara.errors import ConfigError
from capibara.kernels import library, norm
from capibara.kernels.norm import residual_rms_norm, rms_norm

SETS = library.instruction_sets()
EPS = 1e-5
U = 2.0**-24
SHAPES = ((1, 1), (3, 1), (2, 7), (5, 16), (2, 3, 33), (37, 384), (4100, 5))
ROUNDING = {"float32": 0.0, "bfloat16": 2.0**-8}
KINDS = ("alone", "beside", "sum")

needs_native = pytest.mark.skipif(not SETS, reason="the native kernels were not built, or are turned off")


@pytest.fixture(params=(*SETS, "plain"))
def forced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Each set of this machine in turn, and plain JAX; the best set again afterwards."""
    if request.param == "plain":
        monkeypatch.setattr(norm, "native", lambda: False)
    else:
        library.use(request.param)
    yield request.param
    if SETS:
        library.use(SETS[0])


def call(kind: str, x, residual, scale):
    """(s, y), where s takes no gradient if the norm stands alone."""
    if kind == "alone":
        return jnp.zeros_like(x), rms_norm(x, scale, EPS)
    return residual_rms_norm(x, residual if kind == "sum" else None, scale, EPS)


@lru_cache
def program(kind: str, is_plain: bool):
    """Both outputs and the gradients of x, residual and scale; programs of one path serve all sets."""
    del is_plain  # of the key

    def run(x, residual, scale, beside, grad):
        out, back = jax.vjp(lambda *arrays: call(kind, *arrays), x, residual, scale)
        return (*out, *back((beside, grad)))

    return jax.jit(run)


def inputs(shape: tuple[int, ...], dtype: str = "float32"):
    rng = np.random.default_rng(sum(shape))
    x, residual, beside, grad = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(4))
    return x, residual, jnp.asarray(rng.normal(size=shape[-1:]), jnp.float32), beside, grad


def check(found, wanted: np.ndarray, magnitude: np.ndarray, share: float, rounding: float) -> None:
    bound = share * magnitude + rounding * (abs(wanted) + share * magnitude) + 1e-30
    assert np.all(abs(np.asarray(found, np.float64) - wanted) <= bound)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_the_formulas(forced: str, kind: str, dtype: str):
    for shape in SHAPES:
        x, residual, scale, beside, grad = inputs(shape, dtype)
        s, y, *found = program(kind, forced == "plain")(x, residual, scale, beside, grad)
        total = np.asarray(x + residual if kind == "sum" else x)
        if kind != "alone":
            np.testing.assert_array_equal(s, total)
        assert y.dtype == found[0].dtype == dtype and found[2].dtype == jnp.float32
        x64, scale64, grad64 = (np.asarray(array, np.float64) for array in (total, scale, grad))
        beside64 = np.asarray(beside, np.float64) * (kind != "alone")
        root = ((x64**2).mean(-1, keepdims=True) + EPS) ** -0.5
        unit, pull = x64 * root, grad64 * scale64
        across = tuple(range(len(shape) - 1))
        rounding = ROUNDING[dtype]
        # XLA may normalise a sum of bfloat16 that it has not rounded, and rounds before it adds what stands beside
        share = (shape[-1] / 4 + 20) * U + (2 * rounding if forced == "plain" else 0.0)
        check(y, unit * scale64, abs(unit * scale64), share, rounding)
        inner = root * (pull - unit * (pull * unit).mean(-1, keepdims=True))
        size = root * (abs(pull) + abs(unit) * abs(pull * unit).mean(-1, keepdims=True)) + abs(beside64)
        check(found[0], inner + beside64, 2 * size, share, rounding)
        check(found[2], (grad64 * unit).sum(across), abs(grad64 * unit).sum(across), share + 130 * U, 0.0)
        if kind == "sum":
            np.testing.assert_array_equal(found[0], found[1])
        else:
            assert not np.asarray(found[1]).any()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_and_their_products_with_a_direction_are_autodiffs_in_float64(kind: str):
    """Reverse over reverse; the direction has every argument in it. Numbers of order 1 to 10 in float32: 1e-5."""
    x, residual, scale, beside, grad = inputs((3, 9))
    ways = inputs((3, 9))[::-1]

    def plain(kind: str, x, residual, scale):
        total = x + residual if kind == "sum" else x
        return total * (kind != "alone"), total * jax.lax.rsqrt((total**2).mean(-1, keepdims=True) + EPS) * scale

    def both(function, arrays, ways):
        def loss(x, residual, scale):
            s, y = function(kind, x, residual, scale)
            return (jnp.tanh(s) * ways[1]).sum() + (jnp.tanh(y) * ways[0]).sum()

        slopes = jax.grad(loss, (0, 1, 2))
        directions = (ways[0], ways[1], ways[2])
        product = jax.grad(
            lambda *a: sum((g * d).sum() for g, d in zip(slopes(*a), directions, strict=True)), (0, 1, 2)
        )
        return jax.jit(slopes)(*arrays), jax.jit(product)(*arrays)

    found = both(call, (x, residual, scale), ways)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(array, np.float64)) for array in (x, residual, scale)]
        wanted = both(plain, wide, [jnp.asarray(np.asarray(way, np.float64)) for way in ways])
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert one.dtype == jnp.float32 and other.dtype == np.float64
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)


@needs_native
@pytest.mark.parametrize("kind", KINDS)
def test_vmap_and_scan_are_loops_also_over_scales(kind: str):
    """To the bit, however the axes are nested; a scale that all share gets the sum of its gradients."""
    x, residual, scale, beside, grad = (jnp.stack([a, -a, 2 * a]) for a in inputs((2, 70, 21)))
    run = program(kind, False)
    many = (x, residual, scale, beside, grad)
    alone = [run(*arrays) for arrays in zip(*many, strict=True)]
    wanted = [jnp.stack(parts) for parts in zip(*alone, strict=True)]
    scanned = jax.jit(lambda *a: jax.lax.scan(lambda c, one: (c, run(*one)), 0, a)[1])(*many)
    nested = jax.jit(jax.vmap(jax.vmap(run)))(*(a[None] for a in many))
    for found in (jax.jit(jax.vmap(run))(*many), scanned, [part[0] for part in nested]):
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(one, other)
    shared = jax.jit(jax.vmap(run, (0, 0, None, 0, 0)))(x, residual, scale[0], beside, grad)
    np.testing.assert_array_equal(shared[1][2], run(x[2], residual[2], scale[0], beside[2], grad[2])[1])

    def loss(scale):
        return (jax.vmap(lambda *a: call(kind, *a)[1], (0, 0, None))(x, residual, scale) * grad).sum()

    np.testing.assert_allclose(jax.grad(loss)(scale[0]), shared[4].sum(0), rtol=1e-5, atol=1e-4)


@needs_native
def test_the_gradient_of_scale_does_not_depend_on_the_threads():
    """Processes of their own: XLA makes its pool once, of NPROC threads."""
    code = (
        "import jax, numpy as np, hashlib; from capibara.kernels.norm import rms_norm\n"
        "x, g = np.random.default_rng(0).standard_normal((2, 3000, 40), np.float32)\n"
        "found = jax.jit(lambda x, s, g: jax.vjp(lambda x, s: rms_norm(x, s, 1e-5), x, s)[1](g))(x, x[0], g)\n"
        "print(hashlib.sha256(b''.join(np.asarray(a).tobytes() for a in found)).hexdigest())"
    )
    answers = set()
    for threads in ("1", "3"):
        environment = os.environ | {"NPROC": threads, "JAX_PLATFORMS": "cpu"}
        answers.add(
            subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True).stdout
        )
    assert len(answers) == 1 and len(answers.pop()) == 65


def test_nan_and_infinity_stay_in_their_rows(forced: str):
    x, residual, scale, beside, grad = inputs((37, 384))
    run = program("sum", forced == "plain")
    clean = run(x, residual, scale, beside, grad)
    found = run(x.at[5, 3].set(jnp.nan).at[9, 380].set(jnp.inf), residual, scale, beside, grad)
    others = np.delete(np.arange(37), (5, 9))
    for one, other in zip(found[:4], clean[:4], strict=True):
        np.testing.assert_array_equal(one[others], other[others])
    assert np.isnan(found[1][5]).all() and np.isnan(found[2][5]).all() and np.isnan(found[4]).all()
    assert np.isnan(found[1][9, 380]) and not np.asarray(found[1][9, :380]).any()  # ∞ · 0, and 0 beside it


def test_nothing_in_gives_nothing_out(forced: str):
    for shape in ((0, 8), (3, 0)):
        x, scale = jnp.zeros(shape), jnp.ones(shape[-1:])
        assert program("sum", forced == "plain")(x, x, scale, x, x)[1].shape == shape


def test_a_scale_of_another_dtype_gets_its_gradient_in_it():
    x, _, scale, _, grad = inputs((5, 16), "bfloat16")
    to_scale = jax.grad(lambda s: (rms_norm(x, s, EPS) * grad).sum())(scale.astype(jnp.bfloat16))
    assert to_scale.dtype == jnp.bfloat16 and np.asarray(to_scale).any()


@pytest.mark.parametrize(
    ("function", "sentence"),
    (
        (lambda: rms_norm(jnp.ones((2, 3)), jnp.ones(2), EPS), r"last axis of x\[2, 3\]; got \[2\]"),
        (lambda: rms_norm(jnp.ones(()), jnp.ones(()), EPS), "one number for each"),
        (lambda: residual_rms_norm(jnp.ones((2, 3)), jnp.ones(3), jnp.ones(3), EPS), r"float32\[3\]"),
        (lambda: residual_rms_norm(jnp.ones(3), jnp.ones(3, jnp.bfloat16), jnp.ones(3), EPS), "one shape and dtype"),
    ),
)
def test_what_does_not_fit_is_one_sentence(function, sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        function()
