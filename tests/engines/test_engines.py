"""Every engine gives the same answer to the same assignment; what can go wrong with a node goes wrong on `inline`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from capibara.engines.base import (
    Assignment,
    Cohort,
    Kept,
    deal,
    first_kept,
    join,
    node_key,
    renew,
    select_kept,
)
from capibara.engines.inline import InlineEngine
from capibara.engines.stacked import StackedEngine
from capibara.strategies.plain import adamw, plain
from capibara.types import Strategy

STEPS = 2
ENGINES = {
    "inline": InlineEngine,
    "stacked:map": lambda: StackedEngine("map"),
    "stacked:vmap": lambda: StackedEngine("vmap"),
}


def noisy(params, batch, key):
    loss, info = tiny.OBJECTIVE.loss(params, batch, key)
    return loss * (1 + 0.2 * jax.random.normal(key)), info


NOISY = plain(
    tiny.OBJECTIVE._replace(loss=noisy),
    optax.sgd(0.1, momentum=0.5),
    name="noisy",
)
"""Its gradient depends on the key, so that a wrong key shows."""
ADAM = plain(tiny.OBJECTIVE, adamw(0.05), ema_decay=0.9, name="adam")
SOURCE = tiny.Points()
TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}
"""Deltas of about 0.1 from two float32 steps, compiled and not: XLA fuses multiplications and additions."""


def work(cohorts: tuple[Cohort, ...], **changes) -> Assignment:
    start = {"w": jnp.array([0.3, -0.2, 0.1, 0.5]), "b": jnp.array(0.2)}
    num_nodes = sum(len(cohort.nodes) for cohort in cohorts)
    given = Assignment(
        start=start,
        kept=first_kept(cohorts, start),
        batches=lambda node: SOURCE.batches(round=2, draw=1, node=node, steps=STEPS, batch_size=4),
        key=jax.random.key(5),
        round=2,
        draw=1,
        attempt=0,
        steps=STEPS,
        ask=tuple(range(num_nodes)),
        deadline_s=None,
    )
    return given._replace(**changes)


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **TOLERANCE), a, b)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


CASES = {"one node": ((NOISY,), 1), "two strategies": ((NOISY, ADAM), 3)}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """Cohorts, their assignment in the middle of a run, and what every engine makes of it."""
    strategies, num_nodes = CASES[request.param]
    cohorts = deal(strategies, num_nodes)
    first = InlineEngine().map(cohorts, work(cohorts, round=0))
    assignment = work(cohorts, kept=first.kept)
    return cohorts, assignment, {name: make().map(cohorts, assignment) for name, make in ENGINES.items()}


@pytest.mark.parametrize("name", ENGINES)
def test_engines_agree(case, name: str):
    """Deltas, losses and what the nodes keep: moments, averages, counters."""
    _, _, answers = case
    got, truth = answers[name], answers["inline"]
    close(got.stack, truth.stack)
    close(got.kept, truth.kept)
    np.testing.assert_allclose(got.losses, truth.losses, **TOLERANCE)
    assert got.reasons == {}
    assert [int(step) for kept in got.kept for step in kept.step] == [2 * STEPS] * len(got.losses)


@pytest.mark.parametrize("name", ENGINES)
def test_a_node_trains_from_the_start_with_its_own_batches_key_and_moments(case, name: str):
    """Δᵢ by hand: H steps of the node's strategy, one after another, each with its own key."""
    cohorts, assignment, answers = case
    for c, cohort in enumerate(cohorts):
        for k, node in enumerate(cohort.nodes):
            kept = jax.tree.map(lambda leaf, k=k: leaf[k], assignment.kept[c])
            state = cohort.strategy.init(assignment.start)._replace(step=kept.step, inner=kept.inner)
            keys = jax.random.split(node_key(assignment.key, 2, 1, node), STEPS)
            batches = assignment.batches(node)
            for step in range(STEPS):
                state, _ = cohort.strategy.step(state, {n: leaf[step] for n, leaf in batches.items()}, keys[step])
            delta = jax.tree.map(jnp.subtract, state.params, assignment.start)
            close(jax.tree.map(lambda leaf, node=node: leaf[node], answers[name].stack), delta)


@pytest.mark.parametrize("name", ENGINES)
def test_the_trained_parameters_are_given_only_of_a_single_node(case, name: str):
    _, assignment, answers = case
    got = answers[name]
    if len(got.losses) > 1:
        assert got.params is None
    else:
        begin = jax.tree.map(lambda p, d: p - d[0], got.params, got.stack)
        close(begin, assignment.start)


@pytest.mark.parametrize("name", ENGINES)
def test_the_same_assignment_gives_the_same_bits(name: str):
    cohorts = deal((NOISY,), 2)
    engine = ENGINES[name]()
    first, second = (engine.map(cohorts, work(cohorts)) for _ in range(2))
    same((first.stack, first.kept, first.losses), (second.stack, second.kept, second.losses))


@pytest.mark.parametrize("name", ENGINES)
def test_round_draw_and_key_change_the_answer_and_the_attempt_does_not(name: str):
    """The batches stay the same here, so that it is the key that changes it."""
    cohorts, engine = deal((NOISY,), 1), ENGINES[name]()
    before = engine.map(cohorts, work(cohorts)).stack["w"]
    for change in ({"round": 3}, {"draw": 2}, {"key": jax.random.key(6)}):
        assert not np.array_equal(engine.map(cohorts, work(cohorts, **change)).stack["w"], before)
    again = engine.map(cohorts, work(cohorts, attempt=2, deadline_s=1e9)).stack["w"]
    np.testing.assert_array_equal(again, before)


