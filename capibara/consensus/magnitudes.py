"""What sparse merges ask of task vectors: how large the k-th largest entry is, and which entries a lottery keeps.

Both work on streamed rows. A float32 without its sign orders like its 32 bits read as an integer, so two passes that
count, first the upper 16 bits, then the lower 16 bits of the one bin that matters, find any rank exactly, in a whole
model as in one tensor, with 2¹⁶ counters a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from capibara.consensus.ballot import Place
from capibara.errors import ConfigError

GOLDEN = 0x9E3779B1
"""⌊2³² / φ⌋, made odd: neighbouring positions start far apart."""


def kth_largest(leaves: Callable[[], Iterable[Any]], ranks: Sequence[int]) -> np.ndarray:
    """float32[K, m]: of each row the magnitudes of the given ranks, 1 the largest, over all leaves together.

    Cost: two passes over the rows, on the host; the ranks share them.

    Args:
      leaves: `() -> float32[m, ...]` arrays, one pass each time it is called; finite.
      ranks: Each within 1 … the number of entries of a row.
    """
    wanted = np.asarray(ranks, np.int64)[:, None]
    high = _counts(_bits(leaf) >> 16 for leaf in leaves())
    upper, above = _find(high[None], wanted)
    low = np.zeros((len(wanted), len(high), 2**16), np.int64)
    for leaf in leaves():
        bits = _bits(leaf)
        for row, line in enumerate(bits):
            for k in range(len(wanted)):
                inside = line[line >> 16 == upper[k, row]] & 0xFFFF
                low[k, row] += np.bincount(inside, minlength=2**16)
    lower, _ = _find(low, wanted - above)
    return ((upper << 16) | lower).astype(np.uint32).view(np.float32)


def magnitude_ranks(rows: Any) -> np.ndarray:
    """float32, shaped like the rows: 0 for the largest magnitude along the last axis; equal ones by their place.

    Cost: a sort on the host, of magnitude and place together in 64 bits: many times faster than XLA's argsort on CPU.
    """
    wide = np.asarray(rows, np.float32)
    bits = np.ascontiguousarray(np.abs(wide)).view(np.uint32).reshape(-1, wide.shape[-1])
    places = np.arange(bits.shape[1], dtype=np.uint64)
    keys = np.sort((~bits).astype(np.uint64) << np.uint64(32) | places, axis=1)
    ranks = np.empty(bits.shape, np.float32)
    np.put_along_axis(ranks, (keys & np.uint64(0xFFFFFFFF)).astype(np.int64), places.astype(np.float32)[None], axis=1)
    return ranks.reshape(wide.shape)


def count_kept(density: float, size: int) -> int:
    """⌊density · size⌋, but at least 1: a tensor of three entries must not vanish at a density of 0.2."""
    return max(1, int(density * size * (1 + 1e-12)))


def check_density(name: str, density: float) -> None:
    """Refuses a share that is not in (0, 1].

    Raises:
      ConfigError: If it is not.
    """
    if not 0 < density <= 1:
        raise ConfigError(f"{name}: density, the share of entries that stay, must lie in (0, 1]; got {density}.")


def check_key(name: str, key: Any) -> None:
    """Refuses to draw lots without a key.

    Raises:
      ConfigError: If it is None.
    """
    if key is None:
        raise ConfigError(f"{name} draws lots and needs a PRNG key; got None. Pass jax.random.key(seed) to the merge.")


def row_seeds(key: Any, nodes: np.ndarray, leaf: int) -> jax.Array:
    """uint32[m, 2]: what the lots of each row in leaf number `leaf` hang on; a row keeps its lots when others leave."""
    return _row_seeds(key, jnp.asarray(nodes, jnp.int32), jnp.int32(leaf))


def first_of(place: Place) -> jax.Array:
    """uint32[2]: the low and high half of a block's first coordinate."""
    return jnp.asarray(np.array([place.first & 0xFFFFFFFF, place.first >> 32], np.uint32))


@partial(jax.jit, static_argnames="shape")
def uniforms(seeds: jax.Array, first: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """float32[m, ...] in [0, 1), a hash of seed and coordinate: cutting a tensor into blocks changes no lot.

    Two rounds of the finaliser of MurmurHash3 (A. Appleby 2011), each with a seed of its own.

    Args:
      seeds: uint32[m, 2].
      first: The first coordinate of the block, as `first_of` gives it.
      shape: Of the rows, m first.
    """
    count = int(np.prod(shape[1:], dtype=np.int64))
    place = jnp.arange(count, dtype=jnp.uint32) + first[0]
    high = first[1] + (place < first[0]).astype(jnp.uint32)
    mixed = _finalise((place * np.uint32(GOLDEN))[None] ^ seeds[:, :1])
    mixed = _finalise(mixed + seeds[:, 1:] + high[None] * np.uint32(GOLDEN))
    return ((mixed >> 8).astype(jnp.float32) * np.float32(2.0**-24)).reshape(shape)


@jax.jit
def _row_seeds(key: Any, nodes: jax.Array, leaf: jax.Array) -> jax.Array:
    return jax.vmap(
        lambda node: jax.random.bits(jax.random.fold_in(jax.random.fold_in(key, node), leaf), (2,), jnp.uint32)
    )(nodes)


def _finalise(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _bits(leaf: Any) -> np.ndarray:
    rows = np.asarray(leaf, np.float32)
    return np.ascontiguousarray(np.abs(rows)).reshape(len(rows), -1).view(np.uint32)


def _counts(parts: Iterable[np.ndarray]) -> np.ndarray:
    total: Any = 0
    for part in parts:
        total = total + np.stack([np.bincount(line, minlength=2**16) for line in part])
    return total


def _find(counts: np.ndarray, ranks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bin that holds a rank, counted from the highest, and how many entries lie in the bins above it."""
    from_above = np.cumsum(counts[..., ::-1], axis=-1)
    place = (from_above < ranks[..., None]).sum(axis=-1)
    above = np.take_along_axis(from_above, np.maximum(place - 1, 0)[..., None], axis=-1)[..., 0]
    return counts.shape[-1] - 1 - place, np.where(place > 0, above, 0)
