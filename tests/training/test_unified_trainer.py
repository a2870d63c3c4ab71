"""`UnifiedTrainer`: one model on folders of text; stopped anywhere and called again it ends in the same bits."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import small
from faults.faulty import FaultyFiles

from capibara.core.model import ModularCapibaraModel, parameters
from capibara.errors import ConfigError, DataError, RunError
from capibara.loop import StepInfo
from capibara.run.checkpoint import checkpoints, load_checkpoint
from capibara.run.metrics import read_metrics
from capibara.training import UnifiedTrainer
from capibara.training.results import TrainingResults
from capibara.training.solo import train_solo

slow = pytest.mark.slow
STEPS, CHUNK, SAVE = 10, 2, 4
TRAINING = {
    "num_steps": STEPS, "log_every": CHUNK, "checkpoint_every": SAVE, "batch_size": 4, "ema_decay": 0.9,
    "eval_sequences": 200,
}  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train/` and `eval/`: six thousand characters and three thousand of two presidents."""
    folder = tmp_path_factory.mktemp("text")
    small.speeches(folder / "train", 0, 2, 3000)
    small.speeches(folder / "eval", 8, 1, 3000)
    return folder


def pairs(text: Path, folder: Path, *, seed: int = 0, changes: dict[str, Any] | None = None, **options: Any):
    """`train_solo` of the byte pairs; a fresh model each time, as a script that is started again has it."""
    config = small.config(training=TRAINING | (changes or {}))
    options = {"eval_data": text / "eval", "model": small.Pairs(seed)} | options
    return train_solo(config, text / "train", folder, **options)


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory) -> TrainingResults:
    """A training that was never stopped."""
    return pairs(text, tmp_path_factory.mktemp("whole") / "run")


def newest(path: Path) -> dict[str, dict[str, np.ndarray]]:
    return load_checkpoint(checkpoints(path)[-1])[0]


