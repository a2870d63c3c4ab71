"""The running mean of models that come one after another, in float32, however many there are; and decay weights.

    W ← W + w        m ← m + (x − m)·w/W        S ← S + w·(x − mₒₗ)(x − m)           (Welford 1962, West 1979)

In bfloat16 such a mean leaves noise of 0.4 to 1.6 times the change that is averaged; in float32 the error after k
models is about k·2⁻²⁴ of a number. NumPy, in place and in blocks that stay in cache: no second copy on a device.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from capibara.consensus.validate import admit
from capibara.errors import ConfigError, unknown_name
from capibara.kernels import arrays
from capibara.tree import named_leaves
from capibara.types import PyTree

BLOCK = 2**16
"""Numbers taken at a time: three such rows of float32 lie in a core's second-level cache."""

SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda t: 1 - t,
    "1-sqrt": lambda t: 1 - math.sqrt(t),
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
}
"""Learning-rate decays d with d(0) = 1 and d(1) = 0."""


def decay_weights(count: int, schedule: str = "1-sqrt") -> np.ndarray:
    """float64[count], oldest first: the mean that stands for decaying the learning rate over these checkpoints.

    Checkpoints θ₁ … θ_N of a run at constant rate are θ₁ plus N − 1 changes. Had the rate decayed, change i would have
    been scaled by d(i/N): Σ cⱼθⱼ = θ₁ + Σᵢ d(i/N)(θᵢ₊₁ − θᵢ), so cⱼ = d((j−1)/N) − d(j/N), which are ≥ 0 and sum to 1.
    The linear decay is the plain mean. WSM, Tian et al. 2025 (arXiv 2507.17634).

    Fails when: the changes would not have been the same at a smaller rate; the weights assume they would.

    Raises:
      ConfigError: If there is no such schedule, or no checkpoint.
    """
    if schedule not in SCHEDULES:
        raise ConfigError(unknown_name("schedule", schedule, SCHEDULES))
    if count < 1:
        raise ConfigError(f"Decay weights are for at least 1 checkpoint; got {count}.")
    left = np.array([SCHEDULES[schedule](j / count) for j in range(count + 1)])
    return left[:-1] - left[1:]


class Average:
    """A weighted running mean of trees, and on request the variance of every number.

    Tolerates: nothing: whoever adds decides. Leaves that are no floats must be the same in all, and are kept.
    Cost: one pass over each tree; 4 bytes a parameter, 8 with the variance, whatever the number of trees.

    Args:
      variance: Whether to keep S.
    """

    def __init__(self, *, variance: bool = False):
        self.keeps_variance = variance
        self.count, self.weight = 0, 0.0
        self._template: PyTree = None
        self._mean: list[np.ndarray] = []
        self._squares: list[np.ndarray] = []

    def add(self, tree: PyTree, weight: float = 1.0) -> None:
        """Takes one more tree; one of weight 0 is not touched.

        Raises:
          ConfigError: If its structure, shapes or types are not those of the first, or a leaf that cannot be averaged
            is another.
        """
        if weight == 0:
            return
        if self._template is None:
            arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
            self._template = shapes_of(tree)
            self._mean = [np.array(a, np.float32, order="C") if is_float(a) else a for a in arrays]
            if self.keeps_variance:
                self._squares = [np.zeros_like(m) for m in self._mean if m.dtype == np.float32]
            self.count, self.weight = 1, float(weight)
            return
        check_fits(tree, self._template, f"Model {self.count}")
        self.count += 1
        self.weight += weight
        self.move(tree, weight / self.weight, weight)

    def move(self, tree: PyTree, share: float, weight: float = 0.0) -> None:
        """m ← m + share·(x − m): with a constant share, the exponential average."""
        floats = iter(self._squares)
        for mean, leaf in zip(self._mean, jax.tree.leaves(tree), strict=True):
            new = np.asarray(leaf)
            if not is_float(new):
                if not np.array_equal(mean, new):
                    raise ConfigError(f"Model {self.count - 1} differs in a leaf of {new.dtype}, which has no mean.")
                continue
            _towards(mean.reshape(-1), new.reshape(-1), share, weight, next(floats, np.empty(0)).reshape(-1))

    def mean(self) -> PyTree:
        """The mean, with leaves of the types that came.

        Raises:
          ConfigError: If nothing has been added.
        """
        template = self._checked()
        leaves = [m.astype(t.dtype) for m, t in zip(self._mean, jax.tree.leaves(template), strict=True)]
        return jax.tree.unflatten(jax.tree.structure(template), leaves)

    def variance(self) -> PyTree:
        """S/W of every number, float32: 0 for one tree, and for what has no mean.

        Raises:
          ConfigError: If nothing has been added, or no variance was asked for.
        """
        template = self._checked()
        if not self.keeps_variance:
            raise ConfigError("No variance was kept; begin with Average(variance=True).")
        squares = iter(self._squares)
        leaves = [
            next(squares) / np.float32(self.weight) if is_float(t) else np.zeros(t.shape, np.float32)
            for t in jax.tree.leaves(template)
        ]
        return jax.tree.unflatten(jax.tree.structure(template), leaves)

    def with_one_more(self, tree: PyTree) -> PyTree:
        """The mean as it would be with one more tree of weight 1; this one stays as it is.

        Raises:
          ConfigError: If the tree does not fit.
        """
        template = self._checked()
        check_fits(tree, template, f"Model {self.count}")
        share, leaves = np.float32(1 / (self.weight + 1)), []
        for mean, leaf in zip(self._mean, jax.tree.leaves(tree), strict=True):
            new = np.asarray(leaf)
            if not is_float(new):
                leaves.append(mean)
                continue
            if new.dtype == np.float32:
                moved = arrays.moved(mean.reshape(-1), new.reshape(-1), float(share), threads=1)
                leaves.append(moved.reshape(mean.shape))
                continue
            out = np.empty(mean.shape, new.dtype)
            for part, old, come in _blocks(out.reshape(-1), mean.reshape(-1), new.reshape(-1)):
                step = come.astype(np.float32) - old
                step *= share
                step += old
                part[...] = step
            leaves.append(out)
        return jax.tree.unflatten(jax.tree.structure(template), leaves)

    def _checked(self) -> PyTree:
        if self._template is None:
            raise ConfigError("Nothing has been averaged yet; add at least one model.")
        return self._template


