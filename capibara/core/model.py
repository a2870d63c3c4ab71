"""`ModularCapibaraModel`: a pre-norm decoder whose block kinds come from the configuration, on Flax NNX.

    tokens → embedding → blocks (a pattern, repeated) → RMSNorm → tied head

Everything that trains and votes sees the parameters as a flat `dict[str, Array]` (`parameters`, `with_parameters`) and
the losses as pure functions of it (`objective`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from capibara.core.config import ModelConfig, ModularConfig
from capibara.core.layers import AttentionBlock, rms_norm
from capibara.core.loss import head_loss, head_losses
from capibara.errors import ConfigError, unknown_name
from capibara.files import Files, read_tensors, tensors_to_bytes
from capibara.kernels.matmul import dot
from capibara.transforms.remat import recomputed
from capibara.tree import from_named_leaves, named_leaves
from capibara.types import Batch, Objective, PyTree

BLOCKS: dict[str, type] = {"attention": AttentionBlock}


class ModularCapibaraModel(nnx.Module):
    """A decoder-only language model.

    Args:
      config: A `ModularConfig` or its `model` section.
      seed: Of the initial weights; by default the configuration's training seed, or 0.
    """

    def __init__(self, config: ModularConfig | ModelConfig, *, seed: int | None = None):
        self.gradient_checkpointing = False
        self.tokenizer: Any = None
        if isinstance(config, ModularConfig):
            seed = config.training.seed if seed is None else seed
            self.gradient_checkpointing = config.training.gradient_checkpointing
            config = config.model
        self.config = config
        rngs = nnx.Rngs(params=seed or 0)
        shape = (config.vocab_size, config.width)
        self.embedding = nnx.Param(config.init_scale * jax.random.normal(rngs.params(), shape))
        kinds = [config.blocks[i % len(config.blocks)] for i in range(config.num_layers)]
        self.blocks = nnx.List([block_class(kind)(config, rngs) for kind in kinds])
        self.norm = nnx.Param(jnp.ones(config.width))
        if not config.tie_embeddings:
            self.head = nnx.Param(config.init_scale * jax.random.normal(rngs.params(), shape))

    @property
    def num_parameters(self) -> int:
        """Trainable numbers."""
        return sum(leaf.size for leaf in parameters(self).values())

    def hidden(
        self, tokens: jax.Array, *, segments: jax.Array | None = None, positions: jax.Array | None = None
    ) -> jax.Array:
        """Final normalised states [B, T, D] of tokens int32[B, T]; without segments a row is one document."""
        B, T = tokens.shape
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(T), (B, T))
        allowed = jnp.ones((B, T), jnp.int32) if segments is None else segments
        x = self.embedding[...].astype(self.config.dtype)[tokens]
        for block in self.blocks:
            call = recomputed if self.gradient_checkpointing else _output
            x = call(block, x, positions, allowed)
        return rms_norm(x, self.norm[...], self.config.norm_eps)

    def __call__(
        self, tokens: jax.Array, *, segments: jax.Array | None = None, positions: jax.Array | None = None
    ) -> jax.Array:
        """Logits float32[B, T, V] of tokens int32[B, T]."""
        x = self.hidden(tokens, segments=segments, positions=positions)
        return dot(x, self._head().astype(x.dtype), (2,), (1,))

    def loss(self, batch: Batch) -> jax.Array:
        """Mean loss in nats over the targets of a batch that count, z-loss included."""
        x = self.hidden(batch["tokens"], segments=batch["segments"], positions=batch["positions"])
        config = self.config
        return head_loss(
            x.reshape(-1, config.width),
            self._head(),
            batch["targets"].reshape(-1),
            batch["mask"].reshape(-1),
            z_loss=config.z_loss,
            chunk=config.loss_chunk,
        )

    def token_losses(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Loss float32[B, T] in nats of every target, without z-loss, and the mask bool[B, T] of those that count."""
        x = self.hidden(batch["tokens"], segments=batch["segments"], positions=batch["positions"])

        def one(item: tuple[jax.Array, jax.Array]) -> jax.Array:
            state, targets = item
            return head_losses(state, self._head(), targets)[0]

        at_once = _sequences_at_once(self.config, x)
        return jax.lax.map(one, (x, batch["targets"]), batch_size=at_once), batch["mask"]

    def sequence_losses(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Summed loss float32[B] in nats, without z-loss, and tokens float32[B] of each sequence."""
        x = self.hidden(batch["tokens"], segments=batch["segments"], positions=batch["positions"])
        mask = batch["mask"].astype(jnp.float32)

        def one(item: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
            state, targets, weights = item
            return head_losses(state, self._head(), targets)[0] @ weights

        return jax.lax.map(one, (x, batch["targets"], mask), batch_size=_sequences_at_once(self.config, x)), mask.sum(1)

    def generate(self, prompt: Any, max_new_tokens: int = 100, **options: Any) -> Any:
        """Goes on from a prompt; see `capibara.core.generate.generate`."""
        from capibara.core.generate import generate

        return generate(self, prompt, max_new_tokens, **options)

    def save(self, path: Path | str) -> None:
        """Writes `model.safetensors`, `config.json` and, where the model has one, `tokenizer.json` into a folder."""
        path, files = Path(path), Files()
        path.mkdir(parents=True, exist_ok=True)
        files.write_atomic(path / "model.safetensors", tensors_to_bytes(parameters(self)))
        files.write_atomic(path / "config.json", json.dumps(self.config.model_dump(mode="json"), indent=1).encode())
        if getattr(self, "tokenizer", None) is not None:
            self.tokenizer.save(path / "tokenizer.json")

    @classmethod
    def load(cls, path: Path | str) -> ModularCapibaraModel:
        """Reads what `save` wrote.

        Raises:
          ConfigError: If the folder holds no such model, or its weights do not fit its configuration.
        """
        path = Path(path)
        if not (path / "config.json").is_file():
            raise ConfigError(f"{path} holds no saved model (no config.json); give the folder that `save` wrote.")
        model = cls(ModelConfig(**json.loads((path / "config.json").read_text())))
        model = with_parameters(model, read_tensors(path / "model.safetensors"))
        if (path / "tokenizer.json").is_file():
            from capibara.core.tokenizer import load_tokenizer

            model.tokenizer = load_tokenizer(path / "tokenizer.json")
        return model

    def _head(self) -> jax.Array:
        return self.embedding[...] if self.config.tie_embeddings else self.head[...]


def block_class(kind: str | type) -> type:
    """The class of a block kind; a class of the user's own passes through."""
    if not isinstance(kind, str):
        return kind
    if kind not in BLOCKS:
        raise ConfigError(unknown_name("block kind", kind, BLOCKS))
    return BLOCKS[kind]


def parameters(model: nnx.Module) -> dict[str, jax.Array]:
    """The trainable parameters by dotted name; counters and keys are left out."""
    return named_leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def with_parameters(model: Any, params: dict[str, Any]) -> Any:
    """A copy of the model with these parameters.

    Raises:
      ConfigError: If a name or shape does not fit.
    """
    return _rebuild(model)(jax.tree.map(jnp.asarray, dict(params)))


def objective(model: nnx.Module, loss: Callable[..., Any] | None = None) -> Objective:
    """Pure losses over flat parameters.

    Args:
      model: Any NNX module with `loss(batch)`; `sequence_losses(batch) -> (sums[B], tokens[B])` serves the gates, and
        where it is missing every sequence is judged by `loss` on its own. `token_losses(batch) -> (losses[B, T],
        mask[B, T])` serves merge weights.
      loss: `(model, batch, key) -> scalar` instead of the module's own.
    """
    build = _rebuild(model)

    def batch_loss(params: dict[str, Any], batch: Batch, key: Any) -> tuple[jax.Array, dict[str, Any]]:
        module = build(params)
        return (module.loss(batch) if loss is None else loss(module, batch, key)), {}

    def sequence_losses(params: dict[str, Any], batch: Batch) -> tuple[jax.Array, jax.Array]:
        module = build(params)
        if loss is None and hasattr(module, "sequence_losses"):
            return module.sequence_losses(batch)

        def one(sequence: Batch) -> jax.Array:
            return batch_loss(params, jax.tree.map(lambda leaf: leaf[None], sequence), jax.random.key(0))[0]

        tokens = _tokens(batch)
        return jax.lax.map(one, dict(batch)) * tokens, tokens

    def token_losses(params: dict[str, Any], batch: Batch) -> tuple[jax.Array, jax.Array]:
        return build(params).token_losses(batch)

    def logits(params: dict[str, Any], batch: Batch) -> jax.Array:
        return build(params)(batch["tokens"], segments=batch["segments"], positions=batch["positions"])

    return Objective(
        batch_loss,
        sequence_losses,
        token_losses if loss is None and hasattr(model, "token_losses") else None,
        logits if loss is None and isinstance(model, ModularCapibaraModel) else None,
    )


def _output(block: Any, x: jax.Array, *rest: Any) -> jax.Array:
    return block(x, *rest)[0]


def _rebuild(model: Any) -> Callable[[dict[str, Any]], Any]:
    graph, state, rest = nnx.split(model, nnx.Param, ...)
    template = nnx.to_pure_dict(state)
    structure = jax.tree.structure(template)
    order = [name for name in _names(template)]
    shapes = {name: leaf.shape for name, leaf in named_leaves(template).items()}

    def build(params: dict[str, Any]) -> Any:
        if params.keys() != shapes.keys() or any(params[name].shape != shapes[name] for name in shapes):
            from_named_leaves(template, params)
        pure = jax.tree.unflatten(structure, [params[name] for name in order])
        filled = jax.tree.map(lambda leaf: leaf, state)
        nnx.replace_by_pure_dict(filled, pure)
        return nnx.merge(graph, filled, rest)

    return build


def _names(template: PyTree) -> list[str]:
    from capibara.tree import _key

    return [".".join(_key(entry) for entry in path) for path, _ in jax.tree_util.tree_flatten_with_path(template)[0]]


def _tokens(batch: Batch) -> jax.Array:
    if "mask" in batch:
        return batch["mask"].astype(jnp.float32).sum(tuple(range(1, batch["mask"].ndim)))
    return jnp.ones(np.shape(jax.tree.leaves(dict(batch))[0])[0], jnp.float32)


def _sequences_at_once(config: ModelConfig, x: jax.Array) -> int:
    return int(max(1, min(x.shape[0], 2**23 // (x.shape[1] * config.vocab_size))))
