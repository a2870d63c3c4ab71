"""What is done with the same few thousand numbers of every input: sums, middles, products. NumPy, in cache-sized tiles.

    linear        Σᵢ cᵢ θᵢ + s · median          one float32 multiply and add a number, in the order of the inputs
    coordinate    median, trimmed mean           a sorting network of minima and maxima
    gram          ⟨θᵢ − r, θⱼ − r⟩               float64 sums of short float32 ones; r the median, a base model, or zero

NumPy fuses no multiply into an add, so the same inputs give the same bits on every machine. A jitted XLA kernel is
2–3 times as fast on a core, but the disk is the limit either way, and importing JAX costs 150 MB and a second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from capibara.merge.cast import decode
from capibara.merge.middles import middle

TILE_BYTES = 2**21
"""Of the decoded rows that a kernel holds at once: they stay in a core's second-level cache."""

GRAM_COLUMNS = 2**12
"""Columns of one product: 8 rows of this length stay in a core's cache. In float32 a sum of so many products is good to
1e-6 of the lengths it is made from, and the rows are differences already."""

SMALL = 2.0**-60
"""Squared lengths of a tile below this are taken in float64: squares below 2⁻¹²⁶ lose digits in float32."""

LOST = 2.0**-10
"""A squared distance below this share of the squared lengths it comes from has lost half its float32 digits."""


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


def linear(coefficients: Callable[[str], np.ndarray], share: float = 0.0, keep: Sequence[int] = ()) -> Kernel:
    """Σᵢ cᵢ θᵢ, c by tensor; an input with coefficient 0 contributes nothing, whatever it holds.

    Args:
      coefficients: Name of a tensor → c[n].
      share: Of the coordinate-wise median, in a vote.
      keep: Inputs that the median is of.
    """

    def combine(rows: Rows, first: int, last: int, name: str) -> np.ndarray:
        c = coefficients(name)
        total, part = rows.room("total", last - first), rows.room("part", last - first)
        total[...] = 0
        if share:
            np.multiply(median(rows, first, last, name, keep), total.dtype.type(share), out=total)
        for i in np.flatnonzero(c):
            np.multiply(rows.row(int(i), first, last), total.dtype.type(c[i]), out=part)
            np.add(total, part, out=total)
        return total

    return combine


def median(rows: Rows, first: int, last: int, name: str, keep: Sequence[int] | None = None) -> np.ndarray:
    """The middle number of every coordinate, or the mean of the two middle ones; of the inputs in `keep`, or all."""
    m = rows.num_inputs if keep is None else len(keep)
    return middle(rows, first, last, (m - 1) // 2, m // 2 + 1, keep)


def trimmed_mean(trim: int) -> Kernel:
    """The mean of what is left of every coordinate without the `trim` lowest and highest."""

    def combine(rows: Rows, first: int, last: int, name: str) -> np.ndarray:
        return middle(rows, first, last, trim, rows.num_inputs - trim, None)

    return combine


def gram(rows: Rows, first: int, last: int, keep: Sequence[int], reference: str | int) -> tuple[np.ndarray, np.ndarray]:
    """Products of the rows in `keep`, less a reference, over one tile.

    Args:
      rows: The block.
      first: First number of the tile.
      last: One past its last.
      keep: Inputs that take part.
      reference: `zero`; `median`, coordinate-wise; `first`, the first row, which is cheaper, and as good unless it is
        far from the others (`conditioned`); or the number of the input that the others are changes of.

    Returns:
      float64[m, m] of the m kept rows (with `first` to about 1e-6 of the product of two lengths), and bool[m], the rows
      with a number that is not finite (then the products count for nothing).
    """
    m = len(keep)
    with np.errstate(invalid="ignore", over="ignore"):
        if reference == "first":
            deltas, products = _from_first(rows, first, last, keep)
        else:
            deltas, products = _from_reference(rows, first, last, keep, reference)
    if np.isfinite(products).all():
        return products, np.zeros(m, bool)
    bad = np.array([not np.isfinite(rows.row(i, first, last)).all() for i in keep])
    if not bad.any():  # a difference of finite numbers that is too large
        bad[m - len(deltas) :] = ~np.isfinite(deltas).all(axis=1)
    return np.zeros((m, m)), bad


def _from_reference(
    rows: Rows, first: int, last: int, keep: Sequence[int], reference: str | int
) -> tuple[np.ndarray, np.ndarray]:
    """The differences of all rows and their products, float64."""
    count = last - first
    if reference == "zero":
        centre = None
    elif reference == "median":
        centre = median(rows, first, last, "", keep)
    else:
        centre = rows.row(int(reference), first, last, room="reference", own=True)
    deltas = rows.room(("deltas", len(keep)), len(keep) * count, np.float64).reshape(len(keep), count)
    gap = rows.room("gap", count)
    for k, i in enumerate(keep):
        row = rows.row(i, first, last)
        deltas[k] = row if centre is None else np.subtract(row, centre, out=gap)
    return deltas, _summed(deltas)


def _from_first(rows: Rows, first: int, last: int, keep: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The differences of all rows but the first and the products of all, in the rows' precision where that will do."""
    m, count = len(keep), last - first
    deltas = rows.room(("short", m), (m - 1) * count).reshape(m - 1, count)
    centre = rows.row(keep[0], first, last, room="reference", own=True)
    for k, i in enumerate(keep[1:]):
        np.subtract(rows.row(i, first, last), centre, out=deltas[k])
    products = _summed(deltas)
    if deltas.dtype == np.float32 and not _kept_by_float32(products, deltas):
        products = _summed(deltas.astype(np.float64))
    return deltas, np.pad(products, ((1, 0), (1, 0)))


def conditioned(gram: np.ndarray) -> bool:
    """Whether most squared distances of the rows keep enough digits of the products they are made from."""
    squared = np.diagonal(gram)
    distances = squared[:, None] + squared[None, :] - 2 * gram
    others = distances[~np.eye(len(gram), dtype=bool)]
    return bool(np.median(others) > LOST * np.median(squared)) if others.size and squared.max() > 0 else True


def _summed(deltas: np.ndarray) -> np.ndarray:
    """deltas · deltasᵀ: `GRAM_COLUMNS` products are summed in the dtype of the deltas, those sums in float64.

    Few and long calls, since two threads take turns with the interpreter's lock: all runs go in one `matmul`.
    """
    m, count = deltas.shape
    whole = count - count % GRAM_COLUMNS
    runs = deltas[:, :whole].reshape(m, whole // GRAM_COLUMNS, GRAM_COLUMNS).swapaxes(0, 1)
    total = np.zeros((m, m))
    for part in (runs, deltas[None, :, whole:]):
        if part.size:
            total += _products(part).sum(axis=0, dtype=np.float64)
    return total


def _products(runs: np.ndarray) -> np.ndarray:
    """run · runᵀ. Not in one call: NumPy would take BLAS's `syrk`, three times as slow for few long rows."""
    columns = runs.swapaxes(1, 2)
    return np.concatenate([np.matmul(runs, columns[..., :1]), np.matmul(runs, columns[..., 1:])], axis=2)


def _kept_by_float32(products: np.ndarray, deltas: np.ndarray) -> bool:
    """Whether no square was too large for float32, and none that matters too small."""
    squared = np.diagonal(products)
    lost = squared < SMALL
    return bool(np.isfinite(products).all()) and not deltas[lost].any()
