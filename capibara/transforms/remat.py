"""Gradient checkpointing: the backward pass computes a block's activations again instead of keeping them.

Memory falls from all activations of all blocks to the input of every block and the activations of one; the forward
pass is done twice (Chen et al. 2016).
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from capibara.errors import ConfigError


def recomputed(block: nnx.Module, x: jax.Array, *rest: Any) -> jax.Array:
    """`block(x, *rest)[0]`, of which only `x` is kept for the backward pass."""
    graph, state = nnx.split(block)

    def call(state: Any, x: jax.Array, *rest: Any) -> jax.Array:
        return nnx.merge(graph, state)(x, *rest)[0]

    return jax.checkpoint(call)(state, x, *rest)


def with_gradient_checkpointing(model: Any) -> Any:
    """A copy of the model, with the same parameters, that recomputes its blocks in the backward pass.

    Raises:
      ConfigError: If the model has no `gradient_checkpointing` attribute to switch on.
    """
    if not hasattr(model, "gradient_checkpointing"):
        raise ConfigError(
            "use_gradient_checkpointing needs a model with a `gradient_checkpointing` attribute; "
            f"{type(model).__name__} has none. Put jax.checkpoint around its blocks instead, and leave the option out."
        )
    copy = nnx.merge(*nnx.split(model))
    copy.gradient_checkpointing = True
    return copy