def shapes_of(tree: PyTree) -> PyTree:
    """The tree with shapes and types in place of its arrays."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), np.asarray(leaf).dtype), tree)


def check_fits(tree: PyTree, like: PyTree, what: str) -> None:
    """Raises ConfigError naming the first leaf in which a tree differs from the first one."""
    if (reason := admit(tree, like)) is None:
        return
    ours, theirs = named_leaves(like), named_leaves(tree)
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in theirs or name not in ours:
            lacks, has = ("it", "the first") if name not in theirs else ("the first", "it")
            raise ConfigError(f"{what} does not fit the first: {has} has a leaf {name!r}, {lacks} has none.")
        a, b = (f"{getattr(leaf, 'dtype', type(leaf).__name__)}{list(np.shape(leaf))}"
                for leaf in (theirs[name], ours[name]))
        if a != b:
            raise ConfigError(f"{what} does not fit the first: leaf {name!r} is {a}, the first has {b}.")
    raise ConfigError(f"{what} does not fit the first: {reason.replace('_', ' ')}.")


def is_float(leaf: np.ndarray) -> bool:
    """Whether a leaf holds numbers that have a mean, bfloat16 included."""
    return bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def is_finite(tree: PyTree) -> bool:
    """Whether every number of a tree is finite."""
    return all(
        bool(np.isfinite(part).all())
        for leaf in map(np.asarray, jax.tree.leaves(tree))
        if is_float(leaf)
        for (part,) in _blocks(leaf.reshape(-1))
    )


def _towards(mean: np.ndarray, new: np.ndarray, share: float, weight: float, squares: np.ndarray) -> None:
    step_share = np.float32(share)
    kept = len(squares) == len(mean) and weight > 0
    if not kept and new.dtype in (np.float32, jnp.bfloat16):
        arrays.moved(mean, new, share, mean, threads=1)
        return
    for old, come, square in _blocks(mean, new, squares if kept else mean):
        gap = come.astype(np.float32, copy=False) - old
        step = gap * step_share
        old += step
        if kept:
            gap *= gap - step
            gap *= np.float32(weight)
            square += gap


def _blocks(*rows: np.ndarray):
    for first in range(0, len(rows[0]), BLOCK):
        yield tuple(row[first : first + BLOCK] for row in rows)
