"""The model: its parameters, what its tokens see, and the losses it hands to training and to the gates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from capibara.core.config import ModelConfig, ModularConfig
from capibara.core.layers import AttentionBlock
from capibara.core.model import ModularCapibaraModel, objective, parameters, with_parameters
from capibara.errors import ConfigError
from capibara.transforms.remat import with_gradient_checkpointing

SMALL: dict[str, Any] = dict(vocab_size=61, width=16, num_layers=2, num_heads=4, num_kv_heads=2, hidden=24)


@pytest.fixture(scope="module")
def model() -> ModularCapibaraModel:
    return ModularCapibaraModel(ModelConfig(**SMALL, init_scale=0.2, z_loss=1e-2), seed=1)


def packed(lengths: list[list[int]], T: int = 12, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of documents of these lengths, with padding behind them."""
    rng = np.random.default_rng(seed)
    batch: dict[str, np.ndarray] = {name: np.zeros((len(lengths), T), np.int32) for name in ("segments", "positions")}
    batch["tokens"] = rng.integers(0, 61, (len(lengths), T)).astype(np.int32)
    batch["targets"] = rng.integers(0, 61, (len(lengths), T)).astype(np.int32)
    for row, documents in enumerate(lengths):
        start = 0
        for number, length in enumerate(documents, 1):
            batch["segments"][row, start : start + length] = number
            batch["positions"][row, start : start + length] = np.arange(length)
            start += length
    batch["mask"] = batch["segments"] > 0
    return batch


def test_parameters_are_flat_named_and_float32(model):
    params = parameters(model)
    assert list(params) == sorted(params)
    assert params["embedding"].shape == (61, 16) and params["blocks.1.key"].shape == (16, 8)
    assert all(leaf.dtype == jnp.float32 for leaf in params.values())
    block = 2 * 16 + 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24
    assert model.num_parameters == sum(leaf.size for leaf in params.values()) == 61 * 16 + 16 + 2 * block


def test_the_seed_decides_the_weights():
    first, again, other = (ModularCapibaraModel(ModelConfig(**SMALL), seed=seed) for seed in (3, 3, 4))
    assert jax.tree.all(jax.tree.map(np.array_equal, parameters(first), parameters(again)))
    assert not np.array_equal(first.embedding[...], other.embedding[...])


def test_a_whole_configuration_brings_its_seed():
    config = ModularConfig(model=ModelConfig(**SMALL), training={"seed": 7})  # pyright: ignore[reportArgumentType]
    np.testing.assert_array_equal(
        ModularCapibaraModel(config).embedding[...], ModularCapibaraModel(config.model, seed=7).embedding[...]
    )


def test_an_untrained_model_knows_nothing():
    """Its loss is that of guessing, ln V, to a few hundredths at init_scale 0.02."""
    fresh = ModularCapibaraModel(ModelConfig(**SMALL))
    assert float(fresh.loss(packed([[12], [12]]))) == pytest.approx(np.log(61), abs=0.05)


def test_packed_documents_are_read_as_if_alone(model):
    batch = packed([[5, 3, 2], [12]])
    together = model(batch["tokens"], segments=batch["segments"], positions=batch["positions"])
    for row, start, stop in ((0, 0, 5), (0, 5, 8), (0, 8, 10), (1, 0, 12)):
        alone = model(batch["tokens"][row : row + 1, start:stop])
        np.testing.assert_allclose(together[row, start:stop], alone[0], atol=1e-5)


def test_no_token_sees_a_later_one(model):
    tokens = np.arange(10, dtype=np.int32)[None]
    changed = tokens.copy()
    changed[0, 6] = 60
    before, after = model(tokens), model(changed)
    np.testing.assert_array_equal(before[0, :6], after[0, :6])
    assert not np.allclose(before[0, 6:], after[0, 6:])


def test_the_loss_is_the_mean_over_targets_that_count_with_z_loss(model):
    batch = packed([[5, 3], [9]])
    logits = np.asarray(
        model(batch["tokens"], segments=batch["segments"], positions=batch["positions"]), np.float64
    )
    partition = np.log(np.exp(logits).sum(-1))
    chosen = np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    wanted = (partition - chosen + 1e-2 * partition**2)[batch["mask"]].mean()
    assert float(model.loss(batch)) == pytest.approx(wanted, rel=1e-5)


