"""Σ wᵢθᵢ of models that may be more than fit in memory: one model and one sum at a time."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from capibara.consensus.validate import admit
from capibara.errors import ConfigError
from capibara.tree import tree_add
from capibara.types import PyTree

SUM_TOLERANCE = 1e-6


def combine(trees: Sequence[PyTree], weights: np.ndarray) -> PyTree:
    """Σ wᵢθᵢ, one model at a time, summed in float32 and returned in the models' own types.

    A model of weight 0 is not touched, whatever it holds; one of weight 1 is returned as it is.

    Raises:
      ConfigError: If two models with a weight have different structures.
    """
    used = np.flatnonzero(weights)
    if len(used) == 1 and weights[used[0]] == 1:
        return trees[used[0]]
    first = trees[used[0]]
    total = jax.tree.map(lambda leaf: np.float32(weights[used[0]]) * jnp.asarray(leaf, jnp.float32), first)
    for i in used[1:]:
        tree, share = trees[i], np.float32(weights[i])
        if reason := admit(tree, first):
            raise ConfigError(f"Model {i} cannot be merged with model {used[0]}: {reason.replace('_', ' ')}.")
        total = tree_add(total, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree), share)
    return jax.tree.map(lambda sum_, leaf: sum_.astype(leaf.dtype), total, first)


def checked_weights(weights: object, count: int, what: str = "weights") -> np.ndarray:
    """float64[count] on the simplex.

    Raises:
      ConfigError: If there are more or fewer, or one is negative or not finite, or they do not sum to 1.
    """
    w = np.asarray(weights, np.float64)
    if w.shape != (count,):
        raise ConfigError(f"There are {count} models and {what} of shape {w.shape}; give one number for each model.")
    if not np.isfinite(w).all() or (w < 0).any():
        i = int(np.argmax(~(w >= 0) | ~np.isfinite(w)))
        raise ConfigError(f"{what}[{i}] is {w[i]}; a share is a number from 0 to 1.")
    if abs(w.sum() - 1) > SUM_TOLERANCE:
        raise ConfigError(f"{what} sum to {w.sum():.6g}; shares sum to 1. Divide them by their sum.")
    return w / w.sum()
