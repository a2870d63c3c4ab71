"""`ConvexityTrainingStrategy`: the specification's name for training with a certificate of what convexity there is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from capibara.core.config import ModularConfig, TrainingConfig
from capibara.core.linear import LinearModel
from capibara.core.model import ModularCapibaraModel, objective, parameters, with_parameters
from capibara.errors import ConfigError, DataError
from capibara.loop import fit
from capibara.run.callbacks import Callback, show
from capibara.strategies.fista import ConvexFit, fista
from capibara.strategies.plain import adamw, plain
from capibara.strategies.proximal_adam import proximal_adam
from capibara.strategies.proximal_point import proximal_point
from capibara.training import vocabulary
from capibara.training.results import TrainingResults
from capibara.training.session import next_run_path
from capibara.training.solo import train_solo
from capibara.transforms.prox import Prox, ridge, zero
from capibara.types import Batch, Objective, Strategy

CERTIFICATES = {
    "fista": "global",
    "proximal_point": "conditional",
    "proximal_adam": "stationarity",
    "plain": "none",
}
"""What each way of training proves: see docs/convexity.md."""


class ConvexityTrainingStrategy:
    """Trains with as much convexity as the model has, and says how much that is.

    A `LinearModel` is fitted to a proven optimum (FISTA, duality gap). A deep model is trained by proximal point, whose
    every step solves a problem that is convex where it was solved; without `convex_constraint` by proximal Adam, which
    proves stationarity only. Nothing here makes the training of a deep model convex.

    Args:
      regularization: λ ≥ 0 of a ridge term λ/2 ‖θ‖², or a `Prox`.
      convex_constraint: Keeps every step inside a ball in which the problem is strongly convex.
      use_proximal_gradient: Handles the regulariser by its operator; False leaves plain AdamW with λ as weight decay.
      learning_rate: Of Adam; proximal point takes its step length from the curvature.
      batch_size: Sequences, or examples, a step.
      base: Data and training of a run on text; the preset `development` if None.
      **options: Of the strategy, e.g. `kappa=3.0` or `anchor_every=50`.

    Attributes:
      last_result: `ConvexFit` or `TrainingResults` of the last `train`; None after training on arrays.
      certificate: `global`, `conditional`, `stationarity` or `none`, of the last `train`.

    Equivalent to (deep models on text):
      strategy = lambda losses, training, steps: proximal_point(losses, prox=ridge(0.01))
      results = train_solo(config, train_data, folder, model=model, strategy=strategy)
      model = results.model
    """

    def __init__(
        self,
        regularization: float | Prox = 0.01,
        convex_constraint: bool = True,
        use_proximal_gradient: bool = True,
        *,
        learning_rate: float = 1e-3,
        batch_size: int = 8,
        base: ModularConfig | None = None,
        **options: Any,
    ):
        if not isinstance(regularization, Prox) and not 0 <= regularization < float("inf"):
            raise ConfigError(f"regularization is a number of 0 or more, or a Prox; got {regularization}.")
        if isinstance(regularization, Prox) and not use_proximal_gradient:
            raise ConfigError("A regularization given as a Prox needs use_proximal_gradient=True.")
        self.regularization = regularization
        self.prox = regularization if isinstance(regularization, Prox) else _ridge(regularization)
        self.convex_constraint, self.use_proximal_gradient, self.options = (
            convex_constraint, use_proximal_gradient, options,
        )  # fmt: skip
        base = base or ModularConfig.preset("development")
        self.base = base.replace(training={"learning_rate": learning_rate, "batch_size": batch_size})
        self.last_result: ConvexFit | TrainingResults | None = None
        self.certificate = "none"

    def train(
        self,
        model: Any,
        train_data: Any,
        epochs: float = 1,
        *,
        eval_data: Any = None,
        checkpoint_dir: str | Path | None = None,
        callbacks: Sequence[Callback] = (),
        progress: bool = False,
    ) -> Any:
        """The trained model.

        Args:
          model: A `LinearModel`, or any NNX model with `loss(batch)`.
          train_data: For text models: folder or files of text, or `demo:sotu`. Otherwise a batch of arrays with a
            leading axis of examples, which are drawn anew in every epoch; `(x, y)` for a `LinearModel`.
          epochs: Passes over the data; FISTA runs until its gap is small, whatever they are.
          eval_data: Text to evaluate on.
          checkpoint_dir: Run directory of a training on text; `runs/convexity-N` if None. It can be resumed.
          callbacks: Each is called with a `StepInfo` while training goes on.
          progress: Show the log of a training on text on standard error.

        Raises:
          ConfigError, DataError, RunError: If data and model do not fit; see `train_solo`.
        """
        if isinstance(model, LinearModel):
            return self._fit_linear(model, train_data)
        way = self.way
        self.certificate = CERTIFICATES[way]
        if isinstance(train_data, Mapping):
            return self._fit_arrays(model, train_data, epochs, callbacks)
        base = self.base.replace(training={"num_epochs": epochs, "num_steps": None})
        if isinstance(model, ModularCapibaraModel):
            base = ModularConfig(model=model.config, data=base.data, training=base.training, consensus=base.consensus)
        self.last_result = train_solo(
            base,
            train_data,
            Path(checkpoint_dir) if checkpoint_dir else next_run_path(Path("runs"), "convexity"),
            eval_data=eval_data,
            model=model,
            strategy=self.strategy,
            callbacks=callbacks,
            echo=show if progress else None,
        )
        return self.last_result.model

    @property
    def way(self) -> str:
        """How a deep model is trained: `proximal_point`, `proximal_adam` or `plain`."""
        if not self.use_proximal_gradient:
            return "plain"
        return "proximal_point" if self.convex_constraint else "proximal_adam"

    def strategy(self, losses: Objective, training: TrainingConfig, total_steps: int) -> Strategy:
        """The strategy itself: what `train` uses, and what `strategies=[…]` of a consensus takes."""
        given = self.regularization
        name = f"{self.way} {given.name if isinstance(given, Prox) else given}"
        rate = vocabulary.learning_rate(training, total_steps)
        if self.way == "proximal_point":
            return proximal_point(losses, prox=self.prox, name=name, **self.options)
        if self.way == "proximal_adam":
            return proximal_adam(losses, self.prox, rate, name=name, **self.options)
        decay = 0.0 if isinstance(given, Prox) else given
        return plain(losses, adamw(rate, weight_decay=decay, **self.options), name=name)

    def _fit_linear(self, model: LinearModel, data: Any) -> LinearModel:
        x, y = (data["x"], data["y"]) if isinstance(data, Mapping) else data
        start = np.asarray(model.weights[...])
        self.last_result = found = fista(x, y, model.kind, self.prox, start=start, **self.options)
        self.certificate = found.certificate
        return with_parameters(model, {"weights": found.weights.astype(np.float32)})

    def _fit_arrays(self, model: Any, data: Batch, epochs: float, callbacks: Sequence[Callback]) -> Any:
        training = self.base.training
        arrays = {name: np.asarray(leaf) for name, leaf in data.items()}
        sizes = {len(leaf) for leaf in arrays.values()}
        if len(sizes) != 1 or (examples := sizes.pop()) < training.batch_size:
            raise DataError(
                f"Every array of the training data needs the same number of examples, at least batch_size = "
                f"{training.batch_size}; got { {name: leaf.shape for name, leaf in arrays.items()} }."
            )
        per_epoch = examples // training.batch_size
        num_steps = max(round(epochs * per_epoch), 1)

        def batches(first_step: int, count: int) -> Batch:
            rows = [_rows(training.seed, step, per_epoch, examples, training.batch_size)
                    for step in range(first_step, first_step + count)]  # fmt: skip
            return {name: leaf[np.stack(rows)] for name, leaf in arrays.items()}

        strategy = self.strategy(objective(model), training, num_steps)
        state = fit(
            strategy, strategy.init(parameters(model)), batches, jax.random.key(training.seed), num_steps,
            chunk=training.log_every, callbacks=tuple(callbacks),
        )  # fmt: skip
        self.last_result = None
        return with_parameters(model, state.params)


def _ridge(strength: float) -> Prox:
    return ridge(strength) if strength else zero()


def _rows(seed: int, step: int, per_epoch: int, examples: int, batch_size: int) -> np.ndarray:
    """The examples of a step: a permutation of all of them in every epoch, a pure function of seed and step."""
    epoch, place = divmod(step, per_epoch)
    order = np.random.default_rng([seed, 7, epoch]).permutation(examples)
    return order[place * batch_size : (place + 1) * batch_size]