def numbers(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the time and the speed."""
    return [{key: value for key, value in one.items() if key not in ("time", "tokens_per_s")} for one in history]


def assert_same_end(got: TrainingResults, whole: TrainingResults) -> None:
    """Weights, optimiser, evaluation and history, bit for bit."""
    for section, tensors in newest(whole.run_path).items():
        for name, leaf in tensors.items():
            np.testing.assert_array_equal(newest(got.run_path)[section][name], leaf, err_msg=f"{section} {name}")
    for name, leaf in parameters(whole.model).items():
        np.testing.assert_array_equal(parameters(got.model)[name], leaf)
    assert numbers(got.history) == numbers(whole.history)
    for ours, theirs in ((got.before, whole.before), (got.after, whole.after)):
        np.testing.assert_array_equal(ours.sums, theirs.sums)


class Died(BaseException):
    """Like kill −9, it is caught by nothing on its way out."""


def stop_at(step: int, error: BaseException):
    def call(info: StepInfo) -> None:
        if info.step == step:
            raise error

    return call


@pytest.mark.parametrize("error", [KeyboardInterrupt, Died])
@pytest.mark.parametrize("step", [2, pytest.param(4, marks=slow), 6, pytest.param(8, marks=slow), 10])
def test_stopped_after_any_chunk_and_called_again_it_ends_in_the_same_bits(text, whole, tmp_path, error, step: int):
    """A Ctrl-C saves first; a crash goes back to the last checkpoint. The fresh model's weights play no part."""
    with pytest.raises(error) as stopped:
        pairs(text, tmp_path / "run", callbacks=[stop_at(step, error())])
    if error is KeyboardInterrupt:
        assert f"step {step} is saved. To go on, train with checkpoint_dir=" in stopped.value.__notes__[0]
    asked: list[int] = []
    got = pairs(text, tmp_path / "run", seed=1, callbacks=[lambda info: asked.append(info.step)])
    begun = step if error is KeyboardInterrupt else (step - CHUNK) // SAVE * SAVE if step % SAVE else step
    assert asked == list(range(begun + CHUNK, STEPS + 1, CHUNK))
    assert_same_end(got, whole)


def die() -> None:
    raise Died


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_dying_at_every_file_operation_and_called_again_it_ends_in_the_same_bits(text, whole, tmp_path, part: int):
    """Before and in the middle of every write, fsync, rename and removal, from the creation of the run to its end."""
    counting = FaultyFiles(die, armed=True)
    pairs(text, tmp_path / "counted", files=counting)
    assert len(counting.trace) > 80
    for at, point in list(enumerate(counting.trace, 1))[part::4]:
        folder = tmp_path / "run"
        with pytest.raises(Died):
            pairs(text, folder, files=FaultyFiles(die, at, armed=True))
        try:
            assert_same_end(pairs(text, folder), whole)
        except Exception as error:
            error.add_note(f"died at point {at}: {point}")
            raise
        shutil.rmtree(folder)


def test_stopped_again_and_again_it_ends_in_the_same_bits(text, whole, tmp_path):
    for step in (CHUNK, 3 * CHUNK, 4 * CHUNK):
        with pytest.raises(KeyboardInterrupt):
            pairs(text, tmp_path / "run", callbacks=[stop_at(step, KeyboardInterrupt())])
    assert_same_end(pairs(text, tmp_path / "run"), whole)


def test_a_finished_training_called_again_trains_nothing(text, whole):
    def none(info: StepInfo) -> None:
        raise AssertionError("no step is left")

    log = (whole.run_path / "logs" / "training.log").read_text()
    got = pairs(text, whole.run_path, seed=1, callbacks=[none])
    assert_same_end(got, whole)
    assert (whole.run_path / "logs" / "training.log").read_text().startswith(log)


def test_a_damaged_checkpoint_is_walked_past(text, whole, tmp_path):
    with pytest.raises(Died):
        pairs(text, tmp_path / "run", callbacks=[stop_at(STEPS, Died())])
    newest_file = checkpoints(tmp_path / "run")[-1] / "params.safetensors"
    data = bytearray(newest_file.read_bytes())
    data[-1] ^= 1
    newest_file.write_bytes(data)
    notes: list[str] = []
    assert_same_end(pairs(text, tmp_path / "run", echo=notes.append), whole)
    assert any("Going back to the checkpoint before it" in note for note in notes)


def test_the_loss_falls_and_the_model_is_the_average(text, whole):
    change, se = whole.after.against(whole.before)
    assert change < -2 * se
    assert whole.steps == STEPS and [entry["step"] for entry in whole.history] == list(range(CHUNK, STEPS + 1, CHUNK))
    kept = newest(whole.run_path)["inner"]
    table = next(leaf for name, leaf in kept.items() if name.startswith("average"))
    np.testing.assert_array_equal(parameters(whole.model)["table"], table)


def test_the_evaluation_is_the_loss_on_the_evaluation_text(text, whole):
    """Every sequence of `eval/` once, judged again by hand: one byte pair after the other."""
    logits = np.asarray(parameters(whole.model)["table"], np.float64)
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    (file,) = (text / "eval").iterdir()
    ids = [*file.read_bytes(), 256]
    count = len(whole.after.sums) * 32
    assert count <= len(ids) - 1 < count + 32, "all whole sequences of the text"
    total = -sum(logs[a, b] for a, b in zip(ids[:count], ids[1 : count + 1], strict=True))
    assert whole.after.sums.sum() == pytest.approx(total, rel=1e-5)
    assert whole.after.loss == pytest.approx(total / count, rel=1e-5)


def test_the_log_file_tells_the_run(whole):
    lines = (whole.run_path / "logs" / "training.log").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in lines)
    said = [line[20:] for line in lines]
    assert said[0].startswith(f"{STEPS} steps of 4 sequences; the run needs ")
    assert said[1].startswith("eval loss at the start 5.5"), "about ln 257 = 5.549 nats"
    steps = [line.split("  ")[0] for line in said if line.startswith("step ")]
    assert steps == [f"step {k}/10" for k in (2, 4, 6, 8, 10)]
    assert "  eval " in said[6] and "since the start)" in said[6]
    assert said[7].startswith("10 steps, training loss ")


def test_metrics_are_the_history(whole):
    assert numbers(list(read_metrics(whole.run_path / "metrics.jsonl"))) == numbers(whole.history)
    last = whole.history[-1]
    assert last["eval_loss"] == whole.after.loss and last["skipped"] == 0
    assert [("eval_loss" in entry) for entry in whole.history].count(True) == 1, "an epoch is longer than the training"


# The façade


def trainer(**options: Any) -> UnifiedTrainer:
    return UnifiedTrainer(**({"base": small.config(), "batch_size": 4} | options))


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory) -> tuple[UnifiedTrainer, TrainingResults]:
    """The Quick Start form with a decoder of one block."""
    folder = tmp_path_factory.mktemp("façade")
    fitted = trainer(model=ModularCapibaraModel(small.config(), seed=3), learning_rate=5e-3)
    results = fitted.train(
        train_data=str(text / "train"), eval_data=str(text / "eval"), num_epochs=0.2,
        checkpoint_dir=str(folder / "run"), progress=False,
    )  # fmt: skip
    return fitted, results


def test_the_facade_is_equivalent_to_its_core_calls(text, trained, tmp_path):
    fitted, results = trained
    config = small.config().replace(training={"learning_rate": 5e-3, "batch_size": 4, "num_epochs": 0.2})
    model = ModularCapibaraModel(small.config(), seed=3)
    same = train_solo(config, text / "train", tmp_path / "run", eval_data=text / "eval", model=model)
    assert same.steps == results.steps > 0
    for name, leaf in parameters(results.model).items():
        np.testing.assert_array_equal(parameters(same.model)[name], leaf)
    assert numbers(same.history) == numbers(results.history)


