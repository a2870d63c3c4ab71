"""Rows of more than 2³¹ numbers: a few pages of a file, mapped again and again, stand for gigabytes.

A row is A A … A B. B lies beyond 2³¹ numbers. No power of two is a multiple of A's length, so an index that lost its
high bits would read or write A in another phase. Outputs are mapped alike, and compared with what A and B give alone.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys

import ml_dtypes
import numpy as np
import pytest

from capibara.kernels import arrays, library, reference

BF16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
PERIOD = 10_007 * 2048
"""Numbers of A: whole pages in both dtypes, and an odd number of them."""
TIMES = 2**31 // PERIOD + 1
LENGTH = TIMES * PERIOD + 5 * 2048 + 3
STEPS = np.int32([[0, 1], [1, 2], [0, 1]])

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not library.instruction_sets(), reason="the native kernels were not built, or are turned off"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memfd_create, and mmap through libc"),
]


class Repeated:
    """[LENGTH] numbers of which `first`[PERIOD] and `last` alone take memory; freed at the end of the process."""

    def __init__(self, dtype: np.dtype, seed: int | None = None):
        a, b = PERIOD * dtype.itemsize, -(-(LENGTH - TIMES * PERIOD) * dtype.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
        file = os.memfd_create("rows")
        os.truncate(file, a + b)
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        unreserved, fixed = 0x4000 | mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 0x10 | mmap.MAP_SHARED
        whole = libc.mmap(None, TIMES * a + b, 0, unreserved, -1, 0)
        for i in range(TIMES + 1):
            size, offset = (a, 0) if i < TIMES else (b, a)
            place = libc.mmap(whole + i * a, size, mmap.PROT_READ | mmap.PROT_WRITE, fixed, file, offset)
            assert place == whole + i * a, os.strerror(ctypes.get_errno())
        os.close(file)
        memory = (ctypes.c_char * (LENGTH * dtype.itemsize)).from_address(whole)
        self.array = np.frombuffer(memory, dtype, LENGTH)
        self.first, self.last = self.array[:PERIOD], self.array[TIMES * PERIOD :]
        for part, more in ((self.first, 0), (self.last, 100)):  # small whole numbers: their sums are exact
            values = 0 if seed is None else np.random.default_rng(seed + more).integers(-3, 4, len(part)).astype(dtype)
            part[:] = values

    def parts(self) -> tuple[np.ndarray, np.ndarray]:
        return self.first, self.last


def rows_of(dtype: np.dtype, count: int) -> list[Repeated]:
    return [Repeated(dtype, seed) for seed in range(count)]


@pytest.mark.parametrize("wide", (False, True))
def test_products(wide: bool):
    rows = rows_of(BF16, 2)
    first, last = (np.array([row.parts()[i] for row in rows], np.float64) for i in (0, 1))
    wanted = TIMES * (first @ first.T) + last @ last.T
    np.testing.assert_array_equal(arrays.gram([row.array for row in rows], wide=wide), wanted)


def test_weighted_sums():
    rows, out = rows_of(BF16, 2), Repeated(F32)
    arrays.weighted_sum([row.array for row in rows], [0.5, 2.0], out.array)
    for i, found in enumerate(out.parts()):
        wanted = reference.weighted_sum([row.parts()[i] for row in rows], np.array([0.5, 2.0]), np.empty_like(found))
        np.testing.assert_array_equal(found, wanted)


def test_sorted_middles():
    rows, out = rows_of(BF16, 3), Repeated(F32)
    arrays.sorted_mean([row.array for row in rows], STEPS, 1, 2, out.array)
    for i, found in enumerate(out.parts()):
        np.testing.assert_array_equal(found, np.median([np.float32(row.parts()[i]) for row in rows], axis=0))


def test_moves_and_roundings():
    start, to, out, narrow = Repeated(F32, 0), Repeated(BF16, 1), Repeated(F32), Repeated(BF16)
    arrays.moved(start.array, to.array, 0.5, out.array)
    arrays.to_bfloat16(out.array, narrow.array)
    for a, b, found, rounded in zip(*(x.parts() for x in (start, to, out, narrow)), strict=True):
        np.testing.assert_array_equal(found, a + (b.astype(F32) - a) * F32.type(0.5))
        np.testing.assert_array_equal(rounded, found.astype(BF16))
