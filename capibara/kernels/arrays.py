"""Gram matrix and weighted sum of long rows in memory or in mapped files, each in one pass, for NumPy arrays.

Rows are a 2-D array or a list of 1-D arrays of equal length, float32 or bfloat16, `np.memmap` too. A row of weight 0 is
never read: NaNs in it change nothing. Results do not depend on the number of threads. Without the native kernels the
reference in NumPy runs. The GIL is free meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from capibara.errors import ConfigError
from capibara.kernels import reference
from capibara.kernels.library import library


def gram(
    rows: Any, weights: Any = None, *, less: np.ndarray | None = None, threads: int | None = None
) -> np.ndarray:
    """Inner products of n rows or of their differences from one: short runs in float32, their sums in float64.

    Cost: one pass over the rows, n² d multiplications. |error| ≤ 1e-6 · ‖a‖ ‖b‖, and typically a hundredth of that.

    Args:
      rows: [n, d]. A row whose numbers do not lie side by side is copied first.
      weights: [n]; those that are 0 leave their row out. None reads all.
      less: float32[d], contiguous; subtracted from every row, in float32, before it is multiplied.
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
    if less is not None and not (less.dtype == np.float32 and less.shape == (length,) and less.flags.c_contiguous):
        raise ConfigError(f"less is a contiguous float32[{length}]; got {less.dtype}{list(less.shape)}. Cast it first.")
    if found is None:
        return reference.gram(given, shares, less)
    out = np.zeros((len(given), len(given)))
    subtracted = 0 if less is None else less.ctypes.data
    places = shares.ctypes.data, subtracted, length, out.ctypes.data
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
    shares, length = _weights(weights, len(given)), len(given[0])
    if out is None:
        out = np.empty(length, np.float32)
    fits = out.dtype == np.float32 and out.shape == (length,) and out.flags.carray
    if not fits or any(np.may_share_memory(out, row) for row in given):
        raise ConfigError(
            f"out must be a writable, contiguous float32[{length}] that shares no memory with the rows; got "
            f"{out.dtype}{list(out.shape)}. Leave it out for a new array."
        )
    given, threads = _side_by_side(given, shares), _threads(threads)
    found = library()
    if found is None:
        return reference.weighted_sum(given, shares, out)
    place = shares.ctypes.data, length, out.ctypes.data
    found.weighted_sum(_addresses(given), _is_bfloat16(given), *place, threads)
    return out


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
    found = np.ascontiguousarray(weights, np.float64)
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
    return threads or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
