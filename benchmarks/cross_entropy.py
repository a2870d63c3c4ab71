"""Cross-entropy of a tied head on a CPU, value and gradients: the native kernel against torch's, and against plain JAX.

`h @ W.T` and the mean cross-entropy of 2048 tokens, down to the gradients of h and W, all of one dtype. Torch's is
`F.cross_entropy` run eagerly, and compiled where `torch.compile` finds a compiler. Plain JAX is this project's loss
without the kernel: a loop over chunks for the large vocabulary, all logits at once for 256 bytes, which models leave to
plain JAX. One core and one thread each, in one process, in turn, by CPU time. Temporary memory is what the compiler
says a program needs beside arguments and results, the kernel's scratch memory included; torch keeps the logits and
their gradient, each M · V numbers. Needs `make peers`.
"""

from __future__ import annotations

import os

os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # before JAX and torch count the cores

import time  # noqa: E402
from collections.abc import Callable  # noqa: E402

import numpy as np  # noqa: E402
from _common import emit, interleaved, row, say  # noqa: E402

TOKENS = 2048
SHAPES = ((384, 50304), (768, 50304), (384, 256))
DTYPES = ("float32", "bfloat16")
LARGE = 50304
REPEATS = 5
AIM, MOST_MEMORY = 1.3, 0.15


def main() -> None:
    """Prints ratios of time for every shape and dtype."""
    import torch

    from capibara.kernels import library
    from capibara.runtime import prepare_process

    prepare_process()
    torch.set_num_threads(1)
    if not library.native():
        emit("cross_entropy", [row("cross-entropy", "not run: the native kernels are not built")])
        return
    rows = []
    for width, vocabulary in SHAPES:
        for dtype in DTYPES:
            rows += measure(width, vocabulary, dtype)
    emit("cross_entropy", rows, instruction_set=library.instruction_set(), tokens=TOKENS)


def measure(width: int, vocabulary: int, dtype: str) -> list[dict]:
    """Rows of one shape and dtype."""
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((TOKENS, width), np.float32)
    head = rng.standard_normal((vocabulary, width), np.float32) * np.float32(0.02)
    targets = rng.integers(0, vocabulary, TOKENS)
    ours, memory = by_jax(hidden, head, targets, dtype, kernel=True)
    plain, plain_memory = by_jax(hidden, head, targets, dtype, kernel=False)
    candidates = {"ours": ours, "plain JAX": plain, "torch": by_torch(hidden, head, targets, dtype)}
    try:
        compiled = by_torch(hidden, head, targets, dtype, compiled=True)
        compiled()
        candidates["compiled torch"] = compiled
    except Exception as error:  # of many kinds, all its own: a compiler that is missing or fails
        say(f"torch.compile does not run here: {type(error).__name__}")
    timings = interleaved(candidates, repeats=REPEATS, clock=time.process_time)
    name, unit = f"D {width}, V {vocabulary}, {dtype}", timings["ours"].median
    say(f"{name}: {timings}")
    rows = [row(f"{name}: ours", round(1e3 * unit, 1), "ms", spread=[1e3 * s for s in timings["ours"][1:]])]
    for other in list(candidates)[1:]:
        ratio = timings[other].median / unit
        aim = {} if other == "plain JAX" or vocabulary < LARGE else {"limit": f"≥ {AIM} ×", "met": ratio >= AIM}
        rows.append(row(f"{name}: {other} / ours", round(ratio, 2), "×", **aim))
    if vocabulary == LARGE:
        logits = 4 * TOKENS * vocabulary
        share, plain_share = memory / logits, plain_memory / logits
        limit = f"≤ {MOST_MEMORY:.0%} of the logits"
        rows.append(
            row(f"{name}: temporary memory, ours", round(100 * share, 1), "%", limit=limit, met=share <= MOST_MEMORY)
        )
        rows.append(row(f"{name}: temporary memory, plain JAX", round(100 * plain_share, 1), "%"))
    return rows


def by_jax(
    hidden: np.ndarray, head: np.ndarray, targets: np.ndarray, dtype: str, *, kernel: bool
) -> tuple[Callable[[], object], int]:
    """A call for value and gradients, and its temporary memory in bytes."""
    import jax
    import jax.numpy as jnp

    from capibara.kernels.cross_entropy import FEW_LOGITS, cross_entropy, plain_losses

    given = jnp.asarray(hidden, dtype), jnp.asarray(head, dtype)
    places, weights = jnp.asarray(targets, jnp.int32), jnp.full(TOKENS, 1 / TOKENS)

    def loss(hidden, head):
        if kernel:
            return cross_entropy(hidden, head, places, weights)
        if TOKENS * len(head) <= FEW_LOGITS:
            return plain_losses(hidden, head, places)[0] @ weights
        return cross_entropy(hidden, head, places, weights, kernel=False)

    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*given).compile()
    memory = compiled.memory_analysis()
    return lambda: jax.block_until_ready(compiled(*given)), memory.temp_size_in_bytes if memory else 0


def by_torch(
    hidden: np.ndarray, head: np.ndarray, targets: np.ndarray, dtype: str, *, compiled: bool = False
) -> Callable[[], object]:
    """A call of forward and backward."""
    import torch

    h, w = (torch.from_numpy(x).to(getattr(torch, dtype)).requires_grad_() for x in (hidden, head))
    places = torch.from_numpy(targets)

    def loss(h, w):
        return torch.nn.functional.cross_entropy(h @ w.T, places)

    call = torch.compile(loss) if compiled else loss

    def run() -> None:
        h.grad = w.grad = None
        call(h, w).backward()

    return run


if __name__ == "__main__":
    main()
