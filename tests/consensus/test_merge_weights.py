"""The whole search: evidence, surrogate, evaluation, fallback, and what the result says."""

from __future__ import annotations

import json
from functools import partial

import bigram
import numpy as np
import pytest
from bigram import ERRORS, OBJECTIVE, SEQUENCES_ONLY

from capibara.consensus import problems
from capibara.consensus.combine import checked_weights, combine
from capibara.consensus.convex import mixture
from capibara.consensus.evidence import gather, held_out, read_logs
from capibara.consensus.merge_weights import find_weights
from capibara.consensus.simplex import kl_penalty, no_penalty
from capibara.errors import ConfigError

LANGUAGE, OTHER = bigram.chain(0), bigram.chain(1)
DATA = bigram.text(LANGUAGE, 40)
KL = partial(kl_penalty, 0.01)
CHANCE = float(np.log(bigram.V))
PROBLEMS = {
    "mixture": problems.mixture_problem(),
    "log_pool": problems.pool_problem(),
    "weight_space": problems.refined_problem(),
    "quadratic": problems.quadratic_problem(),
    "minimax": problems.minimax_problem(),
    "black_box": problems.black_box_problem(),
}


def find(models, data=DATA, problem=PROBLEMS["mixture"], penalty=KL, objective=OBJECTIVE, **options):  # noqa: B008
    return find_weights(models, objective, held_out(data), problem, penalty, **options)


@pytest.fixture(scope="module")
def tables() -> list[dict]:
    return [bigram.table(LANGUAGE, noise=0.3 + 0.2 * i, seed=i) for i in range(4)]


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_merge_is_never_worse_than_an_input_and_its_loss_is_what_evaluation_says(name, tables):
    data = {"a": DATA, "b": bigram.text(OTHER, 20, seed=1)} if name == "minimax" else DATA
    result = find(tables, data, PROBLEMS[name])
    held = held_out(data)
    logs, rows = read_logs(OBJECTIVE, combine(tables, np.asarray(result)), held)
    assert result.merged_loss == pytest.approx(rows.loss(logs, worst=name == "minimax"), rel=1e-6)
    assert result.merged_loss <= result.losses.min() and result.merged_loss <= result.uniform_loss
    assert result.objective == name and abs(sum(result) - 1) < 1e-9 and len(result) == 4
    kinds = {"quadratic": "conditional", "weight_space": "stationarity", "black_box": "none"}
    assert result.certificate == kinds.get(name, "global_convex")
    assert (result.dual_gap is None) == (name == "black_box")
    assert (result.lower_bound is None) == (name in ("black_box", "weight_space"))
    if result.lower_bound is not None:
        assert result.lower_bound == result.value - result.dual_gap
    json.dumps(result.to_json(), allow_nan=False)


def test_the_mixtures_guarantees(tables):
    """f(w*) ≤ Lᵢ for all i up to its penalty, f ≤ Σ wᵢLᵢ, and the value is that of the tokens that count."""
    result = find(tables, penalty=no_penalty)
    evidence = gather(tables, OBJECTIVE, held_out(DATA))
    assert len(evidence.logs) == DATA["mask"].sum()
    assert result.surrogate_loss == pytest.approx(mixture(evidence.logs).loss, abs=1e-9)
    assert result.surrogate_loss <= result.losses.min() + result.dual_gap
    assert result.surrogate_loss <= result.candidate @ result.losses
    assert result.transfer_gap == result.candidate_loss - result.surrogate_loss


def test_for_tables_the_pools_value_is_the_merged_networks_loss(tables):
    """The surrogate is exact there: no transfer gap, and the lower bound holds for every merge."""
    result = find(tables, problem=PROBLEMS["log_pool"], penalty=no_penalty)
    assert abs(result.transfer_gap) < 1e-5
    assert result.lower_bound <= min(result.merged_loss, result.uniform_loss) + 1e-6


@pytest.mark.parametrize("broken", ["nan", "inf", "hidden_nan"])
def test_a_broken_model_has_weight_zero_and_is_named(tables, broken):
    bad = {"W": tables[0]["W"].copy()}
    if broken == "hidden_nan":  # where no validation token looks: no loss shows it, yet it would spread into a merge
        data = {**DATA, "tokens": np.minimum(DATA["tokens"], bigram.V - 2)}
        bad["W"][-1] = np.nan
    else:
        data, bad["W"][:] = DATA, np.float32(broken)
    result = find([tables[0], bad, tables[1]], data)
    assert result[1] == 0 and result.excluded == {1: "not_finite"} and result.left_out[1] == "not_finite"
    assert np.isfinite(combine([tables[0], bad, tables[1]], np.asarray(result))["W"]).all()
    np.testing.assert_allclose(np.delete(result.weights, 1), find(tables[:2], data).weights, atol=1e-9)


