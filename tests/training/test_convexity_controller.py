"""`ConvexityController`: the specification's snippet, every kind of model, and the promise that nothing gets worse."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from capibara.consensus.combine import combine
from capibara.consensus.evidence import held_out
from capibara.consensus.merge_weights import find_weights
from capibara.consensus.problems import mixture_problem
from capibara.consensus.simplex import kl_penalty
from capibara.core.config import ModelConfig
from capibara.core.model import ModularCapibaraModel, objective, parameters, with_parameters
from capibara.errors import ConfigError
from capibara.files import tensors_to_bytes
from capibara.training.convexity_controller import ConvexityController

SNIPPET = """
from capibara.training.convexity_controller import ConvexityController

controller = ConvexityController(
    lambda_reg=0.01,
    max_iterations=100
)

# Find optimal combination
optimal_weights = controller.optimize(
    models=models,
    validation_data=val_data
)

merged_model = controller.merge(models, optimal_weights)
"""

TEXT = np.frombuffer((Path(__file__).parents[2] / "LICENSE").read_bytes(), np.uint8).astype(np.int32)
SHAPE: dict[str, Any] = dict(vocab_size=256, width=16, num_layers=1, num_heads=2, num_kv_heads=1, hidden=16)
T = 16


def batch_at(places: np.ndarray) -> dict[str, np.ndarray]:
    """Sequences of T bytes that begin there."""
    rows = places[:, None] + np.arange(T)
    ones = np.ones(rows.shape, np.int32)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), rows.shape)
    return {
        "tokens": TEXT[rows],
        "targets": TEXT[rows + 1],
        "segments": ones,
        "positions": positions,
        "mask": ones > 0,
    }


@pytest.fixture(scope="module")
def val_data() -> dict[str, np.ndarray]:
    return batch_at(np.arange(8000, 8000 + 24 * T, T))


@pytest.fixture(scope="module")
def train():
    """`(params, learning rate, seed) -> params` after 60 steps on the first 8,000 bytes; one program."""
    losses = objective(ModularCapibaraModel(ModelConfig(**SHAPE)))
    optimizer = optax.inject_hyperparams(optax.adam)(1e-2)

    @jax.jit
    def run(params, rate, batches):
        state = optimizer.init(params)
        state.hyperparams["learning_rate"] = rate

        def step(carry, batch):
            params, state = carry
            slope = jax.grad(lambda p: losses.loss(p, batch, jax.random.key(0))[0])(params)
            updates, state = optimizer.update(slope, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), batches)[0][0]

    def trained(params, rate, seed):
        places = np.random.default_rng(seed).integers(0, 8000 - T, (60, 8))
        return run(params, jnp.float32(rate), jax.tree.map(lambda *rows: np.stack(rows), *map(batch_at, places)))

    return trained


@pytest.fixture(scope="module")
def models(train) -> list[ModularCapibaraModel]:
    """A start, trained on from there with three learning rates."""
    model = ModularCapibaraModel(ModelConfig(**SHAPE))
    start = train(train(parameters(model), 2e-2, 0), 1e-2, 1)
    return [with_parameters(model, train(start, rate, seed)) for seed, rate in enumerate((1e-2, 5e-3, 2e-2), 2)]


@pytest.fixture(scope="module")
def found(models, val_data):
    return ConvexityController().optimize(models, val_data)


def test_the_specifications_snippet_runs_as_written(models, val_data):
    names: dict[str, Any] = {"models": models, "val_data": val_data}
    exec(SNIPPET, names)
    merged, weights = names["merged_model"], names["optimal_weights"]
    assert isinstance(merged, ModularCapibaraModel)
    assert weights.certificate == "global_convex" and weights.dual_gap < 1e-6 and weights.converged
    loss = float(nnx.jit(lambda m, b: m.loss(b))(merged, val_data))
    alone = [float(nnx.jit(lambda m, b: m.loss(b))(model, val_data)) for model in models]
    assert loss == pytest.approx(weights.merged_loss, rel=1e-5) and loss <= min(alone) + 1e-5
    np.testing.assert_allclose(weights.losses, alone, rtol=1e-5)


def test_the_facade_adds_nothing(models, val_data, found):
    trees = [parameters(model) for model in models]
    result = find_weights(
        trees,
        objective(models[0]),
        held_out(val_data),
        mixture_problem(),
        partial(kl_penalty, 0.01),
        max_iterations=100,
        chance=math.log(256),
    )
    np.testing.assert_array_equal(result.weights, found.weights)
    assert result.value == found.value and result.dual_gap == found.dual_gap and result.crossfit == found.crossfit
    for name, leaf in parameters(ConvexityController().merge(models, found)).items():
        np.testing.assert_array_equal(leaf, combine(trees, result.weights)[name])


def test_the_result_is_the_weight_vector(models, found):
    weights = np.asarray(found)
    assert weights.dtype == np.float64 and weights.sum() == pytest.approx(1) and len(found) == 3
    assert list(found) == weights.tolist() and found[1] == weights[1] and (found[:2] == weights[:2]).all()
    for one in (weights, weights.tolist(), weights.astype(np.float32)):
        merged = parameters(ConvexityController().merge(models, one))
        np.testing.assert_allclose(merged["norm"], parameters(ConvexityController().merge(models, found))["norm"])


def test_trees_files_and_folders_are_models_too(models, val_data, found, tmp_path: Path):
    controller = ConvexityController()
    trees = [parameters(model) for model in models]
    files, folders = [], []
    for i, model in enumerate(models):
        files.append(tmp_path / f"{i}.safetensors")
        files[i].write_bytes(tensors_to_bytes(trees[i]))
        folders.append(tmp_path / f"model-{i}")
        model.save(folders[i])
    wanted = parameters(controller.merge(models, found))
    for kind in (trees, files, [str(file) for file in files], folders):
        needed = {} if kind is folders else {"objective": models[0]}
        result = controller.optimize(kind, val_data, midpoints=0, crossfit=False, **needed)
        np.testing.assert_allclose(result.weights, found.weights, atol=1e-6)
        merged = controller.merge(kind, found)
        got = parameters(merged) if kind is folders else merged
        assert isinstance(merged, ModularCapibaraModel) == (kind is folders)
        np.testing.assert_array_equal(got["embedding"], wanted["embedding"])
    for kind in (trees, files):
        with pytest.raises(ConfigError, match="tell no loss; give objective="):
            controller.optimize(kind, val_data)


def test_models_that_know_nothing_or_are_broken_are_named(models, val_data, found):
    fresh = ModularCapibaraModel(ModelConfig(**SHAPE, init_scale=1.0), seed=5)
    broken = with_parameters(models[0], parameters(models[0]) | {"norm": np.full(16, np.nan, np.float32)})
    result = ConvexityController().optimize([*models, fresh, broken], val_data, midpoints=0, crossfit=False)
    assert result.excluded == {3: "worse_than_chance", 4: "not_finite"}
    np.testing.assert_allclose(result.weights, [*found.weights, 0, 0], atol=1e-9)


def test_models_of_different_initialisations_do_not_average_and_are_not_averaged(train, val_data):
    """The surrogate is certain and wrong about the network; the transfer gap says so, and an input is returned."""
    pair = []
    for seed in (0, 1):
        model = ModularCapibaraModel(ModelConfig(**SHAPE), seed=seed)
        pair.append(with_parameters(model, train(train(parameters(model), 2e-2, seed), 1e-2, seed + 10)))
    result = ConvexityController().optimize(pair, val_data)
    assert result.certificate == "global_convex" and result.dual_gap < 1e-6
    assert result.candidate.min() > 0.05 and result.transfer_gap > 0.1
    assert result.chosen.startswith("model") and result.merged_loss == result.losses.min()
    merged = parameters(ConvexityController().merge(pair, result))
    np.testing.assert_array_equal(merged["embedding"], parameters(pair[int(result.losses.argmin())])["embedding"])


class Pairs(nnx.Module):
    """A model of one's own that tells a loss and nothing else."""

    def __init__(self, seed: int):
        chances = np.random.default_rng(seed).normal(size=(256, 256))
        chances[TEXT[:4000], TEXT[1:4001]] += 2
        self.table = nnx.Param(jnp.asarray(chances, jnp.float32))

    def loss(self, batch: Any) -> jax.Array:
        logits = self.table[...][batch["tokens"]]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]).mean()


