"""Linear models, whose training is a convex problem: one matrix of weights behind a smooth convex loss.

    z = xW      ℓ(z, y) = ½(z − y)²,  log(1 + eᶻ) − yz,  or  log Σ eᶻ − z_y
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.scipy.special import xlogy

from capibara.errors import ConfigError, unknown_name
from capibara.types import Batch


class LinearLoss(NamedTuple):
    """ℓ(z, y), convex and smooth in z, with its conjugate in z.

    Attributes:
      name: As a configuration says it.
      smoothness: Largest eigenvalue of ∇²_z ℓ.
      value: `(z[N, C], y) -> [N]`.
      gradient: `(z[N, C], y) -> [N, C]`.
      conjugate: `(α[N, C], y) -> [N]`, for α between 0 and a gradient.
      classes: True where y are class numbers int[N], and z has a column for each.
    """

    name: str
    smoothness: float
    value: Callable[[jax.Array, jax.Array], jax.Array]
    gradient: Callable[[jax.Array, jax.Array], jax.Array]
    conjugate: Callable[[jax.Array, jax.Array], jax.Array]
    classes: bool = False


class LinearModel(nnx.Module):
    """z = xW with a convex loss; a column of ones in x gives an intercept.

    Args:
      num_features: Columns of x.
      num_outputs: Columns of y, or classes.
      kind: `squared`, `logistic` or `softmax`.

    Raises:
      ConfigError: For an unknown kind.
    """

    def __init__(self, num_features: int, num_outputs: int = 1, *, kind: str = "softmax"):
        if kind not in LOSSES:
            raise ConfigError(unknown_name("loss", kind, LOSSES))
        self.kind = kind
        self.weights = nnx.Param(jnp.zeros((num_features, num_outputs)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """z[N, outputs] of x[N, features]."""
        return x @ self.weights[...]

    def loss(self, batch: Batch) -> jax.Array:
        """Mean loss of examples `x[N, features]` with targets `y`."""
        return self.sequence_losses(batch)[0].mean()

    def sequence_losses(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Loss [N] of each example, and a count of one for each."""
        losses = LOSSES[self.kind]().value(self(batch["x"]), batch["y"])
        return losses, jnp.ones_like(losses)


@cache
def _squared() -> LinearLoss:
    return LinearLoss(
        "squared",
        1.0,
        lambda z, y: 0.5 * jnp.sum(jnp.square(z - y), -1),
        lambda z, y: z - y,
        lambda a, y: jnp.sum(0.5 * jnp.square(a) + a * y, -1),
    )


@cache
def _logistic() -> LinearLoss:
    def conjugate(a: jax.Array, y: jax.Array) -> jax.Array:
        u = jnp.clip(a + y, 0, 1)
        return jnp.sum(xlogy(u, u) + xlogy(1 - u, 1 - u), -1)

    return LinearLoss(
        "logistic",
        0.25,
        lambda z, y: jnp.sum(jnp.logaddexp(0, z) - y * z, -1),
        lambda z, y: jax.nn.sigmoid(z) - y,
        conjugate,
    )


@cache
def _softmax() -> LinearLoss:
    def hot(z: jax.Array, y: jax.Array) -> jax.Array:
        return jax.nn.one_hot(y, z.shape[-1], dtype=z.dtype)

    def conjugate(a: jax.Array, y: jax.Array) -> jax.Array:
        u = jnp.clip(a + hot(a, y), 0, 1)
        return jnp.sum(xlogy(u, u), -1)

    return LinearLoss(
        "softmax",
        0.5,
        lambda z, y: jax.nn.logsumexp(z, -1) - jnp.take_along_axis(z, y[:, None], -1)[:, 0],
        lambda z, y: jax.nn.softmax(z) - hot(z, y),
        conjugate,
        classes=True,
    )


LOSSES = {"squared": _squared, "logistic": _logistic, "softmax": _softmax}
