"""The ballot: n deltas, what each counts, and what each row has become.

    Ballot(stack, weights, rows, gram, scores) → rules → merge → one delta

A rule sees the Gram matrix and the scores and edits `rows` and `weights`; it never touches a leaf. Row i stands for
Σⱼ rows[i, j] Δⱼ + rows[i, n] · 0, a combination of the raw deltas and the start (whose delta is zero). A merge sees
leaves, one at a time. Weight 0 means "does not count", whatever the reason, and such a row changes not one bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from capibara.consensus.row_algebra import gram_matrix
from capibara.types import PyTree


class Ballot(NamedTuple):
    """What rules pass on.

    Attributes:
      stack: Raw deltas, leaves float32[n, ...].
      weights: float64[n], ≥ 0; 0 does not count.
      rows: float64[n, n+1], what each row now is; the identity at first. The last column is the start.
      gram: float64[n, n], products of the raw deltas; 0 where a weight was 0 when the ballot was opened.
      scores: Named float[n] values (quality, counts) that rules may use.
    """

    stack: PyTree
    weights: np.ndarray
    rows: np.ndarray
    gram: np.ndarray
    scores: dict[str, np.ndarray]


class ClippedRows(NamedTuple):
    """The nodes' own deltas as a rule left them, for merges that mixed rows would tell nothing.

    Attributes:
      rows: float64[n, n+1], as in a ballot.
      clipped: float64[n] factors.
      tau: The radius they were clipped to.
    """

    rows: np.ndarray
    clipped: np.ndarray
    tau: float


class Rule(NamedTuple):
    """Re-weights or transforms rows: `init(params) -> state`, `apply(ballot, state, key) -> (ballot, state, info)`.

    `info` may hold `centre` float64[n] (over the raw deltas) and `tau` (then the merge is leashed to them),
    `distance`, `clipped`, `own` (`ClippedRows`, merged instead of `rows` where the merge is no mean), and `backing`
    bool[n] for rules that pick rows: one that is not picked still backs.

    Attributes:
      name: For records.
      init: See above.
      apply: See above.
      least: Rows with weight above 0 that it needs; with fewer, `apply` raises `ConfigError` and a round has no quorum.
    """

    name: str
    init: Callable[[PyTree], PyTree]
    apply: Callable[[Ballot, PyTree, Any], tuple[Ballot, PyTree, dict[str, Any]]]
    least: int = 1


class Place(NamedTuple):
    """Where rows stand that a merge is given: the number of their leaf, and their first coordinate within it.

    In a round a merge always gets whole leaves. Files bigger than memory may hand a leaf over in blocks of coordinates,
    `first` being 0, k, 2k, … of the flattened leaf, where the merge says that it allows this.
    """

    leaf: int
    first: int = 0


class Survey(NamedTuple):
    """What a merge may learn about the m rows that count before it merges any leaf.

    Attributes:
      weights: float64[m], > 0, Σ = 1.
      nodes: int[m], whose row each is.
      leaves: `() -> the rows, leaf by leaf, float32[m, ...]`: one streamed pass; may be called again.
      key: Typed PRNG key, None where there is no randomness to be had.
    """

    weights: np.ndarray
    nodes: np.ndarray
    leaves: Callable[[], Iterator[jax.Array]]
    key: Any


class Merge(NamedTuple):
    """Rows → one delta. Give one of `weights`, `combine`, `leaf` and `prepare`, the first that will do.

    Attributes:
      name: For records.
      weights: `(weights[n]) -> w[n]` with w ≥ 0 and Σw = 1; the merge is Σᵢ wᵢ rowᵢ, which needs no leash.
      leaf: `(rows [m, ...] of the m rows that count, float32) -> [...]`.
      mean: True where equal weights give the plain mean of the rows; only then may mixed rows be merged.
      combine: `(weights[m] with Σ = 1, products[m, m]) -> v[m]`, float64: the merge is Σᵢ vᵢ rowᵢ, with any real v, by
        the scalar products ⟨rowᵢ, rowⱼ⟩.
      per_tensor: `combine` is asked for each tensor, with that tensor's products; otherwise once, for the whole tree.
      prepare: `(Survey) -> leaf function (rows [m, ...], Place) -> [...]`, for merges that draw lots, weigh the rows or
        must have seen the whole tree first.
      whole_tensors: The leaf function needs whole tensors; otherwise any block of a tensor's coordinates will do.
      score: The score by which the rows that count are weighed, where a ballot has it, instead of by their weights.
    """

    name: str
    weights: Callable[[np.ndarray], np.ndarray] | None = None
    leaf: Callable[[jax.Array], jax.Array] | None = None
    mean: bool = False
    combine: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    per_tensor: bool = False
    prepare: Callable[[Survey], Callable[[jax.Array, Place], jax.Array]] | None = None
    whole_tensors: bool = False
    score: str | None = None


class Verdict(NamedTuple):
    """What the vote decided, as float64 NumPy vectors over the n nodes; None where a rule has no such thing.

    Attributes:
      backing: bool[n], counted and not outvoted.
      coefficients: v[n] with merged Δ = Σ vᵢΔᵢ, for linear merges.
      coefficient_start: 1 − Σv, what stays on the start; 0 where a merge goes further than its rows and Σv > 1.
      centre: c[n] over the raw deltas.
      tau: Clipping radius of the merged rows.
      distance: ‖Δᵢ − c‖ of the nodes' own deltas.
      clipped: Factor ≤ 1 by which each merged row was drawn to c.
      leash: Factor ≤ 1 by which the merge was drawn to c.
      cosine: Of Δᵢ to the merged Δ.
      norms: ‖Δᵢ‖.
    """

    backing: np.ndarray
    coefficients: np.ndarray | None
    coefficient_start: float | None
    centre: np.ndarray | None
    tau: float | None
    distance: np.ndarray | None
    clipped: np.ndarray | None
    leash: float | None
    cosine: np.ndarray
    norms: np.ndarray


class Aggregator(NamedTuple):
    """A vote and a merge: `init(params) -> state`, `apply(ballot, state, key) -> (delta, Verdict, state)`.

    `least` is the number of rows with weight above 0 that `apply` needs, `score` the score that its merge weighs by.
    """

    name: str
    init: Callable[[PyTree], PyTree]
    apply: Callable[[Ballot, PyTree, Any], tuple[PyTree, Verdict, PyTree]]
    least: int = 1
    score: str | None = None


def open_ballot(
    stack: PyTree, weights: Any, scores: dict[str, np.ndarray] | None = None, *, gram: np.ndarray | None = None
) -> Ballot:
    """A ballot over raw deltas: identity rows, and the Gram matrix of the rows whose weight is above 0.

    Cost: one pass over the stack, none where the products are given.

    Args:
      stack: Raw deltas, leaves float32[n, ...].
      weights: [n], ≥ 0.
      scores: Named float[n] values for the rules and the merge.
      gram: float64[n, n], the products of at least the rows whose weight is above 0, where they are known already.
    """
    weights = np.asarray(weights, np.float64)
    keep = weights > 0
    gram = gram_matrix(stack, weights) if gram is None else np.where(keep[:, None] & keep[None, :], gram, 0.0)
    return Ballot(stack, weights, np.eye(len(weights), len(weights) + 1), gram, scores or {})