def test_the_model_is_trained_in_place_and_saved(trained):
    fitted, results = trained
    assert fitted.model is results.model
    loaded = ModularCapibaraModel.load(results.run_path / "model")
    for name, leaf in parameters(results.model).items():
        np.testing.assert_array_equal(parameters(loaded)[name], leaf)
    assert isinstance(loaded.generate("The ", 4), str)


def test_a_batch_in_parts_trains_like_the_whole(text, trained, tmp_path):
    """One sequence four times against four at once: the order of float32 sums differs, and AdamW amplifies it."""
    model = ModularCapibaraModel(small.config(), seed=3)
    parts = trainer(model=model, learning_rate=5e-3, batch_size=1, gradient_accumulation_steps=4)
    got = parts.train(text / "train", text / "eval", num_epochs=0.2, checkpoint_dir=tmp_path / "run", progress=False)
    assert got.steps == trained[1].steps
    ours, theirs = ([entry["loss"] for entry in one.history] for one in (got, trained[1]))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_steps_see_batch_size_times_accumulation_steps_sequences():
    base = small.config(training={"batch_size": 12, "accumulation_steps": 3})
    sizes = {
        "as written": ({"batch_size": 16, "gradient_accumulation_steps": 8}, (128, 8)),
        "the base": ({}, (12, 3)),
        "passes of the base, four of them": ({"gradient_accumulation_steps": 4}, (16, 4)),
        "larger passes": ({"batch_size": 5}, (15, 3)),
    }
    for options, (batch, parts) in sizes.values():
        training = UnifiedTrainer(base=base, **options).config.training
        assert (training.batch_size, training.accumulation_steps) == (batch, parts)


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"gradient_accumulation_steps": 0}, {"batch_size": -4}])
def test_a_size_that_cannot_be_meant_is_refused(wrong):
    with pytest.raises(ConfigError, match="should be greater than or equal to 1"):
        UnifiedTrainer(**wrong)


def test_gradient_checkpointing_goes_by_the_argument_then_the_model_then_the_base():
    model, on = ModularCapibaraModel(small.config()), small.config(training={"gradient_checkpointing": True})

    def switched(**options) -> bool:
        return UnifiedTrainer(**options).config.training.gradient_checkpointing

    assert switched(use_gradient_checkpointing=True) and not switched()
    assert switched(model=ModularCapibaraModel(on)) and switched(base=on, model=model)
    assert not switched(model=model, base=on, use_gradient_checkpointing=False)


def test_an_unknown_setting_names_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'schedule'"):
        UnifiedTrainer(scheduel="wsd")


def test_eval_every_is_of_the_call_then_of_the_constructor(text, tmp_path):
    fitted = trainer(model=small.Pairs(), eval_every=4, log_every=2)
    options = {"num_steps": 6, "progress": False}
    first = fitted.train(text / "train", text / "eval", checkpoint_dir=tmp_path / "a", **options)
    second = fitted.train(text / "train", text / "eval", checkpoint_dir=tmp_path / "b", eval_every=2, **options)
    evaluated = [[entry["step"] for entry in one.history if "eval_loss" in entry] for one in (first, second)]
    assert evaluated == [[4, 6], [2, 4, 6]]
    with pytest.raises(ConfigError, match="eval_every is at least 1 step; got 0"):
        fitted.train(text / "train", checkpoint_dir=tmp_path / "c", eval_every=0)


def test_a_callback_ends_the_training_and_another_call_goes_on(text, whole, tmp_path):
    first = pairs(text, tmp_path / "run", callbacks=[stop_at(4, StopIteration())])
    assert first.steps == 4 and first.after.loss < first.before.loss
    assert_same_end(pairs(text, tmp_path / "run"), whole)


# Bad input


def test_resume_demands_or_refuses_a_run(text, whole, tmp_path):
    with pytest.raises(RunError, match="holds no run to resume"):
        pairs(text, tmp_path / "none", resume=True)
    with pytest.raises(RunError, match="holds a run already"):
        pairs(text, whole.run_path, resume=False)
    with pytest.raises(ConfigError, match="resume is 'auto', True or False; got 'maybe'"):
        pairs(text, tmp_path / "none", resume="maybe")
    assert not (tmp_path / "none").exists()


