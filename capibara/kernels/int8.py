"""Weights in int8 with a scale for each column: a quarter of float32's bytes to read, and activations as they were.

    scale[n] = max_k |w[k, n]| / 127        values[k, n] = round(w[k, n] / scale[n])

An entry is off by at most scale[n] / 2. Reference: Dettmers et al. 2022 (LLM.int8, vector-wise; here without outliers,
since only weights are rounded).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from capibara.errors import ConfigError
from capibara.kernels.few_rows import Matrix, product

LARGEST = 127


def quantize(w: Any, *, by_columns: bool = False) -> Matrix:
    """A matrix in int8.

    Args:
      w: [K, N], floating; [N, K] where it stands by its columns, as a tied head [V, D] does.
      by_columns: See w.

    Returns:
      `Matrix` with int8 values of w's shape and float32[N] scales; a column of zeros has the scale 0.

    Raises:
      ConfigError: If w is not a floating matrix.

    Example:
      >>> q = quantize([[1.0, 0.0], [-2.0, 0.0]])
      >>> q.values.tolist(), (q.scales * 127).tolist()
      ([[64, 0], [-127, 0]], [2.0, 0.0])
    """
    w = jnp.asarray(w)
    if w.ndim != 2 or not jnp.issubdtype(w.dtype, jnp.floating):
        raise ConfigError(f"int8 weights are made of a floating matrix; got {w.dtype}{list(w.shape)}.")
    axis = 1 if by_columns else 0
    wide = w.astype(jnp.float32)
    largest = jnp.abs(wide).max(axis, keepdims=True, initial=0)
    scales = largest / LARGEST
    values = jnp.round(wide / jnp.where(scales > 0, scales, 1)).clip(-LARGEST, LARGEST)
    return Matrix(values.astype(jnp.int8), scales.squeeze(axis), by_columns)


def dequantize(matrix: Matrix) -> jax.Array:
    """float32 of the shape that `quantize` was given."""
    scales = jnp.ones(matrix.shape[1]) if matrix.scales is None else matrix.scales
    return matrix.values.astype(jnp.float32) * (scales[:, None] if matrix.by_columns else scales)


def int8_matmul(x: Any, matrix: Matrix) -> jax.Array:
    """x · matrix in float32[..., N], x float32 or bfloat16 [..., K]; see `capibara.kernels.few_rows.product`.

    Raises:
      ConfigError: If shapes or dtypes do not fit.
    """
    x = jnp.asarray(x)
    if x.dtype not in (jnp.float32, jnp.bfloat16) or x.ndim < 1 or x.shape[-1] != matrix.shape[0]:
        raise ConfigError(
            f"x [..., K] is float32 or bfloat16 and meets a matrix [K, N]; got {x.dtype}{list(x.shape)} and "
            f"{list(matrix.shape)}."
        )
    return product(x, matrix)