def test_the_gates_get_sums_without_z_loss(model):
    batch = packed([[5, 3], [9]])
    sums, tokens = objective(model).sequence_losses(parameters(model), batch)
    plain = ModularCapibaraModel(model.config.model_copy(update={"z_loss": 0.0}))
    mean = with_parameters(plain, parameters(model)).loss(batch)
    np.testing.assert_array_equal(tokens, [8, 9])
    assert float(sums.sum() / tokens.sum()) == pytest.approx(float(mean), rel=1e-5)


def test_the_objective_is_pure_and_follows_its_parameters(model):
    batch, target = packed([[12]]), objective(model)
    params = parameters(model)
    moved = jax.tree.map(lambda leaf: leaf * 1.5, params)
    first = target.loss(params, batch, jax.random.key(0))[0]
    assert float(target.loss(moved, batch, jax.random.key(0))[0]) != pytest.approx(float(first), abs=1e-3)
    assert float(target.loss(params, batch, jax.random.key(0))[0]) == float(first) == float(model.loss(batch))


def test_nodes_may_be_mapped_in_either_way(model):
    batch, target = packed([[6, 4]]), objective(model)
    params = parameters(model)
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf]), params)
    slope = jax.grad(lambda p: target.loss(p, batch, jax.random.key(0))[0])
    mapped, together = jax.jit(lambda s: (jax.lax.map(slope, s), jax.vmap(slope)(s)))(stack)
    for name in params:
        np.testing.assert_allclose(mapped[name], together[name], atol=2e-5)


def test_the_chunked_loss_changes_no_gradient(model):
    batch = packed([[5, 3], [9]])
    cut = ModularCapibaraModel(model.config.model_copy(update={"loss_chunk": 5}))

    def slopes(module):
        return jax.jit(jax.grad(lambda p: objective(module).loss(p, batch, jax.random.key(0))[0]))(parameters(model))

    whole, chunked = slopes(model), slopes(cut)
    for name in whole:
        np.testing.assert_allclose(chunked[name], whole[name], atol=1e-5)


def test_a_model_with_other_parameters_is_a_copy(model):
    before = parameters(model)
    doubled = with_parameters(model, jax.tree.map(lambda leaf: 2 * np.asarray(leaf), before))
    np.testing.assert_array_equal(doubled.embedding[...], 2 * before["embedding"])
    np.testing.assert_array_equal(model.embedding[...], before["embedding"])


def test_parameters_that_do_not_fit_are_named(model):
    params = parameters(model)
    with pytest.raises(ConfigError, match="lacks 1 of .* 'norm'"):
        with_parameters(model, {name: leaf for name, leaf in params.items() if name != "norm"})
    with pytest.raises(ConfigError, match="does not know, the first is 'extra'"):
        with_parameters(model, params | {"extra": params["norm"]})
    with pytest.raises(ConfigError, match=r"'norm' has shape \(4,\); the model needs \(16,\)"):
        with_parameters(model, params | {"norm": np.ones(4, np.float32)})


def test_a_saved_model_is_the_same(model, tmp_path: Path):
    from capibara.core.tokenizer import train_bpe

    model = with_parameters(model, parameters(model))
    model.tokenizer = train_bpe(["some text"], 260)
    model.save(tmp_path / "folder" / "model")
    again = ModularCapibaraModel.load(tmp_path / "folder" / "model")
    assert again.config == model.config and again.tokenizer.digest == model.tokenizer.digest
    for name, leaf in parameters(model).items():
        np.testing.assert_array_equal(parameters(again)[name], leaf)


def test_a_folder_without_a_model_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="holds no saved model"):
        ModularCapibaraModel.load(tmp_path)


class Shift(nnx.Module):
    """A block of the user's own: adds a learned vector, sees nothing but its own token."""

    def __init__(self, config, rngs):
        self.by = nnx.Param(jnp.ones(config.width))

    def __call__(self, x, positions, allowed, cache=None):
        return x + self.by[...], cache


