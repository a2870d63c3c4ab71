"""Gram matrix and weighted sum against their NumPy reference: every instruction set, dtype, size, layout, thread count.

Bounds: a lane sums at most 16 float32 products before float64 takes over, 16 · 2⁻²⁴ < 1e-6 of ‖a‖ ‖b‖. The weighted sum
is float64 in the same order, without fused operations, rounded once: the same bits.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from capibara.consensus.comparators import comparators
from capibara.errors import ConfigError
from capibara.kernels import arrays, jitted, library, reference

SETS = library.instruction_sets()
SIZES = (0, 1, 7, 64, 4097, 10**6 + 3)
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
WEIGHTS = np.array([0.25, 0.0, -1.5, 0.3, 2.0])

needs_native = pytest.mark.skipif(not SETS, reason="the native kernels were not built, or are turned off")


def stack_of(length: int, dtype: str, n: int = 5) -> np.ndarray:
    """Row 1 is NaN: its weight is 0."""
    rows = np.random.default_rng(length).standard_normal((n, length), np.float32).astype(DTYPES[dtype])
    rows[1:2] = np.nan
    return rows


def check_gram(found: np.ndarray, rows, weights: np.ndarray, rounding: float = 0.0, centre=None) -> None:
    wanted = reference.gram(rows, weights, centre)
    norms = np.sqrt(np.diag(wanted))
    assert np.all(np.abs(found - wanted) <= (1e-6 + rounding) * np.outer(norms, norms))
    np.testing.assert_array_equal(found, found.T)


def check_sum(found: np.ndarray, rows, weights: np.ndarray) -> None:
    wanted = reference.weighted_sum(rows, weights, np.empty(len(rows[0]), np.float32))
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", SIZES)
def test_every_set_equals_the_reference(forced: str, length: int, dtype: str):
    rows = stack_of(length, dtype)
    assert library.instruction_set() == forced
    check_gram(arrays.gram(rows, WEIGHTS), rows, WEIGHTS)
    centre = rows[0].astype(np.float32) + np.float32(0.01)
    check_gram(arrays.gram(rows, WEIGHTS, centre=centre), rows, WEIGHTS, 0.0, centre)
    for other in (None, centre):  # exact products, sums of float64 in any order
        check_gram(arrays.gram(rows, WEIGHTS, centre=other, wide=True), rows, WEIGHTS, 1e-14 - 1e-6, other)
    check_sum(arrays.weighted_sum(rows, WEIGHTS), rows, WEIGHTS)


@pytest.mark.parametrize("n", (0, 1, 2, 3, 6, 9))
def test_any_number_of_rows_fits_the_tiles(forced: str, n: int):
    rows = np.random.default_rng(n).standard_normal((n, 300), np.float32)
    check_gram(arrays.gram(rows), rows, np.ones(n))
    if n:
        check_sum(arrays.weighted_sum(rows, np.arange(n) + 1.0), rows, np.arange(n) + 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", (1, 2, 3, 8, 33, 200))
def test_sorted_middles_are_those_of_the_reference_bit_for_bit(forced: str, n: int, dtype: str):
    """Any bits: denormals, both zeros, infinities, NaN; medians, a trimmed mean, the lowest, ragged tiles."""
    whole = np.random.default_rng(n).integers(0, 2**32, (n, 3001), np.uint32)
    rows = (whole >> 16).astype(np.uint16).view(DTYPES[dtype]) if dtype == "bfloat16" else whole.view(np.float32)
    rows[:, 500:600] = np.float32([0, -0.0])[np.random.default_rng(1).integers(0, 2, (n, 100))]
    steps = np.int32(comparators(n)).reshape(-1, 2)
    for low, high in {((n - 1) // 2, n // 2 + 1), (n // 4, n - n // 4), (0, 1)}:
        with np.errstate(invalid="ignore", over="ignore"):
            wanted = reference.sorted_mean(rows, low, high, np.empty(3001, np.float32))
        found = arrays.sorted_mean(rows, steps, low, high, threads=2)
        np.testing.assert_array_equal(np.isnan(found), np.isnan(wanted))
        there = ~np.isnan(wanted)
        np.testing.assert_array_equal(found.view(np.uint32)[there], wanted.view(np.uint32)[there])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", (0, 1, 17, 70_001))
def test_a_row_moves_with_the_bits_of_numpy(forced: str, length: int, dtype: str):
    start, to = (stack_of(length, name, 3)[0] for name in ("float32", dtype))
    start = start * np.float32(3)
    wanted = start + (to.astype(np.float32) - start) * np.float32(0.3)
    np.testing.assert_array_equal(arrays.moved(start, to, 0.3), wanted)
    assert arrays.moved(start, to, 0.3, start) is start
    np.testing.assert_array_equal(start, wanted)


def test_rounding_is_that_of_ml_dtypes(forced: str):
    values = np.random.default_rng(0).integers(0, 2**32, 100_003, np.uint32).view(np.float32)
    values[:4] = 0.0, -0.0, np.inf, 3.4e38
    found = arrays.to_bfloat16(values)
    with np.errstate(invalid="ignore", over="ignore"):
        wanted = values.astype(ml_dtypes.bfloat16)
    there = ~np.isnan(values)
    np.testing.assert_array_equal(found.view(np.uint16)[there], wanted.view(np.uint16)[there])
    assert np.isnan(found[~there].astype(np.float32)).all() and (~there).any()


def test_sums_of_many_equal_products_lose_nothing(forced: str):
    """In float32 alone, 2²⁵ ones would stop at 2²⁴ a lane; the true norm is exact here."""
    ones = np.broadcast_to(np.float32(1), (1 << 22) + 5)
    row = np.ascontiguousarray(ones)
    assert arrays.gram([row * 3, row])[0].tolist() == [9.0 * len(row), 3.0 * len(row)]


def test_the_bits_do_not_depend_on_the_threads(forced: str):
    rows = stack_of(10**6 + 3, "float32")
    grams = [arrays.gram(rows, WEIGHTS, threads=threads).tobytes() for threads in (1, 2, 3, 8)]
    sums = [arrays.weighted_sum(rows, WEIGHTS, threads=threads).tobytes() for threads in (1, 2, 3, 8)]
    assert len(set(grams)) == len(set(sums)) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_layout_is_read_right(forced: str, dtype: str, tmp_path: Path):
    """Spread out, backwards, column by column, at odd addresses, mapped from a file."""
    rows = stack_of(1003, dtype)
    size = rows.dtype.itemsize
    odd = []
    for row in rows:
        buffer = np.empty(row.nbytes + 1, np.uint8)
        buffer[1:] = row.view(np.uint8)
        odd.append(np.frombuffer(buffer, row.dtype, len(row), offset=1))
    rows.tofile(tmp_path / "rows")
    stored = np.uint16 if size == 2 else np.float32
    mapped = np.memmap(tmp_path / "rows", stored, "r", shape=rows.shape).view(rows.dtype)
    spread = np.repeat(rows, 2, axis=1)[:, ::2]
    views = {"spread": spread, "fortran": np.asfortranarray(rows), "odd": odd, "mapped": mapped, "list": list(rows)}
    wanted = arrays.gram(rows, WEIGHTS), arrays.weighted_sum(rows, WEIGHTS)
    for name, view in views.items():
        np.testing.assert_array_equal(arrays.gram(view, WEIGHTS), wanted[0], name)
        np.testing.assert_array_equal(arrays.weighted_sum(view, WEIGHTS), wanted[1], name)
    check_gram(arrays.gram(rows[:, ::-1], WEIGHTS), rows[:, ::-1], WEIGHTS)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mprotect through libc")
@pytest.mark.parametrize("length", (1, 7, 64, 1003, 70001))
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_beyond_a_row_is_touched(forced: str, dtype: str, length: int):
    """Every row and the output end at a page that may be neither read nor written: a step too far ends the process."""
    rows = stack_of(length, dtype, 3)
    pages = [Guarded(rows.dtype, length) for _ in rows]
    out = Guarded(np.dtype(np.float32), length)
    for page, row in zip(pages, rows, strict=True):
        page.array[:] = row
    guarded, weights = [page.array for page in pages], WEIGHTS[:3]
    np.testing.assert_array_equal(arrays.gram(guarded, weights), arrays.gram(rows, weights))
    arrays.weighted_sum(guarded, weights, out.array)
    np.testing.assert_array_equal(out.array, arrays.weighted_sum(rows, weights))
    steps = np.int32([[0, 1], [1, 2], [0, 1]])
    arrays.sorted_mean(guarded, steps, 1, 2, out.array)
    np.testing.assert_array_equal(out.array, arrays.sorted_mean(rows, steps, 1, 2))
    short = Guarded(np.dtype(ml_dtypes.bfloat16), length)
    whole = Guarded(np.dtype(np.float32), length)
    whole.array[:] = 1.5
    assert (arrays.to_bfloat16(whole.array, short.array) == 1.5).all()


class Guarded:
    """An array whose last byte is followed by a forbidden page; the memory is given back at the end of the process."""

    def __init__(self, dtype: np.dtype, length: int):
        used = -(-length * dtype.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
        self.memory = mmap.mmap(-1, used + mmap.PAGESIZE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        libc = ctypes.CDLL(None, use_errno=True)
        none = 0
        assert libc.mprotect(ctypes.c_void_p(start + used), ctypes.c_size_t(mmap.PAGESIZE), none) == 0
        self.array = np.frombuffer(self.memory, dtype, length, used - length * dtype.itemsize)


def test_a_row_of_weight_zero_is_not_read(forced: str):
    """It stands on a page that may not be read."""
    page = Guarded(np.dtype(np.float32), 0)
    forbidden = np.frombuffer(page.memory, np.float32, 64, 0)
    rows = [forbidden, np.ones(64, np.float32)]
    assert arrays.gram(rows, [0, 1]).tolist() == [[0, 0], [0, 64]]
    assert arrays.weighted_sum(rows, [0, 3]).tolist() == [3] * 64


def test_nan_and_infinity_of_rows_that_count_are_kept(forced: str):
    rows = np.ones((3, 40), np.float32)
    rows[0, 3], rows[1, 20] = np.nan, np.inf
    found = arrays.weighted_sum(rows, [1, 1, 1])
    assert np.isnan(found[3]) and np.isinf(found[20]) and found[0] == 3
    gram = arrays.gram(rows)
    assert np.isnan(gram[0]).all() and np.isinf(gram[1, 1:]).all() and gram[2, 2] == 40


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", SIZES)
def test_jitted_code_gives_the_same(length: int, dtype: str):
    """float32 weights and a float32 Gram matrix: one rounding of 2⁻²⁴ more. Plain JAX sums in float32."""
    rows, weights = stack_of(length, dtype), np.float32(WEIGHTS)
    stack = jnp.asarray(rows)
    check_gram(np.asarray(jax.jit(jitted.gram)(stack, weights)), rows, weights, 2**-24 if SETS else 1e-5)
    found = np.asarray(jax.jit(jitted.weighted_sum)(stack, weights))
    if SETS:
        check_sum(found, rows, weights.astype(np.float64))
    else:
        magnitude = reference.weighted_sum(abs(rows), abs(weights), np.empty(length, np.float32))
        assert np.all(abs(found - arrays.weighted_sum(rows, weights)) <= 5 * 2**-23 * magnitude)


def test_scan_and_vmap_are_a_loop():
    stacks = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4, 100), np.float32))
    weights = jnp.asarray([[1, 0, 2, 3], [0.5, 1, 0, 0], [0, 0, 0, 1]], jnp.float32)
    for function in (jitted.gram, jitted.weighted_sum):
        wanted = np.stack([function(stack, weight) for stack, weight in zip(stacks, weights, strict=True)])
        np.testing.assert_array_equal(jax.jit(jax.vmap(function))(stacks, weights), wanted)
        scanned = jax.jit(lambda f=function: jax.lax.scan(lambda c, x: (c, f(*x)), 0, (stacks, weights))[1])()
        np.testing.assert_array_equal(scanned, wanted)


def test_many_threads_may_call_at_once():
    """More callers than threads of any pool: nobody waits for a task to start, or this would not end."""
    rows = stack_of(200_000, "float32")
    stack, wanted = jnp.asarray(rows), arrays.gram(rows, WEIGHTS)
    jitted_gram = jax.jit(jitted.gram)
    wanted_jitted, wrong = np.asarray(jitted_gram(stack, WEIGHTS)), []

    def call() -> None:
        for _ in range(5):
            same = np.array_equal(arrays.gram(rows, WEIGHTS, threads=3), wanted)
            if not same or not np.array_equal(jitted_gram(stack, WEIGHTS), wanted_jitted):
                wrong.append(threading.get_ident())

    callers = [threading.Thread(target=call) for _ in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.parametrize(
    ("call", "sentence"),
    (
        (lambda: arrays.gram(np.ones((2, 3))), "float32 or bfloat16"),
        (lambda: arrays.gram(np.ones((2, 3), ">f4")), "byte order"),
        (lambda: arrays.sorted_mean(np.ones((2, 3), np.float32), np.int32([[0, 2]]), 0, 1), "rows 0 to 1; got 0 and 2"),
        (lambda: arrays.sorted_mean(np.ones((2, 3), np.float32), np.int32([[0, 1]]), 1, 1), "low < high"),
        (lambda: arrays.sorted_mean(np.ones((2, 3), np.float32), [[0, 1, 0]], 0, 1), "pairs"),
        (lambda: arrays.sorted_mean(np.ones((2, 3), np.float32), [[0, 2**32 + 1]], 0, 1), "rows 0 to 1"),
        (lambda: arrays.to_bfloat16(np.ones(3, np.float32), np.frombuffer(bytes(6), ml_dtypes.bfloat16)), "writable"),
        (lambda: arrays.to_bfloat16(np.ones(3)), r"values is a contiguous float32\[3\]; got float64"),
        (lambda: arrays.gram(np.ones((2, 3), np.float32), centre=np.ones(2, np.float32)), r"float32\[3\]"),
        (lambda: arrays.gram([np.ones(3, np.float32), np.ones(4, np.float32)]), "one length"),
        (lambda: arrays.gram(np.ones((2, 3), np.float32), [1]), "2 rows need 2 weights"),
        (lambda: arrays.gram(np.ones((2, 3), np.float32), threads=0), "1 or more"),
        (lambda: arrays.weighted_sum([], []), "at least one row"),
        (lambda: arrays.weighted_sum(np.ones((2, 3), np.float32), [1, 1], np.ones(3)), "float32"),
        (lambda: jitted.gram(jnp.ones((2, 3), jnp.int32), jnp.ones(2)), "float32"),
        (lambda: library.use("avx1024"), "Unknown instruction set 'avx1024'"),
    ),
)
def test_what_cannot_be_meant_is_one_clear_error(call, sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        call()


def test_the_output_may_not_be_one_of_the_rows():
    rows = np.ones((2, 3), np.float32)
    with pytest.raises(ConfigError, match="shares no memory"):
        arrays.weighted_sum(rows, [1, 1], rows[0])


@needs_native
@pytest.mark.parametrize("name", (*SETS, "0", "avx1024", ""))
def test_the_variable_forces_a_set(name: str):
    """In a process of its own: the choice is made once."""
    code = (
        "from capibara.kernels import library, arrays; import numpy as np, sys\n"
        "assert arrays.gram(np.ones((1, 9), np.float32)).tolist() == [[9.0]]\n"
        "assert 'jax' not in sys.modules\n"
        "print(library.instruction_set())\n"
    )
    environment = {**os.environ, library.VARIABLE: name}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    if name == "avx1024":
        assert "ConfigError" in done.stderr and all(known in done.stderr for known in SETS), done.stderr
    else:
        assert done.stdout.strip() == {"0": "None", "": SETS[0]}.get(name, name), done.stderr
        assert not done.stderr


def test_a_missing_module_is_one_line_and_the_reference(tmp_path: Path):
    code = (
        "from capibara.kernels import library, arrays; import numpy as np\n"
        "library.MODULE = 'capibara.kernels.absent'\n"
        "for _ in range(2): assert arrays.gram(np.ones((1, 9), np.float32)).tolist() == [[9.0]]\n"
        "assert not library.native()\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != library.VARIABLE}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == 1 and "not built" in done.stderr and library.COST in done.stderr
