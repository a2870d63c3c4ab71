"""`metrics.jsonl`: one JSON object a line, for people and plots. NaN is written as a string."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np


class MetricsWriter:
    """Appends measurements; every line is flushed, so that a killed run loses none that was written.

    Args:
      path: The file; where a killed run left a torn last line, the next one begins on a line of its own.
      clock: Seconds since the epoch, for `time`.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time):
        self.path, self.clock = path, clock
        self._file = open(path, "a+b")
        if _is_torn(self._file):
            self._file.write(b"\n")

    def write(self, **values: Any) -> None:
        """Appends one object with the time and the values given."""
        self._file.write(json.dumps(plain({"time": self.clock(), **values})).encode() + b"\n")
        self._file.flush()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a metrics file; a torn line is left out, and no file is no lines."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for raw in file:
            try:
                line = json.loads(raw)
            except ValueError:
                continue
            if isinstance(line, dict):
                yield _numbers(line)


def _is_torn(file: Any) -> bool:
    if not file.seek(0, 2):
        return False
    file.seek(-1, 2)
    return file.read(1) != b"\n"


def plain(value: Any) -> Any:
    """As JSON types; a number that is not finite, which JSON does not know, becomes a string."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_numbers(one) for one in value]
    return float(value) if value in ("nan", "inf", "-inf") else value
