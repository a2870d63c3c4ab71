"""Numbers about whole trees that proximal operators need, and the root of a falling function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from capibara.types import PyTree

BISECTIONS = 60
"""Halvings of an interval: past float32's 24 bits from any start within 2³⁶ of the answer."""


def soft_threshold(a: jax.Array, height: Any) -> jax.Array:
    """sign(a) · max(|a| − height, 0)."""
    return jnp.sign(a) * jnp.maximum(jnp.abs(a) - height, 0)


def falling_root(excess: Callable[[jax.Array], jax.Array], low: jax.Array, high: jax.Array) -> jax.Array:
    """Where a falling function crosses 0 between `low` and `high`, elementwise."""

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low + high) / 2
        above = excess(middle) > 0
        return jnp.where(above, middle, low), jnp.where(above, high, middle)

    low, high = jax.lax.fori_loop(0, BISECTIONS, halve, (low, high))
    return (low + high) / 2


def total(f: Callable[[jax.Array], jax.Array], x: PyTree) -> jax.Array:
    """Σ of f over all leaves."""
    return jnp.asarray(sum(jnp.sum(f(leaf)) for leaf in jax.tree.leaves(x)))


def everywhere(f: Callable[[jax.Array], jax.Array], x: PyTree) -> jax.Array:
    """Whether f holds in every number of every leaf."""
    return jnp.all(jnp.stack([jnp.all(f(leaf)) for leaf in jax.tree.leaves(x)]))


def largest_absolute(x: PyTree) -> jax.Array:
    """max |xⱼ| over all leaves."""
    return jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(x)]))


def largest(x: PyTree) -> jax.Array:
    """max xⱼ over all leaves."""
    return jnp.max(jnp.stack([jnp.max(leaf) for leaf in jax.tree.leaves(x)]))


def slack(x: PyTree) -> float:
    """Rounding that a sum over the tree may leave: as much as a sum or a singular value may be off."""
    return 256 * float(jnp.finfo(jax.tree.leaves(x)[0].dtype).eps)