def error_rate(model: Any, batch: Any, key: Any) -> jax.Array:
    return (model.table[...][batch["tokens"]].argmax(-1) != batch["targets"]).mean()


def test_any_module_with_a_loss_will_do(val_data):
    own = [Pairs(seed) for seed in range(3)]
    result = ConvexityController(lambda_reg=0).optimize(own, val_data)
    assert result.certificate == "global_convex" and result.merged_loss < result.losses.min()
    merged = ConvexityController().merge(own, result)
    assert float(merged.loss(val_data)) == pytest.approx(result.merged_loss, rel=1e-5)
    with pytest.raises(ConfigError, match="needs the models' logits"):
        ConvexityController(problem="log_pool").optimize(own, val_data)


def test_a_metric_without_gradients(val_data):
    own = [Pairs(seed) for seed in range(3)]
    controller = ConvexityController(problem="black_box", max_iterations=20)
    result = controller.optimize(own, val_data, loss=error_rate)
    assert result.certificate == "none" and result.dual_gap is None
    measured = float(error_rate(controller.merge(own, result), val_data, None))
    assert measured == pytest.approx(result.merged_loss, abs=1e-6) and measured <= result.losses.min() + 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("problem", ["log_pool", "quadratic", "weight_space", "minimax"])
@pytest.mark.parametrize("penalty", ["kl", "l2"])
def test_every_problem_on_a_decoder(models, val_data, problem, penalty):
    halves = {"first": {k: v[:12] for k, v in val_data.items()}, "second": {k: v[12:] for k, v in val_data.items()}}
    first, *others = (parameters(model) for model in models)
    near = [models[0]]
    for tree in others:
        moved = {name: leaf + 0.2 * (tree[name] - leaf) for name, leaf in first.items()}
        near.append(with_parameters(models[0], moved))
    controller = ConvexityController(problem=problem, penalty=penalty)
    result = controller.optimize(near, halves, midpoints=0)
    assert result.merged_loss <= min(result.losses.min(), result.uniform_loss)
    if problem == "quadratic":  # near each other the surrogate is the network to second order
        assert abs(result.transfer_gap) < 0.003
        is_convex = result.probe.least_curvature[0] >= 0
        assert result.certificate == ("conditional" if is_convex else "none")
        assert (result.dual_gap is not None) == is_convex
    else:
        assert result.dual_gap is not None and result.dual_gap < 1e-2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lambda_reg": -1.0}, "lambda_reg is a number of 0 or more; got -1"),
        ({"lambda_reg": math.nan}, "lambda_reg is a number of 0 or more; got nan"),
        ({"max_iterations": 0}, "max_iterations is 1 or more; got 0"),
        ({"problem": "mixtur"}, "Unknown problem 'mixtur'. Did you mean 'mixture'"),
        ({"penalty": "l1"}, "Unknown penalty 'l1'"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        ConvexityController(**arguments)


def test_merges_that_cannot_be_are_refused(models, val_data):
    controller = ConvexityController()
    for call in (lambda: controller.optimize([], val_data), lambda: controller.merge([], [])):
        with pytest.raises(ConfigError, match="no models to merge"):
            call()
    with pytest.raises(ConfigError, match="weights sum to 1.5"):
        controller.merge(models, [0.5, 0.5, 0.5])
    with pytest.raises(ConfigError, match=r"trust\[0\] is -1.0"):
        controller.optimize(models, val_data, trust=[-1.0, 1.0, 1.0])
    wider = ModularCapibaraModel(ModelConfig(**{**SHAPE, "width": 32}))
    with pytest.raises(ConfigError, match="Model 1 cannot be merged with model 0: wrong shape"):
        controller.optimize([models[0], wider], val_data)
    with pytest.raises(ConfigError, match="wrong shape"):
        controller.merge([models[0], wider], [0.5, 0.5])
