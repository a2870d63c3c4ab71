"""The loss in chunks against the loss in one piece: value, gradients, memory."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capibara.core.loss import AUTOMATIC_LIMIT, head_loss


def inputs(M: int = 37, D: int = 16, V: int = 50):
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((M, D), np.float32)
    head = rng.standard_normal((V, D), np.float32)
    targets = rng.integers(0, V, M).astype(np.int32)
    mask = rng.random(M) < 0.8
    return tuple(jnp.asarray(x) for x in (hidden, head, targets, mask))


def oracle(hidden, head, targets, mask, z_loss: float) -> float:
    """The formula in float64."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T
    partition = np.log(np.exp(logits).sum(-1))
    losses = partition - logits[np.arange(len(targets)), np.asarray(targets)] + z_loss * partition**2
    return losses[np.asarray(mask)].mean()


@pytest.mark.parametrize("chunk", [0, 1, 8, 37, 64])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_the_loss_is_its_formula_whatever_the_chunk(chunk: int, z_loss: float):
    args = inputs()
    assert float(head_loss(*args, z_loss=z_loss, chunk=chunk)) == pytest.approx(oracle(*args, z_loss), rel=1e-5)


@pytest.mark.parametrize("chunk", [8, 37])
def test_the_gradients_in_chunks_are_those_in_one_piece(chunk: int):
    hidden, head, targets, mask = inputs()

    def gradients(chunk: int):
        loss = lambda h, w: 3.0 * head_loss(h, w, targets, mask, z_loss=1e-2, chunk=chunk)  # noqa: E731
        return jax.value_and_grad(loss, argnums=(0, 1))(hidden, head)

    (value, (to_hidden, to_head)), (wanted, (wanted_hidden, wanted_head)) = gradients(chunk), gradients(0)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    np.testing.assert_allclose(to_hidden, wanted_hidden, atol=1e-5)
    np.testing.assert_allclose(to_head, wanted_head, atol=1e-5)


def test_the_gradient_is_that_of_finite_differences():
    """An oracle that shares no code with either form, in float64 outside JAX."""
    hidden, head, targets, mask = inputs(M=6, D=4, V=9)
    slope = jax.grad(lambda w: head_loss(hidden, w, targets, mask, z_loss=1e-2, chunk=4))(head)
    step, at = 1e-5, np.asarray(head, np.float64)
    for v, d in ((0, 0), (4, 3), (8, 1)):
        move = np.zeros_like(at)
        move[v, d] = step
        ends = [oracle(hidden, at + sign * move, targets, mask, 1e-2) for sign in (1, -1)]
        assert float(slope[v, d]) == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=2e-6)


def test_a_batch_without_a_target_has_loss_zero_and_no_gradient():
    hidden, head, targets, mask = inputs()
    for chunk in (0, 8):
        loss = partial(head_loss, targets=targets, mask=jnp.zeros_like(mask), chunk=chunk)
        value, slopes = jax.value_and_grad(lambda h, w, loss=loss: loss(h, w), argnums=(0, 1))(hidden, head)
        assert float(value) == 0 and not any(slope.any() for slope in slopes)


def test_chunks_work_in_bfloat16():
    hidden, head, targets, mask = inputs()
    low = hidden.astype(jnp.bfloat16)
    value, slopes = jax.value_and_grad(lambda h, w: head_loss(h, w, targets, mask, chunk=8), argnums=(0, 1))(low, head)
    assert slopes[0].dtype == jnp.bfloat16 and slopes[1].dtype == jnp.float32
    assert float(value) == pytest.approx(oracle(low.astype(jnp.float32), head, targets, mask, 0.0), rel=2e-2)


@pytest.mark.parametrize("transform", ["vmap", "map"])
def test_chunks_work_under_the_maps_that_run_nodes(transform: str):
    hidden, head, targets, mask = inputs()
    stack = jnp.stack([hidden, 2 * hidden])
    slope = jax.grad(lambda h: head_loss(h, head, targets, mask, chunk=8))
    mapped = jax.vmap(slope)(stack) if transform == "vmap" else jax.lax.map(slope, stack)
    for row, one in zip(mapped, stack, strict=True):
        np.testing.assert_allclose(row, slope(one), atol=1e-6)


def test_no_array_of_all_logits_is_ever_made():
    """By the compiler's own account, for the training step of a vocabulary as GPT-2's."""
    M, D, V = 1024, 64, 50304
    assert M * V > AUTOMATIC_LIMIT
    shapes = (((M, D), jnp.float32), ((V, D), jnp.float32), ((M,), jnp.int32), ((M,), jnp.bool_))
    args = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    step = jax.jit(jax.value_and_grad(partial(head_loss, chunk=0), argnums=(0, 1)))
    temporary = step.lower(*args).compile().memory_analysis().temp_size_in_bytes
    all_logits = 4 * M * V
    assert temporary < all_logits / 2