@pytest.mark.parametrize("garbage", ["shouting", "reversed", "untrained"])
def test_a_garbage_model_has_weight_zero_and_is_named(tables, garbage):
    rng = np.random.default_rng(0)
    bad = {
        "shouting": 50 * rng.normal(size=(bigram.V, bigram.V)),
        "reversed": -tables[0]["W"],
        "untrained": 0.1 * rng.normal(size=(bigram.V, bigram.V)),
    }[garbage]
    models = [*tables, {"W": bad.astype(np.float32)}]
    result = find(models, chance=CHANCE)
    assert result[4] == 0 and result.excluded == {4: "worse_than_chance"}
    assert "model 4 does not count: worse than chance" in result.summary()


def test_where_no_model_beats_chance_none_is_excluded():
    models = [{"W": 0.1 * np.random.default_rng(i).normal(size=(7, 7)).astype(np.float32)} for i in range(2)]
    assert find(models, chance=0.1).excluded == {}


def test_models_of_different_initialisations_are_caught():
    """Twins that are the same function and average to noise: the surrogate's gap is tiny, the merge is worthless."""
    model = bigram.hidden(LANGUAGE)
    result = find([model, bigram.twin(model)])
    assert result.certificate == "global_convex" and result.dual_gap < 1e-6
    assert result.transfer_gap > 0.1
    assert result.chosen in ("model 0", "model 1") and result.merged_loss == result.losses.min()
    assert result.probe.midpoints == 0 or result.probe.violations  # candidate and uniform are one point


def test_the_midpoints_between_inputs_see_the_barrier():
    model, other = bigram.hidden(LANGUAGE), bigram.hidden(LANGUAGE, seed=1)
    result = find([model, bigram.twin(model), other], midpoints=6)
    assert result.probe.midpoints == 6 and result.probe.violations > 0
    assert result.merged_loss == result.losses.min()


def test_convex_losses_show_no_violation(tables):
    result = find(tables, midpoints=8)
    assert result.probe.midpoints == 8 and result.probe.violations == 0
    assert find(tables, problem=PROBLEMS["quadratic"]).probe.least_curvature[0] >= 0


@pytest.mark.parametrize("name", PROBLEMS)
def test_identical_models_are_their_own_merge(name, tables):
    models = [tables[0], dict(tables[0]), dict(tables[0])]
    result = find(models, problem=PROBLEMS[name])
    np.testing.assert_allclose(combine(models, np.asarray(result))["W"], tables[0]["W"], rtol=1e-6)
    assert result.merged_loss == pytest.approx(result.losses[0], abs=1e-6)
    assert abs(result.transfer_gap) < 1e-5


@pytest.mark.parametrize("name", PROBLEMS)
def test_one_model_is_returned_as_it_is(name, tables):
    result = find(tables[:1], problem=PROBLEMS[name])
    assert np.asarray(result).tolist() == [1.0] and result.merged_loss == result.losses[0]
    assert combine(tables[:1], np.asarray(result)) is tables[0]


def test_one_sequence_gives_weights_and_no_interval(tables):
    one = {name: leaf[:1] for name, leaf in DATA.items()}
    result = find(tables, one)
    assert result.crossfit is None and result.merged_loss <= result.losses.min()


def test_the_cross_fit_is_what_two_searches_by_hand_give(tables):
    result = find(tables)
    halves = [{name: leaf[which::2] for name, leaf in DATA.items()} for which in (0, 1)]
    total = tokens = gain = 0.0
    for here, there in (halves, halves[::-1]):
        fitted = find(tables, here, crossfit=False)
        held = held_out(there)
        logs, rows = read_logs(OBJECTIVE, combine(tables, fitted.candidate), held)
        alone, _ = read_logs(OBJECTIVE, tables[int(fitted.losses.argmin())], held)
        total -= rows.tokens @ logs
        gain -= rows.tokens @ (logs - alone)
        tokens += rows.tokens.sum()
    assert result.crossfit.loss == pytest.approx(total / tokens, rel=1e-6)
    mean, low, high = result.crossfit.against_best
    assert mean == pytest.approx(gain / tokens, abs=1e-6) and low < mean < high


def test_two_hundred_models():
    models = [bigram.table(LANGUAGE, noise=0.5, seed=i) for i in range(200)]
    result = find(models, midpoints=0, crossfit=False)
    assert len(result) == 200 and result.converged and result.dual_gap < 1e-6
    assert result.merged_loss < result.losses.min()


def test_a_search_cut_short_says_so_and_its_gap_holds(tables):
    best, short = find(tables), find(tables, max_iterations=1)
    assert not short.converged and short.value - best.value <= short.dual_gap
    assert "not converged" in short.summary()


def test_trust_decides_what_the_data_do_not(tables):
    models, trust = [tables[0], dict(tables[0]), tables[1]], np.array([0.6, 0.2, 0.2])
    result = find(models, trust=trust)
    assert result.candidate[0] / result.candidate[1] == pytest.approx(3, rel=1e-4)
    distrusted = find(models, trust=[0.0, 0.5, 0.5])
    assert distrusted[0] == 0 and distrusted.excluded == {0: "no_trust"}


