"""A run from configuration to result: builds the parts, trains in a run directory, judges it on the test split.

    with open_session(config) as session:
        results = session.train()
"""

from __future__ import annotations

import math
import platform
import time
import tomllib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from blake3 import blake3

from capibara.consensus.gates import sequence_sums
from capibara.core.config import ModelConfig, ModularConfig
from capibara.core.model import ModularCapibaraModel, parameters, with_parameters
from capibara.core.tokenizer import load_tokenizer
from capibara.data.batches import TextSource, documents_of, open_source
from capibara.data.prepare import Note
from capibara.errors import CertificateError, RunError
from capibara.kernels.library import instruction_set
from capibara.round_state import RoundPlan, RoundState
from capibara.run.checkpoint import checkpoints, load_checkpoint, newest_intact
from capibara.run.directory import SOLO, Run, check_format
from capibara.run.metrics import MetricsWriter
from capibara.run.progress import Display
from capibara.run.report import history
from capibara.run.resources import Needs, estimate, refuse_if_impossible
from capibara.run.rounds import checkpoint, resume_state, rounds
from capibara.training import vocabulary
from capibara.training.parts import give_tokenizer, run_tokenizer, training_objective
from capibara.training.results import ConsensusResults, Judgement
from capibara.tree import num_bytes
from capibara.types import Objective, Source


class Session:
    """One consensus run and everything it is made of; see `open_session` and `reopen_session`.

    Attributes:
      config: The resolved configuration.
      model: The model as it began (its weights are θ₀).
      plan: What every round shares; its fields are the engine, the aggregator and so on.
      run: The run directory.
      num_rounds: Rounds of the whole run.
    """

    def __init__(
        self,
        config: ModularConfig,
        run: Run,
        *,
        model: Any = None,
        source: Source | None = None,
        loss: Callable[..., Any] | None = None,
        note: Note | None = None,
    ):
        self.config, self.run = config, run
        self.source = source or _text(config, run, model, note)
        self.model = model or ModularCapibaraModel(_fitted(config, self.source))
        if isinstance(self.source, TextSource) and isinstance(self.model, ModularCapibaraModel):
            give_tokenizer(self.model, load_tokenizer(run.path / "tokenizer.json"))
        self.num_rounds = num_rounds(config, self.source)
        self.plan = build_plan(config, training_objective(config, self.model, loss), self.source, self.num_rounds)
        self.params = parameters(self.model)
        self.state: RoundState | None = None

    def train(self, display: Display | None = None, sample: str | None = None) -> ConsensusResults:
        """Runs the rounds that are still to come and returns the outcome.

        Args:
          display: Shows progress; None shows nothing.
          sample: A prompt to write a sample for.

        Raises:
          QuorumError, RunError: See `capibara.run.rounds.rounds`.
        """
        config, run = self.config, self.run
        display = display or self.display(enabled=False)
        display.note(f"{run.path}: this run needs {self._check_room()}.")
        for note in filter(None, (*run.notes, config.consensus.note_on_strategies())):
            display.note(note)
        start = resume_state(self.plan, self.params, run, lambda note: None)
        self.state = start
        display.start_at(start.round)
        before, tests = self.judge(self.params), {}
        tokens = self.plan.batch_size * self.source.tokens_per_sequence * config.consensus.local_steps
        with MetricsWriter(run.path / "metrics.jsonl") as metrics:
            events = rounds(
                self.plan, self.params, run, self.num_rounds, environment=environment(),
                on_phase=display.phase_begins, on_note=display.note,
            )  # fmt: skip
            for event in events:
                self.state = event.state
                loss = float(np.nanmean(event.record.losses[:, -5:]))
                every = config.training.eval_every
                if every and (event.state.round % every == 0 or event.state.round == self.num_rounds):
                    tests[event.line["round"]] = self.judge(event.state.params)
                test = tests.get(event.line["round"])
                display.round_ends(event.line, loss, tokens * config.consensus.num_nodes, test and test.loss)
                if not event.repeated:
                    metrics.write(
                        round=event.line["round"], outcome=event.line["outcome"], loss=loss,
                        test_loss=test and test.loss, node_loss=event.record.losses[:, -5:].mean(1).tolist(),
                        timing=event.line["timing"], backing=event.line["quorum"]["backing"],
                    )  # fmt: skip
        model = with_parameters(self.model, self.state.params)
        if hasattr(self.model, "tokenizer"):
            model.tokenizer = self.model.tokenizer
        if isinstance(model, ModularCapibaraModel):
            model.save(run.path / "model")
        return ConsensusResults(
            consensus_model=model,
            rounds=self.state.round,
            history=history(run.path, [line for line in run.lines if line["outcome"] != "no_quorum"]),
            certificate_path=run.path / "rounds.jsonl",
            run_path=run.path,
            head=run.head,
            before=before,
            after=self.judge(self.state.params),
            sample=model.generate(sample, 200, temperature=0.7, seed=0) if sample else None,
        )

    def judge(self, params: Any) -> Judgement | None:
        """A model's loss on a fixed draw of the test split; None where the source has no such split."""
        count = min(self.config.training.eval_sequences, self.source.num_sequences("test"))
        if count < 2:
            return None
        batch = self.source.held_out("test", round=0, draw=0, count=count)
        sums, tokens = sequence_sums(self.plan.objective, params, batch)
        return Judgement(float(sums.sum() / tokens.sum()), sums, tokens)

    def save(self) -> int:
        """Writes the newest state as a checkpoint, if it is not one already; returns the rounds that are on disk."""
        done = [line for line in self.run.lines if line["outcome"] != "no_quorum"]
        state = self.state
        if state and 0 < state.round == len(done) and newest_intact(self.run).meta.get("round") != state.round:
            checkpoint(self.run, state, done[-1]["hash"])
        return len(done)

    def display(self, enabled: bool = True) -> Display:
        """A display for this run."""
        consensus = self.config.consensus
        return Display(self.num_rounds, consensus.num_nodes, consensus.local_steps, enabled=enabled)

    def close(self) -> None:
        """Releases the run directory."""
        self.run.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check_room(self) -> Needs:
        config = self.config
        shapes = jax.eval_shape(self.plan.strategies[0].init, self.params)
        batch = self.plan.batch_size * self.source.tokens_per_sequence // config.training.accumulation_steps
        numbers = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        needs = estimate(
            4 * numbers,
            config.consensus.num_nodes * num_bytes(shapes.inner),
            batch * activation_bytes_per_token(config),
            num_nodes=config.consensus.num_nodes,
            num_rounds=self.num_rounds,
            keep_deltas=config.consensus.keep_deltas,
            keep_checkpoints=config.consensus.keep_checkpoints,
            all_at_once=jax.default_backend() != "cpu",
        )
        refuse_if_impossible(needs, self.run.path)
        return needs


