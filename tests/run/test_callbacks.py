"""What a run tells: one entry a chunk, log lines, evaluations on time, and an end when nothing gets better."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from capibara.loop import StepInfo
from capibara.run.callbacks import TrainingLog, early_stop, reaches, record
from capibara.types import TrainState


def told(step: int, losses: list[float], **changes) -> StepInfo:
    info = StepInfo(TrainState(step, {}, ()), step, np.array(losses, np.float32), {"gradient_norm": 2.0}, 0, 0, 100.0)
    return info._replace(**changes)


@pytest.mark.parametrize("every", [1, 3, 4, 10])
@pytest.mark.parametrize("chunk", [1, 4, 7])
def test_each_multiple_is_reached_by_the_one_chunk_that_holds_it(every: int, chunk: int):
    ends = list(range(chunk, 43, chunk))
    reached = [end for end in ends if reaches(told(end, [0.0] * chunk), every)]
    expected = sorted({-(-multiple // chunk) * chunk for multiple in range(every, ends[-1] + 1, every)})
    assert reached == expected


def test_an_entry_has_the_mean_loss_of_the_chunk_and_goes_to_every_sink():
    first: list[dict] = []
    second: list[dict] = []
    tell = record((first.append, second.append), learning_rate=lambda step: step / 10)
    tell(told(4, [1.0, 2.0, 3.0, 6.0]))
    assert first == second == [
        {"step": 4, "loss": 3.0, "tokens_per_s": 100.0, "skipped": 0, "gradient_norm": 2.0, "learning_rate": 0.3}
    ]  # fmt: skip


def test_a_skipped_step_does_not_spoil_the_mean_and_no_finite_loss_is_nan():
    entries: list[dict] = []
    tell = record((entries.append,))
    tell(told(3, [1.0, np.nan, 3.0], skipped=1))
    tell(told(6, [np.nan, np.inf, np.nan], skipped=3))
    assert entries[0]["loss"] == 2.0 and entries[0]["skipped"] == 1
    assert np.isnan(entries[1]["loss"])


def test_an_evaluation_is_part_of_its_entry():
    entries: list[dict] = []
    tell = record((entries.append,), evaluate=lambda info: {"eval_loss": 1.5} if info.step == 8 else None)
    tell(told(4, [1.0]))
    tell(told(8, [1.0]))
    assert ["eval_loss" in entry for entry in entries] == [False, True]


def entry(step: int, **more) -> dict:
    return {"step": step, "loss": 2.5, "tokens_per_s": 1234.5, "skipped": 0} | more


def test_a_log_line_has_step_loss_evaluation_rate_speed_and_time_left(tmp_path: Path):
    """10 steps in 30 s: the 80 that are left take 240 s."""
    lines: list[str] = []
    clock = itertools.count(step=30.0).__next__
    with TrainingLog(tmp_path / "training.log", 100, echo=lines.append, clock=clock) as log:
        log(entry(10, learning_rate=3e-4))
        log(entry(20, eval_loss=2.25, eval_change=-0.5, eval_se=0.01, skipped=2))
    assert lines[0] == "step 10/100  loss 2.5000  lr 3.00e-04  1,234 tokens/s"
    assert lines[1] == (
        "step 20/100  loss 2.5000  eval 2.2500 (-0.5000 ± 0.0100 since the start)  1,234 tokens/s  4:00 left"
        "  2 steps skipped: loss or gradient not finite"
    )


def test_the_file_has_the_same_lines_with_the_time_and_earlier_ones_stay(tmp_path: Path):
    path, lines = tmp_path / "training.log", []
    with TrainingLog(path, 100, echo=lines.append) as log:
        log.note("first")
        assert path.read_text().endswith(" first\n"), "a line is flushed at once"
    with TrainingLog(path, 100, echo=lines.append) as log:
        log(entry(10))
    written = path.read_text().splitlines()
    assert [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", "", line) for line in written] == lines
    assert len(lines) == 2


def test_without_progress_in_steps_there_is_no_time_left(tmp_path: Path):
    """The clock of a resumed run starts anew, and a repeated step must not divide by zero."""
    lines: list[str] = []
    with TrainingLog(tmp_path / "training.log", 100, echo=lines.append, clock=lambda: 1.0) as log:
        log(entry(10))
        log(entry(10))
    assert not any("left" in line for line in lines)


def test_early_stop_counts_values_without_a_new_best():
    """Best 2.0 at the second value; the third and fourth do not beat it, chunks without a value do not count."""
    values = iter([3.0, None, 2.0, 2.0, None, 2.5])
    stop = early_stop(2, lambda info: next(values))
    for _ in range(5):
        stop(told(1, [0.0]))
    with pytest.raises(StopIteration):
        stop(told(1, [0.0]))


def test_a_value_that_is_not_a_number_is_no_new_best():
    values = iter([np.nan, 1.0, np.nan, np.nan])
    stop = early_stop(2, lambda info: next(values))
    stop(told(1, [0.0]))
    stop(told(1, [0.0]))
    stop(told(1, [0.0]))
    with pytest.raises(StopIteration):
        stop(told(1, [0.0]))
