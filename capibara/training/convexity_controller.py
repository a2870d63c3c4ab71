"""`ConvexityController`: the specification's name for merge weights with a certificate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from capibara.consensus import problems
from capibara.consensus.combine import checked_weights, combine
from capibara.consensus.evidence import held_out
from capibara.consensus.merge_weights import find_weights
from capibara.consensus.problems import Problem
from capibara.consensus.simplex import Penalty, kl_penalty, l2_penalty, no_penalty
from capibara.consensus.weights_result import ConvexResult
from capibara.core.model import ModularCapibaraModel, parameters, with_parameters
from capibara.core.model import objective as objective_of
from capibara.errors import ConfigError, unknown_name
from capibara.files import read_tensors
from capibara.types import Batch, Objective

PROBLEMS: dict[str, Callable[[], Problem]] = {
    "mixture": problems.mixture_problem,
    "log_pool": problems.pool_problem,
    "weight_space": problems.refined_problem,
    "quadratic": problems.quadratic_problem,
    "minimax": problems.minimax_problem,
    "black_box": problems.black_box_problem,
}

PENALTIES: dict[str, Callable[[float, np.ndarray], Penalty]] = {"kl": kl_penalty, "l2": l2_penalty}


class ConvexityController:
    """Weights for a merge, found on validation data.

    By default the mixture problem: convex, so that `dual_gap` bounds what any other weights could gain, on the
    surrogate. The merged network is then evaluated, and where an input or the plain mean is better, that is returned.

    (i) The gap certifies the surrogate on this validation sample.
    (ii) It does not certify the merged network.
    (iii) The ensemble optimum is not a lower bound for the merge.

    Args:
      lambda_reg: λ of the pull towards the trust weights, ≥ 0; 0 is none.
      max_iterations: Of the solver, ≥ 1. The gap is valid wherever it stops.
      problem: `mixture`, `log_pool`, `weight_space`, `quadratic`, `minimax`, `black_box`, or a `Problem`.
      penalty: `kl`, λ·KL(w‖trust), or `l2`, λ/2·‖w − trust‖².

    Attributes:
      problem: What is minimised.
      last_result: Of the last `optimize`.

    Equivalent to:
      trees = [parameters(model) for model in models]
      result = find_weights(trees, objective(models[0]), held_out(validation_data), mixture_problem(),
                            partial(kl_penalty, lambda_reg), max_iterations=max_iterations, chance=log(vocab_size))
      merged = with_parameters(models[0], combine(trees, result.weights))
    """

    def __init__(
        self,
        lambda_reg: float = 0.01,
        max_iterations: int = 100,
        *,
        problem: str | Problem = "mixture",
        penalty: str = "kl",
    ):
        if not 0 <= lambda_reg < math.inf:
            raise ConfigError(f"lambda_reg is a number of 0 or more; got {lambda_reg}.")
        if max_iterations < 1:
            raise ConfigError(f"max_iterations is 1 or more; got {max_iterations}.")
        if isinstance(problem, str) and problem not in PROBLEMS:
            raise ConfigError(unknown_name("problem", problem, PROBLEMS))
        if penalty not in PENALTIES:
            raise ConfigError(unknown_name("penalty", penalty, PENALTIES))
        self.lambda_reg, self.max_iterations = lambda_reg, max_iterations
        self.problem = PROBLEMS[problem]() if isinstance(problem, str) else problem
        self.penalty: Callable[[np.ndarray], Penalty] = (
            partial(PENALTIES[penalty], lambda_reg) if lambda_reg else no_penalty
        )
        self.last_result: ConvexResult | None = None

    def optimize(
        self,
        models: Sequence[Any],
        validation_data: Batch | Mapping[str, Batch],
        *,
        objective: Objective | Any = None,
        loss: Callable[..., Any] | None = None,
        trust: Sequence[float] | np.ndarray | None = None,
        **options: Any,
    ) -> ConvexResult:
        """The weights, as a result that behaves as the weight vector.

        Args:
          models: NNX models, pytrees, safetensors files, or folders that `ModularCapibaraModel.save` wrote; all of one
            structure. Files are read one at a time.
          validation_data: A batch of sequences, or a dict of batches by domain (for `minimax`).
          objective: Losses of the models, an `Objective` or an NNX model of their structure; needed for pytrees and
            files of tensors, otherwise that of the first model.
          loss: `(model, batch, key) -> scalar`, lower is better, instead of the models' own: a metric for `black_box`.
          trust: What each model is trusted before any data; equal by default.
          **options: `crossfit`, `midpoints`, `chance` of `capibara.consensus.merge_weights.find_weights`.

        Raises:
          ConfigError: If there are no models, they do not fit each other, none is usable, or trust is no distribution.
        """
        if not len(models):
            raise ConfigError("There are no models to merge; give at least one.")
        template = _opened(models[0])
        judge = objective if objective is not None else template
        if not isinstance(judge, Objective):
            if not hasattr(judge, "loss"):
                raise ConfigError(
                    f"Models of kind {type(models[0]).__name__} tell no loss; give objective=, an Objective or an NNX "
                    "model of their structure."
                )
            if loss is None and hasattr(judge, "token_losses") and hasattr(judge, "config"):
                options.setdefault("chance", math.log(judge.config.vocab_size))
            judge = objective_of(judge, loss)
        self.last_result = find_weights(
            _Trees(models),
            judge,
            held_out(validation_data),
            self.problem,
            self.penalty,
            trust=trust,
            max_iterations=self.max_iterations,
            clock=time.perf_counter,
            **options,
        )
        return self.last_result

    def merge(self, models: Sequence[Any], weights: ConvexResult | Sequence[float] | np.ndarray) -> Any:
        """Σ wᵢθᵢ, of the same kind as the first model (a tree, for files of tensors); a model of weight 0 is not read.

        Raises:
          ConfigError: If there are no models, or weights are negative, not finite, too few or do not sum to 1.
        """
        if not len(models):
            raise ConfigError("There are no models to merge; give at least one.")
        trees = _Trees(models)
        merged = combine(trees, checked_weights(weights, len(models)))
        template = _opened(models[0])
        return with_parameters(template, merged) if hasattr(template, "loss") else merged


class _Trees(Sequence[Any]):
    """The parameters of models of any kind; what is on disk is read when it is asked for."""

    def __init__(self, models: Sequence[Any]):
        self.models = models

    def __len__(self) -> int:
        return len(self.models)

    def __getitem__(self, i: Any) -> Any:
        model = _opened(self.models[i])
        return parameters(model) if hasattr(model, "loss") else model


def _opened(model: Any) -> Any:
    if not isinstance(model, (str, Path)):
        return model
    return ModularCapibaraModel.load(model) if Path(model).is_dir() else read_tensors(Path(model))
