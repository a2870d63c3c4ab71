"""What is being done, bytes, bytes a second, and what is left: one live line on a terminal, plain lines elsewhere.

All on standard error. What takes less than `PLAIN_S` seconds prints no plain line.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable

from rich.console import Console
from rich.live import Live
from rich.text import Text

from capibara.merge.inspect import readable

EVERY_S = 0.1
PLAIN_S = 10.0


class Meter:
    """Call it with (what, bytes done, bytes in all); it is a context.

    Args:
      enabled: False shows nothing.
      console: Instead of standard error.
      clock: Seconds, monotonic.
    """

    def __init__(
        self, *, enabled: bool = True, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ):
        self.console = console or Console(stderr=True)
        live = enabled and self.console.is_terminal and not os.environ.get("CI")
        self.live = Live(console=self.console, refresh_per_second=8, transient=True) if live else None
        self.clock, self.what = clock, ""
        self.every = EVERY_S if live else PLAIN_S if enabled else math.inf
        self.began = self.drawn = clock()

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
            self.what, self.began = what, now
        if now - self.drawn < self.every and not (self.live and done == total):
            return
        self.drawn = now
        line = Text(self.line(done, total, now - self.began), style="dim")
        if self.live:
            self.live.update(line)
        else:
            self.console.print(line, soft_wrap=True)

    def line(self, done: int, total: int, seconds: float) -> str:
        """`merging  1.2 GB of 8 GB  1.43 GB/s  5 s left`; a total of 0 is one that is not known."""
        speed = done / seconds if seconds > 0 else 0.0
        if not total:
            return f"{self.what}  {readable(done)}  {readable(speed)}/s"
        left = f"  {(total - done) / speed:.0f} s left" if speed > 0 else ""
        return f"{self.what}  {readable(done)} of {readable(total)}  {readable(speed)}/s{left}"
