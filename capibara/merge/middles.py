"""The sorted middle of every coordinate, by a network of minima and maxima.

    v₀ … vₙ₋₁ ─► comparators (min, max) ─► v₍low₎ … v₍high−1₎ ─► their mean

Rows are sorted as the integers that stand in the order of their numbers, −0 before 0; where all are bfloat16, that is
half the bytes. The native kernel does it where it is built and for what it takes, NumPy else; the bits are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from capibara.consensus.comparators import comparators
from capibara.kernels import arrays
from capibara.kernels.library import library

if TYPE_CHECKING:
    from capibara.merge.kernels import Rows

INTEGERS = {2: np.int16, 4: np.int32, 8: np.int64}


def middle(rows: Rows, first: int, last: int, low: int, high: int, keep: Sequence[int] | None) -> np.ndarray:
    """The mean of the sorted positions low … high − 1 of every coordinate, of the inputs in `keep`, or all.

    A coordinate that is NaN in one of them is NaN in the result.
    """
    chosen = range(rows.num_inputs) if keep is None else keep
    given, out = rows.together(chosen, first, last), rows.room("middle", last - first)
    if library() is not None and out.dtype == np.float32 and len(given) <= arrays.MOST_SORTED:
        return arrays.sorted_mean(given, _pairs(len(given), low, high), low, high, out, threads=1)
    integers = INTEGERS[given[0].dtype.itemsize]
    values = [
        _ordered(row.view(integers), rows.room(("sorted", k, integers), len(row), integers))
        for k, row in enumerate(given)
    ]
    hidden = _hidden(given)
    middles = _sorted(values, rows.room(("sorted", "spare", integers), len(out), integers), low, high)
    mask = rows.room(("sorted", "mask", integers), len(out), integers)
    for k, value in enumerate(middles):
        number = _ordered(value, mask).view(given[0].dtype)  # it is its own inverse
        np.copyto(out, number) if k == 0 else np.add(out, number, out=out, dtype=out.dtype)
    if len(middles) > 1:
        np.divide(out, out.dtype.type(len(middles)), out=out)
    if hidden is not None:
        out[hidden] = np.nan
    return out


def _hidden(rows: Sequence[np.ndarray]) -> np.ndarray | None:
    """Where one is NaN; None if nowhere."""
    found = np.zeros(len(rows[0]), bool)
    for row in rows:
        found |= np.isnan(row)
    return found if found.any() else None


def _ordered(bits: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Sign and magnitude to two's complement: the integers stand in the order of the numbers, −0 before 0."""
    np.right_shift(bits, 8 * bits.itemsize - 1, out=out)
    np.bitwise_and(out, np.iinfo(bits.dtype).max, out=out)
    return np.bitwise_xor(out, bits, out=out)


def _sorted(values: list[np.ndarray], spare: np.ndarray, low: int, high: int) -> list[np.ndarray]:
    """Rows low … high − 1 after sorting every coordinate; all rows and `spare` are written over."""
    for i, j, lower, upper in _steps(len(values), low, high):
        if lower and upper:
            np.minimum(values[i], values[j], out=spare)
            np.maximum(values[i], values[j], out=values[j])
            values[i], spare = spare, values[i]
        elif lower:
            np.minimum(values[i], values[j], out=values[i])
        else:
            np.maximum(values[i], values[j], out=values[j])
    return values[low:high]


@lru_cache(maxsize=16)
def _pairs(count: int, low: int, high: int) -> np.ndarray:
    """`_steps` as the kernel takes them."""
    return np.array([step[:2] for step in _steps(count, low, high)], np.int32).reshape(-1, 2)


@lru_cache(maxsize=16)
def _steps(count: int, low: int, high: int) -> tuple[tuple[int, int, bool, bool], ...]:
    """The comparators whose results reach the positions low … high − 1, each with which of its two results do."""
    needed, steps = set(range(low, high)), []
    for i, j in reversed(comparators(count)):
        lower, upper = i in needed, j in needed
        if lower or upper:
            steps.append((i, j, lower, upper))
            needed |= {i, j}
    return tuple(reversed(steps))
