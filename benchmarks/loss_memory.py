"""Memory and time of the loss with a vocabulary of 50 304: in chunks, against all logits at once.

Value and gradients of `head_loss` alone, float32, as in the training step. `temporary memory` is the compiler's account
of what the program needs beside its arguments and results; `resident memory` is how far a fresh process grew, at its
highest, while the program ran twice (the results, about 80 MiB, included).
"""

from __future__ import annotations

import contextlib
import json
import resource
import subprocess
import sys
from pathlib import Path

from _common import emit, interleaved, row, say

TOKENS, WIDTH, VOCABULARY = 2048, 384, 50304
REPEATS = 5
WAYS = ("all logits at once", "in chunks")

MIB = 2**20
MOST_MEMORY, MOST_TIME = 0.5, 1.25


def main() -> None:
    """Prints memory and time of both ways and their ratios."""
    memory = {name: json.loads(_child("memory", name)) for name in WAYS}
    say(f"memory: {memory}")
    steps = {name: program(name) for name in WAYS}
    timings = interleaved(steps, repeats=REPEATS)
    rows = []
    for kind in ("temporary", "resident"):
        for name in WAYS:
            rows.append(row(f"{kind} memory, {name}", round(memory[name][kind] / MIB), "MiB"))
        share = memory["in chunks"][kind] / memory["all logits at once"][kind]
        rows.append(
            row(f"{kind} memory, ratio", round(share, 3), "×", limit=f"≤ {MOST_MEMORY} ×", met=share <= MOST_MEMORY)
        )
    for name, timing in timings.items():
        rows.append(row(f"time, {name}", round(timing.median, 3), "s", spread=(timing.low, timing.high)))
    ratio = timings["in chunks"].median / timings["all logits at once"].median
    rows.append(row("time, ratio", round(ratio, 3), "×", limit=f"≤ {MOST_TIME} ×", met=ratio <= MOST_TIME))
    emit("loss_memory", rows, tokens=TOKENS, width=WIDTH, vocabulary=VOCABULARY)


def program(name: str):
    """A call that computes loss and gradients once, in one of the two ways."""
    step, args = _compiled(name)
    return lambda: _wait(step(*args))


def measure(name: str) -> None:
    """Prints temporary and resident memory in bytes; for a process of its own."""
    import psutil

    step, args = _compiled(name)
    with contextlib.suppress(OSError):  # Linux: forget the peak of the compilation
        Path("/proc/self/clear_refs").write_text("5")
    before = psutil.Process().memory_info().rss
    for _ in range(2):
        _wait(step(*args))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"temporary": step.memory_analysis().temp_size_in_bytes, "resident": peak - before}))


def _compiled(name: str):
    import jax
    import jax.numpy as jnp
    import numpy as np

    from capibara.core.loss import head_loss

    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((TOKENS, WIDTH), np.float32)
    head = rng.standard_normal((VOCABULARY, WIDTH), np.float32) * np.float32(0.02)
    targets = rng.integers(0, VOCABULARY, TOKENS, np.int32)
    args = tuple(jnp.asarray(x) for x in (hidden, head, targets, np.ones(TOKENS, bool)))
    loss = head_loss if name == "in chunks" else _naive
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    return step.lower(*args).compile(), args


def _naive(hidden, head, targets, mask):
    import jax.numpy as jnp

    from capibara.core.loss import head_losses

    losses, _ = head_losses(hidden, head, targets)
    weights = mask.astype(jnp.float32)
    return losses @ weights / weights.sum()


def _wait(result):
    import jax

    jax.block_until_ready(result)


def _child(*arguments: str) -> str:
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip().splitlines()[-1]


if __name__ == "__main__":
    if sys.argv[1:2] == ["memory"]:
        measure(sys.argv[2])
    else:
        main()
