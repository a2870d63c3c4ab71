"""What a run gives back, in words and numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from capibara.training.results import ConsensusResults, Judgement, TrainingResults


def judged(sums: list[float], tokens: list[float]) -> Judgement:
    return Judgement(sum(sums) / sum(tokens), np.array(sums), np.array(tokens))


BEFORE = judged([30.0, 62.0, 40.0, 51.0], [10.0, 20.0, 13.0, 17.0])
AFTER = judged([20.0, 41.0, 27.0, 35.0], [10.0, 20.0, 13.0, 17.0])
HISTORY = [
    {"round": 0, "outcome": "committed", "loss": 3.0, "reasons": ["backed", "backed", "late", "outvoted"]},
    {"round": 1, "outcome": "refused", "loss": 2.9, "reasons": ["backed", "backed", "backed", "not_finite"]},
    {"round": 2, "outcome": "committed", "loss": 2.8, "reasons": ["backed", "backed", "backed", "outvoted"]},
]
for entry in HISTORY:
    entry["strategies"] = ["plain"] * 4


def consensus(**changes) -> ConsensusResults:
    given = {
        "consensus_model": object(), "rounds": 3, "history": HISTORY, "certificate_path": Path("runs/a/rounds.jsonl"),
        "run_path": Path("runs/a"), "head": "0123456789abcdef" * 4, "before": BEFORE, "after": AFTER,
    }  # fmt: skip
    return ConsensusResults(**given | changes)


def test_backing_is_told_by_strategy_where_there_are_several():
    history = [{**entry, "strategies": ["plain", "convexity"] * 2} for entry in HISTORY]
    assert consensus(history=history).by_strategy() == {"plain": (5, 6), "convexity": (3, 6)}
    told = "Node-rounds that backed, by strategy: convexity 3 of 6, plain 5 of 6."
    assert told in consensus(history=history).summary() and "by strategy" not in consensus().summary()


def test_the_paired_change_is_the_ratio_of_sums_and_its_error_that_of_the_residuals():
    """mean = Σd/Σt; SE = √(n/(n−1) Σ(d − mean·t)²)/Σt, written out."""
    difference, tokens = np.array([-10.0, -21.0, -13.0, -16.0]), np.array([10.0, 20.0, 13.0, 17.0])
    mean = -60.0 / 60.0
    residuals = difference - mean * tokens  # 0, −1, 0, 1
    assert AFTER.against(BEFORE) == pytest.approx((mean, np.sqrt(4 / 3 * (residuals**2).sum()) / 60.0))
    assert AFTER.against(AFTER) == (0.0, 0.0)


def test_the_error_agrees_with_repeated_draws():
    """Over 2,000 draws of 50 sequences the mean SE is within 10 % of the spread of the means."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 30, (2000, 50)).astype(float)
    sums, nothing = tokens * rng.normal(0.1, 0.05, (2000, 50)), [0.0] * 50
    pairs = zip(sums.tolist(), tokens.tolist(), strict=True)
    found = [judged(s, t).against(judged(nothing, t)) for s, t in pairs]
    means, errors = np.array(found).T
    assert errors.mean() == pytest.approx(means.std(), rel=0.1)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [(BEFORE, AFTER, "lower by more than"), (AFTER, BEFORE, "higher by more than"), (AFTER, AFTER, "no more than")],
)
def test_a_change_is_said_with_its_error(before, after, said: str):
    text = after.told(before)
    assert f"{before.loss:.4f} → {after.loss:.4f} nats a token" in text and "paired, 4 sequences" in text
    assert said in text


def test_the_summary_says_rounds_who_was_kept_out_the_loss_and_where_the_certificates_are():
    results = consensus()
    assert results.accused() == {2: {"late": 1}, 3: {"outvoted": 2, "not_finite": 1}}
    assert results.named() == [3]
    lines = results.summary().splitlines()
    assert lines[0] == "3 rounds, 2 committed, 1 refused."
    assert lines[1] == "Named as lying or broken: node 3 (outvoted in 2, not finite in 1 of 3 rounds)."
    assert lines[2] == "Kept out now and then: node 2 late in 1 of 3 rounds."
    assert lines[3].startswith("test loss 3.0500 → 2.0500 nats a token (change -1.0000")
    assert lines[4] == "certificates: runs/a/rounds.jsonl (last hash 0123456789abcdef…)"


def test_a_run_without_accusations_or_a_test_split_says_less():
    honest = [{**entry, "reasons": ["backed"] * 4} for entry in HISTORY]
    summary = consensus(history=honest, before=None, after=None).summary()
    assert "Named" not in summary and "Kept out" not in summary and "test loss" not in summary


def test_the_repr_is_the_summary_and_not_the_arrays():
    assert repr(consensus()) == f"ConsensusResults({consensus().summary()})"
    training = TrainingResults(object(), 4, [], Path("runs/solo-1"), BEFORE, AFTER)
    assert repr(training).startswith("TrainingResults(4 steps.") and "array" not in repr(training)


def test_json_holds_everything_but_the_model():
    told = json.loads(json.dumps(consensus(sample="We the people").to_json()))
    assert told["rounds"] == 3 and told["named"] == [3] and told["sample"] == "We the people"
    assert told["accused"] == {"2": {"late": 1}, "3": {"outvoted": 2, "not_finite": 1}}
    assert told["test"]["change"] == pytest.approx(-1.0)
    training = TrainingResults(object(), 4, HISTORY, Path("runs/solo-1"), BEFORE, AFTER)
    assert json.loads(json.dumps(training.to_json()))["eval"]["before"] == BEFORE.loss


def test_a_training_says_its_steps_speed_and_what_was_skipped():
    history = [
        {"step": 10, "loss": 3.0, "tokens_per_s": 900.0, "skipped": 2},
        {"step": 20, "loss": 2.5, "tokens_per_s": 1000.0, "skipped": 1},
    ]
    lines = TrainingResults(object(), 20, history, Path("runs/solo-1"), BEFORE, AFTER).summary().splitlines()
    assert lines[0] == "20 steps, training loss 2.5000, 1,000 tokens/s."
    assert lines[1] == "3 steps were skipped: their loss or gradient was not finite."
    assert lines[2].startswith("eval loss 3.0500 → 2.0500") and lines[3] == "run: runs/solo-1"
