"""The training loop: chunks do not matter, resuming repeats nothing, callbacks can end it, a broken loss stops it."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from capibara.errors import ConfigError, RunError
from capibara.loop import StepInfo, count_tokens, fit, local_steps, steps
from capibara.strategies.plain import plain
from capibara.types import Strategy

KEY = jax.random.key(3)


def noisy(params, batch, key):
    loss, info = tiny.OBJECTIVE.loss(params, batch, key)
    return loss * (1 + 0.1 * jax.random.normal(key)), info


NOISY = plain(
    tiny.OBJECTIVE._replace(loss=noisy),
    optax.sgd(0.1, momentum=0.5),
)
"""Its gradient depends on the key, so that a wrong key shows."""

DATA = tiny.Points().batches(round=0, draw=0, node=0, steps=40, batch_size=4)


def batches(first: int, count: int):
    return {name: leaf[first : first + count] for name, leaf in DATA.items()}


def poisoned(bad: set[int]):
    def some(first: int, count: int):
        batch = {name: leaf.copy() for name, leaf in batches(first, count).items()}
        for step in range(first, first + count):
            if step in bad:
                batch["y"][step - first] = np.nan
        return batch

    return some


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def start():
    return NOISY.init(tiny.first_params())


@pytest.fixture(scope="module")
def ended():
    """After 23 steps in chunks of 5, and everything that was told on the way."""
    told: list[StepInfo] = []
    return fit(NOISY, start(), batches, KEY, 23, chunk=5, callbacks=(told.append,)), told


def test_the_generator_yields_a_chunk_at_a_time_and_ends_with_the_rest(ended):
    state, told = ended
    assert [info.step for info in told] == [5, 10, 15, 20, 23]
    assert [len(info.losses) for info in told] == [5, 5, 5, 5, 3]
    assert int(state.step) == 23 and told[-1].state is state
    assert set(told[0].info) == {"gradient_norm"}


def test_a_step_sees_its_own_batch_and_key_and_nothing_else(ended):
    """Step k trains with batch k and fold_in(key, k): the loop written out."""
    state, losses = start(), []
    step = jax.jit(NOISY.step)
    for k in range(23):
        batch = {name: leaf[k] for name, leaf in DATA.items()}
        state, info = step(state, batch, jax.random.fold_in(KEY, k))
        losses.append(float(info["loss"]))
    np.testing.assert_allclose(np.concatenate([info.losses for info in ended[1]]), losses, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ended[0].params, state.params)


@pytest.mark.parametrize("stop", [5, 10, 20])
def test_stopped_after_a_chunk_and_gone_on_it_ends_in_the_same_bits(ended, stop: int):
    half = fit(NOISY, start(), batches, KEY, stop, chunk=5)
    same(fit(NOISY, half, batches, KEY, 23, chunk=5), ended[0])


def test_from_the_middle_of_a_chunk_the_next_ends_where_it_would_have():
    half = fit(NOISY, start(), batches, KEY, 7, chunk=5)
    assert [info.step for info in steps(NOISY, half, batches, KEY, 23, chunk=5)] == [10, 15, 20, 23]


def test_a_finished_training_asks_for_no_batch(ended):
    def none(first: int, count: int):
        raise AssertionError("no step is left")

    assert list(steps(NOISY, ended[0], none, KEY, 23)) == []
    assert fit(NOISY, ended[0], none, KEY, 20) is ended[0]


def test_a_callback_ends_the_training_with_the_state_it_saw():
    seen: list[int] = []

    def stop(info: StepInfo) -> None:
        seen.append(info.step)
        if info.step >= 10:
            raise StopIteration

    state = fit(NOISY, start(), batches, KEY, 23, chunk=5, callbacks=(stop,))
    assert seen == [5, 10] and int(state.step) == 10


def test_skipped_steps_are_counted_and_the_others_go_on_from_where_they_were():
    told: list[StepInfo] = []
    state = fit(NOISY, start(), poisoned({2, 3, 9, 10}), KEY, 15, chunk=5, callbacks=(told.append,))
    assert [info.skipped for info in told] == [2, 1, 1]
    assert [info.skipped_in_a_row for info in told] == [0, 1, 0]
    assert [np.flatnonzero(~np.isfinite(info.losses)).tolist() for info in told] == [[2, 3], [4], [0]]
    assert int(state.step) == 15 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


@pytest.mark.parametrize("chunk", [1, 3, 20])
def test_too_many_skipped_steps_in_a_row_stop_the_training(chunk: int):
    """Counted across chunks; six in a row are borne, seven are not."""
    fit(NOISY, start(), poisoned(set(range(4, 10))), KEY, 20, chunk=chunk, max_skipped=7)
    with pytest.raises(RunError, match=r"\d+ steps in a row up to step \d+ had a loss or gradient that is not finite"):
        fit(NOISY, start(), poisoned(set(range(4, 20))), KEY, 20, chunk=chunk, max_skipped=7)


def test_throughput_is_tokens_over_the_clock():
    clock = itertools.count(step=2.0).__next__
    told = list(steps(NOISY, start(), batches, KEY, 12, chunk=10, clock=clock))
    assert [info.tokens_per_s for info in told] == [10 * 4 / 2.0, 2 * 4 / 2.0]


def test_tokens_are_the_targets_that_count_or_the_examples():
    mask = np.zeros((2, 3, 5), bool)
    mask[0, 1, :4] = True
    assert count_tokens({"mask": mask, "tokens": np.zeros((2, 3, 5))}) == 4
    assert count_tokens({"x": np.zeros((2, 3, 7))}) == 6


def test_a_chunk_is_at_least_one_step():
    with pytest.raises(ConfigError, match="at least 1 step; got 0"):
        next(steps(NOISY, start(), batches, KEY, 5, chunk=0))


def test_a_strategy_of_ones_own_needs_no_more_than_a_loss():
    """Neither `skipped` nor any other value is taken for granted."""
    bare = Strategy("bare", lambda p: start()._replace(params=p, inner=()), lambda s, b, k: (
        s._replace(step=s.step + 1, params=jax.tree.map(lambda x: x + 1.0, s.params)), {"loss": jnp.sum(b["y"])}
    ))  # fmt: skip
    (info,) = steps(bare, bare.init(tiny.first_params()), batches, KEY, 4)
    assert info.skipped == 0 and info.info == {} and float(info.state.params["b"]) == 4.0


def test_local_steps_is_the_loop_written_out():
    """The H steps of a node, which engines run, without compilation."""
    keys = jax.random.split(KEY, 3)
    with jax.disable_jit():
        state, infos = local_steps(NOISY.step, start(), batches(0, 3), keys)
        by_hand = start()
        for k in range(3):
            by_hand, info = NOISY.step(by_hand, {name: leaf[k] for name, leaf in DATA.items()}, keys[k])
            assert float(info["loss"]) == float(infos["loss"][k])
    same(state, by_hand)
    assert infos["loss"].shape == (3,)