def open_session(config: ModularConfig, *, run_dir: Path | None = None, kind: str = "train", **parts: Any) -> Session:
    """A new run.

    Args:
      config: The configuration.
      run_dir: The run directory, which must not exist or be empty; `runs/KIND-N` if None.
      kind: For the name of the directory.
      **parts: `model`, `source` and `loss` of the user's own, as objects; `note` gets a sentence now and then while
        much text is prepared.
    """
    config.consensus.warn_when_defenceless()
    path = Path(run_dir) if run_dir else next_run_path(Path("runs"), kind)
    if config.data.path is not None and parts.get("source") is None:
        documents_of(config.data.path)
    run = Run.create(path, config.to_toml())
    try:
        return Session(config, run, **parts)
    except BaseException:
        run.discard()
        raise


def reopen_session(path: Path, *, config: ModularConfig | None = None, **parts: Any) -> Session:
    """An existing run, to be resumed.

    Args:
      path: The run directory.
      config: Needed where the run was started with objects instead of names; else its own `config.toml` is read.
      **parts: `model`, `source` and `loss`, where the run was started with them; `note` as in `open_session`.

    Raises:
      RunError: If it is no run directory of a consensus, or in use.
    """
    if (Path(path) / SOLO).is_file():
        raise RunError(
            f"{path} holds one model of UnifiedTrainer, not a consensus. To go on, call its train(…) again with "
            f"checkpoint_dir='{path}'."
        )
    run = Run.open(path)
    try:
        return Session(config or ModularConfig.from_toml(run.path / "config.toml", environment={}), run, **parts)
    except BaseException:
        run.close()
        raise


