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
Z_LOSS = 1e-2


@pytest.fixture(scope="module")
def model() -> ModularCapibaraModel:
    with jax.numpy_dtype_promotion("strict"):  # as in the tests, so that programs are shared with them
        return ModularCapibaraModel(ModelConfig(**SMALL, init_scale=0.2, z_loss=Z_LOSS), seed=1)


@pytest.fixture(scope="module")
def loss_and_slopes(model):
    """Loss and gradients of the objective, one program for all tests."""
    return compiled(model)


@pytest.fixture(scope="module")
def read(model):
    """Logits, one program for all tests."""
    graph, state = nnx.split(model)

    @jax.jit
    def logits(batch):
        call = nnx.merge(graph, state)
        return call(batch["tokens"], segments=batch["segments"], positions=batch["positions"])

    return logits


def compiled(module):
    return jax.jit(jax.value_and_grad(lambda p, batch: objective(module).loss(p, batch, jax.random.key(0))[0]))


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


def test_an_untrained_model_knows_nothing(loss_and_slopes):
    """Its loss is that of guessing, ln V, to a few hundredths at init_scale 0.02."""
    fresh = parameters(ModularCapibaraModel(ModelConfig(**SMALL)))
    wanted = np.log(61) + Z_LOSS * np.log(61) ** 2
    assert float(loss_and_slopes(fresh, packed([[12], [12]]))[0]) == pytest.approx(wanted, abs=0.05)


def test_packed_documents_are_read_as_if_alone(read):
    batch = packed([[5, 3, 2], [12]])
    together = read(batch)
    for start, stop in ((0, 5), (5, 8), (8, 10)):
        alone = packed([[stop - start], [12]])
        alone["tokens"][0, : stop - start] = batch["tokens"][0, start:stop]
        np.testing.assert_allclose(together[0, start:stop], read(alone)[0, : stop - start], atol=1e-5)


def test_a_row_without_segments_is_one_document(model, read):
    batch = packed([[12], [12]])
    np.testing.assert_allclose(nnx.jit(model.__class__.__call__)(model, batch["tokens"]), read(batch), atol=1e-5)


def test_no_token_sees_a_later_one(read):
    batch = packed([[12], [12]])
    changed = {**batch, "tokens": batch["tokens"].copy()}
    changed["tokens"][0, 6] = (batch["tokens"][0, 6] + 1) % 61
    before, after = read(batch), read(changed)
    np.testing.assert_array_equal(before[0, :6], after[0, :6])
    assert not np.allclose(before[0, 6:], after[0, 6:])


def test_the_loss_is_the_mean_over_targets_that_count_with_z_loss(model, read, loss_and_slopes):
    batch = packed([[5, 3], [9]])
    logits = np.asarray(read(batch), np.float64)
    partition = np.log(np.exp(logits).sum(-1))
    chosen = np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    wanted = (partition - chosen + Z_LOSS * partition**2)[batch["mask"]].mean()
    assert float(loss_and_slopes(parameters(model), batch)[0]) == pytest.approx(wanted, rel=1e-5)


def test_the_gates_get_sums_without_z_loss(model, read):
    batch = packed([[5, 3], [9]])
    sums, tokens = jax.jit(objective(model).sequence_losses)(parameters(model), batch)
    shares = jax.nn.log_softmax(read(batch))
    wanted = -(np.take_along_axis(np.asarray(shares), batch["targets"][..., None], -1)[..., 0] * batch["mask"]).sum(1)
    np.testing.assert_array_equal(tokens, [8, 9])
    np.testing.assert_allclose(sums, wanted, rtol=1e-5)


def test_token_losses_are_those_that_the_gates_sum(model, read):
    batch, losses = packed([[5, 3], [9]]), objective(model)
    assert losses.token_losses is not None
    tokens, mask = jax.jit(losses.token_losses)(parameters(model), batch)
    shares = jax.nn.log_softmax(read(batch))
    wanted = -np.take_along_axis(np.asarray(shares), batch["targets"][..., None], -1)[..., 0]
    np.testing.assert_allclose(np.where(mask, tokens, 0), wanted * batch["mask"], atol=1e-5)
    np.testing.assert_array_equal(mask, batch["mask"])


def test_the_objective_is_pure_and_follows_its_parameters(model, loss_and_slopes):
    batch, params = packed([[12], [12]]), parameters(model)
    first = float(loss_and_slopes(params, batch)[0])
    moved = jax.tree.map(lambda leaf: np.asarray(leaf) * 1.5, params)
    assert float(loss_and_slopes(moved, batch)[0]) != pytest.approx(first, abs=1e-3)
    assert float(loss_and_slopes(params, batch)[0]) == first
    assert float(nnx.jit(lambda m, b: m.loss(b))(model, batch)) == pytest.approx(first, rel=1e-6)


