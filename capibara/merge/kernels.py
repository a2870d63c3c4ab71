"""What is done with the same few thousand numbers of every input: sums, middles, products, in cache-sized tiles.

    linear        Σᵢ cᵢ θᵢ + s · median          summed in float64 in the order of the inputs, rounded once
    coordinate    median, trimmed mean           a sorting network of minima and maxima
    gram          ⟨θᵢ − r, θⱼ − r⟩               float64 sums; r the median, a base model, the first row, or zero

Sums, middles, and products of differences from the first row, are native kernels where they are built
(`capibara.kernels`); sums and middles have the same bits with and without them, on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from capibara.kernels import arrays, reference
from capibara.merge.cast import decode
from capibara.merge.middles import middle
from capibara.merge.tensors import numpy_type

TILE_BYTES = 2**21
"""Of the decoded rows that a kernel holds at once: they stay in a core's second-level cache."""

GRAM_COLUMNS = 2**12
"""Columns of one product in NumPy: 8 rows of this length stay in a core's cache."""

SMALL = 2.0**-60
"""Squared lengths of a tile below this are taken again in float64: squares below 2⁻¹²⁶ lose digits in float32."""

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

    def together(self, which: Sequence[int], first: int, last: int, *, decoded: bool = False) -> list[np.ndarray]:
        """Numbers `first` to `last` of many inputs; as they lie where all are bfloat16 or all float32, or decoded."""
        dtypes = {self.dtypes[i] for i in which}
        if decoded or len(dtypes) > 1 or not dtypes <= {"BF16", "F32"} or self.precision != np.float32:
            return [self.row(i, first, last, room=("decoded", i)) for i in which]
        return [self.raws[i][first * self.sizes[i] : last * self.sizes[i]].view(numpy_type(*dtypes)) for i in which]

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
    return max(2**10, min(2**17, TILE_BYTES // (num_rows * precision.itemsize)))


def mean(rows: Rows, first: int, last: int, name: str) -> np.ndarray:
    """The sum in the order of the inputs, each divided by their number; equal float32 inputs give themselves."""
    n = rows.num_inputs
    return _sum(rows, rows.together(range(n), first, last), np.full(n, 1 / n))


def linear(coefficients: Callable[[str], np.ndarray], share: float = 0.0, keep: Sequence[int] = ()) -> Kernel:
    """Σᵢ cᵢ θᵢ, c by tensor; an input with coefficient 0 contributes nothing, whatever it holds.

    Args:
      coefficients: Name of a tensor → c[n].
      share: Of the coordinate-wise median, in a vote.
      keep: Inputs that the median is of.
    """

    def combine(rows: Rows, first: int, last: int, name: str) -> np.ndarray:
        c = coefficients(name)
        used = np.flatnonzero(c).tolist()
        weights, added = c[used], rows.together(used, first, last, decoded=bool(share))
        if share:
            weights, added = np.append(weights, share), [*added, median(rows, first, last, name, keep)]
        if not added:
            return np.zeros(last - first, rows.precision)
        return _sum(rows, added, weights)

    return combine


def _sum(rows: Rows, added: Sequence[np.ndarray], weights: np.ndarray) -> np.ndarray:
    """Σ weights[i] · added[i]; there is at least one."""
    total = rows.room("total", len(added[0]))
    if rows.precision == np.float64:
        return reference.weighted_sum(added, weights, total)
    return arrays.weighted_sum(added, weights, total, threads=1)


def median(rows: Rows, first: int, last: int, name: str, keep: Sequence[int] | None = None) -> np.ndarray:
    """The middle number of every coordinate, or the mean of the two middle ones; of the inputs in `keep`, or all."""
    m = rows.num_inputs if keep is None else len(keep)
    return middle(rows, first, last, (m - 1) // 2, m // 2 + 1, keep)


def trimmed_mean(trim: int) -> Kernel:
    """The mean of what is left of every coordinate without the `trim` lowest and highest."""

    def combine(rows: Rows, first: int, last: int, name: str) -> np.ndarray:
        return middle(rows, first, last, trim, rows.num_inputs - trim, None)

    return combine


def gram(rows: Rows, first: int, last: int, keep: Sequence[int], centre: str | int) -> tuple[np.ndarray, np.ndarray]:
    """Products of the rows in `keep`, less a reference, over one tile.

    Args:
      rows: The block.
      first: First number of the tile.
      last: One past its last.
      keep: Inputs that take part.
      centre: The reference: `zero`; `median`, coordinate-wise; `first`, the first row, which is cheaper, and as good
        unless it is far from the others (`conditioned`); or the number of the input that the others are changes of.

    Returns:
      float64[m, m] of the m kept rows (of float32 rows with `first` to about 1e-6 of the product of two lengths), and
      bool[m], the rows with a number that is not finite (then the products count for nothing).
    """
    m = len(keep)
    with np.errstate(invalid="ignore", over="ignore"):
        if centre == "first" and rows.precision == np.float32 and m > 1:
            products = _from_first(rows, first, last, keep)
            if products is not None:
                return products, np.zeros(m, bool)
        deltas = _differences(rows, first, last, keep, keep[0] if centre == "first" else centre)
        products = _summed(deltas)
    if np.isfinite(products).all():
        return products, np.zeros(m, bool)
    bad = np.array([not np.isfinite(rows.row(i, first, last)).all() for i in keep])
    if not bad.any():  # a difference of finite numbers that is too large
        bad = np.logical_not(np.isfinite(deltas).all(axis=1))
    return np.zeros((m, m)), bad


def _differences(rows: Rows, first: int, last: int, keep: Sequence[int], centre: str | int) -> np.ndarray:
    """float64[m, count] of all rows from a reference."""
    count = last - first
    if centre == "zero":
        origin = None
    elif centre == "median":
        origin = median(rows, first, last, "", keep)
    else:
        origin = rows.row(int(centre), first, last, room="reference", own=True)
    deltas = rows.room(("deltas", len(keep)), len(keep) * count, np.float64).reshape(len(keep), count)
    gap = rows.room("gap", count)
    for k, i in enumerate(keep):
        row = rows.row(i, first, last)
        deltas[k] = row if origin is None else np.subtract(row, origin, out=gap)
    return deltas


def _from_first(rows: Rows, first: int, last: int, keep: Sequence[int]) -> np.ndarray | None:
    """Products of differences from the first row by float32 arithmetic; None where that would lose what matters."""
    origin = rows.row(keep[0], first, last, room="reference", own=True)
    products = arrays.gram(rows.together(keep[1:], first, last), centre=origin, threads=1)
    tiny = [i for i, squared in zip(keep[1:], np.diagonal(products), strict=True) if squared < SMALL]
    if not np.isfinite(products).all() or not all(np.array_equal(rows.row(i, first, last), origin) for i in tiny):
        return None
    return np.pad(products, ((1, 0), (1, 0)))


def conditioned(gram: np.ndarray) -> bool:
    """Whether most squared distances of the rows keep enough digits of the products they are made from."""
    squared = np.diagonal(gram)
    distances = squared[:, None] + squared[None, :] - 2 * gram
    others = distances[~np.eye(len(gram), dtype=bool)]
    return bool(np.median(others) > LOST * np.median(squared)) if others.size and squared.max() > 0 else True


def _summed(deltas: np.ndarray) -> np.ndarray:
    """deltas · deltasᵀ, `GRAM_COLUMNS` products at a time.

    Few and long calls, since two threads take turns with the interpreter's lock: all runs go in one `matmul`.
    """
    m, count = deltas.shape
    whole = count - count % GRAM_COLUMNS
    runs = deltas[:, :whole].reshape(m, whole // GRAM_COLUMNS, GRAM_COLUMNS).swapaxes(0, 1)
    total = np.zeros((m, m))
    for part in (runs, deltas[None, :, whole:]):
        if part.size:
            total += _products(part).sum(axis=0)
    return total


def _products(runs: np.ndarray) -> np.ndarray:
    """run · runᵀ. Not in one call: NumPy would take BLAS's `syrk`, three times as slow for few long rows."""
    columns = runs.swapaxes(1, 2)
    return np.concatenate([np.matmul(runs, columns[..., :1]), np.matmul(runs, columns[..., 1:])], axis=2)
