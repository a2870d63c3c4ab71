"""This product's own training step with its native kernels and without them, in plain JAX: CPU seconds, in turn.

Whether kernels run is settled once for a process, so each way has a process of its own (`CAPIBARA_KERNELS=0` the plain
one); both stay alive, held to one core. On a processor that widens bfloat16 for products (`bfloat16.py`) both do.
"""

from __future__ import annotations

import sys
import time

from _common import emit, interleaved, machine, row, say
from _step import LARGER, Shape, training_steps
from _workers import Worker, hold_to_one_core

REPEATS = 5
SHAPES = (
    LARGER,
    LARGER._replace(dtype="bfloat16"),
    LARGER._replace(T=1024, B=2),
    LARGER._replace(T=1024, B=2, dtype="bfloat16"),
    LARGER._replace(vocab_size=50_304, dtype="bfloat16"),
)
AIM = 2.0


def main() -> None:
    """Prints tokens a CPU second both ways, and the ratio, for each shape."""
    rows = []
    for number, shape in enumerate(SHAPES):
        ways = {"native kernels": {}, "plain JAX": {"CAPIBARA_KERNELS": "0"}}
        workers = {way: Worker([__file__, str(number)], variables) for way, variables in ways.items()}
        timings = interleaved(
            {way: worker.run for way, worker in workers.items()},
            repeats=REPEATS,
            clock=lambda workers=workers: sum(worker.cpu_s for worker in workers.values()),
        )
        sets = {way: worker.close().strip() for way, worker in workers.items()}
        for way, t in timings.items():
            speed, spread = round(shape.tokens / t.median), (shape.tokens / t.high, shape.tokens / t.low)
            rows.append(row(f"{way} ({sets[way]}): {shape.label}", speed, "tokens/CPU-s", spread=spread))
        ratio = timings["plain JAX"].median / timings["native kernels"].median
        say(f"{shape.label}: {ratio:.2f} × plain JAX")
        aim = {"limit": f"≥ {AIM:g} ×", "met": ratio >= AIM} if shape.dtype == "bfloat16" else {}
        rows.append(row(f"time, plain JAX / native kernels: {shape.label}", round(ratio, 3), "×", **aim))
    emit("kernel_step", rows, cpu=machine())


def work(shape: Shape) -> None:
    """The worker's side."""
    hold_to_one_core()
    from capibara.kernels.library import instruction_set
    from capibara.runtime import tune_allocator

    tune_allocator()
    run = training_steps(shape).run
    for line in sys.stdin:
        if line.strip() == "end":
            print(instruction_set() or "no kernels", flush=True)
            break
        began = time.process_time()
        run()
        print(time.process_time() - began, flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        work(SHAPES[int(sys.argv[1])])
    else:
        main()
