"""What models say about held-out text: the log-probability of every target, and which models cannot be used.

    M models × held-out sequences  →  logs float32[rows, M], a row a target    (M forward passes, one model at a time)

A model whose objective has no `token_losses` is known by its sequences only; a row is then a sequence, its number the
mean log-probability of a target in it, and it counts as many targets as the sequence has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from capibara.consensus.gates import paired
from capibara.consensus.validate import admit
from capibara.errors import ConfigError
from capibara.types import Batch, Objective, PyTree

TOKENS_AT_ONCE = 2**13

NOT_FINITE = "not_finite"
WORSE_THAN_CHANCE = "worse_than_chance"
NO_TRUST = "no_trust"


class HeldOut(NamedTuple):
    """Held-out sequences, one batch a domain.

    Attributes:
      names: Of the domains.
      batches: Leaves [count, ...].
    """

    names: tuple[str, ...]
    batches: tuple[Batch, ...]

    def half(self, which: int) -> HeldOut:
        """Every other sequence of each domain: the even ones for 0, the odd ones for 1."""
        return self._replace(batches=tuple(_rows_of(batch, slice(which, None, 2)) for batch in self.batches))

    @property
    def counts(self) -> tuple[int, ...]:
        """Sequences of each domain."""
        return tuple(_count(batch) for batch in self.batches)


class Rows(NamedTuple):
    """What each row of log-probabilities is; the same for all models.

    Attributes:
      tokens: float64[rows] targets that it stands for.
      sequence: int64[rows], numbered through all domains.
      domain: int64[rows].
      place: int64[rows], of the sequence within its domain.
    """

    tokens: np.ndarray
    sequence: np.ndarray
    domain: np.ndarray
    place: np.ndarray

    def part(self, which: np.ndarray) -> Rows:
        """Some of the rows."""
        return Rows(*(column[which] for column in self))

    def loss(self, logs: np.ndarray, *, worst: bool = False) -> float:
        """Mean loss in nats a target; with `worst`, that of the domain where it is highest. NaN counts as infinite."""
        by_domain = np.bincount(self.domain, -self.tokens * logs) / np.bincount(self.domain, self.tokens)
        mean = by_domain.max() if worst else -(self.tokens @ logs) / self.tokens.sum()
        return float(mean) if np.isfinite(mean) else float("inf")

    def paired(self, logs: np.ndarray, other: np.ndarray) -> tuple[float, float]:
        """Mean difference in loss, `logs` minus `other`, and its standard error over sequences (NaN for one)."""
        number = np.unique(self.sequence, return_inverse=True)[1]
        difference = np.bincount(number, -self.tokens * (np.asarray(logs, np.float64) - other))
        mean, se = paired(difference[None], np.bincount(number, self.tokens))
        return float(mean[0]), float(se[0]) if len(difference) > 1 else float("nan")


class Evidence(NamedTuple):
    """The log-probabilities of M models and what is wrong with some of them.

    Attributes:
      logs: float32[rows, M]; NaN columns for models that were not evaluated.
      rows: What each row is.
      losses: float64[M] mean loss, infinite where it is not finite.
      excluded: Model → why it cannot be used.
    """

    logs: np.ndarray
    rows: Rows
    losses: np.ndarray
    excluded: dict[int, str]

    @property
    def usable(self) -> np.ndarray:
        """The models that are not excluded, in order."""
        return np.array([i for i in range(len(self.losses)) if i not in self.excluded], np.int64)


def held_out(data: Any) -> HeldOut:
    """Validation data as domains: a batch, or a mapping of names to batches.

    Raises:
      ConfigError: If it holds no sequence.
    """
    if not isinstance(data, Mapping) or not data:
        raise ConfigError(
            "validation_data is a batch (a dict of arrays [sequences, ...]) or a dict of batches by domain; got "
            f"{type(data).__name__}."
        )
    if not isinstance(next(iter(data.values())), Mapping):
        data = {"all": data}
    held = HeldOut(tuple(map(str, data)), tuple(dict(batch) for batch in data.values()))
    for name, count in zip(held.names, held.counts, strict=True):
        if count == 0:
            raise ConfigError(f"The validation data {name!r} hold no sequence; give at least one.")
    return held


def gather(
    trees: Sequence[PyTree], objective: Objective, held: HeldOut, *, chance: float = np.inf, worst: bool = False
) -> Evidence:
    """Evaluates every model once.

    Tolerates: models that hold NaN, or answer NaN, or know less than a guess: they are excluded by name.
    Cost: M forward passes over the data; one model at a time is touched.

    Args:
      trees: Parameters, all of one structure.
      objective: Their losses.
      held: The data.
      chance: Loss of a uniform guess, log V. A model above it is excluded, unless none is below.
      worst: Losses are those of the worst domain.

    Raises:
      ConfigError: If there is no model, or one has another structure, or none can be used.
    """
    if not len(trees):
        raise ConfigError("There are no models to merge; give at least one.")
    template, columns, excluded, rows = trees[0], [], dict[int, str](), None
    for i in range(len(trees)):
        tree = trees[i]
        if reason := admit(tree, template):
            raise ConfigError(f"Model {i} cannot be merged with model 0: {reason.replace('_', ' ')}.")
        column = None
        if all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(tree)):
            column, rows = read_logs(objective, tree, held)
        if column is None or not np.isfinite(column).all():
            excluded[i] = NOT_FINITE
        columns.append(column)
    if rows is None or len(excluded) == len(columns):
        raise ConfigError(f"None of the {len(columns)} models gives finite losses on the validation data.")
    empty = np.full(len(rows.tokens), np.nan, np.float32)
    logs = np.stack([empty if column is None else column for column in columns], axis=1)
    losses = np.array([rows.loss(column, worst=worst) for column in logs.T.astype(np.float64)])
    above = {i: WORSE_THAN_CHANCE for i in range(len(losses)) if i not in excluded and losses[i] > chance}
    if len(above) + len(excluded) < len(losses):
        excluded |= above
    return Evidence(logs, rows, losses, dict(sorted(excluded.items())))


def read_logs(objective: Objective, params: PyTree, held: HeldOut) -> tuple[np.ndarray, Rows]:
    """One model's log-probabilities float32[rows] and what the rows are. Cost: one forward pass, in chunks."""
    logs, tokens, sequence, domain, place, first = [], [], [], [], [], 0
    for number, batch in enumerate(held.batches):
        found, counted = _domain_logs(objective, params, batch)
        which = np.nonzero(counted > 0)
        logs.append(found[which])
        tokens.append(counted[which])
        sequence.append(which[0] + first)
        domain.append(np.full(len(which[0]), number))
        place.append(which[0])
        first += len(counted)
        if not len(which[0]):
            raise ConfigError(f"No target of the validation data {held.names[number]!r} counts; the mask is all False.")
    columns = [np.concatenate(column) for column in (tokens, sequence, domain, place)]
    return np.concatenate(logs), Rows(columns[0].astype(np.float64), *columns[1:])


