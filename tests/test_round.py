"""One round under every fault a node can have, on `inline`, where they can all be had."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from capibara.consensus.ballot import Merge
from capibara.consensus.certificate import digest_tree
from capibara.engines.inline import InlineEngine
from capibara.loop import local_steps
from capibara.round import quorum_error, run_round
from capibara.round_state import first_state

BAD = 2


def leaf_names(delta):
    return sorted(delta)


def one_round(deliver=None, *, rounds=1, clock=lambda: 0.0, **config):
    plan = tiny.plan(engine=InlineEngine(deliver, clock=clock), **config)
    state, seen, records = first_state(plan, tiny.first_params()), {}, []
    for _ in range(rounds):
        before = state.round
        state, record = run_round(plan, state, past_digests=seen)
        records.append(record.line)
        for node in record.line["nodes"]:
            if node["digest"]:
                seen.setdefault(node["id"], {})[node["digest"]] = before
    return plan, state, records


def reasons(line):
    return [node["reason"] for node in line["nodes"]]


def from_bad(change):
    return lambda node, attempt, delta: change(delta) if node == BAD else delta


def raise_error(delta):
    raise RuntimeError("the node's disk is on fire")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: jax.tree.map(lambda x: x * jnp.nan, d), "not_finite"),
        (lambda d: {**d, "b": d["b"] + jnp.inf}, "not_finite"),
        (lambda d: {**d, "w": d["w"][:3]}, "wrong_shape"),
        (lambda d: {"w": d["w"]}, "wrong_structure"),
        (lambda d: [d["w"], d["b"]], "wrong_structure"),
        (lambda d: {**d, "w": "not an array"}, "wrong_dtype"),
        (lambda d: {**d, "w": np.asarray(d["w"], np.float64)}, "wrong_dtype"),
        (lambda d: None, "wrong_structure"),
        (raise_error, "crashed"),
        (lambda d: jax.tree.map(lambda x: -1000.0 * x, d), "low_quality"),
        (lambda d: jax.tree.map(lambda x: -8.0 * x, d), "outvoted"),
    ],
)
def test_a_bad_node_is_named_and_the_round_commits_without_it(change, reason):
    threshold = {"quality_threshold": 1e-9} if reason == "outvoted" else {}
    _, state, (line,) = one_round(from_bad(change), max_retries=0, **threshold)
    assert reasons(line) == [reason if node == BAD else "backed" for node in range(5)]
    assert line["outcome"] == "committed" and state.round == 1
    assert line["nodes"][BAD]["coefficient"] in (0.0, None)


def test_a_slow_node_is_late_by_its_own_seconds():
    times = iter(np.cumsum([0.0, 1.0, 0.0, 1.0, 0.0, 50.0, 0.0, 1.0, 0.0, 1.0]))
    _, _, (line,) = one_round(clock=lambda: next(times), consensus_timeout=10.0, max_retries=0)
    assert reasons(line) == ["backed", "backed", "late", "backed", "backed"]
    assert line["timing"]["node_s"] == [1.0, 1.0, 50.0, 1.0, 1.0]


def test_an_old_delta_is_stale_and_zeros_are_not():
    first = {}

    def repeat(delta):
        return first.setdefault("delta", delta)

    _, _, lines = one_round(from_bad(repeat), rounds=3, max_retries=0)
    assert [reasons(line)[BAD] for line in lines] == ["backed", "stale", "stale"]
    zeros = lambda d: jax.tree.map(jnp.zeros_like, d)  # noqa: E731
    _, _, lines = one_round(from_bad(zeros), rounds=2, max_retries=0)
    assert "stale" not in (reasons(lines[0]) + reasons(lines[1]))


def test_what_the_gate_keeps_out_is_measured_like_the_others():
    """A ruined delta has its length on record; sent again it is `stale`, which stands before `low_quality`."""
    first = {}

    def ruin(node, attempt, delta):
        ruined = jax.tree.map(lambda x: -1000.0 * x, delta)
        return first.setdefault("delta", ruined) if node == BAD else delta

    _, _, lines = one_round(ruin, rounds=2, max_retries=0)
    assert [reasons(line)[BAD] for line in lines] == ["low_quality", "stale"]
    length = np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in first["delta"].values()))
    assert [line["nodes"][BAD]["norm"] for line in lines] == pytest.approx([length] * 2, rel=1e-9)


@pytest.mark.parametrize(("factor", "reason"), [(-1000.0, "low_quality"), (np.nan, "not_finite")])
def test_copies_are_recorded_whatever_else_is_wrong_with_them(factor, reason):
    held = {}

    def ruin(node, attempt, delta):
        return held.setdefault("delta", jax.tree.map(lambda x: factor * x, delta)) if node < 2 else delta

    _, _, (line,) = one_round(ruin, max_retries=0)
    assert line["duplicates"] == [[0, 1]] and reasons(line)[:2] == [reason] * 2


def test_what_did_not_arrive_has_no_length():
    _, _, (line,) = one_round(from_bad(raise_error), max_retries=0)
    assert line["nodes"][BAD]["norm"] is None and line["nodes"][BAD]["digest"] is None


def test_a_copy_of_a_neighbour_is_recorded_and_not_punished():
    held = {}

    def copy(node, attempt, delta):
        held[node] = delta
        return held[1] if node == BAD else delta

    _, _, (line,) = one_round(copy)
    assert line["duplicates"] == [[1, BAD]]
    assert reasons(line)[BAD] == "backed"


def test_a_crashed_node_is_asked_again_with_the_same_batches():
    def crash_once(node, attempt, delta):
        if node == BAD and attempt == 0:
            raise RuntimeError("flaky")
        return delta

    config = {"consensus_threshold": 1.0}
    _, mended, (line,) = one_round(crash_once, **config)
    _, healthy, _ = one_round(**config)
    assert line["attempt"] == 1 and line["draw"] == 0 and line["outcome"] == "committed"
    assert digest_tree(mended.params) == digest_tree(healthy.params)
    assert digest_tree(mended.kept) == digest_tree(healthy.kept)


def test_when_all_delivered_and_too_few_pass_everyone_trains_anew_on_another_draw():
    tries = []

    def bad_at_first(node, attempt, delta):
        tries.append((node, attempt))
        return jax.tree.map(lambda x: x * jnp.nan, delta) if attempt == 0 and node < 2 else delta

    _, _, (line,) = one_round(bad_at_first)
    assert line["draw"] == 1 and line["attempt"] == 1 and line["outcome"] == "committed"
    assert tries == [(node, attempt) for attempt in (0, 1) for node in range(5)]


def test_fewer_rows_than_the_rule_needs_are_no_quorum_and_no_error():
    """multi_krum with f = 2 needs 2f + 3 = 7 rows; n − f = 6 nodes would do for a commit."""
    broken = lambda node, attempt, delta: jax.tree.map(lambda x: x * jnp.nan, delta) if node < 2 else delta  # noqa: E731
    plan = tiny.plan(num_nodes=8, voting_strategy="multi_krum", engine=InlineEngine(broken), max_retries=0)
    state = first_state(plan, tiny.first_params())
    after, record = run_round(plan, state)
    assert after is state
    assert record.line["outcome"] == "no_quorum" and record.line["quorum"] == {"needed": 7, "backing": 6}
    assert "6 of 8 nodes back a commit and 7 are needed" in str(quorum_error(record.line))


def test_all_nodes_bad_find_no_quorum_and_leave_everything_as_it_was():
    nothing = lambda node, attempt, delta: raise_error(delta)  # noqa: E731
    plan = tiny.plan(engine=InlineEngine(nothing), max_retries=2)
    state = first_state(plan, tiny.first_params())
    after, record = run_round(plan, state)
    assert after is state
    assert record.line["outcome"] == "no_quorum" and record.line["attempt"] == 2
    error = quorum_error(record.line)
    assert "0 of 5 nodes back a commit and 4 are needed" in str(error) and "node 3: crashed" in str(error)
    assert error.reasons == dict.fromkeys(range(5), "crashed")


def test_a_refused_round_leaves_parameters_and_optimizer_states_as_they_were():
    """A merge of the user's own that explodes: `majority` has no centre, so only the final gate is left."""
    explode = Merge("explode", leaf=lambda rows: -1e3 * rows[0])
    _, state, lines = one_round(rounds=3, voting_strategy="majority", merge_strategy=explode)
    assert [line["outcome"] for line in lines] == ["refused"] * 3
    fresh = first_state(tiny.plan(), tiny.first_params())
    assert state.round == state.refusals == 3
    for name in ("params", "anchor", "kept", "outer", "merged"):
        assert digest_tree(getattr(state, name)) == digest_tree(getattr(fresh, name)), name


