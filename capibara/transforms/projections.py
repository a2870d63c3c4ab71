"""Projections: the proximal operators of "inside a set", in the form of `capibara.transforms.prox`.

The Euclidean ones on balls of ‖·‖₁ and on the simplex are optax's; under a diagonal metric one multiplier μ is found
by bisection.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from capibara.errors import ConfigError
from capibara.transforms.prox import Prox, check_positive, nothing_to_shrink
from capibara.transforms.reductions import (
    everywhere,
    falling_root,
    largest,
    largest_absolute,
    slack,
    soft_threshold,
    total,
)
from capibara.types import PyTree


def box(low: float, high: float) -> Prox:
    """The indicator of low ≤ xⱼ ≤ high: clips, under any metric."""
    if not low <= high:
        raise ConfigError(f"box needs low ≤ high; got {low} and {high}.")

    def inside(x: PyTree) -> jax.Array:
        return everywhere(lambda a: (a >= low) & (a <= high), x)

    def conjugate(u: PyTree) -> jax.Array:
        return total(lambda a: jnp.maximum(jnp.where(a > 0, a * high, 0), jnp.where(a < 0, a * low, 0)), u)

    def apply(x: PyTree, t: Any, metric: PyTree = None) -> PyTree:
        return jax.tree.map(lambda a: jnp.clip(a, low, high), x)

    return Prox("box", lambda x: jnp.where(inside(x), 0.0, jnp.inf), apply, conjugate, nothing_to_shrink)


def non_negative() -> Prox:
    """The indicator of xⱼ ≥ 0: cuts below 0, under any metric."""
    return box(0.0, float("inf"))._replace(
        name="non_negative",
        conjugate=lambda u: jnp.where(everywhere(lambda a: a <= 0, u), 0.0, jnp.inf),
        shrink=lambda u: jnp.where(everywhere(lambda a: a <= 0, u), nothing_to_shrink(u), 0.0),
    )


def l2_ball(radius: float) -> Prox:
    """The indicator of ‖x‖ ≤ radius over the whole tree; under a metric z = Dx/(D + μ), μ by bisection."""
    check_positive("l2_ball", radius)

    def apply(x: PyTree, t: Any, metric: PyTree = None) -> PyTree:
        length = optax.tree.norm(x)
        if metric is None:
            factor = jnp.where(length > radius, radius / jnp.where(length > radius, length, 1), 1)
            return jax.tree.map(lambda a: a * factor, x)

        def at(mu: jax.Array) -> PyTree:
            return jax.tree.map(lambda a, d: d * a / (d + mu), x, metric)

        most = largest_absolute(metric) * length / radius  # there ‖z‖ ≤ max D/(max D + μ) ‖x‖ < radius
        mu = falling_root(lambda mu: optax.tree.norm(at(mu)) - radius, jnp.zeros_like(most), most)
        return at(jnp.where(length > radius, mu, 0))

    def value(x: PyTree) -> jax.Array:
        return jnp.where(optax.tree.norm(x) <= radius * (1 + slack(x)), 0.0, jnp.inf)

    return Prox("l2_ball", value, apply, lambda u: radius * optax.tree.norm(u), nothing_to_shrink)


def l1_ball(radius: float) -> Prox:
    """The indicator of ‖x‖₁ ≤ radius over the whole tree; a soft threshold of height μ/D, μ by bisection."""
    check_positive("l1_ball", radius)

    def apply(x: PyTree, t: Any, metric: PyTree = None) -> PyTree:
        if metric is None:
            return optax.projections.projection_l1_ball(x, radius)

        def at(mu: jax.Array) -> PyTree:
            return jax.tree.map(lambda a, d: soft_threshold(a, mu / d), x, metric)

        most = largest_absolute(jax.tree.map(lambda a, d: a * d, x, metric))
        mu = falling_root(lambda mu: total(jnp.abs, at(mu)) - radius, jnp.zeros_like(most), most)
        return at(jnp.where(total(jnp.abs, x) > radius, mu, 0))

    def value(x: PyTree) -> jax.Array:
        return jnp.where(total(jnp.abs, x) <= radius * (1 + slack(x)), 0.0, jnp.inf)

    return Prox("l1_ball", value, apply, lambda u: radius * largest_absolute(u), nothing_to_shrink)


def simplex(scale: float = 1.0) -> Prox:
    """The indicator of xⱼ ≥ 0, Σ xⱼ = scale over the whole tree; z = (x − μ/D)₊, μ by bisection."""
    check_positive("simplex", scale)

    def apply(x: PyTree, t: Any, metric: PyTree = None) -> PyTree:
        if metric is None:
            return optax.projections.projection_simplex(x, scale)

        def at(mu: jax.Array) -> PyTree:
            return jax.tree.map(lambda a, d: jnp.maximum(a - mu / d, 0), x, metric)

        # Above max Dx nothing is left; below min D(x − scale) every coordinate alone exceeds the scale.
        most = largest(jax.tree.map(lambda a, d: a * d, x, metric))
        least = -largest(jax.tree.map(lambda a, d: d * (scale - a), x, metric))
        return at(falling_root(lambda mu: total(lambda a: a, at(mu)) - scale, least, most))

    def value(x: PyTree) -> jax.Array:
        rounding = scale * slack(x)
        good = everywhere(lambda a: a >= -rounding, x) & (jnp.abs(total(lambda a: a, x) - scale) <= rounding)
        return jnp.where(good, 0.0, jnp.inf)

    return Prox("simplex", value, apply, lambda u: scale * largest(u), nothing_to_shrink)
