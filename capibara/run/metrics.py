"""`metrics.jsonl`: one JSON object a line, for people and plots. Nothing is decided by it; NaN is written as a string."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


class MetricsWriter:
    """Appends measurements; every line is flushed, so that a killed run loses none that was written.

    Args:
      path: The file.
      clock: Seconds since the epoch, for `time`.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time):
        self.path, self.clock = path, clock
        torn = path.exists() and not path.read_bytes().endswith((b"", b"\n")[path.stat().st_size > 0 :])
        self._file = open(path, "a", encoding="utf-8")
        if torn:
            self._file.write("\n")  # or the next line would be lost with the torn one

    def write(self, **values: Any) -> None:
        """Appends one object with the time and the values given."""
        self._file.write(json.dumps(_plain({"time": self.clock(), **values})) + "\n")
        self._file.flush()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a metrics file; a torn last line is left out, and no file is no lines."""
    if not path.exists():
        return
    for raw in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(raw)
        except ValueError:
            continue
        yield {key: _number(value) for key, value in line.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _number(value: Any) -> Any:
    return float(value) if value in ("nan", "inf", "-inf") else value