def test_a_node_that_sent_nan_starts_afresh():
    plan, state, _ = one_round(from_bad(lambda d: jax.tree.map(lambda x: x * jnp.nan, d)))
    steps = np.asarray(state.kept[0].step)
    assert steps.tolist() == [3, 3, 0, 3, 3]
    moments = jax.tree.leaves(state.kept[0].inner)
    assert all((np.asarray(leaf)[BAD] == 0).all() for leaf in moments)


def test_reset_forgets_every_inner_state():
    _, state, _ = one_round(inner_state="reset")
    assert (np.asarray(state.kept[0].step) == 0).all()


@pytest.mark.parametrize("engine", ["inline", "stacked"])
def test_one_node_is_plain_training_exactly(engine):
    plan = tiny.plan(num_nodes=1, engine=engine)
    state, record = run_round(plan, first_state(plan, tiny.first_params()))
    from capibara.engines.base import node_key

    batches = plan.source.batches(round=0, draw=0, node=0, steps=3, batch_size=4)
    keys = jax.random.split(node_key(plan.key, 0, 0, 0), 3)
    begin = plan.strategies[0].init(tiny.first_params())
    if engine == "inline":
        with jax.disable_jit():
            plain, _ = local_steps(plan.strategies[0].step, begin, batches, keys)
    else:
        plain, _ = jax.jit(lambda s: local_steps(plan.strategies[0].step, s, batches, keys))(begin)
    assert digest_tree(state.params) == digest_tree(plain.params)
    assert record.line["final_gate"] is None and record.line["nodes"][0]["quality"] is None


