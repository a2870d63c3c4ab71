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
import jax.numpy as jnp
import numpy as np

from capibara.types import PyTree

BLOCK_COLUMNS = 2**12
"""Columns of one product: 8 float64 rows of this length stay in a core's cache of 1 MB."""

BLOCKS = 8
"""Products at a time; with the rows' float64 copies a step holds n · 2¹⁵ · 12 bytes, 3 MB for 8 rows."""


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
      weights: `(weights[n]) -> w[n]` with Σw = 1; the merge is Σᵢ wᵢ rowᵢ.
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


def open_ballot(stack: PyTree, weights: Any, scores: dict[str, np.ndarray] | None = None) -> Ballot:
    """A ballot over raw deltas: identity rows, and the Gram matrix of the rows whose weight is above 0.

    Cost: one pass over the stack.
    """
    weights = np.asarray(weights, np.float64)
    return Ballot(stack, weights, np.eye(len(weights), len(weights) + 1), gram_matrix(stack, weights), scores or {})


def gram_matrix(stack: PyTree, weights: Any) -> np.ndarray:
    """float64[n, n]: ⟨Δᵢ, Δⱼ⟩ over all leaves, products and sums in float64; zeros in rows with weight 0.

    Float32 products would be useless here: deltas of near-equal nodes cancel (docs/protocol.md, vote, step 1).
    """
    with jax.enable_x64(True):
        return np.asarray(_gram(jax.tree.leaves(stack), jnp.asarray(np.asarray(weights) > 0)))


def weighted_sum(coefficients: Any, stack: PyTree, gram: np.ndarray | None = None) -> PyTree:
    """Σᵢ vᵢ Δᵢ, leaf by leaf in float32; a row with coefficient 0 contributes nothing, whatever it holds.

    Rows far from 1 are scaled by a power of two first, so that a coefficient of 1e-40 on a row of length 1e20 is not
    lost to float32's range. Cost: one pass over the stack.
    """
    v = np.asarray(coefficients, np.float64)
    scale = _power_of_two(gram, len(v))
    return _weighted(stack, (1 / scale).astype(np.float32), (v * scale).astype(np.float32), jnp.asarray(v != 0))


def materialise(rows: np.ndarray, keep: np.ndarray, leaf: jax.Array, gram: np.ndarray | None = None) -> jax.Array:
    """float32[m, ...]: the m rows of a leaf that count, as the combinations that `rows` says."""
    chosen = np.flatnonzero(keep)
    part = rows[chosen][:, : len(keep)]
    if np.array_equal(part, np.eye(len(keep))[chosen]):
        return leaf if keep.all() else leaf[chosen]
    scale = _power_of_two(gram, len(keep))
    used = jnp.asarray((part != 0).any(axis=0))
    return _materialised((part * scale).astype(np.float32), (1 / scale).astype(np.float32), used, leaf)


def distance_from(delta: PyTree, centre: PyTree) -> float:
    """‖Δ − c‖ over all leaves, sums in float64."""
    with jax.enable_x64(True):
        return float(jnp.sqrt(_squared_distance(delta, centre)))


def chain(*rules: Rule, merge: Merge) -> Aggregator:
    """Rules in order, then the merge, then the leash where a rule gave a centre."""

    def init(params: PyTree) -> PyTree:
        return tuple(rule.init(params) for rule in rules)

    def apply(ballot: Ballot, state: PyTree, key: Any) -> tuple[PyTree, Verdict, PyTree]:
        entered, raw = ballot.weights > 0, ballot.gram
        states, info = [], {}
        for rule, one in zip(rules, state, strict=True):
            ballot, one, more = rule.apply(ballot, one, key)
            states.append(one)
            info |= more
        own = info.pop("own", None)
        if own is not None and not merge.mean:
            ballot, info = ballot._replace(rows=own.rows), info | {"tau": own.tau, "clipped": own.clipped}
        backing = entered & info.get("backing", ballot.weights > 0)
        delta, v, leash = merge_rows(ballot, merge, info.get("centre"), info.get("tau"), key)
        norms = np.sqrt(np.diagonal(raw))
        verdict = Verdict(
            backing=backing,
            coefficients=v,
            coefficient_start=None if v is None else max(0.0, 1.0 - float(v.sum())),
            centre=info.get("centre"),
            tau=info.get("tau"),
            distance=info.get("distance"),
            clipped=info.get("clipped"),
            leash=leash,
            cosine=_cosines(ballot.stack, delta, v, raw, norms),
            norms=norms,
        )
        return delta, verdict, tuple(states)

    least = max((rule.least for rule in rules), default=1)
    return Aggregator("+".join([*(rule.name for rule in rules), merge.name]), init, apply, least, merge.score)


