"""Merges that weigh by data, against closed forms and least squares."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capibara.consensus.fisher import empirical_fisher, fisher, input_products, regmean
from capibara.consensus.merging import wise
from capibara.core.config import ModelConfig
from capibara.core.layers import rms_norm
from capibara.core.model import ModularCapibaraModel, parameters, with_parameters
from capibara.errors import ConfigError
from capibara.types import Objective

few = settings(max_examples=30)
seeds = st.integers(0, 2**32 - 1)
CONFIG = ModelConfig(vocab_size=11, width=8, num_layers=2, num_heads=2, num_kv_heads=1, hidden=12, max_length=16)


@few
@given(seeds, st.sampled_from((1e-30, 1.0, 1e30)), st.booleans())
def test_fisher_merging_weighs_every_coordinate_by_its_information(seed, scale, weighted):
    random = np.random.default_rng(seed)
    rows, information = random.normal(size=(3, 2, 4)), random.exponential(size=(3, 2, 4))
    information[:, 0, 0] = 0
    information[1:, 0, 1] = 0
    w = random.uniform(0.5, 1, 3) if weighted else np.ones(3)
    weight = w[:, None, None] * information
    weight[:, 0, 0] = w
    expected = (weight * rows).sum(0) / weight.sum(0)
    x, f = (jnp.asarray(given, jnp.float32) for given in (rows, information * scale))
    np.testing.assert_allclose(fisher(x, f, w if weighted else None), expected, rtol=1e-5, atol=1e-6)
    halves = [fisher(x[:, i : i + 1], f[:, i : i + 1], w) for i in (0, 1)]
    np.testing.assert_allclose(np.concatenate(halves), expected, rtol=1e-5, atol=1e-6)


def test_fisher_merging_of_quadratic_losses_is_their_joint_minimum():
    """The paper's premise: where −log p is quadratic with a diagonal Hessian, the sum is minimised."""
    random = np.random.default_rng(0)
    curvature, minima = random.exponential(size=(2, 5)), random.normal(size=(2, 5))
    found = np.asarray(fisher(jnp.asarray(minima, jnp.float32), jnp.asarray(curvature, jnp.float32)), np.float64)
    np.testing.assert_allclose((curvature * (found - minima)).sum(axis=0), 0, atol=1e-5)


def test_the_empirical_fisher_is_the_mean_of_squared_gradients():
    """½(x·w − y)² of two tokens a sequence: the gradient of a sequence is Σ (x·w − y) x."""
    random = np.random.default_rng(0)
    x, y, w = random.normal(size=(6, 2, 3)), random.normal(size=(6, 2)), random.normal(size=3)

    def losses(params, batch):
        error = batch["x"] @ params["w"] - batch["y"]
        return 0.5 * jnp.sum(jnp.square(error), axis=1), jnp.full(error.shape[0], 2.0)

    objective = Objective(lambda params, batch, key: (losses(params, batch)[0].mean(), {}), losses)
    batch = {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y, jnp.float32)}
    found = empirical_fisher(objective, {"w": jnp.asarray(w, jnp.float32)}, batch)
    gradients = ((x @ w - y)[..., None] * x).sum(axis=1)
    np.testing.assert_allclose(found["w"], np.square(gradients).mean(axis=0), rtol=1e-4)


@few
@given(seeds, st.booleans())
def test_regmean_is_the_least_squares_solution(seed, weighted):
    """Without damping: the W that reproduces every model's outputs on its own inputs best."""
    random = np.random.default_rng(seed)
    inputs = [random.normal(size=(20, 5)) * random.uniform(0.1, 3, 5) for _ in range(3)]
    kernels = [random.normal(size=(5, 4)) for _ in range(3)]
    w = random.uniform(0.2, 1, 3) if weighted else np.ones(3)
    found = regmean(kernels, [x.T @ x for x in inputs], w if weighted else None, off_diagonal=1.0)
    left = np.concatenate([np.sqrt(a) * x for a, x in zip(w, inputs, strict=True)])
    right = np.concatenate([np.sqrt(a) * x @ k for a, x, k in zip(w, inputs, kernels, strict=True)])
    np.testing.assert_allclose(found, np.linalg.lstsq(left, right, rcond=None)[0], rtol=1e-6, atol=1e-8)


@few
@given(seeds, st.sampled_from((0.0, 0.5, 0.9)))
def test_regmean_damps_what_is_off_the_diagonal(seed, alpha):
    random = np.random.default_rng(seed)
    products = [(lambda x: x.T @ x)(random.normal(size=(9, 4))) for _ in range(2)]
    kernels = [random.normal(size=(4, 3)) for _ in range(2)]
    damped = [np.where(np.eye(4), g, alpha * g) for g in products]
    expected = np.linalg.solve(damped[0] + damped[1], damped[0] @ kernels[0] + damped[1] @ kernels[1])
    np.testing.assert_allclose(regmean(kernels, products, off_diagonal=alpha), expected, rtol=1e-7, atol=1e-9)