def pieces(batch: Batch, tokens: int = TOKENS_AT_ONCE) -> list[tuple[Batch, int]]:
    """A batch as pieces of one shape, each with how many of its sequences are its own: the last is filled up.

    Args:
      batch: Leaves [sequences, ...].
      tokens: Of a piece, at most, if a sequence is not longer.
    """
    count, shape = _count(batch), np.shape(jax.tree.leaves(dict(batch))[0])
    at_once = max(1, min(count, tokens // max(int(np.prod(shape[1:2])), 1)))
    found = []
    for first in range(0, count, at_once):
        own = min(at_once, count - first)
        found.append((_rows_of(batch, np.minimum(np.arange(first, first + at_once), count - 1)), own))
    return found


def _domain_logs(objective: Objective, params: PyTree, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities and targets a row, [count, T] or, where only sequences are known, [count]."""
    logs, counted = [], []
    for piece, own in pieces(batch):
        if objective.token_losses is not None:
            found, tokens = _losses(params, piece, losses=objective.token_losses)
            found = -np.asarray(found)
        else:
            sums, tokens = _losses(params, piece, losses=objective.sequence_losses)
            tokens = np.asarray(tokens)
            found = -np.asarray(sums) / np.maximum(tokens, 1)
        logs.append(found[:own])
        counted.append(np.asarray(tokens)[:own])
    return np.concatenate(logs), np.concatenate(counted)


def _rows_of(batch: Batch, which: Any) -> Batch:
    return jax.tree.map(lambda leaf: np.asarray(leaf)[which], dict(batch))


def _count(batch: Batch) -> int:
    leaves = jax.tree.leaves(dict(batch))
    return int(np.shape(leaves[0])[0]) if leaves else 0


@partial(jax.jit, static_argnames="losses")
def _losses(params: PyTree, batch: Batch, *, losses: Any):
    return losses(jax.tree.map(jnp.asarray, params), batch)