@pytest.mark.parametrize("num_nodes", [2, 3])
def test_two_and_three_nodes_merge_plain_deltas(num_nodes):
    plan = tiny.plan(num_nodes=num_nodes)
    _, record = run_round(plan, first_state(plan, tiny.first_params()))
    assert [node["coefficient"] for node in record.line["nodes"]] == pytest.approx([1 / num_nodes] * num_nodes)
    assert record.line["tau"] is None and record.line["leash"] is None


def test_the_same_seeds_give_the_same_bytes():
    first, second = one_round(rounds=2), one_round(rounds=2)
    assert digest_tree(first[1].params) == digest_tree(second[1].params)
    strip = lambda line: {k: v for k, v in line.items() if k != "timing"}  # noqa: E731
    assert [strip(line) for line in first[2]] == [strip(line) for line in second[2]]


@pytest.mark.parametrize("attack", [None, "sign_flip:3", "alie", "scale:-10", "nan", "copy", "label_flip"])
def test_stacked_agrees_with_inline_from_the_same_state(attack):
    """Each round is started from inline's state: the same outcome and reasons, v to 1e-4 (docs/protocol.md, 6)."""
    if attack == "label_flip":
        pytest.skip("points have no labels; the digits test has")
    config = {"num_nodes": 7, "attack": attack}
    inline, stacked = tiny.plan(**config), tiny.plan(engine="stacked", **config)
    state = first_state(inline, tiny.first_params())
    for _ in range(3):
        _, there = run_round(stacked, state)
        state, here = run_round(inline, state)
        assert here.line["outcome"] == there.line["outcome"]
        assert reasons(here.line) == reasons(there.line)
        v = [[node["coefficient"] or 0.0 for node in r.line["nodes"]] for r in (here, there)]
        np.testing.assert_allclose(v[0], v[1], atol=1e-4)
