"""The named merges of `capibara.consensus`, over files: each is the very function that a round uses.

    combine   v from the products of the rows: two passes, θ₀ + Σ vᵢ(θᵢ − θ₀) is a linear merge of files
    prepare   a function of whole tensors (or blocks) of the rows, made after as many passes as it asks for

The rows are θᵢ − θ₀ where a base is given, else the θᵢ themselves. Merges of the second kind hold the largest tensor of
every input in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from capibara.consensus.ballot import Merge, Place, Survey
from capibara.errors import ConfigError
from capibara.merge import kernels
from capibara.merge.plan import Job
from capibara.merge.recipe import Recipe
from capibara.merge.stream import Reader
from capibara.merge.tensors import numpy_type


def named_merge(recipe: Recipe) -> Merge:
    """The merge that a recipe names, with its options.

    Raises:
      ConfigError: If an option has a value that cannot be meant.
    """
    from capibara.consensus import dropout, model_stock, spherical, task_vectors

    factories: dict[str, Callable[..., Merge]] = {
        "slerp": spherical.slerp,
        "karcher": spherical.karcher,
        "rda": spherical.rda,
        "task_arithmetic": task_vectors.task_arithmetic,
        "ties": task_vectors.ties,
        "ties_tensor": task_vectors.ties_tensor,
        "dare": dropout.dare,
        "dare_norm": lambda **options: dropout.dare(norm_matched=True, **options),
        "dare_ties": lambda **options: dropout.dare(elect=True, **options),
        "della": dropout.della,
        "breadcrumbs": task_vectors.breadcrumbs,
        "model_stock": model_stock.model_stock,
        "model_stock_whole": model_stock.model_stock_whole,
        "sce": task_vectors.sce,
    }
    return factories[recipe.method](**recipe.options)


def shares(recipe: Recipe) -> np.ndarray:
    """float64[m], summing to 1."""
    m = len(recipe.inputs)
    return np.full(m, 1 / m) if recipe.weights is None else np.asarray(recipe.weights) / np.sum(recipe.weights)


def combined(recipe: Recipe, gram: np.ndarray) -> np.ndarray:
    """Coefficients of the inputs, and of the base after them where there is one, from the products of the rows."""
    merge, m = named_merge(recipe), len(recipe.inputs)
    assert merge.combine is not None
    v = np.asarray(merge.combine(shares(recipe), gram[:m, :m]), np.float64)
    return v if recipe.base is None else np.append(v, 1.0 - v.sum())


def whole_tensors(recipe: Recipe, jobs: Sequence[Job]) -> kernels.Kernel:
    """The kernel of a merge that is made by `prepare`; it is called with whole tensors.

    Raises:
      ConfigError: If the rows are such that the merge cannot be made.
    """
    import jax

    merge, m = named_merge(recipe), len(recipe.inputs)
    assert merge.prepare is not None
    places = {name: number for number, name in enumerate(sorted(job.name for job in jobs if job.merged))}
    shapes = {job.name: job.shape for job in jobs}
    ordered = sorted((job for job in jobs if job.merged), key=lambda job: job.name)

    def leaves() -> Iterator[Any]:
        with Reader() as reader:
            for job in ordered:
                yield LazyRows(reader, job, m)

    leaf = merge.prepare(Survey(shares(recipe), np.arange(m), leaves, jax.random.key(recipe.seed)))

    def combine(rows: kernels.Rows, first: int, last: int, name: str) -> np.ndarray:
        base = rows.row(m, first, last, room="base")
        deltas = np.stack([rows.row(i, first, last) - base for i in range(m)])
        if not np.isfinite(deltas).all():
            raise ConfigError(
                f"Tensor {name!r} of an input holds NaN or an infinity; {recipe.method} cannot rank such numbers."
            )
        merged = leaf(jax.numpy.asarray(deltas.reshape(m, *shapes[name])), Place(places[name], first))
        return base + np.asarray(merged, base.dtype).reshape(-1)

    return combine


class LazyRows:
    """The rows of one tensor, read when they are asked for as an array; their shape costs nothing."""

    def __init__(self, reader: Reader, job: Job, count: int):
        self.reader, self.job, self.shape = reader, job, (count, *job.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        base = self._values(self.shape[0])
        rows = np.stack([self._values(i) - base for i in range(self.shape[0])]).reshape(self.shape)
        return rows if dtype is None else rows.astype(dtype, copy=False)

    def _values(self, i: int) -> np.ndarray:
        tensor = self.job.inputs[i]
        raw = np.empty(tensor.numbers * numpy_type(tensor.dtype).itemsize, np.uint8)
        self.reader.read(i, tensor, 0, raw.data)
        return raw.view(numpy_type(tensor.dtype)).astype(np.float32)