def merge_rows(
    ballot: Ballot, merge: Merge, centre: np.ndarray | None, tau: float | None, key: Any = None
) -> tuple[PyTree, np.ndarray | None, float | None]:
    """The merged delta, its coefficients over the raw deltas where the merge is linear, and the leash's factor."""
    keep = ballot.weights > 0
    if merge.weights is not None:
        given = np.where(keep, ballot.weights, 0.0)
        if merge.score in ballot.scores and (keep & (ballot.scores[merge.score] > 0)).any():
            given = np.where(keep, ballot.scores[merge.score], 0.0)
        w = np.where(keep, merge.weights(given), 0.0)
        v = w @ ballot.rows[:, : len(w)]
        return weighted_sum(v, ballot.stack, ballot.gram), v, None if centre is None else 1.0
    if merge.combine is not None and not merge.per_tensor:
        v = _combined(ballot, merge.combine, ballot.gram)
        factor = None
        if centre is not None and tau is not None:
            gap = v - centre
            factor = _leash(float(np.sqrt(max(gap @ ballot.gram @ gap, 0.0))), tau)
            v = v if factor == 1.0 else centre + factor * gap
        return weighted_sum(v, ballot.stack, ballot.gram), v, factor
    delta = _by_leaf(ballot, merge, key)
    if centre is None or tau is None:
        return delta, None, None
    middle = weighted_sum(centre, ballot.stack, ballot.gram)
    factor = _leash(distance_from(delta, middle), tau)
    return (delta if factor == 1.0 else _draw(delta, middle, np.float32(factor))), None, factor


def capped(weights: np.ndarray) -> np.ndarray:
    """Weights normalised to 1 of which none is above 2/m; what is cut is shared by the others in proportion.

    A node that claims many samples would otherwise own the merge. m counts the weights above 0.
    """
    w = weights / weights.sum()
    most = 2.0 / max((w > 0).sum(), 1)
    for _ in range(len(w)):
        over = w > most * (1 + 1e-12)
        if not over.any():
            break
        fixed = over | (w == most)
        free = ~fixed & (w > 0)
        w = np.where(fixed, most, w)
        if free.any():
            w = np.where(free, w * (1.0 - w[fixed].sum()) / w[free].sum(), w)
    return w / w.sum()


def _leash(strayed: float, tau: float) -> float:
    return 1.0 if strayed <= tau else tau / strayed


def _combined(ballot: Ballot, combine: Callable[[np.ndarray, np.ndarray], np.ndarray], gram: np.ndarray) -> np.ndarray:
    """float64[n] over the raw deltas of what `combine` makes of the rows that count; `gram` is that of the deltas."""
    chosen = np.flatnonzero(ballot.weights > 0)
    part = ballot.rows[chosen][:, : len(gram)]
    return combine(capped(ballot.weights[chosen]), part @ gram @ part.T) @ part


def _by_leaf(ballot: Ballot, merge: Merge, key: Any) -> PyTree:
    keep = ballot.weights > 0

    def rows(leaf: jax.Array) -> jax.Array:
        return materialise(ballot.rows, keep, leaf, ballot.gram)

    if merge.leaf is not None:
        by_coordinate = merge.leaf
        return jax.tree.map(lambda leaf: by_coordinate(rows(leaf)), ballot.stack)
    leaves, structure = jax.tree.flatten(ballot.stack)
    if merge.combine is not None:
        used, merged = (ballot.rows[keep][:, : len(keep)] != 0).any(axis=0), []
        for leaf in leaves:
            gram = gram_matrix(leaf, used)
            merged.append(weighted_sum(_combined(ballot, merge.combine, gram), leaf, gram))
    else:
        assert merge.prepare is not None
        chosen = np.flatnonzero(keep)
        survey = Survey(capped(ballot.weights[chosen]), chosen, lambda: map(rows, leaves), key)
        one = merge.prepare(survey)
        merged = [one(rows(leaf), Place(number)) for number, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, merged)


def _power_of_two(gram: np.ndarray | None, count: int) -> np.ndarray:
    norms = np.ones(count) if gram is None else np.sqrt(np.diagonal(gram))
    return np.exp2(np.round(np.log2(np.where(norms > 0, norms, 1.0))).clip(-100, 100))


