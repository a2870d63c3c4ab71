"""The loss in chunks against the loss in one piece: value, gradients, memory."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capibara.core.loss import head_loss
from capibara.kernels.cross_entropy import FEW_LOGITS


def inputs(M: int = 37, D: int = 16, V: int = 50):
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((M, D), np.float32)
    head = rng.standard_normal((V, D), np.float32)
    targets = rng.integers(0, V, M).astype(np.int32)
    mask = rng.random(M) < 0.8
    return tuple(jnp.asarray(x) for x in (hidden, head, targets, mask))


def oracle(hidden, head, targets, mask, z_loss: float) -> tuple[float, np.ndarray, np.ndarray]:
    """Loss and gradients by the formula, in float64: d loss / d logits = p (1 + 2 z log Z) − onehot."""
    hidden, head = np.asarray(hidden, np.float64), np.asarray(head, np.float64)
    counted, rows = np.asarray(mask) / np.asarray(mask).sum(), np.arange(len(targets))
    logits = hidden @ head.T
    partition = np.log(np.exp(logits).sum(-1))
    losses = partition - logits[rows, np.asarray(targets)] + z_loss * partition**2
    pull = np.exp(logits - partition[:, None]) * (1 + 2 * z_loss * partition)[:, None]
    pull[rows, np.asarray(targets)] -= 1
    pull *= counted[:, None]
    return float(losses @ counted), pull @ head, pull.T @ hidden


@pytest.mark.parametrize(("chunk", "z_loss"), [(0, 1e-2), (8, 1e-2), (8, 0.0), (37, 0.0), (64, 1e-2)])
def test_loss_and_gradients_are_their_formula_whatever_the_chunk(chunk: int, z_loss: float):
    """The gradient that comes in, 3, must scale what the forward pass computed."""
    hidden, head, targets, mask = inputs()
    step = jax.jit(
        jax.value_and_grad(
            lambda h, w: 3.0 * head_loss(h, w, targets, mask, z_loss=z_loss, chunk=chunk), argnums=(0, 1)
        )
    )
    value, (to_hidden, to_head) = step(hidden, head)
    wanted, wanted_hidden, wanted_head = oracle(hidden, head, targets, mask, z_loss)
    assert float(value) == pytest.approx(3 * wanted, rel=1e-5)
    np.testing.assert_allclose(to_hidden, 3 * wanted_hidden, atol=1e-5)
    np.testing.assert_allclose(to_head, 3 * wanted_head, atol=1e-5)


def test_without_gradients_the_chunked_loss_is_the_same():
    args = inputs()
    value = jax.jit(partial(head_loss, z_loss=1e-2, chunk=8))(*args)
    assert float(value) == pytest.approx(oracle(*args, 1e-2)[0], rel=1e-5)


def test_a_batch_without_a_target_has_loss_zero_and_no_gradient():
    hidden, head, targets, mask = inputs()
    for chunk in (0, 8):
        loss = partial(head_loss, targets=targets, mask=jnp.zeros_like(mask), chunk=chunk)
        value, slopes = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(hidden, head)
        assert float(value) == 0 and not any(slope.any() for slope in slopes)


def test_chunks_work_in_bfloat16():
    hidden, head, targets, mask = inputs()
    low = hidden.astype(jnp.bfloat16)
    loss = partial(head_loss, targets=targets, mask=mask, chunk=8)
    value, slopes = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(low, head)
    assert slopes[0].dtype == jnp.bfloat16 and slopes[1].dtype == jnp.float32
    assert float(value) == pytest.approx(oracle(low.astype(jnp.float32), head, targets, mask, 0.0)[0], rel=2e-2)


@pytest.mark.parametrize("transform", ["vmap", "map"])
def test_chunks_work_under_the_maps_that_run_nodes(transform: str):
    hidden, head, targets, mask = inputs()
    stack = jnp.stack([hidden, 2 * hidden])
    slope = jax.jit(jax.grad(lambda h: head_loss(h, head, targets, mask, chunk=8)))
    mapped = jax.jit(jax.vmap(slope) if transform == "vmap" else partial(jax.lax.map, slope))(stack)
    for row, one in zip(mapped, stack, strict=True):
        np.testing.assert_allclose(row, slope(one), atol=1e-6)


def test_no_array_of_all_logits_is_ever_made():
    """By the compiler's own account, for the training step of a vocabulary as GPT-2's."""
    M, D, V = 1024, 64, 50304
    assert M * V > FEW_LOGITS
    shapes = (((M, D), jnp.float32), ((V, D), jnp.float32), ((M,), jnp.int32), ((M,), jnp.bool_))
    args = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    step = jax.jit(jax.value_and_grad(partial(head_loss, chunk=0), argnums=(0, 1)))
    temporary = step.lower(*args).compile().memory_analysis().temp_size_in_bytes
    all_logits = 4 * M * V
    assert temporary < all_logits / 2
