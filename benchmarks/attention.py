"""Attention on a CPU, forward and backward: the native kernel against torch's, and against the same function in XLA.

Causal, heads of 64, as `[B, T, N, H]` here and `[B, N, T, H]` there, each library's own layout. One core and one thread
each, in one process, in turn. Temporary memory is the compiler's account of what a program needs beside arguments and
results; it does not see the kernel's own scratch, 5 · T · 64 float32 numbers a thread. Needs `make peers`.
"""

from __future__ import annotations

import os

os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # before JAX and torch count the cores

import numpy as np  # noqa: E402
from _common import emit, interleaved, row, say  # noqa: E402

SHAPES = ((8, 6, 256), (4, 12, 1024), (1, 12, 4096), (1, 8, 16384))
SIZE = 64
REPEATS = 5
LONG, LONG_REPEATS = 8192, 3
"""From this length on a call takes seconds."""

AIMS = {"float32": 2.5, "bfloat16": 3.5}
XLA_AIM = 5.0
XLA_LONGEST = 2048
"""Longer sequences are not timed in XLA: its scores would take gigabytes."""

MIB = 2**20


def main() -> None:
    """Prints ratios of time for every shape and dtype."""
    import torch

    from capibara.kernels import library
    from capibara.runtime import prepare_process

    prepare_process()
    torch.set_num_threads(1)
    if not library.native():
        emit("attention", [row("attention", "not run: the native kernels are not built")])
        return
    rows = []
    for shape in SHAPES:
        for dtype in AIMS:
            rows += measure(shape, dtype)
    emit("attention", rows, instruction_set=library.instruction_set())


def measure(shape: tuple[int, int, int], dtype: str) -> list[dict]:
    """Rows of one shape and dtype."""
    B, N, T = shape
    arrays = np.random.default_rng(0).normal(size=(4, B, T, N, SIZE)).astype(np.float32)
    candidates = {"torch": by_torch(arrays, dtype)}
    ours, memory = by_jax(arrays, dtype, plain=False)
    candidates["ours"] = ours
    if T <= XLA_LONGEST:
        candidates["XLA"], xla_memory = by_jax(arrays, dtype, plain=True)
    timings = interleaved(candidates, repeats=REPEATS if T < LONG else LONG_REPEATS)
    say(f"{shape} {dtype}: {timings}")
    name, unit = f"({B}, {N}, {T}, {SIZE}) {dtype}", timings["ours"].median
    ratio = timings["torch"].median / unit
    aim = AIMS[dtype]
    rows = [
        row(f"{name}: ours", round(1e3 * unit, 1), "ms", spread=[1e3 * s for s in timings["ours"][1:]]),
        row(f"{name}: torch / ours", round(ratio, 2), "×", limit=f"≥ {aim} ×", met=ratio >= aim),
        row(f"{name}: temporary memory, ours", round(memory / MIB, 1), "MiB"),
    ]
    if "XLA" in timings:
        ratio = timings["XLA"].median / unit
        rows.append(row(f"{name}: XLA / ours", round(ratio, 2), "×", limit=f"≥ {XLA_AIM} ×", met=ratio >= XLA_AIM))
        rows.append(row(f"{name}: temporary memory, XLA", round(xla_memory / MIB, 1), "MiB"))
    return rows


def by_jax(arrays: np.ndarray, dtype: str, *, plain: bool):
    """A call of forward and backward, and its temporary memory in bytes; `plain` is the mask made and all scores."""
    import jax
    import jax.numpy as jnp

    from capibara.kernels.attention import fast_attention
    from capibara.kernels.plain_attention import masked_attention

    given = [jnp.asarray(x, dtype) for x in arrays]
    allowed = jnp.tril(jnp.ones((arrays.shape[2],) * 2, bool))[None, None]

    def attend(q, k, v):
        return masked_attention(q, k, v, allowed) if plain else fast_attention(q, k, v, causal=True)

    def both(q, k, v, grad):
        out, back = jax.vjp(attend, q, k, v)
        return out, back(grad)

    compiled = jax.jit(both).lower(*given).compile()
    memory = compiled.memory_analysis()
    return lambda: jax.block_until_ready(compiled(*given)), memory.temp_size_in_bytes if memory else 0


def by_torch(arrays: np.ndarray, dtype: str):
    """A call of forward and backward by `scaled_dot_product_attention`."""
    import torch

    tensors = [torch.from_numpy(x.swapaxes(1, 2).copy()).to(getattr(torch, dtype)) for x in arrays]
    q, k, v, grad = tensors
    for tensor in (q, k, v):
        tensor.requires_grad_()

    def run() -> None:
        q.grad = k.grad = v.grad = None
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).backward(grad)

    return run


if __name__ == "__main__":
    main()