def test_another_configuration_or_text_does_not_resume(text, whole, tmp_path):
    with pytest.raises(ConfigError, match=r"was started with training.batch_size = 4; now it is 2"):
        pairs(text, whole.run_path, changes={"batch_size": 2})
    with pytest.raises(ConfigError, match=r"training.num_steps = 10 \(by num_epochs and the length of the text\); now"):
        pairs(text, whole.run_path, changes={"num_steps": 12})
    with pytest.raises(DataError, match="The training text is not the one"):
        other = small.speeches(tmp_path / "other", 4, 2, 3000)
        config = small.config(training=TRAINING)
        train_solo(config, other, whole.run_path, eval_data=text / "eval", model=small.Pairs())


def test_an_empty_folder_is_no_text(text, tmp_path):
    (tmp_path / "empty").mkdir()
    for folders in ((tmp_path / "empty", text / "eval"), (text / "train", tmp_path / "empty")):
        with pytest.raises(DataError):
            trainer().train(*folders, checkpoint_dir=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_an_evaluation_text_shorter_than_a_sequence_is_padded(text, tmp_path):
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "a.txt").write_text("We the people")
    got = pairs(text, tmp_path / "run", eval_data=tmp_path / "short")
    assert got.after.tokens.tolist() == [13.0], "12 pairs and the end"
    assert got.history[-1]["eval_loss"] == got.after.loss


def test_without_evaluation_text_some_of_the_training_text_is_held_out(text, tmp_path):
    folder = small.speeches(tmp_path / "text", 0, 20, 8000)
    config = small.config(training=TRAINING, data={"held_out_fraction": 0.5})
    got = train_solo(config, folder, tmp_path / "run", model=small.Pairs())
    assert len(got.after.sums) >= 2 and "eval loss" in got.summary()


def test_too_little_held_out_text_is_no_evaluation(tmp_path):
    """Held-out splits of fewer than two sequences say nothing; the training goes on without."""
    folder = small.speeches(tmp_path / "text", 0, 20, 8000)
    config = small.config(training=TRAINING, data={"sequence_length": 10_000, "held_out_fraction": 0.3})
    got = train_solo(config.replace(training={"batch_size": 1}), folder, tmp_path / "run", model=small.Pairs())
    assert got.before is None and got.after is None and got.steps == STEPS
    assert "eval" not in got.summary() and "eval_loss" not in got.history[-1]


def test_too_little_text_for_a_step_says_what_would_do(text, tmp_path):
    with pytest.raises(DataError, match="a step needs 4000. Give more text, or lower batch_size or sequence_length"):
        pairs(text, tmp_path / "run", changes={"batch_size": 4000})


def test_a_model_that_knows_too_few_tokens_is_refused(text, tmp_path):
    model = ModularCapibaraModel(small.config(model={"vocab_size": 100}))
    with pytest.raises(ConfigError, match="The model knows 100 tokens and the tokenizer has 257"):
        trainer(model=model).train(text / "train", checkpoint_dir=tmp_path / "run", progress=False)


def test_skipped_steps_are_told_and_a_loss_that_stays_broken_stops_the_run(text, tmp_path):
    def broken_for(fewer: float):
        """Not finite wherever a sequence begins with a letter of the first half of the alphabet."""
        def loss(model, batch, key):
            first = batch["tokens"][0, 0] % 32
            return jnp.where(first < fewer, jnp.nan, 1.0) * model.loss(batch)

        return loss

    got = pairs(text, tmp_path / "some", loss=broken_for(8))
    skipped = sum(entry["skipped"] for entry in got.history)
    assert 0 < skipped < STEPS and f"{skipped} steps were skipped" in got.summary()
    with pytest.raises(RunError, match="100 steps in a row up to step 100 had a loss or gradient that is not finite"):
        pairs(text, tmp_path / "all", loss=broken_for(32), changes={"num_steps": 150, "checkpoint_every": None})


def test_a_directory_of_a_consensus_is_refused(text, tmp_path):
    from capibara.run.directory import Run

    Run.create(tmp_path / "run", "[consensus]\n").close()
    with pytest.raises(RunError, match="holds a consensus run"):
        pairs(text, tmp_path / "run")


def test_gradient_checkpointing_and_a_loss_of_ones_own_reach_the_training(text, tmp_path):
    """Twice the loss at the same rate: AdamW takes the same steps, and the reported loss is twice as high."""
    once = pairs(text, tmp_path / "once", changes={"clip_norm": None, "num_steps": 2})
    twice = pairs(
        text, tmp_path / "twice", changes={"clip_norm": None, "num_steps": 2},
        loss=lambda model, batch, key: 2 * model.loss(batch),
    )  # fmt: skip
    assert twice.history[0]["loss"] == pytest.approx(2 * once.history[0]["loss"], rel=1e-4)
    with pytest.raises(ConfigError, match="Pairs has none"):
        pairs(text, tmp_path / "remat", changes={"gradient_checkpointing": True})
