"""The quality gate and the final gate: paired differences, innocent until proven bad."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capibara.consensus.gates import final_gate, gate_differences, judge, paired
from capibara.types import Objective

LIMIT = -math.log(0.85)


def sequence_losses(params, batch):
    gap = params["w"] - batch["target"]
    return (gap**2).sum(axis=-1) * batch["tokens"], batch["tokens"]


objective = Objective(lambda params, batch, key: (jnp.float32(0), {}), sequence_losses)


@pytest.fixture
def batch():
    random = np.random.default_rng(0)
    return {
        "target": random.normal(size=(18, 3)).astype(np.float32),
        "tokens": random.integers(5, 20, size=18).astype(np.float32),
    }


def test_differences_are_the_summed_losses_after_a_damped_step(batch):
    params, stack = {"w": jnp.ones(3)}, {"w": jnp.asarray([[0.0] * 3, [2.0, 0, 0], [0, -1.0, 4.0]])}
    found, tokens = gate_differences(objective, params, stack, batch, 0.25)
    base = sequence_losses({"w": np.ones(3)}, batch)[0]
    for i, delta in enumerate(np.asarray(stack["w"])):
        expected = sequence_losses({"w": np.ones(3) + 0.25 * delta}, batch)[0] - base
        np.testing.assert_allclose(found[i], expected, rtol=1e-4, atol=1e-4)
    assert not found[0].any()
    np.testing.assert_array_equal(tokens, batch["tokens"])


def test_a_row_without_finite_loss_fails_alone(batch):
    stack = {"w": jnp.asarray([[0.0] * 3, [np.nan] * 3, [1e30] * 3])}
    verdict = judge(*gate_differences(objective, {"w": jnp.ones(3)}, stack, batch, 0.25), 3, LIMIT)
    assert verdict.passed.tolist() == [True, False, False]


def test_mean_and_standard_error_are_token_weighted():
    random = np.random.default_rng(1)
    tokens = np.full(18, 7.0)
    d = random.normal(size=(2, 18))
    mean, se = paired(d * tokens, tokens)
    np.testing.assert_allclose(mean, d.mean(axis=1))
    np.testing.assert_allclose(se, d.std(axis=1, ddof=1) / math.sqrt(18))
    tokens[:9] = 1.0
    np.testing.assert_allclose(paired(d * tokens, tokens)[0], (d * tokens).sum(axis=1) / tokens.sum())


@pytest.mark.parametrize(
    ("shards", "spread", "passes"),
    [
        ((0.0, 0.0, 0.0), 0.0, True),
        ((0.16, 0.16, 0.16), 0.0, True),
        ((0.17, 0.17, 0.17), 0.0, False),
        ((0.17, 0.17, 0.17), 0.3, True),  # not proven: 2 SE reach below the limit
        ((1.5, 0.0, 0.0), 0.0, True),  # one bad shard of three is no majority
        ((0.5, 0.5, 0.1), 0.0, False),
    ],
)
def test_a_node_is_innocent_until_proven_bad_on_most_shards(shards, spread, passes):
    d = np.repeat(shards, 6) + spread * np.tile([1, -1], 9)
    verdict = judge(d[None] * 10, np.full(18, 10.0), 3, LIMIT)
    assert verdict.passed.tolist() == [passes]
    np.testing.assert_allclose(verdict.shard_means[0], shards, atol=1e-12)
    assert verdict.quality[0] == pytest.approx(min(1.0, math.exp(-np.mean(shards))))


def test_a_better_node_has_quality_1():
    assert judge(np.full((1, 18), -3.0), np.ones(18), 3, LIMIT).quality.tolist() == [1.0]


def check(candidate, batch, anchor=0.0):
    points = ({"w": jnp.full(3, jnp.float32(x))} for x in (0.0, anchor, candidate))
    return final_gate(objective, *points, batch, LIMIT)


def test_the_final_gate_compares_with_parent_and_with_anchor(batch):
    batch["target"][:] = 0
    still = check(0.0, batch)
    assert still.passed and still.parent_mean == 0 and still.anchor_mean == 0
    assert not check(1.0, batch).passed
    drifted = check(0.2, batch, anchor=0.0)
    assert drifted.passed and drifted.parent_mean == pytest.approx(0.12, rel=1e-4)


def test_slow_drift_from_the_anchor_is_refused_though_every_step_is_small(batch):
    batch["target"][:] = 0
    parent, anchor, candidate = ({"w": jnp.full(3, jnp.float32(x))} for x in (0.9, 0.0, 0.92))
    verdict = final_gate(objective, parent, anchor, candidate, batch, LIMIT)
    assert verdict.parent_mean < LIMIT < verdict.anchor_mean and not verdict.passed


def test_an_anchor_that_is_the_parent_costs_no_pass_and_changes_no_bit(batch):
    passes = []

    def counted(params, batch):
        jax.debug.callback(lambda: passes.append(1))
        return sequence_losses(params, batch)

    def verdict(anchor):
        passes.clear()
        found = final_gate(objective._replace(sequence_losses=counted), parent, anchor, candidate, batch, LIMIT)
        jax.effects_barrier()
        return found, len(passes)

    parent, candidate = {"w": jnp.full(3, jnp.float32(0.3))}, {"w": jnp.full(3, jnp.float32(0.2))}
    (same, two), (copied, three) = verdict(parent), verdict(dict(parent))
    assert (two, three) == (2, 3)
    assert same == copied and same.parent_mean == same.anchor_mean < 0


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_a_candidate_that_is_not_finite_is_refused(batch, value):
    assert not check(value, batch).passed
