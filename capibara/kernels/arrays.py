"""Gram matrix, weighted sum, sorted middles and rounding of long rows, in memory or mapped files, for NumPy arrays.

Rows are a 2-D array or a list of 1-D arrays of equal length, float32 or bfloat16, `np.memmap` too. A row of weight 0 is
never read: NaNs in it change nothing. Each function passes over the rows once, and its result does not depend on the
number of threads. Without the native kernels the reference in NumPy runs. The GIL is free meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from capibara.errors import ConfigError
from capibara.kernels import reference
from capibara.kernels.library import library
from capibara.runtime import usable_cores

MOST_SORTED = 1024
"""Rows of `sorted_mean`: a tile of all of them, a vector each, is at most 64 KB."""


def gram(
    rows: Any,
    weights: Any = None,
    *,
    centre: np.ndarray | None = None,
    wide: bool = False,
    threads: int | None = None,
) -> np.ndarray:
    """Inner products of n rows or of their differences from one.

    Short runs are summed in float32, those sums in float64: |error| ≤ 1e-6 · ‖a‖ ‖b‖, and typically a hundredth of
    that. Wide, all is float64. Cost: one pass over the rows, n² d multiplications.

    Args:
      rows: [n, d]. A row whose numbers do not lie side by side is copied first.
      weights: [n]; those that are 0 leave their row out. None reads all.
      centre: float32[d], contiguous; subtracted from every row, in float32, before it is multiplied.
      wide: Whether products are float64 too, which holds them exactly; about half as fast where memory is no limit.
      threads: How many to use; None is as many as the process may run on.

    Returns:
      float64[n, n]; the row and column of a row that was left out are 0.

    Raises:
      ConfigError: If the rows or weights do not fit each other.

    Example:
      >>> gram(np.float32([[3, 4], [1, 0]])).tolist()
      [[25.0, 3.0], [3.0, 1.0]]
    """
    given = _rows(rows)
    shares = np.ones(len(given)) if weights is None else _weights(weights, len(given))
    given, threads = _side_by_side(given, shares), _threads(threads)
    found = library()
    length = len(given[0]) if given else 0
    if centre is not None:
        _check(centre, "centre", length)
    if found is None:
        return reference.gram(given, shares, centre)
    out = np.zeros((len(given), len(given)))
    subtracted = 0 if centre is None else centre.ctypes.data
    places = shares.ctypes.data, subtracted, wide, length, out.ctypes.data
    found.gram(_addresses(given), _is_bfloat16(given), *places, threads)
    return out


def weighted_sum(rows: Any, weights: Any, out: np.ndarray | None = None, *, threads: int | None = None) -> np.ndarray:
    """Σ weights[i] · rows[i], summed in float64 in the order of the rows and rounded once: the same bits everywhere.

    Cost: one pass over the rows.

    Args:
      rows: [n, d], n ≥ 1. A row whose numbers do not lie side by side is copied first.
      weights: [n], any numbers; a row of weight 0 is not read.
      out: Where to write: float32[d], contiguous, and no part of the rows. A new array by default.
      threads: How many to use; None is as many as the process may run on.

    Returns:
      float32[d]: `out` where it was given.

    Raises:
      ConfigError: If rows, weights and `out` do not fit each other.

    Example:
      >>> weighted_sum(np.float32([[3, 4], [1, np.nan]]), [0.5, 0]).tolist()
      [1.5, 2.0]
    """
    given = _rows(rows)
    if not given:
        raise ConfigError("A weighted sum needs at least one row; got none.")
    shares, out = _weights(weights, len(given)), _room(out, given)
    given, threads = _side_by_side(given, shares), _threads(threads)
    found = library()
    if found is None:
        return reference.weighted_sum(given, shares, out)
    place = shares.ctypes.data, len(out), out.ctypes.data
    found.weighted_sum(_addresses(given), _is_bfloat16(given), *place, threads)
    return out


def sorted_mean(
    rows: Any, steps: np.ndarray, low: int, high: int, out: np.ndarray | None = None, *, threads: int | None = None
) -> np.ndarray:
    """The mean of positions low … high − 1 of every column once it is in order: a median, a trimmed mean.

    −0 stands before 0. A column that holds NaN gives NaN. Positions are summed in float32 from the lowest on.

    Cost: one pass over the rows, one minimum and maximum a step and column.

    Args:
      rows: [n, d], 1 ≤ n ≤ `MOST_SORTED`. A row whose numbers do not lie side by side is copied first.
      steps: int32[k, 2], pairs i, j of a sorting network: the lower of rows i and j goes to i. Those that change no
        position asked for may be left out.
      low: First position.
      high: One past the last, ≤ n.
      out: Where to write: float32[d], contiguous. A new array by default.
      threads: How many to use; None is as many as the process may run on.

    Returns:
      float32[d]: `out` where it was given.

    Raises:
      ConfigError: If rows, steps, positions and `out` do not fit each other.

    Example:
      >>> sorted_mean(np.float32([[3, 4], [1, 5]]), np.int32([[0, 1]]), 0, 1).tolist()
      [1.0, 4.0]
    """
    given, threads = _rows(rows), _threads(threads)
    steps = np.asarray(steps)
    if steps.ndim != 2 or steps.shape[1] != 2:
        raise ConfigError(f"Steps are pairs, int32[k, 2]; got an array of shape {list(steps.shape)}.")
    if not 1 <= len(given) <= MOST_SORTED or not 0 <= low < high <= len(given):
        raise ConfigError(
            f"Positions {low} to {high} of {len(given)} rows: give 0 ≤ low < high ≤ rows, 1 to {MOST_SORTED} rows."
        )
    if steps.size and not 0 <= steps.min() <= steps.max() < len(given):
        raise ConfigError(f"Steps name rows 0 to {len(given) - 1}; got {steps.min()} and {steps.max()}.")
    steps = np.require(steps, np.int32, ["C", "A"])
    out = _room(out, given)
    given = _side_by_side(given, np.ones(len(given)))
    found = library()
    if found is None:
        return reference.sorted_mean(given, low, high, out)
    place = steps.ctypes.data, len(steps), low, high, len(out), out.ctypes.data
    found.sorted_mean(_addresses(given), _is_bfloat16(given), *place, threads)
    return out


def moved(
    start: np.ndarray, to: np.ndarray, share: float, out: np.ndarray | None = None, *, threads: int | None = None
) -> np.ndarray:
    """start + share · (to − start) in float32, each of the three operations rounded: the same bits everywhere.

    Args:
      start: float32[d], contiguous.
      to: float32[d] or bfloat16[d]. One whose numbers do not lie side by side is copied first.
      share: How far; rounded to float32.
      out: Where to write: float32[d], contiguous; `start` itself, or no part of it or of `to`. A new array by default.
      threads: How many to use; None is as many as the process may run on.

    Returns:
      float32[d]: `out` where it was given.

    Raises:
      ConfigError: If `start`, `to` and `out` do not fit each other.
    """
    (to,) = _rows([to])
    _check(start, "start", len(to))
    out = start if out is start and start.flags.writeable else _room(out, [start, to])
    (to,) = _side_by_side([to], np.ones(1))
    found = library()
    if found is None:
        step = to.astype(np.float32) - start
        step *= np.float32(share)
        return np.add(start, step, out=out)
    places = start.ctypes.data, to.ctypes.data, _is_bfloat16([to]), share, len(start), out.ctypes.data
    found.moved(*places, _threads(threads))
    return out


def to_bfloat16(values: np.ndarray, out: np.ndarray | None = None, *, threads: int | None = None) -> np.ndarray:
    """float32 to the nearest bfloat16, ties to even.

    Args:
      values: float32[d], contiguous.
      out: bfloat16[d], contiguous. A new array by default.
      threads: How many to use; None is as many as the process may run on.

    Returns:
      bfloat16[d]: `out` where it was given.

    Raises:
      ConfigError: If `values` or `out` is something else.
    """
    import ml_dtypes

    _check(values, "values", values.size)
    out = _room(out, [values], np.dtype(ml_dtypes.bfloat16))
    found = library()
    if found is None:
        out[...] = values
    else:
        found.to_bfloat16(values.ctypes.data, len(values), out.ctypes.data, _threads(threads))
    return out


def _room(out: np.ndarray | None, rows: Sequence[np.ndarray], dtype: Any = np.float32) -> np.ndarray:
    """`out`, or a new array as long as a row."""
    length, dtype = len(rows[0]), np.dtype(dtype)
    if out is None:
        return np.empty(length, dtype)
    fits = out.dtype == dtype and out.shape == (length,) and out.flags.c_contiguous and out.flags.writeable
    if not fits or any(np.may_share_memory(out, row) for row in rows):
        raise ConfigError(
            f"out must be a writable, contiguous {dtype}[{length}] that shares no memory with the rows; got "
            f"{out.dtype}{list(out.shape)}. Leave it out for a new array."
        )
    return out


def _check(array: np.ndarray, name: str, length: int) -> None:
    if array.dtype != np.float32 or array.shape != (length,) or not array.flags.c_contiguous:
        raise ConfigError(
            f"{name} is a contiguous float32[{length}]; got {array.dtype}{list(array.shape)}. Cast it first."
        )


def _rows(rows: Any) -> list[np.ndarray]:
    given = [np.asarray(row) for row in rows]
    for row in given:
        if row.ndim != 1 or row.shape != given[0].shape or row.dtype != given[0].dtype:
            raise ConfigError(
                f"Rows are 1-D arrays of one length and dtype; got {given[0].dtype}{list(given[0].shape)} and "
                f"{row.dtype}{list(row.shape)}. Flatten and cast them first."
            )
    if given and given[0].dtype != np.float32 and given[0].dtype.name != "bfloat16":
        raise ConfigError(f"Rows are float32 or bfloat16, of native byte order; got {given[0].dtype.str}. Cast them.")
    return given


def _weights(weights: Any, n: int) -> np.ndarray:
    found = np.require(weights, np.float64, ["C", "A"])
    if found.shape != (n,):
        raise ConfigError(f"{n} rows need {n} weights; got an array of shape {list(found.shape)}.")
    return found


def _side_by_side(rows: Sequence[np.ndarray], weights: np.ndarray) -> list[np.ndarray]:
    """Copies those whose numbers are spread out; the kernels take any address."""
    return [
        row if row.flags.c_contiguous or weight == 0 else np.ascontiguousarray(row)
        for row, weight in zip(rows, weights, strict=True)
    ]


def _addresses(rows: Sequence[np.ndarray]) -> list[int]:
    return [row.__array_interface__["data"][0] for row in rows]


def _is_bfloat16(rows: Sequence[np.ndarray]) -> bool:
    return bool(rows) and rows[0].dtype.name == "bfloat16"


def _threads(threads: int | None) -> int:
    if threads is not None and threads < 1:
        raise ConfigError(f"threads is 1 or more; got {threads}. Leave it out for as many as there are cores.")
    return threads or usable_cores()
