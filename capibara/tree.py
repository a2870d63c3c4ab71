"""Pytrees as the vote sees them: named leaves, and arithmetic that stays leaf by leaf.

JAX is imported inside the functions: importing this module starts nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from capibara.errors import ConfigError
from capibara.types import PyTree


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Leaves by dotted path (`blocks.0.mlp.up`), sorted by name. A flat dict keeps its keys as they are."""
    if type(tree) is dict and all(isinstance(leaf, (np.ndarray, np.generic)) for leaf in tree.values()):
        return dict(sorted((str(name), leaf) for name, leaf in tree.items()))  # needs no JAX

    import jax

    pairs, _ = jax.tree_util.tree_flatten_with_path(tree)
    return dict(sorted((".".join(_key(entry) for entry in path), leaf) for path, leaf in pairs))


def from_named_leaves(template: PyTree, leaves: dict[str, Any]) -> PyTree:
    """The tree of `template` with the leaves of `leaves`.

    Raises:
      ConfigError: If a name is missing, left over, or has another shape than in the template.
    """
    import jax

    pairs, structure = jax.tree_util.tree_flatten_with_path(template)
    names = [".".join(_key(entry) for entry in path) for path, _ in pairs]
    if missing := sorted(set(names) - set(leaves)):
        raise ConfigError(f"The tree lacks {len(missing)} of {len(names)} leaves, the first is {missing[0]!r}.")
    if extra := sorted(set(leaves) - set(names)):
        raise ConfigError(f"The tree has {len(extra)} leaves that the model does not know, the first is {extra[0]!r}.")
    for name, (_, leaf) in zip(names, pairs, strict=True):
        if np.shape(leaves[name]) != np.shape(leaf):
            raise ConfigError(f"Leaf {name!r} has shape {np.shape(leaves[name])}; the model needs {np.shape(leaf)}.")
    return jax.tree_util.tree_unflatten(structure, [leaves[name] for name in names])


def tree_add(a: PyTree, b: PyTree, scale: Any = 1.0) -> PyTree:
    """`a + scale · b`, leaf by leaf."""
    import jax

    return jax.tree.map(lambda x, y: x + scale * y, a, b)


def tree_sub(a: PyTree, b: PyTree) -> PyTree:
    """`a - b`, leaf by leaf."""
    import jax

    return jax.tree.map(lambda x, y: x - y, a, b)


def num_parameters(tree: PyTree) -> int:
    """Numbers in all leaves together."""
    import jax

    return sum(int(np.prod(np.shape(leaf))) for leaf in jax.tree.leaves(tree))


def num_bytes(tree: PyTree) -> int:
    """Bytes of all leaves together; leaves may be shapes from `jax.eval_shape`."""
    import jax

    return sum(int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def _key(entry: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)
