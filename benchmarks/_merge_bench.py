"""What `merge_quality.py` merges: one base a seed, its fine-tunes and checkpoints, trained once and kept on disk.

    older text ─► cosine (the base), wsd, constant-STEP …          at equal tokens
    newer text ─► sweep-0 … · expert-0 … · poisoned · irrelevant   fine-tunes of the base
    a Llama ─► domain-0 · domain-1 · domain-2                      older speeches, newer ones, programs

Everything lies in `benchmarks/.merge_quality/DIGEST/seed-N/NAME.safetensors`; another setting has another digest.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from _merge_text import HELD_OUT, VALIDATION, YEAR, Texts, bpe

PEAK, WEIGHT_DECAY = 1.5e-3, 0.1
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
    steps: int = 900
    tune_steps: int = 120
    tune_rate: float = 6e-4
    models: int = 8
    validation: int = 96
    test: int = 288
    seeds: tuple[int, ...] = (0, 1, 2)
    text: tuple[str, ...] = ()
    llama: bool = False

    @property
    def digest(self) -> str:
        """Names the results and the models of this setting."""
        from blake3 import blake3

        fixed = (YEAR, HELD_OUT, PEAK, WEIGHT_DECAY, SWEEP)
        return blake3(repr((*self, fixed)).encode()).hexdigest()[:12]

    @property
    def spacing(self) -> int:
        """Steps between two checkpoints of the run at constant rate."""
        return self.steps // 20


SMALL = Setting(
    width=96, layers=1, heads=4, vocabulary=0, length=64, batch=4, steps=60, tune_steps=10, models=4, validation=16,
    test=32, seeds=(0,),
)  # fmt: skip
"""Shows that everything runs; its losses mean nothing."""

LLAMA = Setting(
    length=128, batch=4, tune_steps=24, tune_rate=1e-4, models=3, validation=24, test=36, seeds=(0,), llama=True
)  # fmt: skip
"""Three domains from one pretrained model; its shape and vocabulary are its own."""

SMALL_LLAMA = SMALL._replace(models=3, validation=15, test=36, llama=True)


class Bench:
    """Data, model and the trained models of a setting.

    Args:
      setting: What to train, and how much.
      folder: Where everything is kept.
      llama: A Hugging Face folder, where the setting begins with a Llama.
    """

    def __init__(self, setting: Setting, folder: Path, llama: Path | None = None):
        from _merge_llama import read_llama

        from capibara.core.config import ModularConfig
        from capibara.core.model import ModularCapibaraModel, objective
        from capibara.core.tokenizer import byte_tokenizer

        self.setting, self.digest = setting, setting.digest + (f"-{_digest_of(llama)}" if llama else "")
        self.folder = folder / self.digest
        self.folder.mkdir(parents=True, exist_ok=True)
        self.strategies: dict[Any, Any] = {}
        if llama:
            shape, self.start, tokenizer = read_llama(llama)
            self.config = ModularConfig().replace(model=dict(shape))
        else:
            tokenizer = bpe(self.folder, setting.text, setting.vocabulary) if setting.vocabulary else byte_tokenizer()
            self.config = ModularConfig().replace(
                model={
                    "vocab_size": tokenizer.vocab_size, "width": setting.width, "num_layers": setting.layers,
                    "num_heads": setting.heads,
                },
            )  # fmt: skip
        self.tokenizer = tokenizer
        self.texts = Texts(self.folder / "data", tokenizer, setting.length, setting.text)
        self.model = ModularCapibaraModel(self.config)
        self.objective = objective(self.model)

    def names(self, family: str) -> tuple[str, ...]:
        """The models of a family of ingredients."""
        n, last = self.setting.models, self.setting.steps
        return {
            "sweep": tuple(f"sweep-{i}" for i in range(n)),
            "experts": tuple(f"expert-{i}" for i in range(n)),
            "trajectory": tuple(f"constant-{last - j * self.setting.spacing}" for j in reversed(range(n))),
            "domains": tuple(f"domain-{i}" for i in range(n)),
            "two bad": (*(f"sweep-{i}" for i in range(n - 2)), "poisoned", "irrelevant"),
        }[family]

    def get(self, seed: int, name: str) -> dict[str, Any]:
        """A model's parameters, trained first where they are not on disk."""
        from capibara.files import read_tensors

        if self.setting.llama and name == "cosine":
            return self.start
        if not self.path(seed, name).exists():
            self._make(seed, name)
        return read_tensors(self.path(seed, name))

    def path(self, seed: int, name: str) -> Path:
        """Where a model lies."""
        return self.folder / f"seed-{seed}" / f"{name}.safetensors"

    def steps_to_make(self, names: set[tuple[int, str]]) -> int:
        """Training steps that the missing ones of these (seed, name) cost, their bases included."""
        tuned = {(seed, n) for seed, n in names if not n.startswith(("constant", "cosine", "wsd"))}
        bases: set[tuple[int, str]] = set()
        if not self.setting.llama:
            bases = {(seed, "cosine") for seed, _ in tuned}
        missing = {key for key in names | bases if not self.path(*key).exists()}
        runs = {(seed, n.partition("-")[0]) for seed, n in missing if (seed, n) not in tuned}
        return len(runs) * self.setting.steps + len(missing & tuned) * self.setting.tune_steps

    def measure(self) -> tuple[float, float]:
        """Seconds of a training step, and of a sequence's forward pass, on this machine as busy as it is now."""
        import jax

        from capibara.consensus.evidence import held_out, read_logs
        from capibara.core.model import parameters

        strategy = self._strategy("constant", PEAK, WEIGHT_DECAY, self.setting.steps)
        state, step = strategy.init(parameters(self.model)), jax.jit(strategy.step)
        steps = self.texts.older(0).in_order(first_step=0, steps=1, batch_size=self.setting.batch)
        batch = jax.tree.map(lambda leaf: leaf[0], steps)
        held = held_out(self.texts.held_out("trajectory", 0, VALIDATION, self.setting.validation))

        def fastest(call: Callable[[], Any]) -> float:
            times = []
            for _ in range(4):
                began = time.perf_counter()
                jax.block_until_ready(call())
                times.append(time.perf_counter() - began)
            return min(times[1:])

        forward = fastest(lambda: read_logs(self.objective, state.params, held)[0])
        return fastest(lambda: step(state, batch, jax.random.key(0))), forward / held.counts[0]

    def _make(self, seed: int, name: str) -> None:
        kind, _, number = name.partition("-")
        if kind in ("constant", "cosine", "wsd"):
            self._pretrain(seed, kind)
            return
        draw, node, rate, decay = int(number or 0), 0, self.setting.tune_rate, WEIGHT_DECAY
        source, change = self.texts.newer(seed, 1), None
        if kind == "sweep":
            rate, decay = SWEEP[draw]
        elif kind == "expert":
            source, node = self.texts.newer(seed, self.setting.models), draw
        elif kind == "poisoned":
            change = self._wrong_targets
        else:
            source = self.texts.domain(seed, draw if kind == "domain" else 2)
        strategy = self._strategy("cosine", rate, decay, self.setting.tune_steps)

        def batches(first: int, count: int) -> Any:
            batch = source.batches(round=first, draw=draw, node=node, steps=count, batch_size=self.setting.batch)
            return change(batch) if change else batch

        self._train(seed, strategy, self.get(seed, "cosine"), batches, self.setting.tune_steps, 10, {-1: name})

    def _pretrain(self, seed: int, kind: str) -> None:
        from capibara.core.model import ModularCapibaraModel, parameters

        setting, source = self.setting, self.texts.older(seed)
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


def _digest_of(llama: Path) -> str:
    from blake3 import blake3

    return blake3((llama / "model.safetensors").read_bytes()).hexdigest()[:12]
