"""How fast this machine's CPU is, against what it can do at most: for `capibara doctor --speed`.

    peak          multiply-adds on registers, reading memory      measured here, on all cores
    what we run   products, attention, the vote, a training step  as a share of that peak

What we run is the median of several runs. What a share counts: a product of M × K and K × N is 2MKN operations;
causal attention half of its square, 2 products forward and 5 backward; a step 6 a parameter and token, and attention.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from capibara.kernels.library import COST, instruction_set, instruction_sets, library
from capibara.kernels.matmul import widens
from capibara.runtime import usable_cores

GIGA = 1e9
REPEATS = 5


class Sizes(NamedTuple):
    """What is run: the defaults take about 20 s on two cores.

    Attributes:
      seconds: Of each measurement of the peak.
      side: Of the square matrices.
      attention: B, T, heads, head size.
      rows: n, d of the vote.
      width: Of the model.
      layers: Of the model.
      batch: Sequences and tokens of a step.
    """

    seconds: float = 0.5
    side: int = 1024
    attention: tuple[int, int, int, int] = (4, 512, 6, 64)
    rows: tuple[int, int] = (8, 4_000_000)
    width: int = 384
    layers: int = 4
    batch: tuple[int, int] = (4, 256)


FULL = Sizes()


def measure(sizes: Sizes = FULL, note: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Runs everything once; all JSON types.

    Args:
      sizes: See there.
      note: Told what is being measured.

    Returns:
      `rows`: each with `what`, `value`, `unit`, and its `share` of the peak, null where there is none.
      `findings`: sentences about what is slow here, and why.
    """
    import jax

    def tell(what: str) -> None:
        if note is not None:
            note(f"measuring {what} …")

    cores = usable_cores()
    with jax.default_device(jax.devices("cpu")[0]):
        tell("the peak")
        one, _ = _multiply_adds(1, sizes.seconds)
        peak, busy = _multiply_adds(cores, sizes.seconds)
        reading, products = _memory(*sizes.rows)
        rows = []
        if library() is not None:
            rows.append(_row("multiply-adds, one core", one, "GFLOP/s"))
            rows.append(_row("multiply-adds, all cores", peak, "GFLOP/s"))
        rows += [_row("reading memory", reading, "GB/s"), _row("the vote's products", products, "GB/s", reading)]
        tell("products")
        square, half = (_product(sizes.side, dtype) for dtype in ("float32", "bfloat16"))
        rows += [_row("product, float32", square, "GFLOP/s", peak), _row("product, bfloat16", half, "GFLOP/s", peak)]
        tell("attention")
        rows.append(_row("attention, with gradient", _attention(*sizes.attention), "GFLOP/s", peak))
        tell("a training step (it compiles first)")
        step, tokens, faults = _step(sizes)
        rows += [_row("training step", step, "GFLOP/s", peak), _row("tokens of that step", tokens, "tokens/s")]
        again, _ = _multiply_adds(1, sizes.seconds)
    findings = list(_findings(cores, one, again, peak, busy, square, half, faults))
    return {"rows": rows, "findings": findings, "kernels": instruction_set(), "page_faults_a_step": faults}


def speed_text(found: dict[str, Any]) -> str:
    """The rows and findings for a person."""
    lines = []
    for row in found["rows"]:
        of = "of reading" if row["unit"] == "GB/s" else "of all cores' multiply-adds"
        share = "" if row["share"] is None else f"  {100 * row['share']:4.0f} % {of}"
        lines.append(f"{row['what']:28} {row['value']:10,.1f} {row['unit']:9}{share}".rstrip())
    return "\n".join([*lines, *found["findings"]])


def _row(what: str, value: float, unit: str, peak: float = 0.0) -> dict[str, Any]:
    return {"what": what, "value": value, "unit": unit, "share": value / peak if peak else None}


def _findings(
    cores: int, one: float, again: float, peak: float, busy: float, square: float, half: float, faults: int
) -> list[str]:
    found, whole = [], os.cpu_count() or 1
    if cores < whole:
        found.append(f"threads: this process may run on {cores} of {whole} cores (its affinity or its container).")
    if busy < 0.9:
        found.append(f"threads: other work takes about {100 * (1 - busy):.0f} % of the cores; all numbers suffer.")
    if one and peak < 0.8 * cores * one:
        found.append(
            f"frequency: {cores} cores reach {peak / one:.1f} times one core: they share their units (hyper-threads), "
            "are shared with others, or their clock falls under load."
        )
    if one and again < 0.9 * one:
        found.append(f"frequency: one core was {100 * (1 - again / one):.0f} % slower at the end: heat, or other work.")
    if faults > 1000:
        found.append(
            f"allocator: {faults:,} page faults a step; memory goes back to the system and comes anew. On Linux with "
            "glibc `capibara` prevents it unless CAPIBARA_ALLOCATOR=0; in a program of your own call "
            "capibara.runtime.tune_allocator() before JAX starts."
        )
    if library() is None:
        found.append(f"kernels: none, so there is no peak to compare with, and {COST}.")
    elif instruction_set() != instruction_sets()[0]:
        found.append(f"kernels: {instruction_set()} is forced; {instruction_sets()[0]} would be used here.")
    if half < 0.95 * square:
        why = "is widened to float32 here, which has the faster instruction" if widens() else "has no fast path here"
        found.append(
            f"bfloat16: its products reach {100 * half / square:.0f} % of float32's: bfloat16 {why}. It halves memory, "
            "not time."
        )
    return found


