"""What a solo run is made of, built from a configuration and the names of texts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from capibara.consensus.config import ConsensusConfig
from capibara.consensus.gates import sequence_sums
from capibara.core.config import DataConfig, ModularConfig, TrainingConfig
from capibara.core.model import ModularCapibaraModel
from capibara.core.tokenizer import Tokenizer
from capibara.data.batches import TextSource, open_source
from capibara.data.prepare import Note
from capibara.errors import DataError
from capibara.run.directory import Run
from capibara.training import vocabulary
from capibara.training.parts import give_tokenizer, run_tokenizer, training_objective
from capibara.training.results import Judgement
from capibara.types import Batch, Objective, Strategy

MakeStrategy = Callable[[Objective, TrainingConfig, int], Strategy]
"""`(objective, [training], steps of the whole run) -> strategy`."""


@dataclass(frozen=True)
class SoloParts:
    """A solo run's parts.

    Attributes:
      config: Resolved: `training.num_steps` is set.
      model: The model as it begins.
      source: Training text.
      objective: Of the model.
      strategy: How it steps.
      eval_batch: Sequences to evaluate on, leaves [count, T]; None where there is no text for it.
      num_steps: Steps of the whole run.
      epoch: Steps of one pass over the text.
    """

    config: ModularConfig
    model: Any
    source: TextSource
    objective: Objective
    strategy: Strategy
    eval_batch: Batch | None
    num_steps: int
    epoch: int

    def batches(self, first_step: int, count: int) -> Batch:
        """Training batches with leaves [count, B, T]."""
        return self.source.in_order(first_step=first_step, steps=count, batch_size=self.config.training.batch_size)

    def judge(self, params: Any) -> Judgement | None:
        """The loss on the evaluation text, as many sequences at a time as training takes."""
        if self.eval_batch is None:
            return None
        count, training = len(self.eval_batch["tokens"]), self.config.training
        size = min(count, training.batch_size // training.accumulation_steps)
        pieces = [
            sequence_sums(self.objective, params, {n: leaf[i : i + size] for n, leaf in self.eval_batch.items()})
            for i in range(0, count, size)
        ]
        sums, tokens = (np.concatenate(column) for column in zip(*pieces, strict=True))
        return Judgement(float(sums.sum() / tokens.sum()), sums, tokens)


def open_parts(
    config: ModularConfig,
    run: Run,
    train_data: Any,
    eval_data: Any = None,
    *,
    model: Any = None,
    loss: Callable[..., Any] | None = None,
    strategy: MakeStrategy = vocabulary.plain_strategy,
    note: Note | None = None,
) -> SoloParts:
    """Prepares the texts inside the run directory and builds everything else.

    Raises:
      ConfigError: If the model cannot take the tokenizer's ids, or cannot recompute its blocks where that is asked for.
      DataError: If there is too little text for one step.
    """
    training = config.training
    held_out = 0.0 if eval_data is not None else config.data.held_out_fraction
    data = config.data.model_copy(update={"path": train_data, "held_out_fraction": held_out})
    tokenizer = run_tokenizer(config.model_copy(update={"data": data}), run, model)
    if model is None:
        model = ModularCapibaraModel(config.replace(model={"vocab_size": tokenizer.vocab_size}))
    if isinstance(model, ModularCapibaraModel):
        give_tokenizer(model, tokenizer)
    source = _open(data, run, tokenizer, training.seed, note)
    sequences = source.train_tokens // source.tokens_per_sequence
    if sequences < training.batch_size:
        raise DataError(
            f"The training text has {sequences} sequences of {source.tokens_per_sequence} tokens; a step needs "
            f"{training.batch_size}. Give more text, or lower batch_size or sequence_length."
        )
    num_steps = training.num_steps or max(math.ceil(training.num_epochs * sequences / training.batch_size), 1)
    losses = training_objective(config, model, loss)
    resolved = ModularConfig(
        model=model.config if isinstance(model, ModularCapibaraModel) else config.model,
        data=config.data,
        training=training,
        consensus=ConsensusConfig(num_nodes=1, seed=training.seed),
    ).replace(training={"num_steps": num_steps})
    return SoloParts(
        config=resolved,
        model=model,
        source=source,
        objective=losses,
        strategy=strategy(losses, training, num_steps),
        eval_batch=_eval_batch(data, eval_data, run, source, tokenizer, resolved),
        num_steps=num_steps,
        epoch=max(sequences // training.batch_size, 1),
    )


def _open(data: DataConfig, run: Run, tokenizer: Tokenizer, seed: int, note: Note | None = None) -> TextSource:
    return open_source(
        data, num_nodes=1, split="iid", seed=seed, cache=run.path / "text", tokenizer=tokenizer, note=note
    )


def _eval_batch(
    data: DataConfig, eval_data: Any, run: Run, source: TextSource, tokenizer: Tokenizer, config: ModularConfig
) -> Batch | None:
    wanted = config.training.eval_sequences
    if eval_data is None:
        count = min(wanted, source.num_sequences("test"))
        return source.held_out("test", round=0, draw=0, count=count) if count > 1 else None
    other = _open(data.model_copy(update={"path": eval_data}), run, tokenizer, config.training.seed)
    count = min(wanted, max(other.train_tokens // other.tokens_per_sequence, 1))
    return {name: leaf[0] for name, leaf in other.in_order(first_step=0, steps=1, batch_size=count).items()}