def test_a_metric_without_gradients_is_never_worse_than_the_best_input(tables):
    result = find(tables, problem=PROBLEMS["black_box"], objective=ERRORS, max_iterations=40)
    assert result.certificate == "none" and result.iterations <= 40
    assert result.merged_loss <= min(result.losses.min(), result.uniform_loss)
    wrong, tokens = map(np.asarray, ERRORS.sequence_losses(combine(tables, np.asarray(result)), DATA))
    assert result.merged_loss == pytest.approx(wrong.sum() / tokens.sum(), abs=1e-6)


def test_models_that_tell_sequences_only_are_judged_by_these(tables):
    evidence = gather(tables, SEQUENCES_ONLY, held_out(DATA))
    assert evidence.logs.shape == (40, 4) and evidence.rows.tokens.sum() == DATA["mask"].sum()
    np.testing.assert_allclose(evidence.losses, gather(tables, OBJECTIVE, held_out(DATA)).losses, rtol=1e-6)
    result = find(tables, objective=SEQUENCES_ONLY)
    assert result.dual_gap < 1e-6 and result.merged_loss <= result.losses.min()
    with pytest.raises(ConfigError, match="needs the models' logits"):
        find(tables, objective=SEQUENCES_ONLY, problem=PROBLEMS["log_pool"])


def test_the_worst_domain_is_what_minimax_brings_down():
    experts = [bigram.table(LANGUAGE, 0.2), bigram.table(OTHER, 0.2), bigram.table((LANGUAGE + OTHER) / 2, 0.4)]
    domains = {"first": DATA, "second": bigram.text(OTHER, 8, seed=3)}
    fair, mean = find(experts, domains, PROBLEMS["minimax"]), find(experts, domains)
    held = held_out(domains)
    logs, rows = read_logs(OBJECTIVE, combine(experts, mean.candidate), held)
    assert fair.candidate_loss < rows.loss(logs, worst=True)
    assert fair.domains.keys() == {"first", "second"} and sum(fair.domains.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m[:0], "There are no models to merge"),
        (lambda m: [m[0], {"W": m[1]["W"][:3]}], "Model 1 cannot be merged with model 0: wrong shape"),
        (lambda m: [m[0], {"V": m[1]["W"]}], "Model 1 cannot be merged with model 0: wrong structure"),
        (lambda m: [{"W": np.full((7, 7), np.nan, np.float32)}] * 2, "None of the 2 models gives finite losses"),
    ],
)
def test_models_that_cannot_be_merged_are_refused(tables, change, message):
    with pytest.raises(ConfigError, match=message):
        find(change(tables))


def test_data_that_judge_nothing_are_refused(tables):
    with pytest.raises(ConfigError, match="hold no sequence"):
        find(tables, {name: leaf[:0] for name, leaf in DATA.items()})
    with pytest.raises(ConfigError, match="mask is all False"):
        find(tables, {**DATA, "mask": np.zeros_like(DATA["mask"])})
    with pytest.raises(ConfigError, match="got list"):
        find(tables, [1, 2])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([0.5, 0.6, -0.1], r"weights\[2\] is -0.1; a share is"),
        ([0.5, np.nan, 0.5], r"weights\[1\] is nan"),
        ([0.5, np.inf, 0.5], r"weights\[1\] is inf"),
        ([0.5, 0.5, 0.5], "weights sum to 1.5; shares sum to 1"),
        ([0.5, 0.5], r"3 models and weights of shape \(2,\)"),
        ([[1.0, 0.0, 0.0]], "one number for each model"),
    ],
)
def test_weights_that_are_no_shares_are_refused(weights, message):
    with pytest.raises(ConfigError, match=message):
        checked_weights(weights, 3)


def test_a_sum_is_in_float32_and_of_the_models_types():
    """bfloat16 sums of 16 small differences would lose most of them."""
    from ml_dtypes import bfloat16

    rng = np.random.default_rng(0)
    rows = rng.normal(size=(16, 50)).astype(bfloat16)
    w = rng.dirichlet(np.ones(16))
    merged = combine([{"a": row} for row in rows], w)["a"]
    assert merged.dtype == bfloat16
    wanted = w @ rows.astype(np.float64)
    np.testing.assert_allclose(np.asarray(merged, np.float64), wanted, rtol=2**-8, atol=1e-6)


def test_a_model_of_weight_zero_changes_nothing(tables):
    poisoned = [*tables[:2], {"W": np.full_like(tables[0]["W"], np.nan)}]
    merged = combine(poisoned, np.array([0.25, 0.75, 0.0]))
    np.testing.assert_array_equal(merged["W"], combine(tables[:2], np.array([0.25, 0.75]))["W"])
