"""`ConsensusConfig`: f and the quorum by the protocol's rule, and one clear sentence for what cannot be meant."""

from __future__ import annotations

import math
import warnings
from fractions import Fraction
from types import SimpleNamespace

import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capibara.consensus.attacks import ATTACKS, get_attack
from capibara.consensus.config import ConsensusConfig
from capibara.consensus.vocabulary import ATTACKS as NAMES
from capibara.consensus.vocabulary import MERGES, VOTES
from capibara.errors import ConfigError
from capibara.training import vocabulary


def refused(**values) -> str:
    """The sentence with which a configuration is refused."""
    with pytest.raises(ConfigError) as error:
        ConsensusConfig(**values)
    return str(error.value)


@pytest.mark.parametrize(
    ("n", "threshold", "needed", "f"),
    [
        (8, 0.75, 6, 2),
        (7, 0.75, 6, 1),
        (8, None, 6, 2),
        (4, None, 3, 1),
        (10, 0.7, 7, 3),
        (10, 0.3, 3, 1),
        (5, 1.0, 5, 0),
    ],
)
def test_the_protocols_examples_of_quorum_and_f(n, threshold, needed, f):
    config = ConsensusConfig(num_nodes=n, consensus_threshold=threshold)
    assert (config.needed, config.num_tolerated) == (needed, f)


