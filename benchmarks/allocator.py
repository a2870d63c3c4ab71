"""A training step with `runtime.tune_allocator` and without: CPU time, page faults and peak memory.

XLA on CPU allocates its results and temporaries anew at every execution; glibc maps large blocks afresh each time, so
every step touches memory that the kernel must first clear. The small model shows what is left where the blocks stay
below glibc's threshold. A setting holds for a process, so each way has a process of its own; both stay alive, held to
one core, and train in turn.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time

from _common import emit, interleaved, row, say
from _step import LARGER, SMALL, Shape, training_steps
from _workers import Worker, hold_to_one_core

REPEATS = 7
SHAPES = (SMALL, LARGER)
WAYS = {"system": "as glibc sets it", "tuned": "tuned"}
MOST_TIME = 0.95


def main() -> None:
    """Prints both ways and their ratio for each shape."""
    rows = []
    for number, shape in enumerate(SHAPES):
        workers = {way: Worker([__file__, str(number), way]) for way in WAYS}
        faults: dict[str, list[int]] = {way: [] for way in WAYS}
        timings = interleaved(
            {
                way: lambda worker=worker, told=faults[way]: told.append(int(worker.run()[0]))
                for way, worker in workers.items()
            },
            repeats=REPEATS,
            clock=lambda workers=workers: sum(worker.cpu_s for worker in workers.values()),
        )
        for way, words in WAYS.items():
            t, peak = timings[way], int(workers[way].close())
            speed, spread = round(shape.tokens / t.median), (shape.tokens / t.high, shape.tokens / t.low)
            rows += [
                row(f"{words}: {shape.label}", speed, "tokens/CPU-s", spread=spread),
                row(f"{words}: page faults a step", round(statistics.median(faults[way][1:]) / shape.steps)),
                row(f"{words}: peak memory of the process", round(peak / 2**20), "MiB"),
            ]
        ratio = timings["tuned"].median / timings["system"].median
        say(f"{shape.label}: tuned takes {ratio:.3f} of the CPU time")
        aim = {"limit": f"≤ {MOST_TIME} ×", "met": ratio <= MOST_TIME} if shape is LARGER else {}
        rows.append(row(f"CPU time, tuned / not: {shape.label}", round(ratio, 3), "×", **aim))
    emit("allocator", rows)


def work(shape: Shape, way: str) -> None:
    """The worker's side: answers each line on standard input."""
    hold_to_one_core()
    if way == "tuned":
        from capibara.runtime import tune_allocator

        if not tune_allocator():
            sys.exit("The allocator cannot be tuned here: it takes Linux with glibc, and CAPIBARA_ALLOCATOR not 0.")
    run = training_steps(shape).run
    for line in sys.stdin:
        if line.strip() == "end":
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
            break
        before = _used()
        run()
        cpu_s, faults = (now - then for now, then in zip(_used(), before, strict=True))
        print(cpu_s, faults, flush=True)


def _used() -> tuple[float, int]:
    return time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt


if __name__ == "__main__":
    if len(sys.argv) == 3:
        work(SHAPES[int(sys.argv[1])], sys.argv[2])
    else:
        main()
