"""Cases of attention, their inputs, and the oracle: float64 NumPy from the formulas, all scores at once."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np


class Case(NamedTuple):
    """`bias` names the axes of [B, N, T, S] that it does not share; None is no bias."""

    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    causal: bool = True
    window: int | None = None
    segments: bool = False
    bias: str | None = None
    rotary: bool = False


CASES = (
    Case(1, 1, 1, 1, 1, 1),
    Case(2, 7, 7, 2, 1, 5),
    Case(2, 300, 300, 4, 2, 64, segments=True),
    Case(1, 257, 257, 3, 3, 80, causal=False),
    Case(1, 300, 300, 2, 1, 128, window=100),
    Case(1, 5, 300, 2, 2, 32),
    Case(1, 60, 9, 2, 2, 32),
    Case(1, 270, 270, 1, 1, 256, window=30, segments=True),
    Case(1, 130, 200, 2, 1, 33, causal=False, window=50),
)
BIASED = (
    Case(2, 110, 280, 4, 2, 16, bias="BNTS"),
    Case(2, 110, 110, 4, 2, 16, bias="NTS", segments=True),
    Case(2, 20, 270, 4, 2, 16, causal=False, bias="BS"),
    Case(3, 30, 30, 2, 1, 8, bias="TS", window=9),
    Case(2, 30, 30, 2, 2, 8, bias="BN"),
    Case(2, 30, 30, 2, 2, 8, bias="NT", causal=False),
    Case(2, 30, 30, 2, 1, 8, bias=""),
)
TURNED = (
    Case(2, 150, 150, 4, 2, 64, rotary=True, segments=True),
    Case(2, 9, 270, 2, 1, 10, rotary=True),
    Case(1, 40, 40, 2, 2, 2, rotary=True, bias="BNTS", causal=False),
)


class Inputs(NamedTuple):
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    pull: np.ndarray
    ids: np.ndarray | None
    bias: np.ndarray | None
    angles: tuple[np.ndarray, np.ndarray] | None


def inputs(case: Case, dtype: str = "float32") -> Inputs:
    """Normal numbers, rounded to the dtype, as NumPy arrays of it; a tenth of a bias is −inf."""
    rng = np.random.default_rng(case.T * case.H)
    q, pull = (rng.normal(size=(case.B, case.T, case.N, case.H)) for _ in range(2))
    k, v = (rng.normal(size=(case.B, case.S, case.K, case.H)) for _ in range(2))
    ids = np.sort(rng.integers(0, 4, (case.B, case.S)), axis=1) if case.segments else None
    bias = angles = None
    if case.bias is not None:
        sizes = zip("BNTS", (case.B, case.N, case.T, case.S), strict=True)
        bias = rng.normal(size=[size if axis in case.bias else 1 for axis, size in sizes]).astype(np.float32)
        if bias.size > 1:
            bias[rng.random(bias.shape) < 0.1] = -np.inf
    if case.rotary:
        turn = rng.uniform(0, 7, (case.B, case.S, case.H // 2))
        angles = np.cos(turn).astype(np.float32), np.sin(turn).astype(np.float32)
    q, k, v, pull = (np.array(jnp.asarray(x, dtype)) for x in (q, k, v, pull))
    return Inputs(q, k, v, pull, ids, bias, angles)


def turn(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """The two halves of a head as pairs; turned back by −sin."""
    a, b = np.split(x, 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def oracle(case: Case, given: Inputs) -> tuple[np.ndarray, ...]:
    """Output and the gradients of q, k, v and, where there is one, bias."""
    q, k, v, pull = (np.asarray(x, np.float64) for x in given[:4])
    group, scale = case.N // case.K, case.H**-0.5
    if given.angles is not None:
        cos, sin = given.angles
        q_cos, q_sin = cos[:, case.S - case.T :], sin[:, case.S - case.T :]
        q, k = turn(q, q_cos, q_sin), turn(k, cos, sin)
    keys, values = np.repeat(k, group, 2), np.repeat(v, group, 2)
    here, there = np.arange(case.T)[:, None] + case.S - case.T, np.arange(case.S)[None, :]
    allowed = np.ones((case.B, case.N, case.T, case.S), bool)
    if case.causal:
        allowed &= there <= here
    if case.window:
        allowed &= there > here - case.window
    if given.ids is not None:
        allowed &= (given.ids[:, -case.T :, None] == given.ids[:, None, :])[:, None]
    added = np.float64(0) if given.bias is None else given.bias.astype(np.float64)
    scores = np.where(allowed, np.einsum("btnh,bsnh->bnts", q, keys) * scale + added, -np.inf)
    highest = np.max(scores, -1, keepdims=True)
    e = np.exp(scores - np.where(np.isinf(highest), 0, highest))
    shares = e / np.maximum(e.sum(-1, keepdims=True), 1e-300)
    out = np.einsum("bnts,bsnh->btnh", shares, values)
    to_shares = np.einsum("btnh,bsnh->bnts", pull, values)
    slopes = shares * (to_shares - np.einsum("btnh,btnh->bnt", pull, out)[..., None])

    def by_group(x: np.ndarray) -> np.ndarray:
        return x.reshape(case.B, case.S, case.K, group, case.H).sum(3)

    to_q = np.einsum("bnts,bsnh->btnh", slopes, keys) * scale
    to_k = by_group(np.einsum("bnts,btnh->bsnh", slopes, q)) * scale
    if given.angles is not None:
        to_q, to_k = turn(to_q, q_cos, -q_sin), turn(to_k, cos, -sin)
    found = (out, to_q, to_k, by_group(np.einsum("bnts,btnh->bsnh", shares, pull)))
    if given.bias is None:
        return found
    shared = tuple(i for i, size in enumerate(given.bias.shape) if size == 1)
    return (*found, slopes.sum(shared, keepdims=True))
