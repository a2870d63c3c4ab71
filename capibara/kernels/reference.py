"""What every backend must equal, in NumPy and float64: slow, plain, and read beside the formulas.

    G[i, j] = Σ_k (rows[i, k] − r[k]) · (rows[j, k] − r[k])        s[k] = Σ_i weights[i] · rows[i, k]

A row whose weight is 0 is not read: its row and column of G are 0, and it adds nothing to s, whatever stands in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BLOCK = 1 << 16


def gram(rows: Sequence[np.ndarray], weights: np.ndarray, centre: np.ndarray | None = None) -> np.ndarray:
    """float64[n, n] of n rows of equal length, each less the centre r where it is given."""
    found = np.zeros((len(rows), len(rows)))
    read = np.flatnonzero(weights).tolist()
    for start in range(0, len(rows[0]) if len(rows) else 0, BLOCK):
        block = [rows[i][start : start + BLOCK] for i in read]
        if centre is not None:  # in the precision of the rows
            block = [row - centre[start : start + BLOCK] for row in block]
        block = np.array(block, np.float64)
        if len(read):
            found[np.ix_(read, read)] += block @ block.T
    return found


def weighted_sum(rows: Sequence[np.ndarray], weights: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Into `out`[d], float32 or float64, summed in float64 in the order of the rows and rounded once."""
    for start in range(0, len(out), BLOCK):
        total = np.zeros(len(out[start : start + BLOCK]))
        for row, weight in zip(rows, weights, strict=True):
            if weight != 0:
                total += weight * row[start : start + BLOCK].astype(np.float64)
        out[start : start + BLOCK] = total
    return out


def sorted_mean(rows: Sequence[np.ndarray], low: int, high: int, out: np.ndarray) -> np.ndarray:
    """float32[d] into `out`: the mean of sorted positions low … high − 1 of every column, NaN where it holds one."""
    for start in range(0, len(out), BLOCK):
        block = np.array([row[start : start + BLOCK] for row in rows], np.float32)
        hidden = np.isnan(block).any(axis=0)
        bits = block.view(np.int32)
        ordered = np.sort(bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF)), axis=0)[low:high]
        values = (ordered ^ ((ordered >> 31) & np.int32(0x7FFFFFFF))).view(np.float32)
        total = values[0]
        for value in values[1:]:
            total = total + value
        out[start : start + BLOCK] = np.where(hidden, np.float32(np.nan), total / np.float32(high - low))
    return out
