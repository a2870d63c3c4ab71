"""`ByzantineConsensus`: the specification's name for a vote over finished models."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax import nnx

from capibara.consensus.models import ModelVote, vote_models
from capibara.consensus.networks import MOST_ROWS
from capibara.core.model import objective, parameters, with_parameters
from capibara.errors import ConfigError
from capibara.files import read_tensors
from capibara.types import Batch


class ByzantineConsensus:
    """The default vote over models: NNX modules, trees of arrays, or safetensors files.

    Args:
      fault_tolerance: Share of the models that may be arbitrarily wrong. f = min(⌊share · n⌋, ⌊(n−1)/3⌋): with three
        models f is 0, whatever the share; four are the least for f = 1.
      verification_rounds: Recomputations over permuted models that must agree.

    Attributes:
      last_result: Reasons, coefficients and distances of the last vote.

    Equivalent to:
      trees = [parameters(model) for model in models]
      f = min(math.floor(fault_tolerance * len(trees)), (len(trees) - 1) // 3)
      result = vote_models(trees, f, verification_rounds=verification_rounds)
      model = with_parameters(models[0], result.merged)
    """

    def __init__(self, fault_tolerance: float = 0.33, verification_rounds: int = 3):
        if not 0 <= fault_tolerance < 1:
            raise ConfigError(f"fault_tolerance is a share in [0, 1); got {fault_tolerance}.")
        if verification_rounds < 0:
            raise ConfigError(f"verification_rounds is 0 or more; got {verification_rounds}.")
        self.fault_tolerance, self.verification_rounds = fault_tolerance, verification_rounds
        self.last_result: ModelVote | None = None

    def vote(self, models: Sequence[Any], validation_data: Batch | None = None) -> Any:
        """The consensus of models, of the same kind as the first of them (a tree, for files).

        Args:
          models: NNX models, pytrees or paths of safetensors files; all of the same structure.
          validation_data: A batch of held-out sequences; models whose loss on it is ruined do not count. Only NNX
            models with `loss(batch)` have one.

        Raises:
          ConfigError: If there are no models or more than 32, they do not fit each other, or have no loss to validate.
          CertificateError: If a file is missing or is no safetensors file.
          QuorumError: If fewer than n − f models count.
        """
        trees = [_tree(model) for model in models]
        n = len(trees)
        f = min(math.floor(self.fault_tolerance * n), (n - 1) // 3) if n else 0
        if n > MOST_ROWS:
            raise ConfigError(
                f"A vote over models takes at most {MOST_ROWS} of them, since it starts from their "
                f"coordinate-wise median; got {n}. Leave some out."
            )
        if 1 < n < 4 and self.fault_tolerance > 0:
            warnings.warn(
                f"{n} models tolerate f = 0 wrong ones, whatever fault_tolerance says; n = 4 is the least for f = 1.",
                stacklevel=2,
            )
        is_module = n > 0 and isinstance(models[0], nnx.Module)
        validates = n > 0 and validation_data is not None
        if validates and not (is_module and hasattr(models[0], "loss")):
            raise ConfigError(
                "validation_data needs NNX models with `loss(batch)` to be judged by; the first model is of type "
                f"{type(models[0]).__name__}. Give such models, or leave validation_data out."
            )
        self.last_result = vote_models(
            trees,
            f,
            verification_rounds=self.verification_rounds,
            objective=objective(models[0]) if validates else None,
            batch=validation_data,
        )
        merged = self.last_result.merged
        return with_parameters(models[0], merged) if is_module else merged


def _tree(model: Any) -> Any:
    if isinstance(model, (str, Path)):
        return read_tensors(Path(model))
    return parameters(model) if isinstance(model, nnx.Module) else model
