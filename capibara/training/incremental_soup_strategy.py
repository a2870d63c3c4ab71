"""`IncrementalSoupStrategy`: the specification's name for soups of checkpoints."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from capibara.consensus import soup_metrics
from capibara.consensus.averages import decay_weights, is_finite
from capibara.consensus.evidence import held_out
from capibara.consensus.merge_weights import find_weights
from capibara.consensus.problems import black_box_problem, mixture_problem
from capibara.consensus.simplex import kl_penalty
from capibara.consensus.soup_metrics import Metric
from capibara.consensus.soups import ACCEPT, NOT_FINITE, USED, Soup, finished, greedy_soup, linear_soup
from capibara.consensus.weights_result import ConvexResult
from capibara.core.model import objective as objective_of
from capibara.core.model import with_parameters
from capibara.errors import ConfigError, unknown_name
from capibara.merge.merge import merge
from capibara.merge.recipe import Recipe
from capibara.merge.sources import open_checkpoint
from capibara.training.ingredients import Ingredient, Ingredients, ingredient, read_whole
from capibara.types import Objective

METRICS: dict[str, Callable[..., Metric]] = {
    "perplexity": soup_metrics.perplexity,
    "accuracy": soup_metrics.accuracy,
}

LINEAR = ("uniform", "weighted", "window", "decay")
GREEDY = ("greedy", "greedy_by_arrival")
ROBUST = {
    "median": "median",
    "trimmed_mean": "trimmed_mean",
    "geometric_median": "geometric_median",
    "vote": "byzantine_tolerant",
}
"""To the method of `capibara.merge` that streams it, block by block of all files."""

METHODS = (*LINEAR, *GREEDY, *ROBUST)
LAST = 5
LAMBDA = 0.01
"""Of the pull towards equal weights, where weights are found; that of `ConvexityController`."""


class IncrementalSoupStrategy:
    """A soup of checkpoints, added one after another.

    Args:
      merging_method: `uniform`; `weighted` by the weights given to `add_checkpoint`, or found on the validation data;
        `greedy` from the best ingredient on, or `greedy_by_arrival` as they came; `window`, the mean of the `last`;
        `decay`, weighted like a decay of the learning rate; `median`, `trimmed_mean`, `geometric_median`, `vote`.
      evaluation_metric: `perplexity`, `accuracy`, or a callable `(model, validation_data) -> float[sequences]` or
        float, lower is better.
      last: How many of the newest checkpoints count; all, or 5 for `window`.
      schedule: Of `decay`: `1-sqrt`, `linear` or `cosine`.
      accept: A greedy soup takes an ingredient where the paired interval clears zero (`interval`) or the mean is
        better at all (`better`).
      faulty: Checkpoints that may be arbitrarily wrong, for the robust methods; a third by default.
      fallback: Whether an ingredient that is better than the soup on the validation data is returned in its place.
      variance: Whether `last_result.variance` holds the variance of every number (not for robust methods).
      objective: An `Objective` or an NNX model, where the checkpoints do not tell what model they are of.

    Attributes:
      last_result: The `Soup` of the last `merge`: weights, reasons, trials, values.
      last_weights: The certificate, where weights were found on the validation data.

    Equivalent to:
      trees = [parameters(model) for model in models]
      metric = perplexity(objective(models[0]), held_out(validation_data))
      soup = linear_soup(trees, np.ones(len(trees)), metric=metric)    # greedy: greedy_soup(trees, metric)
      merged = with_parameters(models[0], soup.params)
    """

    def __init__(
        self,
        merging_method: str = "uniform",
        evaluation_metric: str | Callable[[Any, Any], Any] = "perplexity",
        *,
        last: int | None = None,
        schedule: str = "1-sqrt",
        accept: str = "interval",
        faulty: int | None = None,
        fallback: bool = True,
        variance: bool = False,
        objective: Objective | Any = None,
    ):
        if merging_method not in METHODS:
            raise ConfigError(unknown_name("merging_method", merging_method, METHODS))
        if isinstance(evaluation_metric, str) and evaluation_metric not in METRICS:
            raise ConfigError(unknown_name("evaluation_metric", evaluation_metric, METRICS))
        if last is not None and last < 1:
            raise ConfigError(f"last is a number of checkpoints, 1 or more; got {last}.")
        if accept not in ACCEPT:
            raise ConfigError(f"accept is 'interval' or 'better'; got {accept!r}.")
        if variance and merging_method in ROBUST:
            raise ConfigError(f"{merging_method} keeps no variance; use a mean, as 'uniform', for that.")
        decay_weights(1, schedule)
        self.merging_method, self.evaluation_metric, self.schedule = merging_method, evaluation_metric, schedule
        self.last = LAST if last is None and merging_method == "window" else last
        self.accept, self.faulty, self.fallback, self.variance = accept, faulty, fallback, variance
        self.objective = objective
        self.last_result: Soup | None = None
        self.last_weights: ConvexResult | None = None
        self._given: list[Ingredient] = []
        self._weights: list[float | None] = []
        self._losses: tuple[Any, Objective] | None = None

    def __len__(self) -> int:
        """Checkpoints that have been added."""
        return len(self._given)

    def add_checkpoint(self, checkpoint: Any, *, weight: float | None = None) -> None:
        """Adds one more; files are opened now and read when merging, so that they take no memory.

        Args:
          checkpoint: A path (safetensors, NPZ, a folder of a model, a run or Orbax, or a pickle of arrays), an NNX
            model, or a tree of arrays.
          weight: Its share, for `weighted`; ≥ 0, any sum.

        Raises:
          DataError: If there is no such checkpoint, it is damaged, or it is a pickle that holds more than arrays.
          ConfigError: If it holds no arrays, or the weight is negative or not finite.
        """
        if weight is not None and not 0 <= weight < math.inf:
            raise ConfigError(f"A weight is a number of 0 or more; got {weight}.")
        if weight is not None and self.merging_method != "weighted":
            raise ConfigError(f"{self.merging_method} takes no weights; use merging_method='weighted'.")
        self._given.append(ingredient(checkpoint, len(self._given)))
        self._weights.append(weight)

    def merge(self, validation_data: Any = None) -> Any:
        """The soup: a model where one is known, otherwise a tree like the checkpoints.

        Without validation data, or where the checkpoints do not tell what model they are of and no `objective` was
        given, nothing is evaluated: `last_result.value` is NaN then.

        Raises:
          ConfigError: If there are no checkpoints, none can be used, they differ in structure, or the method needs
            validation data or a model that is not there.
          DataError: If a file is damaged.
        """
        if not self._given:
            raise ConfigError("There are no checkpoints in the soup; add at least one with add_checkpoint.")
        chosen = slice(None if self.last is None else -self.last, None)
        given = self._given[chosen]
        template = self._template(given)
        trees = Ingredients(given, flat=template is not None)
        metric = self._metric(template, validation_data)
        self.last_weights = None
        if self.merging_method in GREEDY:
            soup = greedy_soup(
                trees,
                self._needed(metric),
                by_arrival=self.merging_method == "greedy_by_arrival",
                accept=self.accept,
                fallback=self.fallback,
                variance=self.variance,
            )
        elif self.merging_method in ROBUST:
            soup = self._robust(trees, metric)
        else:
            weights = self._linear_weights(trees, metric, validation_data, self._weights[chosen])
            fallback = self.fallback and self.last_weights is None  # where weights are found, that is in them already
            soup = linear_soup(trees, weights, metric=metric, fallback=fallback, variance=self.variance)
        self.last_result = soup
        return soup.params if template is None else with_parameters(template, soup.params)

    def _template(self, given: list[Ingredient]) -> Any:
        if self.objective is not None and not isinstance(self.objective, Objective):
            return self.objective
        make = next((one.template for one in given if one.template is not None), None)
        return None if make is None else make()

    def _metric(self, template: Any, data: Any) -> Metric | None:
        if data is None:
            return None
        if not isinstance(self.evaluation_metric, str):
            as_model = (lambda params: params) if template is None else partial(with_parameters, template)
            return soup_metrics.measured(self.evaluation_metric, data, as_model)
        held = held_out(data)
        if isinstance(self.objective, Objective):
            losses = self.objective
        elif template is None:
            return None
        else:
            losses = self._objective_of(template)
        return METRICS[self.evaluation_metric](losses, held)

    def _objective_of(self, template: Any) -> Objective:
        """One objective for all merges of one kind of model, so that it is compiled once."""
        kind = getattr(template, "config", id(template))
        if self._losses is None or self._losses[0] != kind:
            self._losses = kind, objective_of(template)
        return self._losses[1]

    def _needed(self, metric: Metric | None) -> Metric:
        if metric is None:
            raise ConfigError(
                f"{self.merging_method} chooses by validation data: give merge(validation_data=…), and objective= (an "
                "Objective or a model) where the checkpoints are trees or files without a config.json beside them."
            )
        return metric

    def _linear_weights(
        self, trees: Ingredients, metric: Metric | None, data: Any, given: list[float | None]
    ) -> np.ndarray:
        if self.merging_method == "decay":
            return decay_weights(len(trees), self.schedule)
        if self.merging_method != "weighted":
            return np.ones(len(trees))
        weights = [weight for weight in given if weight is not None]
        if len(weights) == len(given):
            if not sum(weights):
                raise ConfigError("All weights are 0; give at least one checkpoint a weight above 0.")
            return np.array(weights)
        if weights:
            raise ConfigError(f"{len(weights)} of {len(given)} checkpoints have a weight; give one to all, or to none.")
        judge = self._needed(metric).objective
        if judge is None:
            raise ConfigError("Weights are found by 'perplexity' or 'accuracy'; for a metric of your own use 'greedy'.")
        problem = mixture_problem() if self.evaluation_metric == "perplexity" else black_box_problem()
        self.last_weights = find_weights(
            trees, judge, held_out(data), problem, partial(kl_penalty, LAMBDA), clock=time.perf_counter
        )
        return np.asarray(self.last_weights.weights)

    def _robust(self, trees: Ingredients, metric: Metric | None) -> Soup:
        """One streaming merge over the files; what is in memory is written beside them for it."""
        reasons, scores = [USED] * len(trees), []
        for i, tree in enumerate(trees):
            good = is_finite(tree)
            reasons[i] = USED if good else NOT_FINITE
            scores.append(metric.score(tree) if metric and self.fallback and good else None)
        kept = [i for i, reason in enumerate(reasons) if reason == USED]
        if not kept:
            raise ConfigError(f"None of the {len(trees)} checkpoints can be averaged: all hold NaN or infinities.")
        evaluations = sum(score is not None for score in scores)
        if len(kept) == 1:
            soup = Soup(trees[kept[0]], np.eye(len(trees))[kept[0]], tuple(reasons))
            return finished(soup, trees, metric, scores, evaluations)
        with tempfile.TemporaryDirectory() as folder:
            inputs = tuple(trees.file(i, Path(folder)) for i in kept)
            recipe = Recipe(inputs, ROBUST[self.merging_method], faulty=self.faulty)
            report = merge(recipe, Path(folder) / "soup.safetensors")
            params = trees.unnamed(read_whole(open_checkpoint(report.out)))
        weights = np.full(len(trees), np.nan)
        for i, entry in zip(kept, report.record["inputs"], strict=True):
            reason = entry.get("reason", USED)
            reasons[i] = USED if reason == "backed" else reason
            if report.record.get("middle") == 0:
                weights[i] = entry["coefficient"]
        return finished(Soup(params, weights, tuple(reasons)), trees, metric, scores, evaluations)
