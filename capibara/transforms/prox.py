"""Proximal operators on trees of arrays, each with its value and its conjugate, also under a diagonal metric.

    prox(x, t, D) = argmin_z  r(z) + 1/(2t) Σ Dⱼ (zⱼ − xⱼ)²        D = 1 where no metric is given

An adaptive optimiser steps in the metric D of its second moments; the Euclidean operator after such a step solves
another problem (Yun et al. 2021, ProxGen). Where no closed form exists under D, one number is found by bisection.
Closed forms: Parikh & Boyd 2014, Proximal Algorithms, ch. 6.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from capibara.errors import ConfigError
from capibara.transforms.reductions import everywhere, falling_root, largest_absolute, slack, soft_threshold, total
from capibara.types import PyTree

MOST_SINGULAR = 1024
"""Largest side of a matrix whose singular values are computed in every step."""


class Prox(NamedTuple):
    """A convex function r with what proximal methods need of it.

    Attributes:
      name: For records.
      value: `(x) -> r(x)`; inf outside the domain.
      apply: `(x, t, metric=None) -> prox`, t > 0 and the metric a tree like x of numbers > 0.
      conjugate: `(u) -> r*(u)`; inf outside its domain.
      shrink: `(u) -> s`, the largest s ≤ 1 with r*(s·u) finite: makes a dual point feasible.
    """

    name: str
    value: Callable[[PyTree], jax.Array]
    apply: Callable[..., PyTree]
    conjugate: Callable[[PyTree], jax.Array]
    shrink: Callable[[PyTree], jax.Array]


def zero() -> Prox:
    """r = 0: the operator leaves everything as it is."""
    return Prox("zero", _zero, lambda x, t, metric=None: x, _only_at_zero, _shrink_to_zero)


def l1(strength: float) -> Prox:
    """r(x) = λ‖x‖₁: soft thresholds, of height tλ/Dⱼ."""
    check_positive("l1", strength)

    def apply(x: PyTree, t: Any, metric: PyTree = None) -> PyTree:
        return _map(lambda a, d: soft_threshold(a, t * strength / d), x, metric)

    def value(x: PyTree) -> jax.Array:
        return strength * total(jnp.abs, x)

    def conjugate(u: PyTree) -> jax.Array:
        return jnp.where(largest_absolute(u) <= strength * (1 + slack(u)), 0.0, jnp.inf)

    return Prox("l1", value, apply, conjugate, lambda u: _fit(strength, largest_absolute(u)))


def ridge(strength: float) -> Prox:
    """r(x) = λ/2 ‖x‖²: x / (1 + tλ/D), which is not the decoupled decay x (1 − tλ)."""
    check_positive("ridge", strength)
    return elastic_net(0.0, strength)._replace(name="ridge")


def elastic_net(l1_strength: float, l2_strength: float) -> Prox:
    """r(x) = λ₁‖x‖₁ + λ₂/2 ‖x‖²: a soft threshold, then a division; Zou & Hastie 2005."""
    check_positive("elastic_net", l2_strength)
    if l1_strength < 0:
        raise ConfigError(f"elastic_net needs l1_strength of 0 or more; got {l1_strength}.")

    def apply(x: PyTree, t: Any, metric: PyTree = None) -> PyTree:
        return _map(lambda a, d: soft_threshold(a, t * l1_strength / d) / (1 + t * l2_strength / d), x, metric)

    def value(x: PyTree) -> jax.Array:
        return l1_strength * total(jnp.abs, x) + l2_strength / 2 * total(jnp.square, x)

    def conjugate(u: PyTree) -> jax.Array:
        return total(lambda a: jnp.square(soft_threshold(a, l1_strength)), u) / (2 * l2_strength)

    return Prox("elastic_net", value, apply, conjugate, nothing_to_shrink)


def group_lasso(strength: float, axis: int = 0) -> Prox:
    """r(x) = λ Σ_g ‖x_g‖, a group for every slice along `axis` (a neuron's weights); Yuan & Lin 2006.

    A leaf of fewer than two dimensions is one group. (1 − tλ/‖x_g‖)₊ x_g; under a metric ‖z_g‖ is found by bisection.
    """
    check_positive("group_lasso", strength)

    def axes(leaf: jax.Array) -> Any:
        return axis if leaf.ndim >= 2 else None

    def norms(leaf: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.sum(jnp.square(leaf), axis=axes(leaf), keepdims=True))

    def euclidean(leaf: jax.Array, height: Any) -> jax.Array:
        length = norms(leaf)
        return jnp.where(length > height, 1 - height / jnp.where(length > height, length, 1), 0) * leaf

    def weighted(leaf: jax.Array, d: jax.Array, height: Any) -> jax.Array:
        # z = Dx ν/(Dν + h) with ν = ‖z‖: Σ (Dx/(Dν + h))² = 1 falls in ν and has a root where ‖Dx‖ > h.
        pull = d * leaf
        alive = norms(pull) > height

        def excess(length: jax.Array) -> jax.Array:
            return jnp.sum(jnp.square(pull / (d * length + height)), axis=axes(leaf), keepdims=True) - 1

        length = falling_root(excess, jnp.zeros_like(norms(leaf)), norms(leaf))
        return jnp.where(alive, pull * length / (d * length + height), 0)

    def apply(x: PyTree, t: Any, metric: PyTree = None) -> PyTree:
        if metric is None:
            return jax.tree.map(lambda leaf: euclidean(leaf, t * strength), x)
        return jax.tree.map(lambda leaf, d: weighted(leaf, d, t * strength), x, metric)

    def value(x: PyTree) -> jax.Array:
        return strength * total(norms, x)

    def longest(u: PyTree) -> jax.Array:
        return largest_absolute(jax.tree.map(norms, u))

    def conjugate(u: PyTree) -> jax.Array:
        return jnp.where(longest(u) <= strength * (1 + slack(u)), 0.0, jnp.inf)

    return Prox("group_lasso", value, apply, conjugate, lambda u: _fit(strength, longest(u)))


def nuclear_norm(strength: float) -> Prox:
    """r(X) = λ Σ σ(X) of every matrix in the tree (other leaves are left alone): soft thresholds of singular values.

    Cost: a singular value decomposition of every matrix; sides up to 1024. There is none under a metric.

    Raises:
      ConfigError: When applied to a larger matrix or with a metric.
    """
    check_positive("nuclear_norm", strength)

    def singular(leaf: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        if min(leaf.shape) > MOST_SINGULAR:
            raise ConfigError(
                f"nuclear_norm is for matrices with a side of at most {MOST_SINGULAR}; got {leaf.shape}. Use "
                "group_lasso, which removes neurons instead of ranks."
            )
        left, sigma, right = jnp.linalg.svd(leaf, full_matrices=False)
        return left, sigma, right

    def values(leaf: jax.Array) -> jax.Array:
        return singular(leaf)[1] if leaf.ndim == 2 else jnp.zeros(1, leaf.dtype)

    def threshold(leaf: jax.Array, height: Any) -> jax.Array:
        if leaf.ndim != 2:
            return leaf
        left, sigma, right = singular(leaf)
        return (left * jnp.maximum(sigma - height, 0)) @ right

    def apply(x: PyTree, t: Any, metric: PyTree = None) -> PyTree:
        if metric is not None:
            raise ConfigError("nuclear_norm has no operator under a diagonal metric; use it with a scalar step.")
        return jax.tree.map(lambda leaf: threshold(leaf, t * strength), x)

    def matrices_only(u: PyTree) -> jax.Array:
        return everywhere(lambda leaf: leaf == 0 if leaf.ndim != 2 else jnp.array(True), u)

    def conjugate(u: PyTree) -> jax.Array:
        small = largest_absolute(jax.tree.map(values, u)) <= strength * (1 + slack(u))
        return jnp.where(small & matrices_only(u), 0.0, jnp.inf)

    def shrink(u: PyTree) -> jax.Array:
        return jnp.where(matrices_only(u), _fit(strength, largest_absolute(jax.tree.map(values, u))), 0.0)

    return Prox("nuclear_norm", lambda x: strength * total(values, x), apply, conjugate, shrink)


def nothing_to_shrink(x: PyTree) -> jax.Array:
    """1 in the tree's type: every point is feasible as it is."""
    return jnp.ones((), jax.tree.leaves(x)[0].dtype)


def check_positive(name: str, number: float) -> None:
    """Raises `ConfigError` for a strength or radius that is not a positive finite number."""
    if not (number > 0 and number < float("inf")):
        raise ConfigError(f"{name} needs a positive finite number; got {number}.")


def _map(f: Callable[[jax.Array, Any], jax.Array], x: PyTree, metric: PyTree) -> PyTree:
    return jax.tree.map(lambda a: f(a, 1), x) if metric is None else jax.tree.map(f, x, metric)


def _fit(limit: float, largest: jax.Array) -> jax.Array:
    return jnp.where(largest > limit, limit / jnp.where(largest > limit, largest, 1), 1)


def _only_at_zero(u: PyTree) -> jax.Array:
    return jnp.where(largest_absolute(u) == 0, 0.0, jnp.inf)


def _shrink_to_zero(u: PyTree) -> jax.Array:
    return jnp.where(largest_absolute(u) == 0, nothing_to_shrink(u), 0.0)


def _zero(x: PyTree) -> jax.Array:
    return jnp.zeros((), jax.tree.leaves(x)[0].dtype)
