"""Whole rounds on nodes with unequal data: the digits, Dirichlet(.33), eight nodes, the engine `stacked`."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import Any

import digits
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capibara.consensus.attacks import ATTACKS, Attack, AttackView
from capibara.consensus.attacks.base import replace_rows
from capibara.consensus.config import ConsensusConfig
from capibara.errors import DataError

NODES = 8


def run(num_rounds: int, *, seed: int = 0, **config: Any):
    """The last state and all lines of a run."""
    settings: dict[str, Any] = {"num_nodes": NODES, "seed": seed, "local_steps": 5} | config
    plan = digits.plan(ConsensusConfig(**settings))
    events = list(islice(digits.run(plan, num_rounds, seed=seed), 3 * num_rounds))
    assert events[-1][0].round == num_rounds, "hardly any round finds a quorum"
    return events[-1][0], [line for _, line in events]


def reasons(lines: list[dict[str, Any]]) -> list[list[str]]:
    return [[node["reason"] for node in line["nodes"]] for line in lines]


def test_nodes_hold_unequal_shares_of_all_the_training_data():
    source = digits.Digits(NODES)
    held_out = np.concatenate(list(source.splits.values()))
    everything = np.concatenate([*source.nodes, held_out])
    assert sorted(everything) == list(range(1797))
    classes = [len(set(source.labels[node])) for node in source.nodes]
    assert min(classes) < 8 and min(map(len, source.nodes)) >= digits.LEAST
    assert [len(set(source.labels[node])) for node in digits.Digits(NODES, gamma=None).nodes] == [10] * NODES


def test_batches_are_a_function_of_round_draw_and_node():
    def batch(round: int, draw: int, node: int) -> bytes:
        found = digits.Digits(NODES).batches(round=round, draw=draw, node=node, steps=2, batch_size=4)
        assert found["x"].shape == (2, 4, 64) and found["targets"].dtype == np.int32
        return found["x"].tobytes()

    assert batch(3, 1, 2) == batch(3, 1, 2)
    assert len({batch(3, 1, 2), batch(4, 1, 2), batch(3, 0, 2), batch(3, 1, 5)}) == 4
    gate = digits.Digits(NODES).held_out("gate", round=0, draw=0, count=240)
    assert len(np.unique(gate["x"], axis=0)) > 230  # the same example is never drawn twice
    with pytest.raises(DataError, match="'merge' has 60 examples; 61 were asked for"):
        digits.Digits(NODES).held_out("merge", round=0, draw=0, count=61)


def test_an_attack_of_your_own_goes_through_whole_rounds():
    def forge(view: AttackView, state: Any, key: Any) -> tuple[Any, Any]:
        mirrored = jax.tree.map(lambda leaf: -leaf[view.honest[-1]], view.stack)
        return replace_rows(view.stack, view.hostile, mirrored), state + 1

    mirror = Attack("mirror", init=lambda zeros, hostile: jnp.zeros((), jnp.int32), forge=forge)
    state, lines = run(2, attack=mirror, attack_nodes=(1, 4))
    assert int(state.attack) == 2
    for line in lines:
        assert line["nodes"][1]["digest"] == line["nodes"][4]["digest"]
        assert line["nodes"][1]["norm"] == pytest.approx(line["nodes"][7]["norm"], rel=1e-5)
        assert line["duplicates"] == [[1, 4]]


def test_free_riders_leave_digests_that_repeat():
    _, lines = run(3, attack="stale")
    assert [line[6:] for line in reasons(lines)] == [["backed"] * 2, ["stale"] * 2, ["stale"] * 2]
    _, lines = run(2, attack="copy")
    assert [line["duplicates"] for line in lines] == [[[0, 6], [1, 7]]] * 2


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "gated_out"), [(5, 0.0), (30, 0.003)])
def test_honest_nodes_with_unequal_data_are_left_alone(steps: int, gated_out: float):
    """Invariant 9, over 2,400 node-rounds: at most `gated_out` of them low_quality, at most .5 % outvoted.

    With SGD at .1 and momentum .5. It does not hold for steps of any size: at momentum .9 and the same rate, .4 % were
    gated out at H = 5 and 1 % outvoted at H = 30.
    """
    found = Counter()
    for seed in range(3):
        for line in reasons(run(100, seed=seed, local_steps=steps)[1]):
            found.update(line)
    assert found.total() >= 2400
    assert found["low_quality"] <= gated_out * found.total()
    assert found["outvoted"] <= 0.005 * found.total()
    assert set(found) <= {"backed", "low_quality", "outvoted"}


@pytest.mark.slow
@pytest.mark.parametrize("attack", [*ATTACKS, "scale:-10", "ipm:3"])
def test_no_attack_stops_the_vote_from_learning(attack: str):
    """50 rounds; .93 without an attack, .83 to .92 under these when this was written, .10 is guessing."""
    state, _ = run(50, attack=attack)
    assert digits.accuracy(state.params) > 0.75


@pytest.mark.slow
def test_the_mean_does_not_learn_under_the_optimised_attack():
    """The control: the same gates and quorum, nobody outvoted or clipped."""
    state, _ = run(50, attack="optimised", voting_strategy="majority")
    assert digits.accuracy(state.params) < 0.3
