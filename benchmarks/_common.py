"""What the benchmarks share: interleaved timing, a description of the machine, and the one line each prints.

A benchmark is a script that runs alone (`python benchmarks/vote.py`) and whose last line of output is one JSON object:

    {"benchmark": "vote", "rows": [{"measure": "…", "value": 2.8, "unit": "×", "limit": "≤ 3", "met": true}]}

`run.py` collects those lines into RESULTS.md. Nothing here imports JAX.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers", "byzfl")
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")


class Timing(NamedTuple):
    """Seconds of one of several interleaved candidates: the median, the fastest and the slowest repeat."""

    median: float
    low: float
    high: float


def interleaved(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    repeats: int = 7,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Times candidates in turn, so that a machine that slows down slows all of them.

    Every candidate runs once untimed (compilation, page faults), then once in each repeat; the order rotates.

    Args:
      candidates: Name to a function without arguments that returns only when its work is done
        (`jax.block_until_ready`).
      repeats: Timed runs of each.
      clock: Seconds; `time.process_time` counts CPU seconds instead of elapsed ones.
    """
    names = list(candidates)
    for name in names:
        candidates[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats):
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            began = clock()
            candidates[name]()
            seconds[name].append(clock() - began)
    return {name: Timing(statistics.median(s), min(s), max(s)) for name, s in seconds.items()}


def row(
    measure: str,
    value: float | str,
    unit: str = "",
    *,
    spread: Sequence[float] | None = None,
    limit: str = "",
    met: bool | None = None,
) -> dict[str, Any]:
    """One line of the table.

    Args:
      measure: What was measured, in words.
      value: The median, or a text where it is no number.
      unit: `s`, `ms`, `×`, `%`, `MB`, `tokens/s`, …
      spread: Lowest and highest value, in the same unit.
      limit: What is aimed at or must hold, in words (`≤ 5 %`).
      met: Whether it holds; None where there is no limit.
    """
    entry: dict[str, Any] = {"measure": measure, "value": value, "unit": unit}
    if spread is not None:
        entry["spread"] = [float(spread[0]), float(spread[1])]
    if limit:
        entry["limit"] = limit
    if met is not None:
        entry["met"] = bool(met)
    return entry


def emit(benchmark: str, rows: Sequence[dict[str, Any]], **extra: Any) -> None:
    """Prints the one JSON line that a benchmark ends with; `extra` is kept in results.jsonl, outside the table."""
    print(json.dumps({"benchmark": benchmark, "rows": list(rows), **extra}), flush=True)


def machine() -> dict[str, Any]:
    """The processor with the instructions that matter here, usable cores, memory and system."""
    import psutil

    model, flags = _processor()
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        cores = os.cpu_count() or 1
    return {
        "cpu": model,
        "instructions": [name for name in INSTRUCTIONS if name in flags],
        "cores": cores,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """The versions of Python and of those of `packages` that this environment has."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def say(text: str) -> None:
    """A progress line, on standard error: standard output is for the result."""
    print(text, file=sys.stderr, flush=True)


def _processor() -> tuple[str, set[str]]:
    model, flags = platform.processor() or "unknown processor", set[str]()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags.update(value.split())
    return model, flags
