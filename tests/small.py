"""Runs on real text that take a second: speeches, a table of byte pairs that trains, a decoder of one block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from capibara.core.config import ModularConfig
from capibara.data.demo import demo_folder

SHAPE = {"width": 16, "num_layers": 1, "num_heads": 2, "hidden": 16}
"""Of the smallest decoder: 5 k parameters."""


class Pairs(nnx.Module):
    """The likelihood of a byte given the one before: any NNX model with `loss(batch)`, quick to compile."""

    def __init__(self, seed: int = 0):
        self.table = nnx.Param(0.02 * jax.random.normal(jax.random.key(seed), (257, 257)))

    def loss(self, batch: Any) -> jax.Array:
        """Mean over the targets that count."""
        losses = optax.softmax_cross_entropy_with_integer_labels(self.table[...][batch["tokens"]], batch["targets"])
        mask = batch["mask"].astype(jnp.float32)
        return (losses * mask).sum() / jnp.maximum(mask.sum(), 1.0)


def speeches(folder: Path, first: int, count: int, characters: int = 4000) -> Path:
    """A folder with the beginnings of some speeches, one file each."""
    folder.mkdir(parents=True)
    for file in sorted((demo_folder() / "speeches").glob("*.txt"))[first : first + count]:
        (folder / file.name).write_text(file.read_text(encoding="utf-8")[:characters], encoding="utf-8")
    return folder


def config(**sections: dict[str, Any]) -> ModularConfig:
    """The preset `development`, made small; keywords change sections as in `replace`."""
    base = ModularConfig.preset("development").replace(
        model=SHAPE, data={"sequence_length": 32}, training={"warmup_steps": 2, "learning_rate": 0.01, "log_every": 2}
    )
    return base.replace(**sections)
