"""What a training run tells while it goes on: each is called with a `StepInfo` after every chunk of steps.

    evaluate ─► record ─► metrics.jsonl, logs/training.log, the terminal        save ─► checkpoints/
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from capibara.loop import StepInfo

Callback = Callable[[StepInfo], None]
Sink = Callable[[dict[str, Any]], None]


def reaches(info: StepInfo, num_steps: int) -> bool:
    """Whether a chunk reached a multiple of `num_steps`; decided by the chunk alone, so a resumed run agrees."""
    return info.step // num_steps > (info.step - len(info.losses)) // num_steps


def record(
    sinks: Sequence[Sink],
    *,
    learning_rate: Callable[[int], Any] | None = None,
    evaluate: Callable[[StepInfo], dict[str, float] | None] | None = None,
) -> Callback:
    """Makes one flat entry of each chunk and hands it to every sink.

    Args:
      sinks: Each is called with the entry: `step, loss, tokens_per_s, skipped`, what the strategy reports, and
        what `evaluate` returned.
      learning_rate: Schedule; the entry says what the last step of the chunk used.
      evaluate: Returns a dict where an evaluation is due, else None.
    """

    def call(info: StepInfo) -> None:
        finite = info.losses[np.isfinite(info.losses)]
        loss = float(finite.mean(dtype=np.float64)) if finite.size else float("nan")
        entry = {"step": info.step, "loss": loss, "tokens_per_s": info.tokens_per_s, "skipped": info.skipped}
        entry |= info.info
        if learning_rate is not None:
            entry["learning_rate"] = float(learning_rate(info.step - 1))
        entry |= (evaluate(info) if evaluate else None) or {}
        for sink in sinks:
            sink(entry)

    return call


def show(text: str) -> None:
    """Writes a line where a person may read it: on standard error, standard output is for results."""
    sys.stderr.write(text + "\n")


class TrainingLog:
    """`logs/training.log`: one line per entry with the local time, flushed at once, and the same line elsewhere.

    Args:
      path: The file; lines are appended.
      num_steps: Steps of the whole run.
      echo: Also gets every line, without its time.
      clock: Seconds, monotonic, for the time left.
    """

    def __init__(
        self,
        path: Path,
        num_steps: int,
        *,
        echo: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.num_steps, self.echo, self.clock = num_steps, echo, clock
        self._last: tuple[int, float] | None = None
        self._file = open(path, "a", encoding="utf-8")

    def note(self, text: str) -> None:
        """Writes one sentence."""
        self._file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        self._file.flush()
        if self.echo:
            self.echo(text)

    def __call__(self, entry: dict[str, Any]) -> None:
        """Writes an entry of `record`; a sink."""
        now, step = self.clock(), entry["step"]
        text = f"step {step}/{self.num_steps}  loss {entry['loss']:.4f}"
        if "eval_loss" in entry:
            text += f"  eval {entry['eval_loss']:.4f}"
            if entry.get("eval_se") is not None:
                text += f" ({entry['eval_change']:+.4f} ± {entry['eval_se']:.4f} since the start)"
        if "learning_rate" in entry:
            text += f"  lr {entry['learning_rate']:.2e}"
        text += f"  {entry['tokens_per_s']:,.0f} tokens/s"
        if self._last is not None and step > self._last[0]:
            left = (now - self._last[1]) / (step - self._last[0]) * (self.num_steps - step)
            text += f"  {int(left) // 60}:{int(left) % 60:02} left"
        if entry["skipped"]:
            text += f"  {entry['skipped']} steps skipped: loss or gradient not finite"
        self._last = (step, now)
        self.note(text)

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()


def early_stop(patience: int, value: Callable[[StepInfo], float | None]) -> Callback:
    """Ends `fit` when `value` has not fallen below its best for `patience` calls in a row.

    Args:
      patience: Values without a new best that end the training.
      value: What should fall, or None where there is no new value.
    """
    best, since = float("inf"), 0

    def call(info: StepInfo) -> None:
        nonlocal best, since
        now = value(info)
        if now is None:
            return
        best, since = (now, 0) if now < best else (best, since + 1)
        if since >= patience:
            raise StopIteration

    return call
