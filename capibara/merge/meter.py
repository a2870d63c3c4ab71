"""One live line on a terminal: what is being done, bytes, bytes a second, and what is left. On standard error."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from rich.console import Console
from rich.live import Live
from rich.text import Text

from capibara.merge.inspect import readable

EVERY_S = 0.1


class Meter:
    """Call it with (what, bytes done, bytes in all); it is a context.

    Args:
      enabled: False shows nothing, as does anything that is no terminal.
      console: Instead of standard error.
      clock: Seconds, monotonic.
    """

    def __init__(
        self, *, enabled: bool = True, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ):
        console = console or Console(stderr=True)
        shown = enabled and console.is_terminal and not os.environ.get("CI")
        self.live = Live(console=console, refresh_per_second=8, transient=True) if shown else None
        self.clock, self.what = clock, ""
        self.began = self.drawn = 0.0

    def __enter__(self) -> Meter:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.live:
            self.live.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        now = self.clock()
        if what != self.what:
            self.what, self.began, self.drawn = what, now, 0.0
        if self.live and (now - self.drawn >= EVERY_S or done == total):
            self.drawn = now
            self.live.update(Text(self.line(done, total, now - self.began), style="dim"))

    def line(self, done: int, total: int, seconds: float) -> str:
        """`merging  1.2 GB of 8 GB  1.43 GB/s  5 s left`."""
        speed = done / seconds if seconds > 0 else 0.0
        left = f"  {(total - done) / speed:.0f} s left" if speed > 0 else ""
        return f"{self.what}  {readable(done)} of {readable(total)}  {readable(speed)}/s{left}"