def _cosines(stack: PyTree, delta: PyTree, v: np.ndarray | None, gram: np.ndarray, norms: np.ndarray) -> np.ndarray:
    if v is not None:
        products, length = gram @ v, np.sqrt(max(v @ gram @ v, 0.0))
    else:
        with jax.enable_x64(True):
            found, squared = _products(stack, delta, jnp.asarray(norms > 0))
        products, length = np.asarray(found), float(np.sqrt(squared))
    scale = norms * length
    return np.divide(products, scale, out=np.full(len(norms), np.nan), where=scale > 0).clip(-1, 1)


@jax.jit
def _gram(leaves: list[jax.Array], keep: jax.Array) -> jax.Array:
    total = jnp.zeros((keep.shape[0], keep.shape[0]), jnp.float64)
    for leaf in leaves:
        total = total + _leaf_gram(leaf.reshape(leaf.shape[0], -1), keep)
    return total


def _leaf_gram(flat: jax.Array, keep: jax.Array) -> jax.Array:
    n, d = flat.shape

    def add(first: Any, total: jax.Array, width: int) -> jax.Array:
        blocks = BLOCKS if width == BLOCK_COLUMNS * BLOCKS else 1
        part = jax.lax.dynamic_slice(flat, (0, first), (n, width)).reshape(n, blocks, -1)
        part = jnp.where(keep[:, None, None], part, 0).astype(jnp.float64)
        return total + jax.lax.dot_general(part, part, (((2,), (2,)), ((1,), (1,)))).sum(0)

    return _over_blocks(add, jnp.zeros((n, n), jnp.float64), d)


def _over_blocks(add: Callable[[Any, jax.Array, int], jax.Array], zero: jax.Array, columns: int) -> jax.Array:
    """Sums `add(first column, total, width)` over a leaf, so that float64 copies never exceed a block."""
    step = BLOCK_COLUMNS * BLOCKS
    whole, total = columns // step, zero
    if whole:
        # Two loops that do not depend on each other: XLA runs them on two cores (benchmarks/vote.py).
        for first, last in [(0, whole // 2), (whole // 2, whole)] if whole > 1 else [(0, 1)]:
            total = total + jax.lax.fori_loop(first, last, lambda i, part: add(i * step, part, step), zero)
    return add(whole * step, total, columns % step) if columns % step else total


@jax.jit
def _weighted(stack: PyTree, down: jax.Array, up: jax.Array, keep: jax.Array) -> PyTree:
    def one(leaf: jax.Array) -> jax.Array:
        total = jnp.zeros(leaf.shape[1:], jnp.float32)
        for i in range(leaf.shape[0]):
            total = total + jnp.where(keep[i], (leaf[i] * down[i]) * up[i], 0)
        return total

    return jax.tree.map(one, stack)


@jax.jit
def _materialised(part: jax.Array, down: jax.Array, used: jax.Array, leaf: jax.Array) -> jax.Array:
    flat = leaf.reshape(leaf.shape[0], -1)
    clean = jnp.where(used[:, None], flat * down[:, None], 0)
    return jnp.matmul(part, clean, precision="highest").reshape(part.shape[0], *leaf.shape[1:])


@jax.jit
def _squared_distance(delta: PyTree, centre: PyTree) -> jax.Array:
    def one(a: jax.Array, b: jax.Array) -> jax.Array:
        gap = (a.astype(jnp.float64) - b.astype(jnp.float64)).ravel()
        return gap @ gap

    return jnp.asarray(sum(jax.tree.leaves(jax.tree.map(one, delta, centre))))


@jax.jit
def _products(stack: PyTree, delta: PyTree, keep: jax.Array) -> tuple[jax.Array, jax.Array]:
    found, squared = jnp.zeros(keep.shape[0], jnp.float64), jnp.zeros((), jnp.float64)
    for leaf, one in zip(jax.tree.leaves(stack), jax.tree.leaves(delta), strict=True):
        rows, flat = leaf.reshape(leaf.shape[0], -1), one.ravel()

        def add(first: Any, total: jax.Array, width: int, rows: jax.Array = rows, flat: jax.Array = flat) -> jax.Array:
            part = jax.lax.dynamic_slice(rows, (0, first), (rows.shape[0], width))
            clean = jnp.where(keep[:, None], part, 0).astype(jnp.float64)
            return total + clean @ jax.lax.dynamic_slice(flat, (first,), (width,)).astype(jnp.float64)

        found = _over_blocks(add, found, flat.shape[0])
        squared = squared + jnp.sum(jnp.square(flat.astype(jnp.float64)))
    return found, squared


@jax.jit
def _draw(delta: PyTree, middle: PyTree, factor: jax.Array) -> PyTree:
    return jax.tree.map(lambda a, b: b + factor * (a - b), delta, middle)
