"""Fast attention against float64 NumPy: values, gradients, masks, biases, RoPE, ragged sizes, transformations of JAX.

On every instruction set of the machine, and in plain JAX.
"""

from __future__ import annotations

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import BIASED, CASES, TURNED, Case, Inputs, inputs, oracle

from capibara.errors import ConfigError
from capibara.kernels import attention_rules, library
from capibara.kernels.attention import fast_attention, packed_attention
from capibara.kernels.rotary import rotary_angles, rotate

SETS = library.instruction_sets()


@pytest.fixture(params=(*SETS, "plain"))
def forced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Each set of this machine in turn, then plain JAX; the best set again afterwards."""
    if request.param == "plain":
        monkeypatch.setattr(attention_rules, "native", lambda: False)
    else:
        library.use(request.param)
    yield request.param
    if SETS:
        library.use(SETS[0])


def call(case: Case, q, k, v, bias, given: Inputs):
    return fast_attention(
        q, k, v, causal=case.causal, window=case.window, segment_ids=segments(case, given.ids), bias=bias,
        rotary=given.angles,
    )  # fmt: skip


def segments(case: Case, ids):
    return ids if ids is None or case.T == case.S else (ids[:, -case.T :], ids)


@lru_cache(64)
def compiled(case: Case, dtype: str, native: bool):
    """One program for all instruction sets: the set is chosen when it runs."""
    given = inputs(case, dtype)

    def run(q, k, v, pull, bias):
        if bias is None:
            out, back = jax.vjp(lambda q, k, v: call(case, q, k, v, None, given), q, k, v)
        else:
            out, back = jax.vjp(lambda q, k, v, bias: call(case, q, k, v, bias, given), q, k, v, bias)
        return (out, *back(pull))

    return jax.jit(run).lower(*given[:4], given.bias).compile()


def both_ways(case: Case, given: Inputs, forced: str):
    run = compiled(case, str(given.q.dtype), forced != "plain")
    return run(*given[:4], given.bias)


@pytest.mark.parametrize("case", (*CASES, *BIASED, *TURNED), ids=str)
def test_values_and_gradients_are_the_formulas(case: Case, forced: str):
    """Float32 sums of up to 600 products of order 1: some 1e-6 of their size, which is up to 10."""
    given = inputs(case)
    for found, wanted in zip(both_ways(case, given, forced), oracle(case, given), strict=True):
        np.testing.assert_allclose(found, wanted, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("case", (CASES[2], CASES[7], BIASED[1], TURNED[0]), ids=str)
def test_bfloat16_differs_by_the_rounding_of_what_comes_in_and_out(case: Case, forced: str):
    """The oracle gets the rounded inputs; the output is rounded to 8 bits, and `out` is read back rounded. Plain JAX
    also rounds turned queries and keys and the shares. A bias stays float32."""
    given = inputs(case, "bfloat16")
    found = both_ways(case, given, forced)
    assert all(x.dtype == jnp.bfloat16 for x in found[:4])
    for one, wanted in zip(found, oracle(case, given), strict=True):
        np.testing.assert_allclose(np.asarray(one, np.float64), wanted, atol=5e-2, rtol=2e-2)


def test_a_bias_of_the_inputs_dtype_is_read_as_it_is(forced: str):
    given = inputs(BIASED[0], "bfloat16")
    narrow = jnp.asarray(given.bias, jnp.bfloat16)
    found = jax.jit(lambda bias: call(BIASED[0], *given[:3], bias, given))
    np.testing.assert_array_equal(found(narrow), found(narrow.astype(jnp.float32)))
    slope = jax.eval_shape(
        jax.grad(lambda bias: call(BIASED[0], *given[:3], bias, given).astype(jnp.float32).sum()), narrow
    )
    assert slope.dtype == jnp.bfloat16


def test_a_query_that_sees_no_key_gives_zeros_and_takes_no_gradient(forced: str):
    given = inputs(CASES[6])
    out, to_q, _, _ = both_ways(CASES[6], given, forced)
    assert not np.asarray(out[:, :51]).any() and not np.asarray(to_q[:, :51]).any()
    assert np.asarray(out[:, 51:]).all()


def test_a_row_of_the_bias_that_is_minus_infinity_gives_zeros(forced: str):
    case = Case(1, 40, 300, 2, 1, 8, causal=False, bias="BNTS")
    given = inputs(case)
    given.bias[0, 1, 7] = -np.inf
    out, to_q, _, _, to_bias = both_ways(case, given, forced)
    for x in (out[0, 7, 1], to_q[0, 7, 1], to_bias[0, 1, 7]):
        assert not np.asarray(x).any()
    assert np.asarray(out[0, 7, 0]).all()


@pytest.mark.parametrize("name", ("k", "v"))
def test_a_nan_reaches_the_rows_that_see_it_and_no_other(name: str, forced: str):
    """Key 40 is hidden by position, in one head by the bias, and from document 1 by its segment."""
    case = Case(1, 60, 60, 2, 1, 16, bias="BNTS")
    given = inputs(case)
    given.bias[:] = 0
    given.bias[0, 1, :, 40] = -np.inf
    given = given._replace(ids=(np.arange(60) >= 50)[None].astype(np.int32))
    getattr(given, name)[0, 40] = np.nan

    def run(q, k, v):
        out = call(case, q, k, v, given.bias, given)
        return jnp.where(jnp.isfinite(out), out, 0).sum(), out

    slopes, out = jax.jit(jax.grad(run, (0, 1, 2), has_aux=True))(*given[:3])
    broken = np.isnan(np.asarray(out)).all(-1)
    np.testing.assert_array_equal(np.isnan(np.asarray(out)).any(-1), broken)
    np.testing.assert_array_equal(broken[0, :, 0], (np.arange(60) >= 40) & (np.arange(60) < 50))
    assert not broken[0, :, 1].any()
    assert np.isfinite(np.asarray(slopes[0])[~broken]).all()
    for slope in slopes[1:]:  # keys of the other document, which no broken row sees
        assert np.isfinite(np.asarray(slope)[0, 50:]).all()


def test_a_gradient_that_is_nan_stays_with_the_keys_that_its_row_sees(forced: str):
    case = Case(1, 120, 120, 1, 1, 16)
    given = inputs(case)
    given.pull[0, 30] = np.nan
    _, to_q, to_k, to_v = (np.asarray(x) for x in both_ways(case, given, forced))
    if forced == "plain":  # the product of all rows at once: 0 · NaN
        assert np.isfinite(to_q[0, :30]).all() and np.isfinite(to_q[0, 31:]).all()
    else:
        for slope in (to_k, to_v):
            assert np.isfinite(slope[0, 31:]).all() and np.isnan(slope[0, :31]).all()


@pytest.mark.parametrize(
    "case", (Case(2, 70, 70, 4, 2, 16), Case(2, 70, 70, 3, 3, 8, rotary=True, bias="NTS")), ids=str
)
def test_packed_is_the_same_as_apart(case: Case, forced: str):
    given = inputs(case)
    q, k, v, pull = given[:4]
    qkv = jnp.concatenate([x.reshape(case.B, case.T, -1) for x in (q, k, v)], -1)
    options = {"causal": True, "bias": given.bias, "rotary": given.angles}

    def packed(qkv):
        return packed_attention(qkv, case.N, case.K, **options)

    @jax.jit
    def both(qkv, q, k, v, pull):
        out, back = jax.vjp(packed, qkv)
        wanted, apart = jax.vjp(lambda q, k, v: fast_attention(q, k, v, **options), q, k, v)
        slopes = jnp.concatenate([x.reshape(case.B, case.T, -1) for x in apart(pull)], -1)
        return (out, back(pull)[0]), (wanted, slopes)

    for found, wanted in zip(*both(qkv, q, k, v, pull), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-6 if forced == "plain" else 0, rtol=0)
    text = jax.jit(jax.grad(lambda x: packed(x).sum())).lower(qkv).as_text()
    assert forced == "plain" or "concatenate" not in text.split("capibara_attention_backward")[1]


def test_vmap_and_scan_are_loops(forced: str):
    """Also where some arrays are mapped over and others are not, with gradients."""
    case = Case(2, 70, 70, 2, 1, 16, bias="TS", rotary=True, segments=True)
    given = inputs(case)
    q, k, v, pull = given[:4]
    many = jnp.stack([q, 2 * q, -q])

    @jax.jit
    def both(q, bias):
        out, back = jax.vjp(lambda q, k, bias: call(case, q, k, v, bias, given), q, k, bias)
        return (out, *back(pull))

    @jax.jit
    def mapped(many, bias):
        twice = jax.vmap(jax.vmap(both, (None, 0)), (0, None))(many, jnp.stack([bias / 2, bias]))
        loop = jax.lax.scan(lambda c, x: (c, both(x, bias)), None, many)[1]
        return jax.vmap(both, (0, None))(many, bias), loop, [x[:, 1] for x in twice]

    alone = [jnp.stack(parts) for parts in zip(*(both(x, given.bias) for x in many), strict=True)]
    atol = 3e-5 if forced == "plain" else 0  # XLA sums a larger batch in another order
    for found in mapped(many, given.bias):
        for one, wanted in zip(found, alone, strict=True):
            np.testing.assert_allclose(one, wanted, atol=atol, rtol=atol)


MAPPED = [axes for axes in np.ndindex(2, 2, 2, 2, 2, 2) if any(axes)][::7]


@pytest.mark.parametrize("axes", MAPPED, ids=str)
def test_vmap_may_map_over_any_of_the_arrays(axes: tuple[int, ...]):
    """q, k, v, cos, sin and bias, each mapped or shared, with the gradients of the first three."""
    given = inputs(Case(2, 9, 9, 2, 1, 8, bias="TS", rotary=True))
    arrays = [jnp.asarray(x) for x in (*given[:3], *given.angles, given.bias)]
    stacked = [jnp.stack([x, x[::-1], 0.5 * x]) if one else x for x, one in zip(arrays, axes, strict=True)]

    def both(q, k, v, cos, sin, bias):
        def run(q, k, v):
            return fast_attention(q, k, v, causal=True, bias=bias, rotary=(cos, sin))

        out, back = jax.vjp(run, q, k, v)
        return (out, *back(given.pull))

    found = jax.jit(jax.vmap(both, [0 if one else None for one in axes]))(*stacked)
    alone = [jax.jit(both)(*(x[i] if one else x for x, one in zip(stacked, axes, strict=True))) for i in range(3)]
    for i, wanted in enumerate(alone):
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one[i], other, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("low", (-1e31, -3.4e38))
def test_however_low_a_bias_is_it_hides_nothing_and_shows_nothing_hidden(low: float, forced: str):
    """Equal biases cancel. The lowest floats have no room for the score beside them, and leave equal shares."""
    given = inputs(Case(1, 6, 6, 1, 1, 8))
    bias = jnp.full((1, 1, 6, 6), low, jnp.float32)
    found = jax.jit(lambda q, k, v: fast_attention(q, k, v, causal=True, bias=bias))(*given[:3])
    steps = np.arange(1, 7)[:, None, None]
    np.testing.assert_allclose(found[0], np.cumsum(given.v[0], 0) / steps, atol=1e-6)


@pytest.mark.parametrize("packed", (False, True))
def test_the_second_derivative_is_that_of_the_plain_formula(packed: bool):
    """A Hessian-vector product, reverse over reverse, against finite differences of the gradient in float32."""
    case = Case(1, 12, 12, 2, 1, 8, bias="NTS", rotary=True)
    given = inputs(case)
    bias = np.where(np.isinf(given.bias), 0, given.bias)
    start = (jnp.concatenate(given[:3], 2).reshape(1, 12, -1) if packed else given.q, bias)
    rng = np.random.default_rng(1)
    along = tuple(jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in start)

    def loss(x, bias):
        if packed:
            out = packed_attention(x, 2, 1, causal=True, bias=bias, rotary=given.angles)
        else:
            out = call(case, x, given.k, given.v, bias, given)
        return (jnp.tanh(out) * given.pull).sum()

    slope = jax.jit(jax.grad(loss, (0, 1)))
    product = jax.jit(jax.grad(lambda *at: sum((a * b).sum() for a, b in zip(slope(*at), along, strict=True)), (0, 1)))(
        *start
    )
    step = 1e-2
    ahead, behind = (slope(*(x + s * step * a for x, a in zip(start, along, strict=True))) for s in (1, -1))
    for found, plus, minus in zip(product, ahead, behind, strict=True):
        np.testing.assert_allclose(found, (plus - minus) / (2 * step), atol=4e-3)


@pytest.mark.skipif(not SETS, reason="plain JAX holds the scores")
def test_a_bias_that_is_not_differentiated_costs_no_gradient():
    T = 512
    q = jax.ShapeDtypeStruct((1, T, 2, 8), jnp.float32)
    bias = jax.ShapeDtypeStruct((1, 2, T, T), jnp.float32)

    def loss(q, bias):
        return fast_attention(q, q, q, bias=bias).sum()

    def temporary(argnums) -> int:
        program = jax.jit(lambda q, b: sum(x.sum() for x in jax.grad(loss, argnums)(q, b))).lower(q, bias).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporary((0,)) < T * T * 4 <= temporary((0, 1))


def test_the_angles_of_positions_turn_by_distance():
    """Scores of turned pairs depend on the difference of positions only, and position 0 turns nothing."""
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(size=(1, 1, 1, 16)), jnp.float32) for _ in range(2))

    def score(here: int, there: int):
        turned = [rotate(z, *rotary_angles(jnp.full((1, 1), p), 16, 1e4)) for z, p in ((x, here), (y, there))]
        return float((turned[0] * turned[1]).sum())

    assert score(0, 0) == pytest.approx(float((x * y).sum()), abs=1e-5)
    assert score(13, 4) == pytest.approx(score(109, 100), abs=1e-4)


def test_nothing_in_gives_nothing_out():
    q, kv = jnp.zeros((2, 0, 4, 8)), jnp.zeros((2, 0, 2, 8))
    assert fast_attention(q, kv, kv).shape == (2, 0, 4, 8)
    assert not np.asarray(fast_attention(jnp.ones((2, 3, 4, 8)), kv, kv)).any()
    assert packed_attention(jnp.zeros((0, 3, 32)), 2, 1).shape == (0, 3, 2, 8)


@pytest.mark.parametrize(
    ("change", "sentence"),
    (
        (dict.fromkeys("kv", np.ones((1, 4, 3, 8), np.float32)), "2 query heads cannot share 3"),
        ({"k": np.ones((1, 4, 2, 4), np.float32)}, "needs q"),
        ({"q": np.ones((1, 4, 2, 8), np.int32)}, "all float32 or all bfloat16"),
        ({"window": 0}, "window is 1 or more"),
        ({"segment_ids": np.ones((1, 3), np.int32)}, "segment_ids are integers of shape"),
        ({"bias": np.ones((1, 3, 4, 4), np.float32)}, "broadcasts to"),
        ({"bias": np.ones((4, 4), bool)}, "is of floats"),
        ({"rotary": np.ones((2, 1, 4, 3), np.float32)}, "rotary is"),
    ),
)
def test_what_does_not_fit_is_one_sentence(change: dict, sentence: str):
    given = {name: np.ones((1, 4, 2, 8), np.float32) for name in "qkv"} | change
    q, k, v = (given.pop(name) for name in "qkv")
    with pytest.raises(ConfigError, match=sentence):
        fast_attention(q, k, v, **given)


def test_packed_heads_that_do_not_fit_are_one_sentence():
    with pytest.raises(ConfigError, match="Packed attention needs"):
        packed_attention(np.ones((1, 4, 31), np.float32), 2, 1)
    with pytest.raises(ConfigError, match="3 query heads cannot share 2"):
        packed_attention(np.ones((1, 4, 7 * 8), np.float32), 3, 2)
