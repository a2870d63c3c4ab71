"""`UnifiedTrainer`: the specification's name for training one model on one machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from capibara.core.config import ModularConfig
from capibara.core.model import ModularCapibaraModel
from capibara.run.callbacks import Callback, show
from capibara.training.session import next_run_path
from capibara.training.solo import TrainingResults, train_solo


class UnifiedTrainer:
    """Trains one model on folders of text, resumably.

    Args:
      model: Any NNX model with `loss(batch)`; it is trained in place. None makes the base configuration's decoder.
      learning_rate: Peak learning rate of AdamW; the base configuration's if None, as for the next two.
      batch_size: Sequences a forward and backward pass.
      gradient_accumulation_steps: Passes a step: a step sees `batch_size · gradient_accumulation_steps` sequences.
      use_gradient_checkpointing: Compute activations again in the backward pass instead of keeping them.
      base: Data and training of the run; the preset `development` if None.
      loss: `(model, batch, key) -> scalar`, instead of the model's own.
      **training: Other values of the `training` section, e.g. `schedule="wsd"` or `ema_decay=0.999`.

    Attributes:
      config: The resolved configuration.
      model: The model, trained after `train`.

    Equivalent to:
      config = ModularConfig.preset("development").replace(
          training={"learning_rate": 3e-4, "batch_size": 32, "num_epochs": num_epochs}
      )
      results = train_solo(config, train_data, Path(checkpoint_dir), eval_data=eval_data, model=model)
    """

    def __init__(
        self,
        model: Any = None,
        learning_rate: float | None = None,
        batch_size: int | None = None,
        gradient_accumulation_steps: int | None = None,
        use_gradient_checkpointing: bool | None = None,
        *,
        base: ModularConfig | None = None,
        loss: Callable[..., Any] | None = None,
        **training: Any,
    ):
        base = base or ModularConfig.preset("development")
        if isinstance(model, ModularCapibaraModel):
            base = ModularConfig(model=model.config, data=base.data, training=base.training, consensus=base.consensus)
            if use_gradient_checkpointing is None and model.gradient_checkpointing:
                use_gradient_checkpointing = True
        before = base.training
        parts = before.accumulation_steps if gradient_accumulation_steps is None else gradient_accumulation_steps
        size = before.batch_size // before.accumulation_steps if batch_size is None else batch_size
        given = {
            "learning_rate": learning_rate,
            "batch_size": size * parts,
            "accumulation_steps": parts,
            "gradient_checkpointing": use_gradient_checkpointing,
            **training,
        }
        self.config = base.replace(training={name: value for name, value in given.items() if value is not None})
        self.model, self.loss, self.eval_every = model, loss, training.get("eval_every")

    def train(
        self,
        train_data: str | Sequence[str],
        eval_data: str | Sequence[str] | None = None,
        num_epochs: float | None = None,
        checkpoint_dir: str | Path | None = None,
        *,
        num_steps: int | None = None,
        resume: bool | str = "auto",
        eval_every: int | None = None,
        callbacks: Sequence[Callback] = (),
        progress: bool = True,
    ) -> TrainingResults:
        """Trains, saving as it goes; called again after a stop, it goes on and ends as if it had never stopped.

        Args:
          train_data: Folder or files of text (.txt, .md, .jsonl, .jsonl.gz), or `demo:sotu`.
          eval_data: The same for evaluation; None holds some of `train_data` out.
          num_epochs: Passes over `train_data`.
          checkpoint_dir: The run directory: checkpoints, `metrics.jsonl`, `logs/training.log`, at the end `model/`;
            `runs/solo-N` if None.
          num_steps: Steps, instead of `num_epochs`.
          resume: `"auto"` goes on where `checkpoint_dir` holds a run; True demands one, False a new one.
          eval_every: Steps between evaluations; the constructor's if None, and without that an epoch.
          callbacks: Each is called with a `capibara.loop.StepInfo` every `log_every` steps.
          progress: Show each log line on standard error.

        Returns:
          `model`, `steps`, `history`, `before`, `after`, `summary()`.

        Raises:
          CapibaraError: See `capibara.training.solo.train_solo`.
        """
        chosen = {} if num_epochs is None else {"num_epochs": num_epochs, "num_steps": None}
        if num_steps is not None:
            chosen["num_steps"] = num_steps
        results = train_solo(
            self.config.replace(training=chosen),
            train_data,
            Path(checkpoint_dir) if checkpoint_dir else next_run_path(Path("runs"), "solo"),
            eval_data=eval_data,
            model=self.model,
            loss=self.loss,
            resume=resume,
            eval_every=self.eval_every if eval_every is None else eval_every,
            callbacks=callbacks,
            echo=show if progress else None,
        )
        self.model = results.model
        return results