def load_model(path: Path) -> ModularCapibaraModel:
    """The model of a run, from its newest intact checkpoint, or a folder that `model.save` wrote.

    Raises:
      RunError: If the run has no checkpoint yet.
    """
    if (path / "model.safetensors").is_file():
        return ModularCapibaraModel.load(path)
    check_format(path)
    config = ModelConfig(**tomllib.loads((path / "config.toml").read_text())["model"])
    for folder in reversed(checkpoints(path)):
        try:
            sections, _ = load_checkpoint(folder)
        except CertificateError:
            continue
        tokenizer = load_tokenizer(path / "tokenizer.json")
        model_config = ModelConfig(**{**dict(config), "vocab_size": tokenizer.vocab_size})
        model = with_parameters(ModularCapibaraModel(model_config), sections["params"])
        model.tokenizer = tokenizer
        return model
    raise RunError(f"{path} has no intact checkpoint yet; let it finish a round: capibara resume {path}")


def build_plan(config: ModularConfig, losses: Objective, source: Source, total_rounds: int) -> RoundPlan:
    """The parts of a round as the configuration names them; pure construction."""
    consensus = config.consensus
    steps = total_rounds * consensus.local_steps
    digest = config.digest() + str(getattr(source, "digest", ""))
    return RoundPlan(
        config=consensus,
        objective=losses,
        strategies=vocabulary.strategies(
            consensus.strategies, losses, config.training, steps, consensus.local_steps
        ),
        engine=vocabulary.engine(consensus),
        aggregator=vocabulary.aggregator(consensus),
        outer=vocabulary.outer(consensus),
        source=source,
        batch_size=config.training.batch_size,
        key=jax.random.key(consensus.seed),
        config_digest=blake3(f"{digest}:{steps}".encode()).hexdigest(),
        attack=vocabulary.attack(consensus),
        vocab_size=getattr(source, "vocab_size", config.model.vocab_size),
        clock=time.perf_counter,
    )


def num_rounds(config: ModularConfig, source: Source) -> int:
    """`training.num_rounds`, or ceil(epochs · training tokens / (n · H · tokens a step))."""
    if config.training.num_rounds is not None:
        return config.training.num_rounds
    node_round = config.consensus.local_steps * config.training.batch_size * source.tokens_per_sequence
    return math.ceil(config.training.num_epochs * source.train_tokens / (config.consensus.num_nodes * node_round))


def next_run_path(folder: Path, kind: str) -> Path:
    """`folder/KIND-N` with the first N that is free."""
    number = 1
    while (folder / f"{kind}-{number}").exists():
        number += 1
    return folder / f"{kind}-{number}"


def environment() -> dict[str, Any]:
    """Machine and versions, for certificates; outside the hash."""
    packages = {name: version(name) for name in ("jax", "flax", "optax", "numpy", "blake3")}
    return {"machine": platform.machine(), "python": platform.python_version(), "backend": jax.default_backend(),
            "kernels": instruction_set(), "packages": packages}  # fmt: skip


def _text(config: ModularConfig, run: Run, model: Any, note: Note | None) -> TextSource:
    tokenizer = run_tokenizer(config, run, model)
    return open_source(
        config.data, num_nodes=config.consensus.num_nodes, split=config.consensus.split, seed=config.consensus.seed,
        cache=run.path.parent / ".data", tokenizer=tokenizer, note=note,
    )  # fmt: skip


def _fitted(config: ModularConfig, source: Any) -> ModularConfig:
    """The configuration with the vocabulary of the tokenizer."""
    vocab_size = getattr(source, "vocab_size", config.model.vocab_size)
    return config if vocab_size == config.model.vocab_size else config.replace(model={"vocab_size": vocab_size})


def activation_bytes_per_token(config: ModularConfig) -> int:
    """About what a training step keeps for the backward pass; with gradient checkpointing one block and the inputs."""
    model = config.model
    block = 12 * model.width + 4 * model.hidden_size + 3 * model.num_heads * config.data.sequence_length
    recomputes = config.training.gradient_checkpointing
    kept = block + model.num_layers * model.width if recomputes else model.num_layers * block
    return 4 * (kept + 3 * min(model.vocab_size, 8192))
