"""What a person sees while a run goes on: one live line on a terminal, plain lines elsewhere.

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


class Display:
    """Shows rounds as they happen: step, loss, tokens/s, time left and how many nodes back the commit.

    Args:
      num_rounds: Rounds of the whole run.
      num_nodes: Nodes, for the backing.
      steps: Local steps a round.
      enabled: False prints nothing.
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
        live = enabled and self.console.is_terminal and not os.environ.get("CI")
        self.live = Live(console=self.console, refresh_per_second=8, transient=True) if live else None
        self.began = self.round_began = clock()
        self.durations: list[float] = []
        self.last, self.finished, self.phase = "", 0, "starting"

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
            self.note(f"{finished} of {self.num_rounds} rounds are on disk; going on.")

    def phase_begins(self, phase: str) -> None:
        """Names what the round is doing now."""
        self.phase = phase
        self._draw()

    def note(self, text: str) -> None:
        """One sentence that stays on the screen."""
        self.console.print(Text(text), highlight=False)

    def round_ends(self, line: dict[str, Any], loss: float, tokens: int, test_loss: float | None) -> None:
        """Prints the round that has just been committed or refused."""
        now = self.clock()
        seconds = now - self.round_began
        self.durations.append(seconds)
        self.round_began, self.finished = now, line["round"] + 1
        rest = sum(self.durations[-5:]) / len(self.durations[-5:]) * (self.num_rounds - self.finished)
        named = ", ".join(
            f"node {n['id']} {n['reason'].replace('_', ' ')}" for n in line["nodes"] if n["reason"] != "backed"
        )
        test = f"  test {test_loss:.4f}" if test_loss is not None else ""
        self.last = (
            f"round {self.finished}/{self.num_rounds}  step {self.finished * self.steps}  loss {loss:.4f}{test}  "
            f"{tokens / max(seconds, 1e-9):,.0f} tokens/s  {_duration(rest)} left  "
            f"backing {line['quorum']['backing']}/{self.num_nodes}"
        )
        self.note(f"{self.last}  {line['outcome']}" + (f"  ({named})" if named else ""))
        self._draw()

    def _draw(self) -> None:
        if self.live:
            done = f"{self.finished}/{self.num_rounds}"
            elapsed = _duration(self.clock() - self.began)
            self.live.update(Text(f"⠿ round {done}  {self.phase.replace('_', ' ')}  {elapsed} elapsed", style="dim"))


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
