"""Attention on GPUs and TPUs, as far as this machine can tell: what is lowered for them, not that it runs."""

from __future__ import annotations

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental.pallas.ops.tpu import splash_attention

from capibara.kernels import attention_rules, elsewhere
from capibara.kernels.attention import fast_attention, packed_attention
from capibara.kernels.plain_attention import Arrays, Sight, plain_attention

CALLS = {"cuda": (r"__cudnn\$fmha\w*Softmax\b", r"__cudnn\$fmha\w*Backward"), "tpu": ("tpu_custom_call",) * 2}
"""Of the forward and of the gradient."""

OPTIONS = ({}, {"window": 64}, {"segments": True})


@pytest.fixture(autouse=True)
def as_if_on_all_platforms(monkeypatch: pytest.MonkeyPatch):
    """A host with a CPU only has no cuDNN to ask for its version."""
    both = lambda: ("cuda", "tpu")  # noqa: E731
    monkeypatch.setattr(elsewhere, "platforms", both)
    monkeypatch.setattr(attention_rules, "platforms", both)
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)


def lowered(platform: str, call, *shapes, dtype=jnp.bfloat16) -> tuple[str, str]:
    """The programs of a call and of its gradient."""
    given = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]

    def loss(*arrays):
        return call(*arrays).astype(jnp.float32).sum()

    programs = (call, jax.grad(loss, tuple(range(len(shapes)))))
    return tuple(jax.jit(f).trace(*given).lower(lowering_platforms=(platform,)).as_text() for f in programs)


def segments(q) -> jax.Array:
    return jnp.zeros(q.shape[:2], jnp.int32)


@pytest.mark.parametrize("platform", CALLS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_libraries_own_kernels_are_called(platform: str, options: dict):
    def call(q, k, v):
        ids = segments(q) if options.get("segments") else None
        return fast_attention(q, k, v, causal=True, window=options.get("window"), segment_ids=ids)

    texts = lowered(platform, call, (2, 256, 4, 128), (2, 256, 2, 128), (2, 256, 2, 128))
    for text, name in zip(texts, CALLS[platform], strict=True):
        assert re.search(name, text)
        assert "capibara_attention" not in text


@pytest.mark.parametrize("platform", CALLS)
def test_packed_and_turned_heads_are_taken_too(platform: str):
    def call(qkv):
        turn = jnp.ones((1, 256, 64), jnp.float32)
        return packed_attention(qkv, 4, 2, causal=True, rotary=(turn, turn))

    for text, name in zip(lowered(platform, call, (2, 256, 8 * 128)), CALLS[platform], strict=True):
        assert re.search(name, text)


@pytest.mark.parametrize("platform", CALLS)
@pytest.mark.parametrize("reason", ("bias", "fewer queries", "pair of segments", "ragged", "window ahead"))
def test_what_they_do_not_take_is_plain(platform: str, reason: str):
    T = 100 if reason == "fewer queries" else 256
    size = 127 if reason == "ragged" else 128

    def call(q, k, v):
        if reason == "bias":
            return fast_attention(q, k, v, bias=jnp.zeros((1, 1, T, 256)))
        ids = (segments(q), segments(k)) if reason == "pair of segments" else None
        return fast_attention(q, k, v, segment_ids=ids, window=9 if reason == "window ahead" else None)

    if platform == "tpu" and reason in ("ragged", "window ahead"):
        pytest.skip("splash attention takes any size of heads, and any window")
    for text in lowered(platform, call, (2, T, 4, size), (2, 256, 2, size), (2, 256, 2, size)):
        assert "custom_call" not in text or "cudnn" not in text and "tpu_custom_call" not in text


@pytest.mark.parametrize("options", (*OPTIONS, {"causal": False}, {"causal": False, "window": 64}), ids=str)
@pytest.mark.parametrize("name", ("cudnn", "splash"))
def test_they_are_asked_for_the_same_function(name: str, options: dict, monkeypatch: pytest.MonkeyPatch):
    """Splash attention in Pallas' interpreter, and JAX's own of what cuDNN is asked, against plain JAX."""
    if name == "cudnn" and options == {"causal": False, "window": 64}:
        pytest.skip("not taken")
    plain_of_jax, kernel = jax.nn.dot_product_attention, splash_attention.make_splash_mha_single_device
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, implementation, **k: plain_of_jax(*a, **k))
    monkeypatch.setattr(splash_attention, "make_splash_mha_single_device", partial(kernel, interpret=True))
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 256, heads, 16)), jnp.float32) for heads in (4, 2, 2))
    ids = jnp.asarray(np.sort(rng.integers(0, 3, (1, 256))), jnp.int32) if options.get("segments") else None
    arrays = Arrays(q, k, v, ids, ids)
    sight = Sight(options.get("causal", True), options.get("window", 0), 0.3, 2, True)
    found = jax.jit(partial(getattr(elsewhere, name), sight=sight))(arrays)
    np.testing.assert_allclose(found, plain_attention(arrays, sight), atol=1e-5)


def test_on_a_cpu_the_native_kernel_or_plain_jax_runs():
    q = jnp.ones((1, 256, 1, 128), jnp.bfloat16)
    assert jax.jit(lambda q: fast_attention(q, q, q, causal=True))(q).shape == q.shape
