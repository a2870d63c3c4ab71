"""Running means against float64, decay weights against the schedule, and greedy soups against trying by hand."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import bigram
import jax
import ml_dtypes
import numpy as np
import pytest

from capibara.consensus.averages import SCHEDULES, Average, decay_weights, is_finite
from capibara.consensus.evidence import held_out
from capibara.consensus.soup_metrics import Score, accuracy, improves, measured, perplexity
from capibara.consensus.soups import NO_GAIN, NOT_FINITE, USED, greedy_soup, linear_soup
from capibara.errors import ConfigError
from capibara.types import Objective

CHANCES = bigram.chain(0)
DATA = bigram.text(CHANCES, 40, seed=3)
METRIC = perplexity(bigram.OBJECTIVE, held_out(DATA))


def trees(count: int, seed: int = 0, dtype: Any = np.float32) -> list[dict]:
    """Models that differ by a hundredth of their size, as checkpoints of one run do."""
    rng = np.random.default_rng(seed)
    base = {"w": rng.normal(size=(300, 700)), "b": rng.normal(size=5), "s": rng.normal()}
    return [{k: (v + 0.01 * rng.normal(size=np.shape(v))).astype(dtype) for k, v in base.items()} for _ in range(count)]


def stacked(models, name) -> np.ndarray:
    return np.stack([np.asarray(model[name], np.float64) for model in models])


def tables(*noises: float) -> list[dict]:
    """Tables that know the language but for independent noise: their mean knows it better than any."""
    return [bigram.table(CHANCES, noise, seed) for seed, noise in enumerate(noises)]


def loss(params) -> float:
    sums, tokens = bigram.OBJECTIVE.sequence_losses(jax.tree.map(np.asarray, params), DATA)
    return float(np.asarray(sums, np.float64).sum() / np.asarray(tokens, np.float64).sum())


class Counted(list):
    """A lazy sequence that knows how often each model was read."""

    def __init__(self, models):
        super().__init__(models)
        self.reads = [0] * len(models)

    def __getitem__(self, i):
        self.reads[i] += 1
        return super().__getitem__(i)


@pytest.mark.parametrize("weights", [[1] * 7, [0.5, 3, 1, 0.1, 2, 2, 1e-3]])
def test_the_running_mean_and_variance_are_those_of_all_at_once(weights):
    """float64 over the stack; the bound is k·2⁻²⁴ relative to numbers of size 4."""
    models, average = trees(7), Average(variance=True)
    for model, weight in zip(models, weights, strict=True):
        average.add(model, weight)
    shares = np.array(weights) / np.sum(weights)
    mean, variance = average.mean(), average.variance()
    for name in ("w", "b", "s"):
        rows = stacked(models, name)
        exact = np.tensordot(shares, rows, 1)
        np.testing.assert_allclose(mean[name], exact, atol=7 * 2**-24 * 5)
        spread = np.tensordot(shares, (rows - exact) ** 2, 1)
        np.testing.assert_allclose(variance[name], spread, rtol=2e-3, atol=1e-8)
        assert mean[name].dtype == np.float32 and mean[name].shape == np.shape(models[0][name])


def test_many_bfloat16_models_are_averaged_in_float32():
    """64 models: 98 % of the numbers are the exact mean rounded once. Rounding 64 sums on the way would leave few.

    The float32 error, up to 64·2⁻²⁴, straddles a boundary between bfloat16 numbers, 2⁻⁸ apart, in .1 to 1 % of cases.
    """
    models, average = trees(64, dtype=ml_dtypes.bfloat16), Average()
    for model in models:
        average.add(model)
    exact, mean = stacked(models, "w").mean(axis=0), np.asarray(average.mean()["w"], np.float64)
    assert np.abs(mean - exact).max() <= np.abs(exact).max() * 2**-8
    assert np.mean(mean == exact.astype(np.float32).astype(ml_dtypes.bfloat16)) > 0.98


def test_order_in_memory_does_not_matter():
    models = trees(3)
    turned = [{**model, "w": np.asfortranarray(model["w"])} for model in models]
    a, b = Average(), Average()
    for one, other in zip(models, turned, strict=True):
        a.add(one)
        b.add(other)
    np.testing.assert_array_equal(a.mean()["w"], b.mean()["w"])


def test_a_candidate_is_the_mean_that_it_would_become():
    models, average = trees(4), Average()
    for model in models[:3]:
        average.add(model)
    before = average.mean()
    candidate = average.with_one_more(models[3])
    np.testing.assert_array_equal(average.mean()["w"], before["w"])
    average.add(models[3])
    jax.tree.map(np.testing.assert_array_equal, candidate, average.mean())


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16])
def test_a_candidate_is_rounded_once_and_changes_nothing_it_was_made_from(dtype):
    rng = np.random.default_rng(3)
    models = [{"w": rng.normal(size=70_001).astype(dtype)} for _ in range(3)]  # more than a block
    average = Average()
    for model in models[:2]:
        average.add(model)
    before, given = average.mean()["w"].tobytes(), models[2]["w"].tobytes()
    first, second, third = (model["w"].astype(np.float32) for model in models)
    mean = first + (second - first) * np.float32(1 / 2)
    candidate = average.with_one_more(models[2])["w"]
    assert candidate.dtype == dtype
    assert candidate.tobytes() == (mean + (third - mean) * np.float32(1 / 3)).astype(dtype).tobytes()
    assert average.mean()["w"].tobytes() == before and models[2]["w"].tobytes() == given


def test_the_mean_takes_as_much_memory_however_many_models():
    average, sizes = Average(), []
    for model in trees(20):
        average.add(model)
        sizes.append(sum(leaf.nbytes for leaf in jax.tree.leaves(average.__dict__) if isinstance(leaf, np.ndarray)))
    assert set(sizes) == {sum(leaf.nbytes for leaf in trees(1)[0].values())}


def test_leaves_without_a_mean_must_be_the_same():
    model = {"w": np.ones(2, np.float32), "seed": np.array(3)}
    average = Average()
    average.add(model)
    average.add(model)
    assert average.mean()["seed"] == 3
    with pytest.raises(ConfigError, match="differs in a leaf of int64"):
        average.add({**model, "seed": np.array(4)})


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_decay_weights_are_the_decayed_sum_of_changes(schedule):
    """Σ cⱼθⱼ = θ₁ + Σ d(i/N)(θᵢ₊₁ − θᵢ), the definition, in float64."""
    n, models = 6, np.random.default_rng(0).normal(size=(6, 11))
    c = decay_weights(n, schedule)
    assert c.sum() == pytest.approx(1) and (c > 0).all()
    decayed = models[0].copy()
    for i, (before, after) in enumerate(pairwise(models), 1):
        decayed += SCHEDULES[schedule](i / n) * (after - before)
    np.testing.assert_allclose(c @ models, decayed, atol=1e-12)


def test_linear_decay_is_the_plain_mean():
    np.testing.assert_allclose(decay_weights(8, "linear"), np.full(8, 1 / 8))
    assert decay_weights(1, "1-sqrt").tolist() == [1]
    with pytest.raises(ConfigError, match="Did you mean 'cosine'"):
        decay_weights(3, "cosin")


def test_a_linear_soup_is_the_weighted_mean_and_reads_each_once():
    models = Counted(trees(4))
    soup = linear_soup(models, [1, 0, 2, 1])
    np.testing.assert_allclose(soup.weights, [0.25, 0, 0.5, 0.25])
    np.testing.assert_allclose(soup.params["w"], np.tensordot(soup.weights, stacked(list(models), "w"), 1), atol=1e-6)
    assert models.reads == [1, 0, 1, 1] and soup.evaluations == 0 and math.isnan(soup.value)


def test_a_model_with_nan_is_left_out_by_name():
    models = trees(4)
    models[2]["w"][5, 5] = np.nan
    models[0]["b"][1] = np.inf
    soup = linear_soup(models, np.ones(4), variance=True)
    assert soup.reasons == (NOT_FINITE, USED, NOT_FINITE, USED)
    np.testing.assert_allclose(soup.params["w"], (models[1]["w"] + models[3]["w"]) / 2, atol=1e-6)
    assert soup.weights.tolist() == [0, 0.5, 0, 0.5] and is_finite(soup.params) and is_finite(soup.variance)
    with pytest.raises(ConfigError, match="None of the 1 checkpoints"):
        linear_soup(models[2:3], np.ones(1))
    with pytest.raises(ConfigError, match="There are no checkpoints"):
        linear_soup([], np.ones(0))


def test_models_of_another_structure_are_named():
    models = trees(2)
    with pytest.raises(ConfigError, match=r"Checkpoint 1 does not fit the first: leaf 'w' is float32\[3\]"):
        linear_soup([models[0], {**models[1], "w": np.zeros(3, np.float32)}], np.ones(2))
    with pytest.raises(ConfigError, match="Checkpoint 1 .* the first has a leaf 'b', it has none"):
        linear_soup([models[0], {k: v for k, v in models[1].items() if k != "b"}], np.ones(2))
    with pytest.raises(ConfigError, match=r"'w' is float16\[300, 700\]"):
        linear_soup([models[0], {**models[1], "w": models[1]["w"].astype(np.float16)}], np.ones(2))


def test_values_are_those_of_the_models():
    models = tables(0.5, 0.5, 0.5)
    soup = linear_soup(models, np.ones(3), metric=METRIC)
    np.testing.assert_allclose(soup.values, [math.exp(loss(model)) for model in models], rtol=1e-5)
    assert soup.value == pytest.approx(math.exp(loss(soup.params)), rel=1e-5)
    assert soup.fallback is None and soup.value < min(soup.values) and soup.evaluations == 4


def test_models_of_other_initialisations_fall_back_to_the_best():
    """A hidden layer and its twin of permuted units: one function, and a mean that is none."""
    model = bigram.hidden(CHANCES)
    worse = {name: leaf + 0.1 for name, leaf in model.items()}
    soup = linear_soup([worse, model, bigram.twin(model)], np.ones(3), metric=METRIC)
    assert soup.fallback is not None and soup.weights[soup.fallback] == 1
    assert soup.value == pytest.approx(math.exp(loss(model)), rel=1e-5)
    kept = linear_soup([worse, model, bigram.twin(model)], np.ones(3), metric=METRIC, fallback=False)
    assert kept.fallback is None and kept.value > soup.value and kept.evaluations == 1


def by_hand(models, accept: str) -> list[int]:
    """The greedy soup, sorted, with means and losses from scratch."""
    order = sorted(range(len(models)), key=lambda i: loss(models[i]))
    chosen = order[:1]

    def sums(which):
        mean = jax.tree.map(lambda *leaves: np.mean(np.stack(leaves), axis=0, dtype=np.float64).astype(np.float32),
                            *[models[i] for i in which])
        found, tokens = bigram.OBJECTIVE.sequence_losses(mean, DATA)
        return np.asarray(found, np.float64), np.asarray(tokens, np.float64)

    for i in order[1:]:
        (old, tokens), (new, _) = sums(chosen), sums([*chosen, i])
        d = (new - old).sum() / tokens.sum()
        n = len(tokens)
        se = math.sqrt(((new - old - d * tokens) ** 2).sum() * n / (n - 1)) / tokens.sum()
        if d < 0 if accept == "better" else d + 2 * se < 0:
            chosen.append(i)
    return sorted(chosen)


@pytest.mark.parametrize("accept", ["interval", "better"])
@pytest.mark.parametrize("seed", range(3))
def test_the_greedy_soup_is_the_one_found_by_hand(accept, seed):
    models = [bigram.table(CHANCES, noise, 10 * seed + i) for i, noise in enumerate((0.5, 0.3, 0.6, 0.35, 1.2, 0.4))]
    soup = greedy_soup(models, METRIC, accept=accept)
    chosen = [i for i, reason in enumerate(soup.reasons) if reason == USED]
    assert chosen == by_hand(models, accept)
    assert soup.value <= min(soup.values) and soup.evaluations == 6 + 5
    np.testing.assert_allclose(soup.params["W"], np.mean([models[i]["W"] for i in chosen], axis=0), atol=1e-5)
    assert soup.value == pytest.approx(math.exp(loss(soup.params)), rel=1e-5)


def test_noise_is_not_taken_for_a_gain():
    """Ingredients around the language itself, none better by right: of 33, ten look better, none clears zero."""
    base, taken = bigram.table(CHANCES), dict.fromkeys(("better", "interval"), 0)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        models = [{"W": base["W"] + 3e-3 * rng.normal(size=base["W"].shape).astype(np.float32)} for _ in range(12)]
        for accept in taken:
            soup = greedy_soup(models, METRIC, by_arrival=True, accept=accept, fallback=False)
            taken[accept] += sum(trial.accepted for trial in soup.trials)
    assert taken["better"] >= 6 and taken["interval"] <= 1


def test_by_arrival_goes_in_order_and_reads_each_once():
    models = Counted(tables(0.6, 0.5, 0.4, 0.3))
    soup = greedy_soup(models, METRIC, by_arrival=True, fallback=False)
    assert [trial.ingredient for trial in soup.trials] == [1, 2, 3] and models.reads == [1] * 4
    assert soup.evaluations == 4 and soup.reasons[0] == USED
    again = greedy_soup(models, METRIC, by_arrival=True)
    assert again.evaluations == 7 and again.value <= min(again.values)


@pytest.mark.parametrize("by_arrival", [False, True])
def test_a_ruined_ingredient_stays_out(by_arrival):
    models = tables(0.4, 0.4, 0.4)
    models.insert(0, {"W": np.full_like(models[0]["W"], np.nan)})
    models.append({"W": -20 * models[1]["W"]})
    soup = greedy_soup(models, METRIC, by_arrival=by_arrival)
    assert soup.reasons[0] == NOT_FINITE and soup.reasons[4] == NO_GAIN and soup.weights[[0, 4]].tolist() == [0, 0]


def test_one_sequence_shows_nothing_so_the_best_stays_alone():
    one = {name: leaf[:1] for name, leaf in DATA.items()}
    models = tables(0.3, 0.5, 0.4)
    soup = greedy_soup(models, perplexity(bigram.OBJECTIVE, held_out(one)))
    assert soup.reasons.count(USED) == 1 and all(trial.se == math.inf for trial in soup.trials)
    assert soup.value == min(soup.values)


def test_one_and_two_hundred_checkpoints():
    one = greedy_soup(tables(0.3), METRIC)
    assert one.weights.tolist() == [1] and one.trials == () and one.evaluations == 1
    many = tables(*[0.8] * 200)
    soup = linear_soup(many, np.ones(200), metric=METRIC)
    np.testing.assert_allclose(soup.params["W"], np.mean([m["W"] for m in many], axis=0), atol=1e-5)
    assert soup.value < min(soup.values)


def test_accuracy_counts_first_guesses():
    metric = accuracy(bigram.OBJECTIVE, held_out(DATA))
    model = bigram.table(CHANCES, 0.5)
    guess = np.asarray(model["W"])[DATA["tokens"]].argmax(-1)
    share = (guess == DATA["targets"])[DATA["mask"]].mean()
    assert metric.shown(metric.score(model).mean) == pytest.approx(share)
    with pytest.raises(ConfigError, match="accuracy needs a model that gives logits"):
        accuracy(bigram.SEQUENCES_ONLY, held_out(DATA))


def test_any_callable_judges():
    def distance(model, data):
        return ((model["W"] - CHANCES) ** 2).sum(1)

    soup = greedy_soup(tables(0.5, 0.5), measured(distance, None, lambda params: params))
    assert soup.value == pytest.approx(np.mean(distance(soup.params, None)), rel=1e-6)
    single = measured(lambda model, data: float(distance(model, data).sum()), None, lambda params: params)
    with pytest.raises(ConfigError, match="one number, which has no interval"):
        greedy_soup(tables(0.5, 0.5), single)
    assert greedy_soup(tables(0.5, 0.5), single, accept="better").evaluations == 3


def test_the_interval_is_that_of_the_ratio():
    old, new = Score(np.array([4.0, 6, 5]), np.array([2.0, 3, 2])), Score(np.array([3.0, 6, 5]), np.array([2.0, 3, 2]))
    good, mean, se = improves(new, old, "interval")
    d = np.array([-1.0, 0, 0])
    residual = d - (-1 / 7) * np.array([2.0, 3, 2])
    assert mean == pytest.approx(-1 / 7)
    assert se == pytest.approx(math.sqrt((residual**2).sum() * 3 / 2) / 7)
    assert good == (mean + 2 * se < 0) and improves(new, old, "better")[0]


def test_data_that_count_no_target_are_refused():
    none = {**DATA, "mask": np.zeros_like(DATA["mask"])}
    with pytest.raises(ConfigError, match="No target"):
        linear_soup(tables(0.1), [1], metric=perplexity(bigram.OBJECTIVE, held_out(none)))
    with pytest.raises(ConfigError, match="accept is"):
        greedy_soup(tables(0.1), METRIC, accept="always")
    assert isinstance(METRIC.objective, Objective)
