"""`ConvexityTrainingStrategy`: the specification's snippet, each tier with its certificate, data that do not fit."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from capibara.core.config import ModularConfig
from capibara.core.linear import LinearModel
from capibara.core.model import ModularCapibaraModel, parameters
from capibara.errors import ConfigError, DataError
from capibara.training import ConvexityTrainingStrategy
from capibara.transforms.prox import l1


def write_text(folder):
    """Sixty short documents, so that every held-out split gets some."""
    folder.mkdir()
    for k in range(60):
        text = " ".join(f"line {k} {i}: the people of the {k * i % 97} states form a union." for i in range(3))
        (folder / f"{k}.txt").write_text(text)
    return folder


class Net(nnx.Module):
    """Two layers on three numbers."""

    def __init__(self):
        random = np.random.default_rng(0)
        self.first = nnx.Param(jnp.asarray(random.normal(size=(3, 8)), jnp.float32))
        self.second = nnx.Param(jnp.asarray(random.normal(size=(8, 1)), jnp.float32))

    def loss(self, batch):
        """Mean squared error."""
        hidden = jnp.tanh(batch["x"] @ self.first[...])
        return jnp.mean(jnp.square(hidden @ self.second[...] - batch["y"]))


def examples(count: int = 64):
    random = np.random.default_rng(1)
    x = random.normal(size=(count, 3)).astype(np.float32)
    return {"x": x, "y": np.sin(x.sum(axis=1, keepdims=True)).astype(np.float32)}


def test_a_linear_model_comes_with_a_global_certificate():
    random = np.random.default_rng(0)
    x = random.normal(size=(80, 4))
    y = np.argmax(x[:, :3], axis=1)
    strategy = ConvexityTrainingStrategy(regularization=0.01)
    model = strategy.train(LinearModel(4, 3), (x, y))
    assert strategy.certificate == "global" and strategy.last_result.converged
    assert strategy.last_result.dual_gap <= 1e-8
    batch = {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y)}
    penalty = 0.005 * float(jnp.sum(jnp.square(model.weights[...])))
    assert float(model.loss(batch)) + penalty == pytest.approx(strategy.last_result.value, abs=1e-6)
    assert float(model.loss(batch)) < float(LinearModel(4, 3).loss(batch))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "certificate"),
    [
        ({}, "conditional"),
        ({"convex_constraint": False}, "stationarity"),
        ({"convex_constraint": False, "use_proximal_gradient": False}, "none"),
    ],
)
def test_a_deep_model_learns_with_the_certificate_of_its_tier(options, certificate):
    strategy = ConvexityTrainingStrategy(regularization=1e-4, learning_rate=0.02, batch_size=16, **options)
    data, losses = examples(), []
    model = strategy.train(Net(), data, epochs=25, callbacks=[lambda info: losses.extend(info.losses)])
    assert strategy.certificate == certificate and len(losses) == 100
    assert float(model.loss(data)) < 0.7 * float(Net().loss(data))
    again = ConvexityTrainingStrategy(regularization=1e-4, learning_rate=0.02, batch_size=16, **options)
    other = again.train(Net(), data, epochs=25)
    for name, leaf in parameters(model).items():
        np.testing.assert_array_equal(leaf, parameters(other)[name])


@pytest.mark.slow
def test_the_specifications_snippet_runs_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CAPIBARA_DATA__HELD_OUT_FRACTION", "0.3")
    write_text(tmp_path / "text")
    base = ModularConfig.preset("development")
    small = base.replace(model={"width": 16, "num_layers": 1, "num_heads": 2}, data={"sequence_length": 32})
    train_data, model = "text", ModularCapibaraModel(small)
    before = {name: np.asarray(leaf) for name, leaf in parameters(model).items()}

    strategy = ConvexityTrainingStrategy(
        regularization=0.01,
        convex_constraint=True,
        use_proximal_gradient=True
    )  # fmt: skip

    # Training with convexity constraints
    model = strategy.train(
        model=model,
        train_data=train_data,
        epochs=10
    )  # fmt: skip

    assert strategy.certificate == "conditional"
    result = strategy.last_result
    assert result.after.loss < result.before.loss
    assert any(entry["certified"] == 1 for entry in result.history)
    assert any(not np.array_equal(leaf, before[name]) for name, leaf in parameters(model).items())


def test_a_run_on_text_cannot_be_resumed_with_another_strategy(tmp_path):
    text = write_text(tmp_path / "text")
    base = ModularConfig.preset("development").replace(
        model={"width": 8, "num_layers": 1, "num_heads": 2}, data={"sequence_length": 32, "held_out_fraction": 0.3}
    )
    options = {"convex_constraint": False, "base": base}
    folder = tmp_path / "run"
    ConvexityTrainingStrategy(0.01, **options).train(None, text, 0.05, checkpoint_dir=folder)
    with pytest.raises(ConfigError, match="started with the strategy proximal_adam 0.01; now it is proximal_adam 0.02"):
        ConvexityTrainingStrategy(0.02, **options).train(None, text, 0.05, checkpoint_dir=folder)


@pytest.mark.parametrize(
    ("make", "error", "expected"),
    [
        (lambda: ConvexityTrainingStrategy(-1.0), ConfigError, "regularization is a number of 0 or more"),
        (
            lambda: ConvexityTrainingStrategy(l1(1.0), use_proximal_gradient=False),
            ConfigError,
            "needs use_proximal_gradient=True",
        ),
        (lambda: ConvexityTrainingStrategy().train(Net(), examples(4)), DataError, "at least batch_size = 8"),
        (
            lambda: ConvexityTrainingStrategy().train(Net(), {"x": np.zeros((9, 3)), "y": np.zeros((8, 1))}),
            DataError,
            "same number of examples",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, error, expected):
    with pytest.raises(error, match=expected):
        make()
