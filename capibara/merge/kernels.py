"""What is done with the same few thousand numbers of every input: sums, middles, products. NumPy, in cache-sized tiles.

    linear        Σᵢ cᵢ θᵢ + s · median          one float32 multiply and add a number, in the order of the inputs
    coordinate    median, trimmed mean           a sorting network of minima and maxima
    gram          ⟨θᵢ − r, θⱼ − r⟩               float64, r the median, a base model, or zero

NumPy fuses no multiply into an add, so the same inputs give the same bits on every machine. A jitted XLA kernel is
2–3 times as fast on a core, but the disk is the limit either way, and importing JAX costs 150 MB and a second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from capibara.consensus.comparators import comparators
from capibara.merge.cast import decode

TILE_BYTES = 2**21
"""Of the decoded rows that a kernel holds at once: they stay in a core's second-level cache."""

GRAM_COLUMNS = 2**12
"""Columns of one product: 8 float64 rows of this length stay in a core's cache."""

LOST = 2.0**-30
"""A squared distance below this share of the squared lengths it comes from has lost more digits than it may."""


class Rows:
    """The bytes of one block of every input, decoded tile by tile into scratch memory that is kept.

    Args:
      num_inputs: Inputs.
      precision: float32, or float64 where an input holds it.
    """

    def __init__(self, num_inputs: int, precision: type[np.floating]):
        self.num_inputs, self.precision = num_inputs, np.dtype(precision)
        self._scratch: dict[object, np.ndarray] = {}
        self.raws: Sequence[np.ndarray] = ()
        self.dtypes: Sequence[str] = ()
        self.sizes: Sequence[int] = ()

    def open(self, raws: Sequence[np.ndarray], dtypes: Sequence[str], sizes: Sequence[int]) -> None:
        """Takes the next block: the bytes of every input, their types, and the bytes of one number of each."""
        self.raws, self.dtypes, self.sizes = raws, dtypes, sizes

    def row(self, i: int, first: int, last: int, *, room: object = 0, own: bool = False) -> np.ndarray:
        """Numbers `first` to `last` of input i, in the scratch row `room`; with `own` they may be written over."""
        out = self.room(room, last - first)
        size = self.sizes[i]
        values = decode(self.raws[i][first * size : last * size], self.dtypes[i], out)
        if own and values is not out:
            np.copyto(out, values)
            return out
        return values

    def room(self, key: object, count: int, dtype: type | np.dtype | None = None) -> np.ndarray:
        """A scratch row of at least `count` numbers, cut to it."""
        kept = self._scratch.get(key)
        if kept is None or len(kept) < count:
            kept = self._scratch[key] = np.empty(count, dtype or self.precision)
        return kept[:count]


Kernel = Callable[[Rows, int, int, str], np.ndarray]
"""(rows, first, last, name of the tensor) → the merged numbers, in scratch memory."""


