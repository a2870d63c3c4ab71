"""What a person sees while a run goes on: a line that lives on a terminal, and one plain line a round everywhere.

    round 3/8  step 60  loss 2.9134  test 2.8860  5,120 tokens/s  0:41 left  backing 6/8  committed  (6, 7 outvoted)
    ⠹ round 4/8  train  step 60  loss 2.9134  5,120 tokens/s  0:38 left  backing 6/8  0:24 elapsed

Everything goes to standard error, so that standard output carries the result alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from capibara.run.report import kept_out

FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"


class Display:
    """Shows rounds as they happen: step, loss, tokens/s, time left and how many nodes back the commit.

    Args:
      num_rounds: Rounds of the whole run.
      num_nodes: Nodes, for the backing.
      steps: Local steps a round.
      enabled: False prints nothing.
      console: Where to; standard error if None.
      clock: Seconds, monotonic.
    """

    def __init__(
        self,
        num_rounds: int,
        num_nodes: int,
        steps: int,
        *,
        enabled: bool = True,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.num_rounds, self.num_nodes, self.steps, self.clock = num_rounds, num_nodes, steps, clock
        self.console = console or Console(stderr=True, quiet=not enabled)
        self.began = self.round_began = clock()
        self.durations: list[float] = []
        self.last, self.finished, self.phase = "", 0, "starting"
        is_live = self.console.is_terminal and not self.console.is_dumb_terminal and not os.environ.get("CI")
        self.live = (
            Live(console=self.console, get_renderable=self.line, refresh_per_second=8, transient=True)
            if enabled and is_live
            else None
        )

    def __enter__(self) -> Display:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.live:
            self.live.stop()

    def start_at(self, finished: int) -> None:
        """Says where a resumed run stands."""
        self.finished, self.round_began = finished, self.clock()
        if finished:
            then = "going on." if finished < self.num_rounds else "nothing is left to do."
            self.note(f"{finished} of {self.num_rounds} rounds are on disk; {then}")

    def phase_begins(self, phase: str) -> None:
        """Names what the round is doing now."""
        self.phase = phase.replace("_", " ")

    def note(self, text: str) -> None:
        """One sentence that stays on the screen, however long, on a line of its own."""
        self.console.print(Text(text), soft_wrap=True)

    def round_ends(self, line: dict[str, Any], loss: float, tokens: int, test_loss: float | None) -> None:
        """Prints the round that has just been committed or refused."""
        now = self.clock()
        seconds = now - self.round_began
        self.durations.append(seconds)
        self.round_began, self.finished = now, line["round"] + 1
        self.phase = "starting" if self.finished < self.num_rounds else "finishing"
        test = f"  test {test_loss:.4f}" if test_loss is not None else ""
        self.last = (
            f"step {self.finished * self.steps}  loss {loss:.4f}{test}  {tokens / max(seconds, 1e-9):,.0f} tokens/s  "
            f"{duration(self.seconds_left())} left  backing {line['quorum']['backing']}/{self.num_nodes}"
        )
        out = kept_out([node["reason"] for node in line["nodes"]])
        named = f"  ({out})" if out else ""
        self.note(f"round {self.finished}/{self.num_rounds}  {self.last}  {line['outcome']}{named}")

    def seconds_left(self) -> float:
        """From the last rounds; the first one, which compiles, counts only while it is the only one."""
        recent = self.durations[1:][-5:] or self.durations
        return sum(recent) / len(recent) * (self.num_rounds - self.finished) if recent else 0.0

    def line(self) -> Text:
        """The live line as it is now."""
        now = self.clock()
        frame = FRAMES[int(now * 8) % len(FRAMES)] if self.console.encoding.startswith("utf") else "*"
        phase = self.phase if self.durations or self.phase in ("starting", "finishing") else f"{self.phase}, compiling"
        parts = [
            f"{frame} round {min(self.finished + 1, self.num_rounds)}/{self.num_rounds}",
            phase,
            *([self.last] if self.last else []),
            f"{duration(now - self.began)} elapsed",
        ]
        return Text("  ".join(parts), style="dim", no_wrap=True, overflow="ellipsis")


def duration(seconds: float) -> str:
    """`0:07`, `12:30`, `1:02:03`."""
    minutes, seconds = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
