"""Attacks submit what their docstrings say, change the hostile rows only, and depend on nothing but their arguments."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rows import as_row, as_stack

from capibara.consensus.attacks import ATTACKS, Attack, AttackView, get_attack
from capibara.consensus.attacks.base import replace_rows
from capibara.consensus.attacks.optimised import REVERSALS, SHIFTS
from capibara.consensus.attacks.rows import usual_shift
from capibara.consensus.ballot import Aggregator, open_ballot
from capibara.consensus.certificate import digest_rows
from capibara.consensus.config import ConsensusConfig
from capibara.consensus.vocabulary import ATTACKS as VOCABULARY
from capibara.errors import ConfigError
from capibara.training.vocabulary import aggregator
from capibara.tree import named_leaves

HOSTILE = (2, 7)
HONEST = (0, 1, 3, 4, 5, 6)
EPSILON = np.finfo(np.float32).eps

RULES: dict[str, Aggregator] = {
    name: aggregator(ConsensusConfig(num_nodes=8, voting_strategy=name))
    for name in ("majority", "trimmed_mean", "byzantine_tolerant")
}
"""The plain mean, the trimmed mean and the default vote, at f = 2."""

FORGING = [name for name in ATTACKS if get_attack(name).forge]


def deltas(seed: int = 0) -> np.ndarray:
    """float32[8, 7]: nodes that agree on a direction and differ by as much again."""
    random = np.random.default_rng(seed)
    return (random.normal(size=7) + random.normal(size=(8, 7))).astype(np.float32)


def view_of(rows: np.ndarray, rule: str = "majority") -> AttackView:
    stack = as_stack(rows)

    def aggregate(candidate: Any) -> Any:
        ballot = open_ballot(candidate, np.ones(len(rows)))
        return RULES[rule].apply(ballot, RULES[rule].init(()), None)[0]

    start = jax.tree.map(lambda leaf: jnp.zeros_like(leaf[0]), stack)
    return AttackView(stack, HOSTILE, HONEST, 2, 0, aggregate, start)


def state_of(attack: Attack, view: AttackView) -> Any:
    return attack.init(view.start, view.hostile) if attack.init else ()


def forged(spec: Any, view: AttackView, key: int = 0) -> np.ndarray:
    """float64[8, 7]: the stack after the attack, as a matrix."""
    attack = get_attack(spec)
    assert attack.forge is not None
    return matrix(attack.forge(view, state_of(attack, view), jax.random.key(key))[0])


def matrix(stack: Any) -> np.ndarray:
    return np.stack([as_row(jax.tree.map(lambda leaf, i=i: leaf[i], stack)) for i in range(8)])


def mean(x: np.ndarray) -> np.ndarray:
    return x[list(HONEST)].mean(axis=0)


def deviation(x: np.ndarray) -> np.ndarray:
    return x[list(HONEST)].std(axis=0)


def hidden_shift(x: np.ndarray) -> float:
    """Min-Max by halving intervals, as in the paper, on vectors."""
    honest = x[list(HONEST)]
    widest = max(np.linalg.norm(a - b) for a in honest for b in honest)
    low, high = 0.0, 1000.0
    for _ in range(80):
        middle = (low + high) / 2
        row = mean(x) - middle * deviation(x)
        hides = max(np.linalg.norm(row - a) for a in honest) <= widest
        low, high = (middle, high) if hides else (low, middle)
    return low


FORMULAS = {
    "sign_flip": lambda x: -x[list(HOSTILE)],
    "sign_flip:4": lambda x: -4 * x[list(HOSTILE)],
    "scale": lambda x: 10 * x[list(HOSTILE)],
    "scale:-10": lambda x: -10 * x[list(HOSTILE)],
    "alie": lambda x: mean(x) - 0.3 * deviation(x),  # n = 8, two hostile: h = 3 of 6 honest, Φ⁻¹(1/2) = 0, floor 0.3
    "alie:1.5": lambda x: mean(x) - 1.5 * deviation(x),
    "ipm": lambda x: -0.1 * mean(x),
    "ipm:3": lambda x: -3 * mean(x),
    "min_max": lambda x: mean(x) - hidden_shift(x) * deviation(x),
    "min_max:2": lambda x: mean(x) - 2 * deviation(x),
    "mimic": lambda x: x[0],
    "mimic:2": lambda x: x[3],
    "copy": lambda x: x[[0, 1]],
    "nan": lambda x: np.full(x.shape[1], np.nan),
}


@pytest.mark.parametrize("spec", FORMULAS)
@pytest.mark.parametrize("seed", range(3))
def test_hostile_rows_follow_the_formula(spec: str, seed: int):
    """To the rounding of a handful of float32 operations on numbers below 10 times the largest."""
    x = deltas(seed).astype(np.float64)
    wanted = np.broadcast_to(FORMULAS[spec](x), (2, 7))
    got = forged(spec, view_of(deltas(seed)))[list(HOSTILE)]
    np.testing.assert_allclose(got, wanted, rtol=0, atol=16 * EPSILON * max(1.0, np.nanmax(np.abs(x)) * 10))


def test_min_max_stays_hidden_at_the_scales_of_a_model():
    """Deltas of 1e-6 or 1e6 scale the forged row alike: γ has no unit."""
    row = forged("min_max", view_of(deltas()))[7]
    for scale in (1e-6, 1e6):
        again = forged("min_max", view_of(deltas() * np.float32(scale)))[7] / scale
        np.testing.assert_allclose(again, row, rtol=1e-4, atol=1e-5)


def test_min_max_of_equal_rows_is_that_row():
    rows = np.tile(deltas()[0], (8, 1))
    np.testing.assert_allclose(forged("min_max", view_of(rows))[7], rows[0], rtol=4 * EPSILON)


def test_gaussian_rows_have_the_length_asked_for_and_differ():
    x = deltas()
    lies = forged("gaussian:3", view_of(x))[list(HOSTILE)]
    np.testing.assert_allclose(np.linalg.norm(lies, axis=1), 3 * np.linalg.norm(mean(x.astype(np.float64))), rtol=1e-5)
    assert abs(lies[0] @ lies[1]) < 0.99 * np.linalg.norm(lies[0]) * np.linalg.norm(lies[1])
    assert not np.allclose(forged("gaussian:3", view_of(x), key=1)[7], lies[1])


def test_alie_takes_the_largest_shift_that_looks_ordinary():
    """Baruch et al. 2019: 50 workers of which 24 lie need 2 helpers of 26, Φ⁻¹(24/26) = 1.43 (their CIFAR setting)."""
    assert usual_shift(26, 24) == pytest.approx(NormalDist().inv_cdf(24 / 26)) == pytest.approx(1.426, abs=1e-3)
    assert usual_shift(6, 2) == usual_shift(1, 1) == usual_shift(1, 5) == 0.3


@pytest.mark.parametrize("name", FORGING)
def test_only_hostile_rows_change(name: str):
    view = view_of(deltas())
    attack = get_attack(name)
    assert attack.forge is not None
    stack, _ = attack.forge(view, state_of(attack, view), jax.random.key(0))
    assert jax.tree.structure(stack) == jax.tree.structure(view.stack)
    for after, before in zip(jax.tree.leaves(stack), jax.tree.leaves(view.stack), strict=True):
        assert (after.shape, after.dtype) == (before.shape, jnp.float32)
        assert np.asarray(after)[list(HONEST)].tobytes() == np.asarray(before)[list(HONEST)].tobytes()


@pytest.mark.parametrize("name", FORGING)
def test_same_arguments_give_the_same_bytes(name: str):
    view = view_of(deltas())
    assert forged(name, view).tobytes() == forged(name, view).tobytes()


@pytest.mark.parametrize("name", ["alie", "ipm", "min_max", "gaussian", "mimic", "copy", "optimised"])
def test_statistics_ignore_what_hostile_rows_hold(name: str):
    """A hostile node whose own training broke down lies as well as any."""
    broken = deltas()
    broken[list(HOSTILE)] = np.nan
    assert forged(name, view_of(broken)).tobytes() == forged(name, view_of(deltas())).tobytes()


def test_copies_are_exact():
    """To the bit, so that equal digests are what a copy leaves."""
    attack, view = get_attack("copy"), view_of(deltas())
    assert attack.forge is not None
    found = digest_rows(attack.forge(view, (), None)[0], 8)
    assert (found[2], found[7]) == (found[0], found[1])


def test_stale_repeats_its_first_delta_for_ever():
    attack = get_attack("stale")
    assert attack.forge is not None
    view = view_of(deltas(0))
    state, sent = state_of(attack, view), []
    for seed in range(3):
        stack, state = attack.forge(view_of(deltas(seed)), state, None)
        sent.append([digest_rows(stack, 8)[node] for node in HOSTILE])
    assert sent[0] == sent[1] == sent[2] == [digest_rows(view.stack, 8)[node] for node in HOSTILE]
    assert all(isinstance(leaf, jax.Array) for leaf in named_leaves(state).values())


def test_label_flip_mirrors_the_targets_and_nothing_else():
    attack = get_attack("label_flip")
    assert attack.forge is None and attack.poison is not None
    batch = {"tokens": np.arange(6).reshape(1, 2, 3), "targets": np.array([[[0, 1, 9]]], np.int32)}
    flipped = attack.poison(batch, 10)
    assert flipped["tokens"] is batch["tokens"]
    assert flipped["targets"].tolist() == [[[9, 8, 0]]] and flipped["targets"].dtype == np.int32
    assert attack.poison(flipped, 10)["targets"].tolist() == batch["targets"].tolist()
    with pytest.raises(ConfigError, match="these batches hold image"):
        attack.poison({"image": np.zeros(3)}, 10)


def damage(spec: Any, rows: np.ndarray, rule: str) -> float:
    view = view_of(rows, rule)
    stack = as_stack(forged(spec, view).astype(np.float32))
    return float(np.linalg.norm(as_row(view.aggregate(stack)) - mean(rows.astype(np.float64))))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", range(3))
def test_optimised_does_at_least_the_damage_of_its_families(rule: str, seed: int):
    """It tries their defaults too. The search measures in float32, hence the slack of its rounding."""
    rows = deltas(seed)
    both, alie, ipm = (damage(spec, rows, rule) for spec in ("optimised", "optimised:alie", "optimised:ipm"))
    slack = 1 - 64 * EPSILON
    assert both >= slack * max(alie, ipm)
    assert alie >= slack * max(damage(f"alie:{z}", rows, rule) for z in (0.3, *SHIFTS))
    assert ipm >= slack * max(damage(f"ipm:{strength}", rows, rule) for strength in REVERSALS)


def test_optimised_takes_the_strongest_reversal_against_the_mean():
    """The mean moves further the larger ε is, so the search must end at its largest."""
    x = deltas()
    np.testing.assert_allclose(
        forged("optimised:ipm", view_of(x))[7], -REVERSALS[-1] * mean(x.astype(np.float64)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("sign_flop", "Did you mean 'sign_flip'"),
        ("", "Unknown attack ''"),
        ("scale:ten", "strength of the attack 'scale' is a number; got 'ten'"),
        ("scale:", "strength of the attack 'scale' is a number; got ''"),
        ("ipm:nan", "strength of the attack 'ipm' is a number; got 'nan'"),
        ("alie:inf", "strength of the attack 'alie' is a number; got 'inf'"),
        ("mimic:1.5", "counts honest nodes; got 1.5"),
        ("nan:3", "'nan' takes no strength; got 'nan:3'. Write 'nan'."),
        ("optimised:alice", "Did you mean 'alie'"),
    ],
)
def test_unusable_names_are_explained(spec: str, sentence: str):
    with pytest.raises(ConfigError) as error:
        get_attack(spec)
    assert sentence in str(error.value)


@pytest.mark.parametrize("name", ATTACKS)
def test_names_and_docstrings_say_which_attack_it_is(name: str):
    """The name stands in records, and every factory says what the table of docs/attacks.md says."""
    assert get_attack(name).name.partition(":")[0] == name
    text = ATTACKS[name].__doc__ or ""
    assert all(word in text for word in ("Needs: ", "Beats: ", "Strength: "))


def test_an_attack_of_your_own_is_one_object():
    """Ten lines with a state; tests/test_unequal_nodes.py puts one through whole rounds."""

    def forge(view: AttackView, state: Any, key: Any) -> tuple[Any, Any]:
        last = jax.tree.map(lambda leaf: -leaf[view.honest[-1]], view.stack)
        return replace_rows(view.stack, view.hostile, last), state + 1

    mirror = Attack("mirror", init=lambda zeros, hostile: jnp.zeros((), jnp.int32), forge=forge)
    assert get_attack(mirror) is mirror
    assert ConsensusConfig(num_nodes=8, attack=mirror).attack_ids == (6, 7)
    x = deltas()
    np.testing.assert_array_equal(forged(mirror, view_of(x))[list(HOSTILE)], np.stack([-x[6], -x[6]]))


def test_configurations_know_the_names():
    """Before anything is built, and without importing JAX."""
    assert set(VOCABULARY) == set(ATTACKS)
    with pytest.raises(ConfigError, match="Unknown attack 'sign_flop'. Did you mean 'sign_flip'"):
        ConsensusConfig(num_nodes=8, attack="sign_flop:2")
    with pytest.raises(ConfigError, match="all 4 nodes; an attack needs at least one honest node"):
        ConsensusConfig(num_nodes=4, attack="ipm", attack_nodes=(0, 1, 2, 3))
