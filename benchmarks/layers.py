"""Norms and activations on a CPU, forward and backward: the native kernels against the same functions in XLA.

2048 tokens of two widths, jitted, in one process, in turn, on one core; CPU seconds are counted. Then a training step
of 6 layers of 384 (`_step.py`) with these kernels and with plain JAX in their place; attention is native in both.
"""

from __future__ import annotations

import os

os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # before JAX counts the cores

import time  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from typing import Any  # noqa: E402
from unittest import mock  # noqa: E402

import numpy as np  # noqa: E402
from _common import emit, interleaved, row, say  # noqa: E402
from _step import LARGER, training_steps  # noqa: E402

TOKENS, WIDTHS = 2048, (384, 1024)
DTYPES = ("float32", "bfloat16")
REPEATS, STEPS = 15, 7


def main() -> None:
    """Prints ratios of time, plain over native."""
    from capibara.kernels import library
    from capibara.runtime import prepare_process

    prepare_process()
    if not library.native():
        emit("layers", [row("layers", "not run: the native kernels are not built")])
        return
    rows = []
    for width in WIDTHS:
        for dtype in DTYPES:
            rows += [compared(name, *pair, REPEATS) for name, pair in functions(width, dtype).items()]
    for dtype in DTYPES:
        shape = LARGER._replace(dtype=dtype)
        ours, plain = training_steps(shape), training_steps(shape)
        ours.run()  # compiles with the kernels
        with without_kernels():
            plain.run()
        rows.append(compared(f"training step, {shape.label}", ours.run, plain.run, STEPS))
    emit("layers", rows, instruction_set=library.instruction_set(), clock="process_time")


def functions(width: int, dtype: str) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """By name: a call of forward and backward with the kernels, and one without."""
    import jax
    import jax.numpy as jnp

    from capibara.kernels.activation import gelu, silu, swiglu
    from capibara.kernels.norm import residual_rms_norm, rms_norm

    x, y, *grads = (jnp.asarray(a, dtype) for a in np.random.default_rng(0).normal(size=(4, TOKENS, width)))
    scale = jnp.ones(width)
    cases = {
        "RMSNorm": (lambda x, scale: rms_norm(x, scale, 1e-5), (x, scale), grads[0]),
        "residual + RMSNorm": (lambda *a: residual_rms_norm(*a, 1e-5), (x, y, scale), tuple(grads)),
        "SwiGLU": (swiglu, (x, y), grads[0]),
        "SiLU": (silu, (x,), grads[0]),
    }
    if dtype == "bfloat16":  # in float32 it is XLA's anyway
        cases["GELU"] = gelu, (x,), grads[0]

    def both(function: Callable[..., Any], given: tuple, grad: Any) -> Callable[[], Any]:
        def run(given: tuple, grad: Any) -> Any:
            out, back = jax.vjp(function, *given)
            return out, back(grad)

        compiled = jax.jit(run).lower(given, grad).compile()
        return lambda: jax.block_until_ready(compiled(given, grad))

    found = {}
    for name, case in cases.items():
        ours = both(*case)
        with without_kernels():
            found[f"{name} [{TOKENS}, {width}] {dtype}"] = ours, both(*case)
    return found


@contextmanager
def without_kernels() -> Iterator[None]:
    """What is traced inside takes plain JAX for norms and activations."""
    with (
        mock.patch("capibara.kernels.norm.native", lambda: False),
        mock.patch("capibara.kernels.activation.native", lambda: False),
    ):
        yield


def compared(name: str, ours: Callable[[], Any], plain: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """A row with the ratio of medians, and that of the fastest and of the slowest repeats as its spread."""
    t = interleaved({"ours": ours, "plain": plain}, repeats=repeats, clock=time.process_time)
    ratio, ends = t["plain"].median / t["ours"].median, [t["plain"][i] / t["ours"][i] for i in (1, 2)]
    say(f"{name}: {1e3 * t['ours'].median:.2f} ms, plain {1e3 * t['plain'].median:.2f} ms, {ratio:.2f} × ({ends})")
    spread = [min(ratio, *ends), max(ratio, *ends)]
    return row(f"{name}: XLA / ours", round(ratio, 2), "×", spread=spread, limit="≥ 1 ×", met=ratio >= 1)


if __name__ == "__main__":
    main()