def _multiply_adds(threads: int, seconds: float) -> tuple[float, float]:
    """GFLOP/s of so many threads together, and which share of their time they ran; 0 without native kernels."""
    native = library()
    if native is None:
        return 0.0, 1.0
    began = time.perf_counter()
    native.multiply_adds(100_000)
    rounds = max(1, int(100_000 * seconds / (time.perf_counter() - began)))
    with ThreadPoolExecutor(threads) as pool:
        began, ran = time.perf_counter(), time.process_time()
        done = sum(pool.map(native.multiply_adds, [rounds] * threads))
        took, ran = time.perf_counter() - began, time.process_time() - ran
    return done / took / GIGA, min(1.0, ran / took / threads)


def _memory(n: int, d: int) -> tuple[float, float]:
    """GB/s of reading n rows of d float32 numbers on all cores, and of the vote's products of them."""
    import jax.numpy as jnp

    from capibara.consensus.row_algebra import gram_matrix

    stack, cores = jnp.ones((n, d), jnp.float32), usable_cores()
    rows = np.asarray(stack)
    with ThreadPoolExecutor(cores) as pool:
        reading = _median(lambda: list(pool.map(np.max, np.array_split(rows.reshape(-1), cores))))
    products = _median(lambda: gram_matrix([stack], np.ones(n)))
    return rows.nbytes / reading / GIGA, rows.nbytes / products / GIGA


def _product(side: int, dtype: str) -> float:
    import jax
    import jax.numpy as jnp

    from capibara.kernels.matmul import dot

    a = jnp.ones((side, side), dtype)
    program = jax.jit(lambda a, b: dot(a, b, (1,), (0,)))
    return 2 * side**3 / _median(lambda: program(a, a).block_until_ready()) / GIGA


def _attention(B: int, T: int, N: int, H: int) -> float:
    import jax
    import jax.numpy as jnp

    from capibara.kernels.attention import fast_attention

    q = jnp.asarray(np.random.default_rng(0).standard_normal((B, T, N, H), np.float32))
    program = jax.jit(jax.grad(lambda q, k, v: fast_attention(q, k, v, causal=True).sum(), (0, 1, 2)))
    return 7 * B * N * T * T * H / _median(lambda: jax.block_until_ready(program(q, q, q))) / GIGA


def _step(sizes: Sizes) -> tuple[float, float, int]:
    """GFLOP/s, tokens a second and page faults of a step of a float32 model on random bytes."""
    import jax

    from capibara.core.config import ModelConfig
    from capibara.core.model import ModularCapibaraModel, objective, parameters
    from capibara.loop import local_steps
    from capibara.strategies.plain import adamw, plain

    B, T = sizes.batch
    config = ModelConfig(width=sizes.width, num_layers=sizes.layers, num_heads=sizes.width // 64 or 1, max_length=T)
    model = ModularCapibaraModel(config, seed=0)
    strategy = plain(objective(model), adamw(1e-3))
    tokens = np.random.default_rng(0).integers(0, 256, (1, B, T + 1), np.int32)
    everywhere = np.ones((1, B, T), np.int32)
    batches = {
        "tokens": tokens[..., :-1],
        "targets": tokens[..., 1:],
        "segments": everywhere,
        "positions": np.broadcast_to(np.arange(T, dtype=np.int32), (1, B, T)),
        "mask": everywhere.astype(bool),
    }
    program = jax.jit(lambda state, keys: local_steps(strategy.step, state, batches, keys), donate_argnums=0)
    held, keys = [strategy.init(parameters(model))], jax.random.split(jax.random.key(0), 1)
    faults: list[int] = []

    def run() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        held[0], infos = program(held[0], keys)
        jax.block_until_ready(infos)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

    seconds = _median(run)
    operations = 6 * model.num_parameters * B * T + 7 * sizes.layers * B * T * T * sizes.width
    return operations / seconds / GIGA, B * T / seconds, round(median(faults[1:]))


def _median(run: Callable[[], Any]) -> float:
    """Seconds of one run; the first one, which may compile, does not count."""
    run()
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return median(times)
