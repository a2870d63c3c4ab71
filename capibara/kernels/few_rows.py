"""Products of few rows with a matrix that is only read, those of generation: reading the matrix is what they cost.

    y[m, n] = scale[n] · Σ_k x[m, k] · w[k, n]        w in float32, bfloat16 or int8; sums in float32

A `Matrix` stands where a model has a parameter, and `capibara.core.layers.linear` takes it for one. The native kernel
(`src/few_rows.hpp`) reads every number of w once; with more rows than `MOST_ROWS`, without the native kernels and on
other backends XLA's dot runs. `benchmarks/generation.py` measures what that gives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from capibara.kernels.library import native
from capibara.kernels.matmul import dot

MOST_ROWS = 64
"""Of x: with more, arithmetic is what a product costs, and XLA's dot does that better."""


@dataclass(frozen=True)
class Matrix:
    """A matrix [K, N] that nothing is derived from; a pytree.

    Attributes:
      values: [K, N], or [N, K] where it stands by its columns: float32, bfloat16, or int8 with scales.
      scales: float32[N], of int8: column n is scales[n] · values[:, n]. None is all ones.
      by_columns: Whether values are [N, K], as a tied head is.
    """

    values: jax.Array
    scales: jax.Array | None = None
    by_columns: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N)."""
        first, second = self.values.shape
        return (second, first) if self.by_columns else (first, second)

    def __getitem__(self, whole: EllipsisType) -> Matrix:
        """`matrix[...]` is the matrix, as for the parameter that it stands for."""
        return self


jax.tree_util.register_dataclass(Matrix, data_fields=["values", "scales"], meta_fields=["by_columns"])


def product(x: jax.Array, matrix: Matrix) -> jax.Array:
    """x · matrix, summed in float32.

    A row's sums depend neither on the number of threads nor, up to `MOST_ROWS`, on the other rows.

    Cost: one pass over the matrix for up to `MOST_ROWS` rows. Not differentiable.

    Args:
      x: [..., K], float32 or bfloat16.
      matrix: [K, N].

    Returns:
      float32[..., N].
    """
    inner, columns = matrix.shape
    rows = math.prod(x.shape[:-1])
    if not native() or not 0 < rows <= MOST_ROWS or not inner or not columns:
        return _plain(x, matrix)
    return jax.lax.platform_dependent(x, matrix, cpu=_native, default=_plain)


def _native(x: jax.Array, matrix: Matrix) -> jax.Array:
    inner, columns = matrix.shape
    scales = jnp.zeros(0, jnp.float32) if matrix.scales is None else matrix.scales
    rows = x.reshape(-1, inner).astype(jnp.float32)
    shape = jax.ShapeDtypeStruct((rows.shape[0], columns), jnp.float32)
    call = jax.ffi.ffi_call("capibara_few_rows", shape, vmap_method="sequential")
    found: Any = call(rows, matrix.values, scales, by_columns=np.bool_(matrix.by_columns))
    return found.reshape(*x.shape[:-1], columns)


def _plain(x: jax.Array, matrix: Matrix) -> jax.Array:
    """In the wider of both dtypes, int8 in float32: neither is rounded."""
    wide = jnp.float32 if matrix.values.dtype == jnp.int8 else jnp.promote_types(x.dtype, matrix.values.dtype)
    found = dot(x.astype(wide), matrix.values.astype(wide), (x.ndim - 1,), (1 if matrix.by_columns else 0,))
    return found if matrix.scales is None else found * matrix.scales