def test_blocks_repeat_and_may_be_the_users_own():
    config = ModelConfig(**{**SMALL, "num_layers": 5}, blocks=("attention", Shift))
    mixed = ModularCapibaraModel(config)
    assert [type(block) for block in mixed.blocks] == [AttentionBlock, Shift, AttentionBlock, Shift, AttentionBlock]
    slopes = jax.grad(lambda p: objective(mixed).loss(p, packed([[12]]), jax.random.key(0))[0])(parameters(mixed))
    assert float(jnp.abs(slopes["blocks.3.by"]).max()) > 0


def test_an_unknown_block_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="'atention'.*attention"):
        ModularCapibaraModel(ModelConfig(**SMALL, blocks=("atention",)))


def test_an_untied_head_is_a_parameter_of_its_own():
    untied = ModularCapibaraModel(ModelConfig(**SMALL, tie_embeddings=False))
    slopes = jax.grad(lambda p: objective(untied).loss(p, packed([[12]]), jax.random.key(0))[0])(parameters(untied))
    unseen = np.setdiff1d(np.arange(61), packed([[12]])["tokens"])
    assert slopes["head"].shape == (61, 16) and not slopes["embedding"][unseen].any()


def test_bfloat16_is_float32_within_its_precision(model):
    low = ModularCapibaraModel(model.config.model_copy(update={"dtype": "bfloat16"}))
    low = with_parameters(low, parameters(model))
    batch = packed([[12], [7, 5]])
    assert low.hidden(batch["tokens"]).dtype == jnp.bfloat16 and low(batch["tokens"]).dtype == jnp.float32
    assert float(low.loss(batch)) == pytest.approx(float(model.loss(batch)), rel=1e-2)
    slopes = jax.grad(lambda p: objective(low).loss(p, batch, jax.random.key(0))[0])(parameters(low))
    assert all(slope.dtype == jnp.float32 for slope in slopes.values())


def test_recomputed_blocks_give_the_same_gradients(model):
    batch = packed([[5, 3], [9]])
    light = with_gradient_checkpointing(model)

    def slopes(module):
        return jax.jit(jax.grad(lambda p: objective(module).loss(p, batch, jax.random.key(0))[0]))(parameters(model))

    kept, recomputed = slopes(model), slopes(light)
    for name in kept:
        np.testing.assert_allclose(recomputed[name], kept[name], atol=1e-6)


class Line(nnx.Module):
    """Any module serves, with counters and keys beside its parameters."""

    def __init__(self):
        self.slope = nnx.Param(jnp.zeros(()))
        self.calls = nnx.Variable(jnp.zeros((), jnp.uint32))
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

    def loss(self, batch):
        return ((self.slope[...] * batch["x"] - batch["y"]) ** 2).mean()


def test_any_module_with_a_loss_trains_and_is_judged():
    line = Line()
    batch = {"x": np.array([1.0, 2.0], np.float32), "y": np.array([2.0, 4.0], np.float32)}
    assert list(parameters(line)) == ["slope"]
    target = objective(line)
    slope = jax.grad(lambda p: target.loss(p, batch, jax.random.key(0))[0])(parameters(line))["slope"]
    assert float(slope) == pytest.approx(-10.0)
    sums, tokens = target.sequence_losses({"slope": jnp.ones(())}, batch)
    np.testing.assert_allclose(sums, [1.0, 4.0])
    np.testing.assert_array_equal(tokens, [1, 1])


def test_a_loss_of_the_users_own_replaces_the_modules():
    target = objective(Line(), loss=lambda module, batch, key: module.slope[...] * 3 + 1)
    assert float(target.loss({"slope": jnp.asarray(2.0)}, {"x": np.ones(2, np.float32)}, None)[0]) == 7


def test_a_few_steps_learn_a_batch_by_heart(model):
    batch, target = packed([[12], [7, 5]]), objective(model)

    @jax.jit
    def descend(params):
        slope = jax.grad(lambda p: target.loss(p, batch, jax.random.key(0))[0])

        def step(params, _):
            return jax.tree.map(lambda p, g: p - 0.3 * g, params, slope(params)), None

        return jax.lax.scan(step, params, length=150)[0]

    learned = with_parameters(model, descend(parameters(model)))
    assert float(learned.loss(batch)) < 0.3 * float(model.loss(batch))
