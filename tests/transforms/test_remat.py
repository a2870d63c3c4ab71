"""Gradient checkpointing changes what is kept for the backward pass, not what comes out of it."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

from capibara.core.config import ModelConfig
from capibara.core.model import ModularCapibaraModel, objective, parameters
from capibara.errors import ConfigError
from capibara.transforms.remat import recomputed, with_gradient_checkpointing

LAYERS, T = 3, 32


@pytest.fixture(scope="module")
def model() -> ModularCapibaraModel:
    return ModularCapibaraModel(ModelConfig(vocab_size=32, width=16, num_layers=LAYERS, num_heads=2), seed=1)


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
    ids = np.random.default_rng(0).integers(1, 32, (3, T + 1)).astype(np.int32)
    ones = np.ones((3, T), np.int32)
    return {
        "tokens": ids[:, :-1], "targets": ids[:, 1:], "segments": ones,
        "positions": np.arange(T, dtype=np.int32) * ones, "mask": ones.astype(bool),
    }  # fmt: skip


def gradients(model, batch):
    losses = objective(model)
    return jax.jit(jax.value_and_grad(lambda params: losses.loss(params, batch, None)[0]))


def test_loss_and_gradients_are_the_same(model, batch):
    """Recomputing repeats the same float32 operations; only their fusion may differ."""
    loss, grads = gradients(model, batch)(parameters(model))
    again, regrads = gradients(with_gradient_checkpointing(model), batch)(parameters(model))
    assert float(again) == pytest.approx(float(loss), rel=1e-6)
    for name, leaf in grads.items():
        np.testing.assert_allclose(regrads[name], leaf, rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_block_keeps_its_input_only(model, batch):
    """What the backward pass is given: of every block x, [B, T, D], instead of all its activations."""
    def kept(model) -> int:
        losses = objective(model)
        _, backward = jax.eval_shape(lambda p: jax.vjp(lambda q: losses.loss(q, batch, None)[0], p), parameters(model))
        return sum(leaf.size for leaf in jax.tree.leaves(backward))

    everything, little = kept(model), kept(with_gradient_checkpointing(model))
    weights, a_state = model.num_parameters, 3 * T * 16
    assert little < everything / 2
    assert little - weights < (everything - weights) / LAYERS + LAYERS * a_state


def test_the_copy_has_the_same_parameters_and_the_model_is_as_it_was(model):
    copy = with_gradient_checkpointing(model)
    assert copy.gradient_checkpointing and not model.gradient_checkpointing
    for name, leaf in parameters(model).items():
        np.testing.assert_array_equal(parameters(copy)[name], leaf)


def test_a_block_of_ones_own_is_recomputed_the_same():
    class Square(nnx.Module):
        def __init__(self):
            self.weight = nnx.Param(jax.numpy.array([2.0, -1.0]))

        def __call__(self, x, bias):
            return (self.weight[...] * x + bias) ** 2, "cache"

    x, block = np.array([3.0, 4.0], np.float32), Square()
    slope = jax.grad(lambda x: recomputed(block, x, 1.0).sum())(x)
    np.testing.assert_allclose(recomputed(block, x, 1.0), [49.0, 9.0])
    np.testing.assert_allclose(slope, [2 * 7 * 2, 2 * -3 * -1])


def test_a_model_that_cannot_recompute_is_refused():
    with pytest.raises(ConfigError, match="Linear has none. Put jax.checkpoint around its blocks"):
        with_gradient_checkpointing(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
