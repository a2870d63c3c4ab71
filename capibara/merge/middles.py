"""The sorted middle of every coordinate, by a network of minima and maxima.

    v₀ … vₙ₋₁ ─► comparators (min, max) ─► v₍low₎ … v₍high−1₎ ─► their mean

bfloat16 rows are sorted as the 16-bit integers that have their order, which is half the bytes; the result is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from capibara.consensus.comparators import comparators
from capibara.merge.cast import decode

if TYPE_CHECKING:
    from capibara.merge.kernels import Rows

INFINITY = np.int16(0x7F80)
"""In the order of `_ordered`; what is above it or below −INFINITY − 1 is NaN."""


def middle(rows: Rows, first: int, last: int, low: int, high: int, keep: Sequence[int] | None) -> np.ndarray:
    """The mean of the sorted positions low … high − 1 of every coordinate, of the inputs in `keep`, or all.

    NaN in one of them is NaN in the result.
    """
    chosen = range(rows.num_inputs) if keep is None else keep
    if rows.precision == np.float32 and all(rows.dtypes[i] == "BF16" for i in chosen):
        found = _sorted_as_integers(rows, first, last, low, high, chosen)
        if found is not None:
            return _mean(found)
    values = [rows.row(i, first, last, room=("sorted", k), own=True) for k, i in enumerate(chosen)]
    return _mean(_sorted(values, rows.room(("sorted", "spare"), last - first), low, high))


def _sorted_as_integers(
    rows: Rows, first: int, last: int, low: int, high: int, chosen: Sequence[int]
) -> list[np.ndarray] | None:
    """The sorted positions low … high − 1 as float32; None where there is a NaN, which integers would sort."""
    values = []
    for k, i in enumerate(chosen):
        bits = rows.raws[i][2 * first : 2 * last].view(np.int16)
        values.append(_ordered(bits, rows.room(("ordered", k), last - first, np.int16)))
        if len(bits) and (values[k].max() > INFINITY or values[k].min() < ~INFINITY):
            return None
    middles = _sorted(values, rows.room(("ordered", "spare"), last - first, np.int16), low, high)
    mask = rows.room(("ordered", "mask"), last - first, np.int16)
    found = []
    for k, value in enumerate(middles):
        bits = _ordered(value, mask)  # it is its own inverse
        found.append(decode(bits.view(np.uint8), "BF16", rows.room(("sorted", k), last - first)))
    return found


def _ordered(bits: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Sign and magnitude to two's complement: the integers stand in the order of the numbers, −0 before 0."""
    np.right_shift(bits, 15, out=out)
    np.bitwise_and(out, np.int16(0x7FFF), out=out)
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


def _mean(values: list[np.ndarray]) -> np.ndarray:
    total = values[0]
    for value in values[1:]:
        np.add(total, value, out=total)
    if len(values) > 1:
        np.divide(total, total.dtype.type(len(values)), out=total)
    return total


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
