"""The layers against their formulas: values and gradients, in float32 and bfloat16."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from capibara.core.config import ModelConfig
from capibara.core.layers import AttentionBlock, attention, causal_segments, linear, rms_norm, rotary, silu

FLOAT32 = 2e-6
"""Of values of order 1: some tens of roundings of 2⁻²⁴."""


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def test_linear_is_the_product_and_so_are_its_gradients():
    x, kernel, pull = normal(0, 2, 5, 12), normal(1, 12, 7), normal(2, 2, 5, 7)
    y, back = jax.vjp(linear, x, kernel)
    to_x, to_kernel = back(jnp.asarray(pull))
    np.testing.assert_allclose(y, x @ kernel, atol=1e-5)
    np.testing.assert_allclose(to_x, pull @ kernel.T, atol=1e-5)
    np.testing.assert_allclose(to_kernel, np.einsum("btd,bte->de", x, pull), atol=1e-5)


def test_linear_in_bfloat16_sums_in_float32():
    """Summed in bfloat16, 4096 ones would stop at 256: a bfloat16 has 8 bits of precision."""
    ones, kernel = jnp.ones((4096, 4096), jnp.bfloat16), jnp.ones((4096, 1), jnp.float32)
    y = jax.jit(linear)(ones, kernel)
    to_kernel = jax.jit(jax.grad(lambda k: linear(ones, k).astype(jnp.float32).sum()))(kernel)
    assert y.dtype == jnp.bfloat16 and float(y[0, 0]) == 4096
    assert to_kernel.dtype == jnp.float32 and float(to_kernel[0, 0]) == 4096


@given(st.floats(-80, 80, width=32))
@settings(max_examples=50, deadline=None)
def test_silu_has_the_gradient_of_its_formula(x: float):
    gate = 1 / (1 + np.exp(-np.float64(x)))
    value, slope = jax.value_and_grad(silu)(jnp.float32(x))
    np.testing.assert_allclose(value, x * gate, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(slope, gate + x * gate * (1 - gate), rtol=1e-4, atol=1e-6)


def test_rms_norm_is_its_formula():
    x, scale = normal(0, 3, 16), normal(1, 16)
    wanted = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5) * scale
    np.testing.assert_allclose(rms_norm(jnp.asarray(x), jnp.asarray(scale), 1e-5), wanted, atol=FLOAT32 * 4)


def test_rms_norm_of_zero_has_a_finite_gradient():
    slope = jax.jit(jax.grad(lambda x: rms_norm(x, jnp.ones(8), 1e-5).sum()))(jnp.zeros((2, 8)))
    assert np.isfinite(slope).all()


def test_rotary_turns_each_pair_by_its_angle():
    x = normal(0, 1, 6, 2, 8)
    positions = np.array([[0, 1, 2, 7, 100, 1000]], np.int32)
    angle = positions[0, :, None, None] * 10000.0 ** (-np.arange(4) / 4)
    wanted = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angle)
    turned = rotary(jnp.asarray(x), jnp.asarray(positions), 10000.0)
    # angle in float32: 1000 rad is known to 6e-5
    np.testing.assert_allclose(turned, np.concatenate([wanted.real, wanted.imag], -1), atol=3e-4)


@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 300))
@settings(max_examples=25, deadline=None)
def test_rotary_makes_products_depend_on_the_distance_only(a: int, b: int, shift: int):
    query, key = normal(0, 1, 1, 1, 8), normal(1, 1, 1, 1, 8)

    def product(i: int, j: int) -> float:
        turned = [rotary(jnp.asarray(x), jnp.full((1, 1), p, jnp.int32), 10000.0) for x, p in ((query, i), (key, j))]
        return float((turned[0] * turned[1]).sum())

    assert product(a, b) == pytest.approx(product(a + shift, b + shift), abs=2e-3)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_attention_is_softmax_over_what_is_allowed(num_kv_heads: int):
    B, T, S, N, H = 2, 5, 7, 4, 6
    query = normal(0, B, T, N, H)
    key, value = normal(1, B, S, num_kv_heads, H), normal(2, B, S, num_kv_heads, H)
    allowed = np.random.default_rng(3).random((B, T, S)) < 0.6
    allowed[..., 0] = True
    wanted = np.zeros((B, T, N, H))
    for b, t, n in np.ndindex(B, T, N):
        group = n // (N // num_kv_heads)
        scores = key[b, allowed[b, t], group] @ query[b, t, n] / np.sqrt(H)
        weights = np.exp(scores - scores.max())
        wanted[b, t, n] = weights / weights.sum() @ value[b, allowed[b, t], group]
    mixed = jax.jit(attention)(*(jnp.asarray(x) for x in (query, key, value, allowed)))
    np.testing.assert_allclose(mixed, wanted, atol=FLOAT32 * 2)


def test_attention_with_nothing_allowed_is_finite_and_so_is_its_gradient():
    x = jnp.asarray(normal(0, 1, 3, 2, 4))
    loss = jax.jit(jax.value_and_grad(lambda x: attention(x, x, x, jnp.zeros((1, 3, 3), bool)).sum()))
    value, slope = loss(x)
    assert np.isfinite(value) and np.isfinite(slope).all()


visible = jax.jit(causal_segments)


@given(st.lists(st.integers(0, 3), min_size=9, max_size=9))
@settings(max_examples=25, deadline=None)
def test_a_token_sees_itself_and_earlier_ones_of_its_document(segments: list[int]):
    allowed = np.asarray(visible(jnp.asarray([segments], jnp.int32)))[0]
    for i, j in np.ndindex(*allowed.shape):
        assert allowed[i, j] == (j <= i and segments[i] == segments[j])


def test_a_block_turns_the_same_with_segments_as_with_their_mask():
    """With segments attention turns the heads as it reads them; with a mask they are turned before it."""
    block = AttentionBlock(ModelConfig(width=32, num_heads=4, num_kv_heads=2, init_scale=0.3), nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 30, 32)), jnp.float32)
    positions = jnp.concatenate([jnp.arange(20), jnp.arange(10)])[None].repeat(2, 0)
    segments = jnp.where(jnp.arange(30) < 20, 1, 2)[None].repeat(2, 0)
    found = block(x, positions, segments)[0]
    np.testing.assert_allclose(found, block(x, positions, causal_segments(segments))[0], atol=2e-5)
    assert np.abs(found - block(x, 0 * positions, segments)[0]).max() > 1e-2
