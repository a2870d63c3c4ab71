"""The plain strategy: optax by hand, accumulation equals the whole batch, the average, and the NaN guard."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from capibara.strategies.plain import adamw, average, plain
from capibara.types import Objective

KEY = jax.random.key(0)


def batches(count: int, size: int = 8) -> list[dict[str, np.ndarray]]:
    many = tiny.Points().batches(round=0, draw=0, node=1, steps=count, batch_size=size)
    return [{name: leaf[i] for name, leaf in many.items()} for i in range(count)]


def train(strategy, given, params=None):
    state, infos = strategy.init(params or tiny.first_params()), []
    step = jax.jit(strategy.step)
    for batch in given:
        state, info = step(state, batch, KEY)
        infos.append(info)
    return state, infos


def close(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


MATRIX = {"w": jnp.full((4, 3), 0.5), "b": jnp.full(3, 0.25)}


def matrix_loss(params, batch, key):
    return jnp.mean((batch["x"] @ params["w"] + params["b"] - batch["y"][:, None]) ** 2), {}


def test_adamw_is_the_algorithm_by_hand():
    """Clip by global norm, moments with bias correction, decay on the matrix only, in float64."""
    rate, decay, b1, b2, clip = 0.05, 0.1, 0.9, 0.95, 0.5
    optimizer = adamw(rate, weight_decay=decay, beta1=b1, beta2=b2, clip_norm=clip)
    strategy = plain(Objective(matrix_loss, None), optimizer)  # type: ignore[arg-type]
    state, infos = train(strategy, given := batches(4), MATRIX)
    w, b = np.full((4, 3), 0.5), np.full(3, 0.25)
    m, v = [np.zeros((4, 3)), np.zeros(3)], [np.zeros((4, 3)), np.zeros(3)]
    for t, batch in enumerate(given, 1):
        x, y = batch["x"].astype(np.float64), batch["y"].astype(np.float64)
        error = x @ w + b - y[:, None]
        gradients = [2 * x.T @ error / error.size, 2 * error.sum(0) / error.size]
        norm = np.sqrt(sum((g**2).sum() for g in gradients))
        assert float(infos[t - 1]["gradient_norm"]) == pytest.approx(norm, rel=1e-5)
        assert norm > clip, "the clip must act"
        gradients = [g * clip / norm for g in gradients]
        m = [b1 * a + (1 - b1) * g for a, g in zip(m, gradients, strict=True)]
        v = [b2 * a + (1 - b2) * g**2 for a, g in zip(v, gradients, strict=True)]
        move = [(a / (1 - b1**t)) / (np.sqrt(c / (1 - b2**t)) + 1e-8) for a, c in zip(m, v, strict=True)]
        w, b = w - rate * (move[0] + decay * w), b - rate * move[1]
    close(state.params, {"w": w, "b": b})
    assert int(state.step) == 4


def test_without_a_clip_norm_gradients_are_taken_as_they_are():
    free, clipped = adamw(0.1, clip_norm=None), adamw(0.1, clip_norm=1e9)
    objective = tiny.OBJECTIVE
    close(train(plain(objective, free), batches(3))[0].params, train(plain(objective, clipped), batches(3))[0].params)


def masked(rng, size, counted):
    mask = np.zeros((size, 6), bool)
    for row, count in enumerate(counted):
        mask[row, :count] = True
    return {"x": rng.normal(size=(size, 6, 4)).astype(np.float32), "mask": mask}


def masked_loss(params, batch, key):
    errors = (batch["x"] @ params["w"] + params["b"] - 1.0) ** 2
    weights = batch["mask"].astype(jnp.float32)
    return (errors * weights).sum() / jnp.maximum(weights.sum(), 1.0), {}


@pytest.mark.parametrize("parts", [2, 4, 8])
@pytest.mark.parametrize("counted", [(6,) * 8, (6, 1, 3, 6, 2, 5, 1, 4), (6, 6, 6, 6, 0, 0, 0, 0)])
def test_accumulation_equals_the_whole_batch(parts: int, counted: tuple[int, ...]):
    """Parts with unequal counts of targets, also with none, are weighed by them; only the order of sums differs."""
    given = [masked(np.random.default_rng(i), 8, counted) for i in range(3)]
    objective = Objective(masked_loss, None)  # type: ignore[arg-type]
    whole, whole_infos = train(plain(objective, adamw(0.05)), given)
    cut, cut_infos = train(plain(objective, adamw(0.05), accumulation_steps=parts), given)
    close(cut.params, whole.params, rtol=2e-5)
    for name in ("loss", "gradient_norm"):
        assert [float(i[name]) for i in cut_infos] == pytest.approx([float(i[name]) for i in whole_infos], rel=1e-5)


def test_parts_without_a_mask_weigh_by_their_examples():
    whole, _ = train(plain(tiny.OBJECTIVE, adamw(0.05)), batches(3))
    cut, _ = train(plain(tiny.OBJECTIVE, adamw(0.05), accumulation_steps=4), batches(3))
    close(cut.params, whole.params, rtol=2e-5)


def test_a_batch_of_padding_changes_nothing_but_by_decay_and_momentum():
    """No target counts: the loss is 0, not NaN, with and without accumulation."""
    empty = [masked(np.random.default_rng(0), 8, (0,) * 8)]
    objective = Objective(masked_loss, None)  # type: ignore[arg-type]
    for parts in (1, 2):
        state, (info,) = train(plain(objective, optax.sgd(1.0), accumulation_steps=parts), empty)
        assert float(info["loss"]) == 0.0 and int(info["skipped"]) == 0
        same(state.params, tiny.first_params())


def test_the_average_is_the_closed_form():
    """a_T = d^T θ₀ + (1 − d) Σ d^(T−k) θ_k."""
    d, strategy = 0.8, plain(tiny.OBJECTIVE, optax.sgd(0.2), ema_decay=0.8)
    path, state = [], strategy.init(first := {"w": jnp.ones(4), "b": jnp.ones(())})
    for batch in batches(5):
        state, _ = jax.jit(strategy.step)(state, batch, KEY)
        path.append(state.params)
    for name in ("w", "b"):
        terms = [(1 - d) * d ** (5 - k) * np.float64(params[name]) for k, params in enumerate(path, 1)]
        np.testing.assert_allclose(average(state)[name], d**5 * np.float64(first[name]) + sum(terms), rtol=1e-5)


def test_without_an_average_the_parameters_stand_for_it():
    state = plain(tiny.OBJECTIVE, optax.sgd(0.2)).init(tiny.first_params())
    assert average(state) is state.params


def poisoned(batch, kind):
    return {**batch, "y": np.full_like(batch["y"], kind)}


@pytest.mark.parametrize("kind", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(kind: float, parts: int):
    """1e30 makes a finite batch whose loss overflows. Moments, their counters and the average stay as they were."""
    strategy = plain(tiny.OBJECTIVE, adamw(0.05), accumulation_steps=parts, ema_decay=0.9)
    good, bad = batches(4), 2
    given = [poisoned(batch, kind) if i == bad else batch for i, batch in enumerate(good)]
    before, _ = train(strategy, given[:bad])
    at, infos = train(strategy, given[: bad + 1])
    assert [int(info["skipped"]) for info in infos] == [0, 0, 1]
    same((at.params, at.inner), (before.params, before.inner))
    assert int(at.step) == bad + 1
    after, _ = train(strategy, given)
    without, _ = train(strategy, good[:bad] + good[bad + 1 :])
    same((after.params, after.inner), (without.params, without.inner))


def test_a_finite_loss_with_a_gradient_that_is_not_is_skipped():
    """√|x| at 0 has an infinite slope."""
    objective = Objective(lambda p, batch, key: (jnp.sqrt(jnp.abs(p["w"])).sum(), {}), None)  # type: ignore[arg-type]
    state, (info,) = train(plain(objective, optax.sgd(0.1)), batches(1))
    assert np.isfinite(float(info["loss"])) and int(info["skipped"]) == 1
    same(state.params, tiny.first_params())


def test_each_part_gets_a_key_of_its_own():
    def noise(params, batch, key):
        return params["b"] * jax.random.normal(key), {}

    objective = Objective(noise, None)  # type: ignore[arg-type]
    state, _ = train(plain(objective, optax.sgd(1.0), accumulation_steps=4), batches(1))
    expected = np.mean([float(jax.random.normal(key)) for key in jax.random.split(KEY, 4)])
    assert float(state.params["b"]) == pytest.approx(-expected, rel=1e-5)