@given(st.integers(1, 60), st.integers(1, 1000))
@settings(max_examples=200, deadline=None)
def test_quorum_is_exact_and_f_is_the_smallest_of_three_bounds(n, thousandths):
    config = ConsensusConfig(num_nodes=n, consensus_threshold=thousandths / 1000)
    needed = -(-thousandths * n // 1000)
    assert config.needed == needed
    assert config.num_tolerated == min((n - 1) // 3, n - needed, (needed - 1) // 2)


@given(st.integers(4, 200), st.data())
@settings(max_examples=200, deadline=None)
def test_the_threshold_that_an_error_proposes_is_accepted(n, data):
    f = data.draw(st.integers(1, (n - 1) // 3))
    threshold = data.draw(st.integers(1, 1000)) / 1000
    try:
        ConsensusConfig(num_nodes=n, num_faulty=f, consensus_threshold=threshold)
    except ConfigError as error:
        proposed = float(str(error).split("Set consensus_threshold = ")[1].split(" ")[0])
        assert ConsensusConfig(num_nodes=n, num_faulty=f, consensus_threshold=proposed).num_tolerated == f
    else:
        assert 2 * f + 1 <= math.ceil(Fraction(str(threshold)) * n) <= n - f


def test_f_above_what_the_threshold_leaves_names_the_threshold_that_would_do():
    assert refused(num_nodes=7, consensus_threshold=0.9, num_faulty=1) == (
        "num_faulty = 1 does not fit consensus_threshold = 0.9, which leaves room for 0 of 7 nodes. "
        "Set consensus_threshold = 0.8571 or less, or num_faulty = 0."
    )
    assert "Set consensus_threshold = 0.7 or more" in refused(num_nodes=10, consensus_threshold=0.3, num_faulty=3)


def test_f_above_a_third_names_the_nodes_it_needs():
    assert refused(num_nodes=8, consensus_threshold=0.75, num_faulty=3) == (
        "num_faulty = 3 needs at least 10 nodes (agreement needs n ≥ 3f + 1); got num_nodes = 8, which tolerates 2."
    )


def test_unanimous_needs_everyone_and_tolerates_nobody():
    config = ConsensusConfig(num_nodes=8, voting_strategy="unanimous", consensus_threshold=0.5)
    assert (config.needed, config.num_tolerated) == (8, 0)
    assert "all 8 nodes must back" in refused(num_nodes=8, voting_strategy="unanimous", num_faulty=1)


@pytest.mark.parametrize("name", VOTES)
@pytest.mark.parametrize("f", [1, 2, 3])
def test_too_few_nodes_for_a_rule_names_a_rule_that_does(name, f):
    """Each rule is accepted exactly from its own least n on, beside agreement's n ≥ 3f + 1."""
    if name == "unanimous":
        return
    least = VOTES[name].least(f)
    for n in range(3 * f + 1, 4 * f + 5):
        values = {"num_nodes": n, "num_faulty": f, "voting_strategy": name}
        if n >= least:
            ConsensusConfig(**values)
            continue
        sentence = refused(**values)
        assert f"{name!r} with f = {f} needs at least {least} nodes; got num_nodes = {n}." in sentence
        proposed = sentence.split("Use '")[1].split("'")[0]
        ConsensusConfig(**(values | {"voting_strategy": proposed}))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"voting_strategy": "byzantine_tolerent"}, "Did you mean 'byzantine_tolerant'?"),
        ({"merge_strategy": "weighted_avg"}, "Did you mean 'weighted_average'? Known: breadcrumbs, "),
        ({"merge_strategy": "xyzzy"}, "ties, ties_tensor, trimmed_mean, uniform, weighted_average."),
        ({"engine": "inlined"}, "Did you mean 'inline'?"),
        ({"outer": "nestrov"}, "Did you mean 'nesterov'?"),
        ({"inner_state": "kept"}, "Unknown inner_state 'kept'. Did you mean 'keep'?"),
        ({"merge_rows": "owned"}, "Did you mean 'own'?"),
        ({"strategies": ["plane"]}, "Unknown strategy 'plane'. Did you mean 'plain'?"),
        ({"attack": "sign_flop"}, "Did you mean 'sign_flip'?"),
        ({"split": "by_fields"}, "Unknown split 'by_fields'. Did you mean 'by_field'?"),
        ({"split": "by_field:2"}, "Unknown split 'by_field:2'"),
        ({"split": "dirichlet"}, "needs a positive number, e.g. 'dirichlet:0.33'"),
        ({"split": "dirichlet:inf"}, "needs a positive number"),
        ({"attack": "scale:x"}, "attack = 'scale:x' needs a number after the colon, e.g. 'scale:2'."),
        ({"attack": "scale:nan"}, "needs a number after the colon"),
        ({"attack": "copy:2"}, "'copy' takes no strength. Write 'copy'."),
        ({"attack": "optimised:krum"}, "needs alie or ipm after the colon, e.g. 'optimised:alie'."),
        ({"num_node": 8}, "Unknown key 'num_node'. Did you mean 'num_nodes'?"),
        ({"num_nodes": "four"}, "num_nodes should be a valid integer"),
        ({"num_nodes": 0}, "num_nodes should be greater than or equal to 1; got 0."),
        ({"num_nodes": True}, "num_nodes is a number; got true."),
        ({"quality_threshold": float("nan")}, "quality_threshold should be a finite number; got nan."),
        ({"voting_strategy": 3}, "voting_strategy is a name or an object; got 3."),
        ({"outer": {"name": "sgd"}}, "outer is a name or an object"),
        ({"strategies": "plain"}, "strategies should be a list; got 'plain'."),
        ({"strategies": []}, "strategies"),
        ({"attack_nodes": [4]}, "attack_nodes names node 4; the nodes are 0 to 3."),
        ({"verification_rounds": 2}, "needs at least 16 sequences. Set gate_sequences = 8."),
        ({"voting_strategy": "median", "merge_strategy": "uniform"}, "sees coordinates and is the merge itself"),
        ({"outer": "<object adam>"}, "was given as an object, <object adam>, which a file cannot hold"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_meant_is_one_clear_sentence(values, expected):
    sentence = refused(**values)
    assert expected in sentence
    assert "pydantic" not in sentence and "validation error" not in sentence


def test_pydantic_errors_do_not_leak():
    """Neither from `model_validate` nor from an assignment."""
    with pytest.raises(ConfigError, match="Did you mean 'num_nodes'"):
        ConsensusConfig.model_validate({"num_node": 8})
    with pytest.raises(ConfigError, match="ConsensusConfig is frozen; got num_nodes = 8"):
        ConsensusConfig().num_nodes = 8  # type: ignore[misc]


def test_all_mistakes_are_told_at_once():
    assert len(refused(num_nodes="x", local_steps=0, seeds=1).splitlines()) == 3


@pytest.mark.parametrize("n", [1, 2, 3])
def test_up_to_three_nodes_tolerate_no_lie_and_say_so_once(n):
    config = ConsensusConfig(num_nodes=n)
    assert (config.needed, config.num_tolerated) == (n, 0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config.warn_when_defenceless()
    said = [str(warning.message) for warning in caught]
    assert len(said) == (n > 1), "one node is plain training and needs no warning"
    for sentence in said:
        assert f"{n} nodes tolerate f = 0 lies; n = 4 is the least for f = 1. One crash stops a round" in sentence
        threshold = float(sentence.split("consensus_threshold = ")[1].split(" ")[0])
        assert ConsensusConfig(num_nodes=n, consensus_threshold=threshold).needed == n - 1


def test_a_threshold_that_leaves_no_room_is_warned_of():
    with pytest.warns(UserWarning, match=r"8 nodes tolerate f = 0 lies at consensus_threshold = 0.9; without it f = 2"):
        ConsensusConfig(num_nodes=8, consensus_threshold=0.9).warn_when_defenceless()


@pytest.mark.parametrize(
    "values", [{"num_nodes": 4}, {"num_nodes": 8, "num_faulty": 0}, {"voting_strategy": "unanimous"}]
)
def test_nothing_is_said_where_f_is_as_wanted(values):
    ConsensusConfig(**values).warn_when_defenceless()


def test_derived_values():
    config = ConsensusConfig(num_nodes=8, attack="scale:-10")
    assert config.attack_ids == (6, 7)
    assert config.gate_alpha == 0.25
    assert config.gate_limit == pytest.approx(0.163, abs=5e-4)
    assert ConsensusConfig(num_nodes=3).gate_alpha == 0.5
    assert ConsensusConfig(attack="nan", attack_nodes=[0, 2]).attack_ids == (0, 2)
    assert ConsensusConfig(attack_nodes=[0]).attack_ids == ()
    assert config.describe() == (
        "8 nodes, 6 must back a commit, 2 may be arbitrarily wrong; vote byzantine_tolerant, merge weighted_average."
    )


def test_objects_stand_where_names_do():
    rule, attack = SimpleNamespace(name="mine"), get_attack("scale:-10")
    config = ConsensusConfig(voting_strategy=rule, outer=optax.sgd(0.5), attack=attack, strategies=(rule, "plain"))
    assert config.voting_strategy is rule and config.attack is attack
    assert "vote mine" in config.describe()


def test_none_as_a_word_unsets():
    assert ConsensusConfig(consensus_timeout="none").consensus_timeout is None
    assert "num_nodes should be a valid integer" in refused(num_nodes="none")


def test_every_name_of_the_vocabulary_has_its_object():
    assert set(NAMES) == set(ATTACKS)
    assert set(VOTES) == set(vocabulary.VOTES)
    assert set(MERGES) <= set(vocabulary.MERGES)
    for name in NAMES:
        assert get_attack(ConsensusConfig(attack=name).attack).name.startswith(name)


def test_strategies_that_too_few_nodes_share_are_noted():
    """⌊8/3⌋ = 2 = f: the two nodes of a strategy can be outvoted for being different; with nine they cannot."""
    three = ("plain", "convexity", "incremental_soup")
    note = ConsensusConfig(num_nodes=8, consensus_threshold=0.75, strategies=three).note_on_strategies()
    assert note is not None and "some have 2, no more than the f = 2" in note and "use 9 nodes" in note
    assert ConsensusConfig(num_nodes=9, consensus_threshold=0.75, strategies=three).note_on_strategies() is None
    assert ConsensusConfig(num_nodes=8).note_on_strategies() is None
