"""Fast attention against float64 NumPy: values, gradients, masks, ragged sizes, transformations of JAX."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capibara.errors import ConfigError
from capibara.kernels.attention import fast_attention
from capibara.kernels.library import native


class Case(NamedTuple):
    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    causal: bool = True
    window: int | None = None
    segments: bool = False


CASES = (
    Case(1, 1, 1, 1, 1, 1),
    Case(2, 7, 7, 2, 1, 5),
    Case(2, 300, 300, 4, 2, 64, segments=True),
    Case(1, 257, 257, 3, 3, 80, causal=False),
    Case(1, 300, 300, 2, 1, 128, window=100),
    Case(1, 5, 300, 2, 2, 32),
    Case(1, 60, 9, 2, 2, 32),
    Case(1, 270, 270, 1, 1, 256, window=30, segments=True),
    Case(1, 130, 200, 2, 1, 33, causal=False, window=50),
)


def inputs(case: Case, dtype: str = "float32"):
    rng = np.random.default_rng(case.T * case.H)
    q, pull = (rng.normal(size=(case.B, case.T, case.N, case.H)) for _ in range(2))
    k, v = (rng.normal(size=(case.B, case.S, case.K, case.H)) for _ in range(2))
    ids = np.sort(rng.integers(0, 4, (case.B, case.S)), axis=1) if case.segments else None
    return [jnp.asarray(x, dtype) for x in (q, k, v, pull)], ids


def oracle(case: Case, arrays, ids):
    """Output and the gradients of q, k and v, in float64 from the formulas, all scores at once."""
    q, k, v, pull = (np.asarray(x, np.float64) for x in arrays)
    group, scale = case.N // case.K, case.H**-0.5
    keys, values = np.repeat(k, group, 2), np.repeat(v, group, 2)
    here, there = np.arange(case.T)[:, None] + case.S - case.T, np.arange(case.S)[None, :]
    allowed = np.ones((case.B, 1, case.T, case.S), bool)
    if case.causal:
        allowed &= there <= here
    if case.window:
        allowed &= there > here - case.window
    if ids is not None:
        allowed &= (ids[:, -case.T :, None] == ids[:, None, :])[:, None]
    scores = np.where(allowed, np.einsum("btnh,bsnh->bnts", q, keys) * scale, -np.inf)
    highest = np.max(scores, -1, keepdims=True)
    e = np.exp(scores - np.where(np.isinf(highest), 0, highest))
    shares = e / np.maximum(e.sum(-1, keepdims=True), 1e-300)
    out = np.einsum("bnts,bsnh->btnh", shares, values)
    to_shares = np.einsum("btnh,bsnh->bnts", pull, values)
    slopes = shares * (to_shares - np.einsum("btnh,btnh->bnt", pull, out)[..., None]) * scale

    def by_group(x: np.ndarray) -> np.ndarray:
        return x.reshape(case.B, case.S, case.K, group, case.H).sum(3)

    return (
        out, np.einsum("bnts,bsnh->btnh", slopes, keys), by_group(np.einsum("bnts,btnh->bsnh", slopes, q)),
        by_group(np.einsum("bnts,btnh->bsnh", shares, pull)),
    )  # fmt: skip


def both_ways(case: Case, arrays, ids):
    q, k, v, pull = arrays

    def call(q, k, v):
        return fast_attention(q, k, v, causal=case.causal, window=case.window, segment_ids=ids)

    @jax.jit
    def run(q, k, v, pull):
        out, back = jax.vjp(call, q, k, v)
        return (out, *back(pull))

    return run(q, k, v, pull)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_are_the_formulas(case: Case):
    """Float32 sums of up to 600 products of order 1: some 1e-6 of their size, which is up to 10."""
    arrays, ids = inputs(case)
    for found, wanted in zip(both_ways(case, arrays, ids), oracle(case, arrays, ids), strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("case", (CASES[2], CASES[7]), ids=str)
def test_bfloat16_differs_by_the_rounding_of_what_comes_in_and_out(case: Case):
    """The oracle gets the rounded inputs; the output is rounded to 8 bits, and `out` is read back rounded."""
    arrays, ids = inputs(case, "bfloat16")
    for found, wanted in zip(both_ways(case, arrays, ids), oracle(case, arrays, ids), strict=True):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(found, np.float64), wanted, atol=3e-2, rtol=1e-2)


def test_a_query_that_sees_no_key_gives_zeros_and_takes_no_gradient():
    case = Case(1, 60, 9, 2, 2, 32)
    arrays, _ = inputs(case)
    out, to_q, _, _ = both_ways(case, arrays, None)
    assert not np.asarray(out[:, :51]).any() and not np.asarray(to_q[:, :51]).any()
    assert np.asarray(out[:, 51:]).all()


def test_vmap_and_scan_are_loops():
    case = Case(2, 70, 70, 2, 1, 16)
    (q, k, v, _), _ = inputs(case)
    many = jnp.stack([q, 2 * q, -q])

    def call(q):
        return fast_attention(q, k, v, causal=True)

    alone = jnp.stack([call(x) for x in many])
    loop = jax.lax.scan(lambda c, x: (c, call(x)), None, many)[1]
    if native():
        np.testing.assert_array_equal(jax.vmap(call)(many), alone)
        np.testing.assert_array_equal(loop, alone)
    else:  # XLA sums a larger batch in another order
        np.testing.assert_allclose(jax.vmap(call)(many), alone, atol=1e-6)
        np.testing.assert_allclose(loop, alone, atol=1e-6)


def test_the_second_derivative_is_that_of_the_plain_formula():
    """A Hessian-vector product, reverse over reverse, against finite differences of the gradient in float32."""
    case = Case(1, 12, 12, 2, 1, 8)
    (q, k, v, pull), _ = inputs(case)

    def slope(q):
        return jax.grad(lambda q: (jnp.tanh(fast_attention(q, k, v, causal=True)) * pull).sum())(q)

    product = jax.jit(jax.grad(lambda q: (slope(q) * pull).sum()))(q)
    step = 1e-2
    differences = (slope(q + step * pull) - slope(q - step * pull)) / (2 * step)
    np.testing.assert_allclose(product, differences, atol=2e-3)


def test_a_bias_is_added_to_the_scores():
    case = Case(1, 9, 9, 2, 2, 8, causal=False)
    (q, k, v, _), _ = inputs(case)
    hidden = np.where(np.arange(9) < 4, 0.0, -1e30)
    np.testing.assert_allclose(
        fast_attention(q, k, v, bias=hidden), fast_attention(q, k[:, :4], v[:, :4]), atol=2e-6
    )


def test_a_nan_stays_in_the_rows_that_see_it():
    case = Case(1, 60, 60, 1, 1, 16)
    (q, k, v, _), _ = inputs(case)
    out = np.asarray(fast_attention(q, k.at[0, 40].set(jnp.nan), v, causal=True))
    assert np.isfinite(out[0, :40]).all() and np.isnan(out[0, 40:]).all()


def test_nothing_in_gives_nothing_out():
    q, kv = jnp.zeros((2, 0, 4, 8)), jnp.zeros((2, 0, 2, 8))
    assert fast_attention(q, kv, kv).shape == (2, 0, 4, 8)
    assert not np.asarray(fast_attention(jnp.ones((2, 3, 4, 8)), kv, kv)).any()


@pytest.mark.parametrize(
    ("change", "sentence"),
    (
        (dict.fromkeys("kv", np.ones((1, 4, 3, 8), np.float32)), "2 query heads cannot share 3"),
        ({"k": np.ones((1, 4, 2, 4), np.float32)}, "needs q"),
        ({"q": np.ones((1, 4, 2, 8), np.int32)}, "all float32 or all bfloat16"),
        ({"window": 0}, "window is 1 or more"),
        ({"segment_ids": np.ones((1, 3), np.int32)}, "segment_ids are integers of shape"),
    ),
)
def test_what_does_not_fit_is_one_sentence(change: dict, sentence: str):
    given = {name: np.ones((1, 4, 2, 8), np.float32) for name in "qkv"} | change
    q, k, v = (given.pop(name) for name in "qkv")
    with pytest.raises(ConfigError, match=sentence):
        fast_attention(q, k, v, **given)
