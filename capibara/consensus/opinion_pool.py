"""The log-opinion pool: the weights with which averaged logits predict best.

    min over the simplex of  f(w) + Ω(w),    f(w) = Σₜ aₜ [ logsumexp_v(Σᵢ wᵢ zₜᵢᵥ) − Σᵢ wᵢ zₜᵢ(yₜ) ]

Convex (a log-sum-exp of linear functions, minus one), and to first order what averaging the parameters does: the logits
of Σ wᵢθᵢ are Σ wᵢ zᵢ + O(‖Δ‖²). It needs all V logits of all M models, so they come in pieces and are dropped.
Genest & Zidek 1986; Wortsman et al. 2022, §4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from capibara.consensus.convex import FLOOR, resolution
from capibara.consensus.evidence import HeldOut, pieces
from capibara.consensus.simplex import Penalty, Smooth, Solution, minimise
from capibara.errors import ConfigError
from capibara.types import Objective, PyTree

Pieces = Callable[[], Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]]
"""`() -> (log-probabilities float[t, V, M], targets int[t], tokens float[t] that a row counts)`, the same each time."""

KEPT_BYTES = 2**28
"""Pieces up to this size in all are kept between iterations; more are computed again, M forward passes each time."""

ROW_NUMBERS = 2**22
"""Numbers of float64 that one block of the derivatives holds: 32 MB."""


def opinion_pool(
    pieces: Pieces, penalty: Penalty, *, max_iterations: int = 100, tolerance: float = 1e-9
) -> Solution:
    """Weights of the best pool, by projected Newton.

    Tolerates: a model that is no use; its weight becomes 0.
    Cost: T·V·M² products an iteration, and the pieces again for each value: for small V·T.
    Fails when: a log-probability is NaN.

    Args:
      pieces: The log-probabilities of all words, see `Pieces`; a constant added to a row's V numbers changes nothing.
      penalty: Ω.
      max_iterations: Newton steps; the gap is valid wherever they stop.
      tolerance: Gap at which it stops.
    """
    tokens = sum(float(a.sum()) for _, _, a in pieces())

    def blocks() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        for z, y, a in pieces():
            rows = max(1, ROW_NUMBERS // (z.shape[1] * z.shape[2]))
            for first in range(0, len(y), rows):
                part = slice(first, first + rows)
                yield np.maximum(z[part].astype(np.float64), FLOOR), y[part], a[part] / tokens

    def value(w: np.ndarray) -> float:
        return float(sum(a @ _pool(z, y, w)[0] for z, y, a in blocks()))

    def derivatives(w: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        total, gradient, hessian = 0.0, np.zeros(len(w)), np.zeros((len(w), len(w)))
        for z, y, a in blocks():
            losses, chances = _pool(z, y, w)
            total += float(a @ losses)
            mean = np.einsum("tv,tvm->tm", chances, z)
            gradient += a @ (mean - z[np.arange(len(y)), y])
            spread = (z - mean[:, None]) * np.sqrt(chances * a[:, None])[..., None]
            spread = spread.reshape(-1, len(w))
            hessian += spread.T @ spread
        return total, gradient, hessian

    found = minimise(
        Smooth(value, derivatives), penalty, penalty.prior, max_iterations=max_iterations, tolerance=tolerance
    )
    kind = next(iter(pieces()))[0]
    return found._replace(gap=found.gap + resolution(kind, found.loss))


def model_pieces(trees: Sequence[PyTree], objective: Objective, held: HeldOut) -> Pieces:
    """The log-probabilities of models on held-out data, kept where they are small.

    Raises:
      ConfigError: If the objective tells no logits.
    """
    if objective.logits is None:
        raise ConfigError(
            "The log-opinion pool needs the models' logits; this objective tells none. Use problem='mixture', or give "
            "an Objective with `logits`."
        )
    cached: list[tuple[np.ndarray, np.ndarray, np.ndarray]] | None = None

    def compute() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        for batch in held.batches:
            for piece, own in pieces(batch):
                counted = np.asarray(piece["mask"])[:own] > 0
                each = [_log_chances(trees[i], piece, logits=objective.logits) for i in range(len(trees))]
                z = np.stack([np.asarray(one)[:own][counted] for one in each], axis=-1)
                yield z, np.asarray(piece["targets"])[:own][counted], np.ones(len(z))

    def read() -> Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        nonlocal cached
        if cached is not None:
            return cached
        kept, size = [], 0
        for one in (generator := compute()):
            kept.append(one)
            size += one[0].nbytes
            if size > KEPT_BYTES:
                return _and_then(kept, generator)
        cached = kept
        return cached

    return read


def _and_then(first: list[Any], rest: Iterator[Any]) -> Iterator[Any]:
    while first:
        yield first.pop(0)
    yield from rest


def _pool(z: np.ndarray, y: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Loss of each row and the pool's chances [t, V]."""
    mixed = z @ w
    most = mixed.max(axis=1, keepdims=True)
    chances = np.exp(mixed - most)
    total = chances.sum(axis=1, keepdims=True)
    losses = np.log(total[:, 0]) + most[:, 0] - mixed[np.arange(len(y)), y]
    return losses, chances / total


@partial(jax.jit, static_argnames="logits")
def _log_chances(params: PyTree, batch: Any, *, logits: Any) -> jax.Array:
    return jax.nn.log_softmax(logits(jax.tree.map(jnp.asarray, params), batch), axis=-1)
