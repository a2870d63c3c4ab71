"""The default vote, `byzantine_tolerant`: clip by norm, mix neighbours, find the centre, clip to it, name gross liars.

    Δᵢ → ARC → NNM → c = geometric median → yᵢ = c + min(1, τ/‖yᵢ−c‖)(yᵢ−c) → mean

Everything after the Gram matrix is arithmetic on n×n numbers, so the whole outcome is one n-vector v with
merged Δ = Σ vᵢΔᵢ, v ≥ 0, Σv ≤ 1: it can be recorded, audited and recomputed. Steps and guarantee: docs/protocol.md.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from capibara.consensus.ballot import Ballot, ClippedRows, Rule
from capibara.consensus.mixing import (
    FLOOR,
    adaptive_clip,
    clip_to,
    distances,
    geometric_median,
    nearest_mean,
    order_statistic,
)
from capibara.errors import ConfigError
from capibara.types import PyTree


def byzantine_tolerant(
    f: int, *, outvote_at: float = 3.0, merge_rows: str = "own", clip_norms: bool = True
) -> Rule:
    """The default vote over rows of which at most f are arbitrary.

    Tolerates: f arbitrary rows of m > 2f. At least m−f rows are honest, so τ ≤ R, the largest distance of an honest
      row from the centre c: whatever is merged ends within R of c. The distance from c to the honest mean is
      O(√(f/m)) times the honest spread (NNM, Allouah et al. 2023, Thm. 2).
    Cost: one pass over the deltas for the Gram matrix and one for the final sum, O(n²d + nd); n³ numbers between.
    Fails when: more than f rows are wrong; or f colluders push by up to (f/m)·τ a round in one direction, which the
      anchor of the final gate and the drift in the certificate watch.

    Args:
      f: Rows that may be arbitrary; 0 leaves rows and weights as they are.
      outvote_at: κ: a node whose own delta is further from c than κ times the (m−f)-th smallest such distance is
        outvoted. This names gross liars; the clipping is the defence. Rows that entered with weight 0 count among the
        f: with all of them spent nobody is outvoted, or a gated liar would cost an honest node its vote.
      merge_rows: `mixed` merges the mixed rows where weights are equal; `own` merges the nodes' own clipped deltas.
      clip_norms: Whether ARC is applied; off where there is no common start (`vote_models`).

    Returns:
      A rule without state; info holds `centre`, `tau`, `distance`, `clipped`, and as `own` the three values that a
      merge other than the mean takes instead of the mixed rows.

    Raises:
      ConfigError: From `apply`, if m ≤ 2f rows enter.
    """

    def apply(ballot: Ballot, state: PyTree, key: Any) -> tuple[Ballot, PyTree, dict[str, Any]]:
        if f == 0:
            return ballot, state, {}
        keep = ballot.weights > 0
        if keep.sum() <= 2 * f:
            raise ConfigError(
                f"byzantine_tolerant with f = {f} needs more than {2 * f} rows that count; got {keep.sum()}."
            )
        counted = ballot.weights[keep]
        mixed = merge_rows == "mixed" and bool((counted == counted[0]).all())
        with jax.enable_x64(True):
            found = jax.tree.map(np.asarray, _vote(ballot.gram, keep, f, float(outvote_at), clip_norms=clip_norms))
        both = {kind: _rows(found["keep"], *found[kind]) for kind in ("mixed", "own")}
        chosen = both["mixed" if mixed else "own"]
        info = {
            "centre": found["centre"],
            "distance": np.where(keep, found["distance"], np.nan),
            "tau": chosen.tau,
            "clipped": chosen.clipped,
            "own": both["own"],
        }
        return ballot._replace(rows=chosen.rows, weights=np.where(found["keep"], ballot.weights, 0.0)), state, info

    return Rule("byzantine_tolerant", lambda params: (), apply, 2 * f + 1)


def majority() -> Rule:
    """Gate and quorum decide; nobody is outvoted.

    Tolerates: nothing that passes the gate: one row can move the mean as far as it likes.
    Cost: nothing.
    Fails when: any node lies within the gate's limit.
    """
    return Rule("majority", lambda params: (), lambda ballot, state, key: (ballot, state, {}))


def _rows(keep: np.ndarray, rows: np.ndarray, clipped: np.ndarray, tau: np.ndarray) -> ClippedRows:
    start = np.where(keep, 1.0 - rows.sum(axis=1), 0.0)
    return ClippedRows(np.column_stack([rows, start]), np.where(keep, clipped, np.nan), float(tau))


@partial(jax.jit, static_argnames="clip_norms")
def _vote(gram: jax.Array, keep: jax.Array, f: jax.Array, at: jax.Array, *, clip_norms: bool) -> dict[str, Any]:
    gram = jnp.where(keep[:, None] & keep[None, :], gram, 0.0)
    identity = jnp.eye(len(keep), dtype=gram.dtype)

    def centre_of(keep: jax.Array, _: Any):
        if clip_norms:
            factors, longest = adaptive_clip(gram, keep, f)
        else:
            factors, longest = jnp.where(keep, 1.0, 0.0), jnp.sqrt(jnp.where(keep, jnp.diagonal(gram), 0.0).max())
        floor = FLOOR * longest
        mixed = nearest_mean(jnp.diag(factors), gram, keep, f, floor)
        centre = geometric_median(mixed, gram, keep, floor)
        own = distances(identity, centre, gram)
        m = keep.sum()
        # With n − m rows kept out already, f − (n − m) may still be wrong: no more than that many are outvoted.
        spared = m - jnp.maximum(f - (len(keep) - m), 0)
        limit = jnp.maximum(at * order_statistic(own, keep, m - f), order_statistic(own, keep, spared))
        named = keep & ~((own > limit) & (own > floor))
        again = jnp.where(named.sum() > 2 * f, named, keep)
        return again, (keep, mixed, centre, own, floor, named)

    # Twice, so that the second time nothing of the outvoted is left; the same again where nobody was.
    _, passes = jax.lax.scan(centre_of, keep, length=2)
    named = passes[-1][0]
    entered, mixed, centre, own, floor, _ = jax.tree.map(lambda x: x[1], passes)
    return {
        "mixed": clip_to(mixed, centre, gram, entered, f, floor),
        "own": clip_to(identity, centre, gram, entered, f, floor),
        "centre": centre,
        "distance": own,
        "keep": named,
    }