def tile_numbers(num_rows: int, precision: np.dtype) -> int:
    """How many numbers of each of `num_rows` rows are decoded at once."""
    return max(2**10, min(2**16, TILE_BYTES // (num_rows * precision.itemsize)))


def mean(rows: Rows, first: int, last: int, name: str) -> np.ndarray:
    """The sum in the order of the inputs, divided by their number."""
    total = rows.room("total", last - first)
    np.copyto(total, rows.row(0, first, last))
    for i in range(1, rows.num_inputs):
        np.add(total, rows.row(i, first, last), out=total)
    np.divide(total, total.dtype.type(rows.num_inputs), out=total)
    return total


def linear(coefficients: Callable[[str], np.ndarray], middle: float = 0.0, keep: Sequence[int] = ()) -> Kernel:
    """Σᵢ cᵢ θᵢ, c by tensor; an input with coefficient 0 contributes nothing, whatever it holds.

    Args:
      coefficients: Name of a tensor → c[n].
      middle: Share of the coordinate-wise median, in a vote.
      keep: Inputs that the median is of.
    """

    def combine(rows: Rows, first: int, last: int, name: str) -> np.ndarray:
        c = coefficients(name)
        total, part = rows.room("total", last - first), rows.room("part", last - first)
        total[...] = 0
        if middle:
            np.multiply(median(rows, first, last, name, keep), total.dtype.type(middle), out=total)
        for i in np.flatnonzero(c):
            np.multiply(rows.row(int(i), first, last), total.dtype.type(c[i]), out=part)
            np.add(total, part, out=total)
        return total

    return combine


def median(rows: Rows, first: int, last: int, name: str, keep: Sequence[int] | None = None) -> np.ndarray:
    """The middle number of every coordinate, or the mean of the two middle ones; of the inputs in `keep`, or all."""
    m = rows.num_inputs if keep is None else len(keep)
    return _middle(rows, first, last, (m - 1) // 2, m // 2 + 1, keep)


def trimmed_mean(trim: int) -> Kernel:
    """The mean of what is left of every coordinate without the `trim` lowest and highest."""

    def combine(rows: Rows, first: int, last: int, name: str) -> np.ndarray:
        return _middle(rows, first, last, trim, rows.num_inputs - trim, None)

    return combine


def gram(rows: Rows, first: int, last: int, keep: Sequence[int], reference: str | int) -> tuple[np.ndarray, np.ndarray]:
    """Products of the rows in `keep`, less a reference, over one tile.

    Args:
      rows: The block.
      first: First number of the tile.
      last: One past its last.
      keep: Inputs that take part.
      reference: `zero`; `median`, coordinate-wise; `three`, the middle of the first, the middle and the last row, which
        is cheaper and as good unless two of the three are liars; or the number of the input that the others are changes
        of.

    Returns:
      float64[m, m] of the m kept rows, and bool[m], the rows with a number that is not finite (then the products count
      for nothing).
    """
    count, m = last - first, len(keep)
    deltas = rows.room(("deltas", m), m * count, np.float64).reshape(m, count)
    if reference == "median" or (reference == "three" and m < 4):
        middle = median(rows, first, last, "", keep)
    elif reference == "three":
        middle = median(rows, first, last, "", (keep[0], keep[m // 2], keep[-1]))
    elif reference == "zero":
        middle = None
    else:
        middle = rows.row(int(reference), first, last, room="reference", own=True)
    gap = rows.room("gap", count)
    for k, i in enumerate(keep):
        row = rows.row(i, first, last)
        deltas[k] = row if middle is None else np.subtract(row, middle, out=gap)
    with np.errstate(invalid="ignore", over="ignore"):
        parts = [_products(deltas[:, k : k + GRAM_COLUMNS]) for k in range(0, count, GRAM_COLUMNS)]
        products = np.sum(parts, axis=0) if parts else np.zeros((m, m))
    if np.isfinite(products).all():
        return products, np.zeros(m, bool)
    bad = np.array([not np.isfinite(rows.row(i, first, last)).all() for i in keep])
    return np.zeros((m, m)), bad if bad.any() else np.array([not np.isfinite(delta).all() for delta in deltas])


def conditioned(gram: np.ndarray) -> bool:
    """Whether the squared distances of the rows keep enough digits of the products they are made from."""
    squared = np.diagonal(gram)
    distances = squared[:, None] + squared[None, :] - 2 * gram
    others = distances[~np.eye(len(gram), dtype=bool)]
    return bool(np.median(others) > LOST * squared.max()) if others.size and squared.max() > 0 else True


def _products(deltas: np.ndarray) -> np.ndarray:
    """deltas · deltasᵀ. Not in one call: NumPy would take BLAS's `syrk`, three times as slow for few long rows."""
    products = np.empty((len(deltas), len(deltas)))
    np.matmul(deltas, deltas[0], out=products[:, 0])
    np.matmul(deltas, deltas[1:].T, out=products[:, 1:])
    return products


def _middle(rows: Rows, first: int, last: int, low: int, high: int, keep: Sequence[int] | None) -> np.ndarray:
    """The mean of the sorted positions low … high − 1 of every coordinate."""
    chosen = range(rows.num_inputs) if keep is None else keep
    values = [rows.row(i, first, last, room=("sorted", k), own=True) for k, i in enumerate(chosen)]
    spare = rows.room(("sorted", "spare"), last - first)
    for i, j, lower, upper in _steps(len(values), low, high):
        if lower and upper:
            np.minimum(values[i], values[j], out=spare)
            np.maximum(values[i], values[j], out=values[j])
            values[i], spare = spare, values[i]
        elif lower:
            np.minimum(values[i], values[j], out=values[i])
        else:
            np.maximum(values[i], values[j], out=values[j])
    total = values[low]
    for k in range(low + 1, high):
        np.add(total, values[k], out=total)
    if high - low > 1:
        np.divide(total, total.dtype.type(high - low), out=total)
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
