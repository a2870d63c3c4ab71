"""Ballots to vote on, for Hypothesis: honest rows around a mean, and up to f arbitrary ones of every kind we know."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

LIES = ("zero", "copy", "huge", "tiny", "opposite", "nudge", "gauss", "edge")
SIZES = ((4, 1), (7, 2), (10, 3))
"""(n, f) of the fast lane; every other pair compiles the vote once more."""


class Case(NamedTuple):
    """float32[n, d] deltas of which the rows `liars` are arbitrary."""

    deltas: np.ndarray
    liars: list[int]
    f: int

    @property
    def n(self) -> int:
        """The number of rows."""
        return len(self.deltas)


@st.composite
def cases(draw, sizes=SIZES, dimension: int = 5) -> Case:
    """One ballot: a scale of 1e-20 to 1e20, honest rows with more or less in common, liars of one or two kinds."""
    n, f = draw(st.sampled_from(sizes))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = 10.0 ** draw(st.sampled_from((-20, -6, 0, 0, 0, 6, 20)))
    spread = draw(st.sampled_from((0.0, 1e-3, 0.3, 1.0, 5.0)))
    mean = random.normal(size=dimension)
    deltas = mean + spread * random.normal(size=(n, dimension))
    liars = sorted(random.choice(n, size=draw(st.integers(0, f)), replace=False).tolist())
    kinds = draw(st.lists(st.sampled_from(LIES), min_size=1, max_size=2))
    for place, i in enumerate(liars):
        deltas[i] = lie(kinds[place % len(kinds)], deltas, mean, spread, i, random)
    with np.errstate(over="ignore", under="ignore"):
        return Case(np.clip(deltas * scale, -1e30, 1e30).astype(np.float32), liars, f)


def lie(kind: str, deltas: np.ndarray, mean: np.ndarray, spread: float, i: int, random) -> np.ndarray:
    """One row of a liar."""
    return {
        "zero": np.zeros_like(mean),
        "copy": deltas[(i + 1) % len(deltas)],
        "huge": 1e20 * random.normal(size=mean.shape),
        "tiny": 1e-6 * random.normal(size=mean.shape),
        "opposite": -10.0 * mean,
        "nudge": mean - 1.5 * spread * np.ones_like(mean),
        "gauss": 10.0 * random.normal(size=mean.shape),
        "edge": mean * (1 + 3 * spread),
    }[kind]


def as_stack(deltas: np.ndarray) -> dict:
    """The rows as a stack of two leaves, so that nothing depends on there being one."""
    import jax.numpy as jnp

    half = deltas.shape[1] // 2
    return {"a": jnp.asarray(deltas[:, :half]), "b": {"c": jnp.asarray(deltas[:, half:, None])}}


def as_row(delta: dict) -> np.ndarray:
    """float64[d]: a delta as one vector again."""
    return np.concatenate([np.ravel(delta["a"]), np.ravel(delta["b"]["c"])]).astype(np.float64)
