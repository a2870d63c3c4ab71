"""Training steps of the plain strategy as nodes run them, on random tokens, for the benchmarks that time them.

JAX is imported inside the functions: the allocator has to be set before it starts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

LEARNING_RATE, WEIGHT_DECAY, BETAS, CLIP = 1e-3, 0.1, (0.9, 0.95), 1.0


class Shape(NamedTuple):
    """One model and batch: `steps` training steps are one timed run."""

    name: str
    dtype: str
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    T: int
    B: int
    steps: int
    vocab_size: int = 256

    @property
    def tokens(self) -> int:
        """Tokens of one timed run."""
        return self.B * self.T * self.steps

    @property
    def label(self) -> str:
        """For rows."""
        vocabulary = "" if self.vocab_size == 256 else f", V {self.vocab_size:,}"
        return f"{self.name}{vocabulary}, T {self.T}, B {self.B}, {self.dtype}"


SMALL = Shape("small", "float32", 160, 4, 5, 5, 128, 8, 10)
LARGER = Shape("6 layers of 384", "float32", 384, 6, 6, 2, 256, 8, 1)
WIDE = Shape("12 layers of 768", "float32", 768, 12, 12, 4, 1024, 1, 1)


class Ours(NamedTuple):
    """Our side: `run` trains `shape.steps` steps from where the last call ended and returns the first one's loss."""

    run: Callable[[], float]
    params: dict[str, np.ndarray]
    config: Any
    tokens: np.ndarray


def training_steps(shape: Shape) -> Ours:
    """The model of a shape with AdamW behind a clip by global norm, compiled at the first call."""
    import jax

    from capibara.core.config import ModelConfig
    from capibara.core.model import ModularCapibaraModel, objective, parameters
    from capibara.loop import local_steps
    from capibara.strategies.plain import adamw, plain

    config = ModelConfig(
        vocab_size=shape.vocab_size,
        width=shape.width,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        max_length=shape.T,
        dtype=shape.dtype,  # pyright: ignore[reportArgumentType]
    )
    model = ModularCapibaraModel(config, seed=0)
    optimizer = adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY, beta1=BETAS[0], beta2=BETAS[1], clip_norm=CLIP)
    strategy = plain(objective(model), optimizer)
    tokens = np.random.default_rng(0).integers(0, shape.vocab_size, (shape.steps, shape.B, shape.T + 1), np.int32)
    batches = {
        "tokens": tokens[..., :-1],
        "targets": tokens[..., 1:],
        "segments": np.ones(tokens[..., 1:].shape, np.int32),
        "positions": np.broadcast_to(np.arange(shape.T, dtype=np.int32), tokens[..., 1:].shape),
        "mask": np.ones(tokens[..., 1:].shape, bool),
    }
    params = parameters(model)
    first = {name: np.array(leaf) for name, leaf in params.items()}
    held = {"state": strategy.init(params)}
    program = jax.jit(lambda state, keys: local_steps(strategy.step, state, batches, keys), donate_argnums=0)
    step_keys = jax.random.split(jax.random.key(0), shape.steps)

    def run() -> float:
        held["state"], infos = program(held["state"], step_keys)
        return float(infos["loss"][0])

    return Ours(run, first, config, tokens)