def test_nodes_may_be_mapped_in_either_way(model, loss_and_slopes):
    batch, params = packed([[6, 4], [12]]), parameters(model)
    nodes = [params, jax.tree.map(lambda leaf: np.asarray(leaf) * np.float32(0.5), params)]
    stack = jax.tree.map(lambda *leaves: np.stack(leaves), *nodes)

    @jax.jit
    def both_ways(stack):
        slope = jax.grad(lambda p: objective(model).loss(p, batch, jax.random.key(0))[0])
        return jax.lax.map(slope, stack), jax.vmap(slope)(stack)

    for mapped in both_ways(stack):
        for number, node in enumerate(nodes):
            alone = loss_and_slopes(node, batch)[1]
            for name, leaf in alone.items():
                np.testing.assert_allclose(mapped[name][number], leaf, atol=2e-5)


def test_the_chunked_loss_changes_no_gradient(model, loss_and_slopes):
    batch, params = packed([[5, 3], [9]]), parameters(model)
    cut = ModularCapibaraModel(model.config.model_copy(update={"loss_chunk": 5}))
    chunked = compiled(cut)(params, batch)[1]
    for name, leaf in loss_and_slopes(params, batch)[1].items():
        np.testing.assert_allclose(chunked[name], leaf, atol=1e-5)


def test_a_model_with_other_parameters_is_a_copy(model):
    before = parameters(model)
    doubled = with_parameters(model, {name: 2 * np.asarray(leaf) for name, leaf in before.items()})
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
    config = ModelConfig(**{**SMALL, "num_layers": 5}, blocks=("attention", Shift, Shift))
    mixed = ModularCapibaraModel(config)
    assert [type(block) for block in mixed.blocks] == [AttentionBlock, Shift, Shift, AttentionBlock, Shift]
    slopes = compiled(mixed)(parameters(mixed), packed([[12]]))[1]
    assert float(jnp.abs(slopes["blocks.4.by"]).max()) > 0


def test_an_unknown_block_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="'atention'.*attention"):
        ModularCapibaraModel(ModelConfig(**SMALL, blocks=("atention",)))


def test_an_untied_head_is_a_parameter_of_its_own():
    untied = ModularCapibaraModel(ModelConfig(**{**SMALL, "num_layers": 1}, tie_embeddings=False))
    slopes = compiled(untied)(parameters(untied), packed([[12]]))[1]
    unseen = np.setdiff1d(np.arange(61), packed([[12]])["tokens"])
    assert slopes["head"].shape == (61, 16) and not slopes["embedding"][unseen].any()


def test_bfloat16_is_float32_within_its_precision(model, loss_and_slopes):
    low = ModularCapibaraModel(model.config.model_copy(update={"dtype": "bfloat16"}))
    batch, params = packed([[12], [7, 5]]), parameters(model)
    states, logits = (jax.eval_shape(lambda m=m: m(batch["tokens"])) for m in (low.hidden, low))
    assert states.dtype == jnp.bfloat16 and logits.dtype == jnp.float32
    value, slopes = compiled(low)(params, batch)
    wanted, wanted_slopes = loss_and_slopes(params, batch)
    assert float(value) == pytest.approx(float(wanted), rel=1e-2)
    for name, leaf in slopes.items():
        assert leaf.dtype == jnp.float32
        error = np.linalg.norm(leaf - wanted_slopes[name]) / np.linalg.norm(wanted_slopes[name])
        assert error < 0.05, name  # 8 bits: each rounding 0.4 %, some tens of them


def test_recomputed_blocks_give_the_same_gradients(model, loss_and_slopes):
    batch, params = packed([[5, 3], [9]]), parameters(model)
    recomputed = compiled(with_gradient_checkpointing(model))(params, batch)[1]
    for name, leaf in loss_and_slopes(params, batch)[1].items():
        np.testing.assert_allclose(recomputed[name], leaf, atol=1e-6)


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


def test_a_few_steps_learn_a_batch_by_heart(model, loss_and_slopes):
    batch, params = packed([[12], [7, 5]]), parameters(model)
    first = float(loss_and_slopes(params, batch)[0])
    for _ in range(150):
        loss, slopes = loss_and_slopes(params, batch)
        params = {name: leaf - np.float32(0.3) * np.asarray(slopes[name]) for name, leaf in params.items()}
    assert float(loss) < 0.3 * first
