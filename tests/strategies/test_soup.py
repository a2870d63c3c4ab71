"""A node that returns the mean of its last states: by hand, over rounds, and in a round that commits."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest
import tiny

from capibara.consensus.config import ConsensusConfig
from capibara.core.config import TrainingConfig
from capibara.errors import ConfigError
from capibara.round import run_round
from capibara.round_state import first_state
from capibara.strategies.plain import plain
from capibara.strategies.soup import averaged
from capibara.training import vocabulary

KEY = jax.random.key(0)
INNER = plain(tiny.OBJECTIVE, optax.sgd(0.2, momentum=0.5))


def states(strategy, count: int, params=None) -> list:
    """The states after 1 … count steps."""
    many = tiny.Points().batches(round=0, draw=0, node=1, steps=count, batch_size=8)
    state, found, step = strategy.init(params or tiny.first_params()), [], jax.jit(strategy.step)
    for i in range(count):
        state, _ = step(state, {name: leaf[i] for name, leaf in many.items()}, KEY)
        found.append(state)
    return found


def close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **(tolerance or {"rtol": 1e-5, "atol": 1e-6})), a, b)


@pytest.mark.parametrize("last", [1, 3, 7])
def test_the_round_ends_in_the_mean_of_its_last_states(last: int):
    """Until then it is the plain strategy, bit for bit."""
    ours, theirs = states(averaged(INNER, 7, last), 7), states(INNER, 7)
    for a, b in zip(ours[:-1], theirs[:-1], strict=True):
        close(a.params, b.params, rtol=0, atol=0)
    mean = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *[state.params for state in theirs[-last:]])
    close(ours[-1].params, mean)
    close(ours[-1].inner.inner, theirs[-1].inner, rtol=0, atol=0)


def test_the_next_round_begins_a_new_mean():
    """What a node averaged before does not reach into the round after; training goes on from the mean."""
    both = states(averaged(INNER, 4, 2), 8)
    many = tiny.Points().batches(round=0, draw=0, node=1, steps=8, batch_size=8)
    state = both[3]._replace(inner=both[3].inner.inner)
    seen, step = [], jax.jit(INNER.step)
    for i in range(4, 8):
        state, _ = step(state, {name: leaf[i] for name, leaf in many.items()}, KEY)
        seen.append(state.params)
    close(both[-1].params, jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *seen[-2:]))


def test_half_of_the_round_where_nothing_is_said():
    close(states(averaged(INNER, 7), 7)[-1].params, states(averaged(INNER, 7, 3), 7)[-1].params, rtol=0, atol=0)
    close(states(averaged(INNER, 1), 1)[-1].params, states(INNER, 1)[-1].params, rtol=0, atol=0)


def test_a_skipped_step_does_not_break_the_mean():
    strategy = averaged(INNER, 3, 3)
    many = tiny.Points().batches(round=0, draw=0, node=1, steps=3, batch_size=8)
    many = {**many, "y": np.where(np.arange(3)[:, None] == 1, np.nan, many["y"])}
    state, seen, step = strategy.init(tiny.first_params()), [], jax.jit(strategy.step)
    for i in range(3):
        state, info = step(state, {name: leaf[i] for name, leaf in many.items()}, KEY)
        seen.append(int(info["skipped"]))
    assert seen == [0, 1, 0] and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_numbers_out_of_range_are_refused():
    for steps, last in ((0, None), (4, 0), (4, 5)):
        with pytest.raises(ConfigError, match="local.step"):
            averaged(INNER, steps, last)


def test_it_has_a_name_in_a_configuration():
    config = ConsensusConfig(num_nodes=4, local_steps=6, strategies=("plain", "incremental_soup"))
    found = vocabulary.strategies(config.strategies, tiny.OBJECTIVE, TrainingConfig(), 12, config.local_steps)
    assert [strategy.name for strategy in found] == ["plain", "incremental_soup"]
    close(states(found[1], 6)[-1].params, states(averaged(found[0], 6), 6)[-1].params, rtol=0, atol=0)
    with pytest.raises(ConfigError, match="Did you mean 'incremental_soup'"):
        ConsensusConfig(num_nodes=4, strategies=("incremental_soups",))


def test_nodes_vote_on_their_means():
    """Every delta of two rounds is the mean of the node's last two states less the start."""
    plan = tiny.plan(num_nodes=5, local_steps=4, engine="stacked")
    plan = plan._replace(strategies=(averaged(tiny.STRATEGY, 4, 2),))
    state, step = first_state(plan, tiny.first_params()), jax.jit(tiny.STRATEGY.step)
    own = [tiny.STRATEGY.init(state.params) for _ in range(5)]
    for number in range(2):
        start = state.params
        state, record = run_round(plan, state)
        for node in range(5):
            many = plan.source.batches(round=number, draw=0, node=node, steps=4, batch_size=4)
            mine, seen = own[node]._replace(params=start), []
            for i in range(4):
                mine, _ = step(mine, {name: leaf[i] for name, leaf in many.items()}, KEY)
                seen.append(mine.params)
            own[node] = mine
            mean = jax.tree.map(lambda a, b, s: (a + b) / 2 - s, *seen[-2:], start)
            close(jax.tree.map(lambda leaf: leaf[node], record.stack), mean)  # noqa: B023
        assert [entry["reason"] for entry in record.line["nodes"]] == ["backed"] * 5