def test_a_node_key_is_a_function_of_round_draw_and_node():
    key = jax.random.key(0)
    places = [(round, draw, node) for round in range(3) for draw in range(3) for node in range(4)]
    assert len({tuple(jax.random.key_data(node_key(key, *place)).tolist()) for place in places}) == 36


# What only nodes that run one by one can do


@pytest.fixture(scope="module")
def healthy():
    """Four nodes of two strategies, their assignment, and what comes back when nothing goes wrong."""
    cohorts = deal((NOISY, ADAM), 4)
    assignment = work(cohorts)
    return cohorts, assignment, InlineEngine().map(cohorts, assignment)


def bad(node: int, change):
    return lambda i, attempt, delta: change(delta) if i == node else delta


def explode(delta):
    raise RuntimeError("out of memory")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (explode, "crashed"),
        (lambda d: {"w": d["w"]}, "wrong_structure"),
        (lambda d: (d["w"], d["b"]), "wrong_structure"),
        (lambda d: {**d, "w": d["w"][None]}, "wrong_shape"),
        (lambda d: {**d, "w": d["w"].astype(jnp.bfloat16)}, "wrong_dtype"),
        (lambda d: {**d, "b": 0.0}, "wrong_dtype"),
    ],
)
def test_a_node_without_a_usable_delta_is_named_and_keeps_what_it_had(healthy, change, reason: str):
    cohorts, assignment, whole = healthy
    got = InlineEngine(bad(2, change)).map(cohorts, assignment)
    assert got.reasons == {2: reason}
    assert all((leaf[2] == 0).all() for leaf in jax.tree.leaves(got.stack))
    others = np.array([0, 1, 3])
    same(jax.tree.map(lambda leaf: leaf[others], got.stack), jax.tree.map(lambda leaf: leaf[others], whole.stack))
    same(got.kept, select_kept(cohorts, {0, 1, 3}, whole.kept, assignment.kept))


def test_an_exception_is_kept_with_a_note_on_node_round_and_attempt():
    engine = InlineEngine(bad(1, explode))
    engine.map(cohorts := deal((NOISY,), 2), work(cohorts, attempt=3))
    assert str(engine.last_error) == "out of memory"
    assert engine.last_error.__notes__ == ["node 1 in round 2, attempt 3"]


def test_a_strategy_that_raises_crashes_its_nodes_only():
    def broken(state, batch, key):
        raise ValueError("no such batch")

    cohorts = deal((NOISY, Strategy("broken", NOISY.init, broken)), 4)
    got = InlineEngine().map(cohorts, work(cohorts))
    assert got.reasons == {1: "crashed", 3: "crashed"}
    assert np.isnan(got.losses[[1, 3]]).all() and np.isfinite(got.losses[[0, 2]]).all()


def test_the_deadline_is_each_nodes_own():
    """0.5 s is in time and 2 s is late, however long all of them take together."""
    times = iter(np.cumsum([0, 0.5, 0, 2.0, 0, 0.5, 0, 1.0]))
    engine = InlineEngine(clock=lambda: next(times))
    got = engine.map(cohorts := deal((NOISY,), 4), work(cohorts, deadline_s=1.0))
    assert got.reasons == {1: "late"}
    np.testing.assert_allclose(got.seconds, [0.5, 2.0, 0.5, 1.0])


def test_only_the_asked_nodes_train_and_the_attempt_reaches_them():
    asked = []
    engine = InlineEngine(lambda node, attempt, delta: asked.append((node, attempt)) or delta)
    cohorts = deal((NOISY,), 4)
    got = engine.map(cohorts, work(cohorts, ask=(1, 3), attempt=2))
    assert asked == [(1, 2), (3, 2)]
    assert got.reasons == {} and np.isnan(got.losses[[0, 2]]).all()
    assert (got.stack["w"][jnp.array([0, 2])] == 0).all()
    assert np.asarray(got.kept[0].step).tolist() == [0, STEPS, 0, STEPS]


def test_an_interrupt_is_not_a_crash():
    def interrupt(delta):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        InlineEngine(bad(0, interrupt)).map(cohorts := deal((NOISY,), 2), work(cohorts))


# What a coordinator does with the answers


def test_answers_asked_again_are_joined_to_those_that_came(healthy):
    cohorts, assignment, whole = healthy
    held = InlineEngine(bad(2, explode)).map(cohorts, assignment)
    again = InlineEngine().map(cohorts, assignment._replace(ask=(2,), attempt=1))
    joined = join(cohorts, held, again, (2,))
    same((joined.stack, joined.kept, joined.losses), (whole.stack, whole.kept, whole.losses))
    assert joined.reasons == {}


def test_strategies_are_dealt_round_robin():
    assert [cohort.nodes for cohort in deal((NOISY, ADAM), 5)] == [(0, 2, 4), (1, 3)]
    assert [cohort.strategy.name for cohort in deal((NOISY, ADAM), 1)] == ["noisy"]


def test_a_renewed_node_has_never_trained(healthy):
    cohorts, assignment, whole = healthy
    after = whole.kept
    mended = renew(cohorts, after, {1, 2}, assignment.start)
    same(mended, select_kept(cohorts, {1, 2}, assignment.kept, after))
    assert renew(cohorts, after, set(), assignment.start) is after
    assert isinstance(mended[0], Kept)
