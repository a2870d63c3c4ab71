"""CPU seconds of `import capibara` and `capibara --help`; neither may load JAX (about 2 CPU-seconds on its own).

Each command runs in a fresh process; user and system seconds of the child are counted, so a busy machine changes
little. A bare `python -c pass` is the floor.
"""

from __future__ import annotations

import resource
import subprocess
import sys

from _common import emit, interleaved, row

LIMIT_S = 0.5
REPEATS = 11
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import capibara": [sys.executable, "-c", "import capibara"],
    "capibara --help": [sys.executable, "-c", "from capibara.cli import main; main(['--help'])"],
}


def main() -> None:
    """Runs each command in turn and prints the medians."""
    timings = interleaved({name: _call(command) for name, command in COMMANDS.items()}, repeats=REPEATS, clock=_cpu)
    rows = []
    for name, timing in timings.items():
        limited = name != "python -c pass"
        rows.append(
            row(
                f"`{name}`",
                round(timing.median, 3),
                "CPU-s",
                spread=(timing.low, timing.high),
                limit=f"< {LIMIT_S} CPU-s" if limited else "",
                met=timing.median < LIMIT_S if limited else None,
            )
        )
    emit("import_cost", rows)


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _call(command: list[str]):
    return lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
