"""Sorting networks: which pairs to put in order, in turn, so that any values end up sorted. No JAX.

Reference: Batcher's odd-even merge sort, K. E. Batcher 1968.
"""

from __future__ import annotations

from functools import lru_cache


@lru_cache(maxsize=32)
def comparators(count: int) -> tuple[tuple[int, int], ...]:
    """Pairs (i, j), i < j, that sort `count` values when each pair is put in order in turn."""
    pairs = []
    p = 1
    while p < count:
        k = p
        while k >= 1:
            for j in range(k % p, count - k, 2 * k):
                for i in range(min(k, count - j - k)):
                    if (i + j) // (2 * p) == (i + j + k) // (2 * p):
                        pairs.append((i + j, i + j + k))
            k //= 2
        p *= 2
    return tuple(pairs)
