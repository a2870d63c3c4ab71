"""What a soup is judged by: a number for every held-out sequence, lower is better, so that two models can be compared.

    perplexity   exp(Σ nats / Σ tokens)          accuracy   1 − Σ wrong / Σ tokens          or any callable

    d = mean(a − b) over sequences, SE by the ratio estimator:   a is better  ⟺  d + 2·SE < 0
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from capibara.consensus.evidence import HeldOut, pieces
from capibara.consensus.gates import paired, sequence_sums
from capibara.errors import ConfigError
from capibara.types import Batch, Objective, PyTree

STANDARD_ERRORS = 2.0


class Score(NamedTuple):
    """One model on the held-out sequences.

    Attributes:
      sums: float64[sequences], what is counted (nats, wrong targets, …), lower is better.
      tokens: float64[sequences], over how many targets.
    """

    sums: np.ndarray
    tokens: np.ndarray

    @property
    def mean(self) -> float:
        """Per target; infinite where it is not finite."""
        value = float(self.sums.sum() / self.tokens.sum())
        return value if math.isfinite(value) else math.inf

    def paired(self, other: Score) -> tuple[float, float]:
        """Mean difference to another model and its standard error, infinite where there is one sequence only."""
        if len(self.sums) < 2:
            return self.mean - other.mean, math.inf
        mean, se = paired((self.sums - other.sums)[None], self.tokens)
        return float(mean[0]), float(se[0])


class Metric(NamedTuple):
    """How models are judged.

    Attributes:
      name: For records.
      score: `(params) -> Score`.
      shown: From a mean to the number that people know: a perplexity, an accuracy.
      objective: Whose `sequence_losses` are the sums; None for a callable.
    """

    name: str
    score: Callable[[PyTree], Score]
    shown: Callable[[float], float]
    objective: Objective | None = None


def perplexity(objective: Objective, held: HeldOut) -> Metric:
    """The exponential of the mean loss in nats a target."""
    return Metric("perplexity", partial(_score, objective, held), _exp, objective)


def accuracy(objective: Objective, held: HeldOut) -> Metric:
    """The share of targets that are the model's first guess.

    Raises:
      ConfigError: If the model gives no logits.
    """
    logits = objective.logits
    if logits is None:
        raise ConfigError("accuracy needs a model that gives logits, as ModularCapibaraModel; use 'perplexity'.")

    def errors(params: PyTree, batch: Batch) -> tuple[Any, Any]:
        counts = batch["mask"].astype(jnp.float32)
        wrong = logits(params, batch).argmax(-1) != batch["targets"]
        return jnp.where(wrong, counts, 0).sum(1), counts.sum(1)

    judged = Objective(objective.loss, errors)
    return Metric("accuracy", partial(_score, judged, held), lambda mean: 1.0 - mean, judged)


def measured(function: Callable[[Any, Any], Any], data: Any, as_model: Callable[[PyTree], Any]) -> Metric:
    """Any callable `(model, validation_data) -> float | float[sequences]`, lower is better."""

    def score(params: PyTree) -> Score:
        found = np.atleast_1d(np.asarray(function(as_model(params), data), np.float64))
        if found.ndim != 1 or not len(found):
            raise ConfigError(f"The metric returned shape {found.shape}; return a number, or one for each sequence.")
        return Score(found, np.ones(len(found)))

    return Metric(getattr(function, "__name__", "metric"), score, float)


def improves(new: Score, old: Score, accept: str) -> tuple[bool, float, float]:
    """Whether a model is better: where the paired interval clears zero (`interval`), or on the mean alone (`better`).

    Returns:
      The answer, the mean difference and its standard error.
    """
    mean, se = new.paired(old)
    if not math.isfinite(new.mean):
        return False, math.inf, math.inf
    return (mean < 0 if accept == "better" else mean + STANDARD_ERRORS * se < 0), mean, se


def _score(objective: Objective, held: HeldOut, params: PyTree) -> Score:
    sums, tokens = [], []
    for batch in held.batches:
        for piece, own in pieces(batch):
            found, counted = sequence_sums(objective, params, piece)
            sums.append(found[:own])
            tokens.append(counted[:own])
    score = Score(np.concatenate(sums), np.concatenate(tokens))
    if not score.tokens.sum():
        raise ConfigError("No target of the validation data counts; the mask is all False.")
    return score


def _exp(mean: float) -> float:
    return math.exp(mean) if mean < 700 else math.inf