def test_regmean_keeps_the_mean_where_no_model_saw_an_input():
    random = np.random.default_rng(0)
    kernels = [random.normal(size=(3, 2)) for _ in range(2)]
    products = [np.diag([1.0, 0, 0]), np.diag([3.0, 0, 0])]
    found = regmean(kernels, products)
    np.testing.assert_allclose(found[1:], (kernels[0] + kernels[1])[1:] / 2)
    np.testing.assert_allclose(found[0], 0.25 * kernels[0][0] + 0.75 * kernels[1][0])
    np.testing.assert_allclose(regmean(kernels, [np.zeros((3, 3))] * 2), (kernels[0] + kernels[1]) / 2)


def test_regmean_of_one_model_is_that_model():
    kernel = np.random.default_rng(0).normal(size=(3, 2))
    np.testing.assert_allclose(regmean([kernel], [np.eye(3)]), kernel)


def test_regmean_says_what_does_not_fit():
    with pytest.raises(ConfigError, match=r"model 1 has a kernel \(3, 2\) and products \(2, 2\); needed are \(3, 2\)"):
        regmean([np.ones((3, 2))] * 2, [np.eye(3), np.eye(2)])
    with pytest.raises(ConfigError, match="off_diagonal must lie"):
        regmean([np.ones((3, 2))], [np.eye(3)], off_diagonal=1.5)


def test_input_products_are_those_of_the_inputs_of_every_layer():
    """A net of which all inputs are known; a kernel used twice adds up, one used otherwise is left out."""
    random = np.random.default_rng(0)
    shapes = {"a": (4, 5), "b": (5, 5), "turned": (3, 5), "bias": (5,)}
    params = {name: jnp.asarray(random.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    x = jnp.asarray(random.normal(size=(2, 6, 4)), jnp.float32)

    def net(params, x):
        h = jnp.tanh(x @ params["a"] + params["bias"])
        h = jax.jit(lambda h: jnp.tanh(h @ params["b"]))(h)
        return jnp.tanh(h @ params["b"]) @ params["turned"].T

    found = input_products(net, params, x)
    wide = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    flat = np.asarray(x, np.float64).reshape(-1, 4)
    first = np.tanh(flat @ wide["a"] + wide["bias"])
    second = np.tanh(first @ wide["b"])
    assert set(found) == {"a", "b"}
    np.testing.assert_allclose(found["a"], flat.T @ flat, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["b"], first.T @ first + second.T @ second, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recomputed", [False, True])
def test_input_products_see_into_our_own_model(recomputed):
    """Seven kernels a block; the tied embedding is no kernel. The first layer's input can be computed by hand."""
    model = ModularCapibaraModel(CONFIG, seed=0)
    model.gradient_checkpointing = recomputed
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 7)))
    params = parameters(model)
    found = input_products(lambda p, tokens: with_parameters(model, p)(tokens), params, tokens)
    kernels = {name for name, leaf in params.items() if leaf.ndim == 2 and "embedding" not in name}
    assert set(found) == kernels and len(kernels) == 14
    name = next(name for name in kernels if name.endswith("0.query"))
    block = name.removesuffix("query")
    y = rms_norm(params["embedding"][tokens], params[f"{block}norm_attention"], CONFIG.norm_eps).reshape(-1, 8)
    np.testing.assert_allclose(found[name], y.T @ y, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found[name], found[f"{block}value"])


def test_regmean_with_products_from_data_serves_both_tasks_better_than_the_mean():
    """Two linear models that each saw half of the input directions: the mean spoils both, RegMean neither."""
    random = np.random.default_rng(0)
    inputs = [random.normal(size=(40, 6)) * scale for scale in ([1, 1, 1, 0.01, 0.01, 0.01], [0.01] * 3 + [1] * 3)]
    kernels = [random.normal(size=(6, 2)) for _ in range(2)]
    tasks = [[jnp.asarray(one, jnp.float32) for one in task] for task in zip(inputs, kernels, strict=True)]
    products = [input_products(lambda p, x: x @ p["w"], {"w": kernel}, x)["w"] for x, kernel in tasks]

    def error(kernel):
        return sum(np.square(x @ kernel - x @ k).sum() for x, k in zip(inputs, kernels, strict=True))

    assert error(regmean(kernels, products)) < 0.01 * error((kernels[0] + kernels[1]) / 2)


@few
@given(seeds, st.floats(0, 2))
def test_the_wise_line_is_straight_and_ends_in_both_models(seed, alpha):
    random = np.random.default_rng(seed)
    base, tuned = ({"w": jnp.asarray(random.normal(size=4), jnp.float32)} for _ in range(2))
    assert wise(base, tuned, 0.0)["w"].tolist() == base["w"].tolist()
    assert wise(base, tuned, 1.0)["w"].tolist() == tuned["w"].tolist()
    expected = np.asarray(base["w"], np.float64) * (1 - alpha) + alpha * np.asarray(tuned["w"], np.float64)
    np.testing.assert_allclose(wise(base, tuned, alpha)["w"], expected, atol=1e-6)


@pytest.mark.parametrize("alpha", [-0.1, float("nan"), float("inf")])
def test_a_point_beyond_the_base_is_refused(alpha):
    with pytest.raises(ConfigError, match="alpha is a finite number of at least 0; got"):
        wise({}, {}, alpha)
