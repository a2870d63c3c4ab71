"""The least and the largest eigenvalue of a symmetric operator, with a bound that fails with a stated probability.

    k products A·q  →  tridiagonal T_k  →  Ritz values θ₁ … θ_k inside [λ_min, λ_max]

Ritz values lie inside the spectrum, so θ₁ alone always flatters λ_min. From a start drawn uniformly on the sphere,
Pr[θ₁ − λ_min > ε (λ_max − λ_min)] ≤ 1.648 √n exp(−√ε (2k − 1)): Kuczyński & Woźniakowski 1992, Theorem 4.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from capibara.errors import ConfigError
from capibara.types import PyTree


class Spectrum(NamedTuple):
    """What k products tell of a spectrum.

    Attributes:
      lowest: θ₁ ≥ λ_min, the estimate.
      highest: θ_k ≤ λ_max, the estimate.
      lower_bound: ≤ λ_min with probability ≥ 1 − δ; −inf where k is too small for δ.
      upper_bound: ≥ λ_max with probability ≥ 1 − δ; inf where k is too small.
    """

    lowest: jax.Array
    highest: jax.Array
    lower_bound: jax.Array
    upper_bound: jax.Array


def extreme_eigenvalues(
    product: Callable[[PyTree], PyTree], template: PyTree, key: Any, *, num_products: int = 40, failure: float = 1e-6
) -> Spectrum:
    """The ends of the spectrum of a symmetric operator, by Lanczos with full reorthogonalisation.

    Args:
      product: `v -> A v` on trees like `template`.
      template: A tree of the right shapes; its values are not used.
      key: A typed PRNG key; the start is drawn with it, and δ is over this draw.
      num_products: k ≥ 2; never more than the numbers in the tree.
      failure: δ in (0, 1), the probability that either bound is wrong.

    Returns:
      The spectrum's ends. Cost: k products, k + 1 vectors of memory. The bound holds for exact arithmetic; in float32
      it is good to about 1e-6 of the spread.
    """
    if num_products < 2 or not 0 < failure < 1:
        raise ConfigError(
            f"extreme_eigenvalues needs num_products ≥ 2 and failure in (0, 1); got {num_products} and {failure}."
        )
    flat, unravel = ravel_pytree(template)
    n = flat.shape[0]
    k = min(num_products, n)
    first = jax.random.normal(key, (n,), flat.dtype)
    basis = jnp.zeros((k, n), flat.dtype).at[0].set(first / jnp.linalg.norm(first))

    def multiply(q: jax.Array) -> jax.Array:
        return ravel_pytree(product(unravel(q)))[0]

    def extend(i: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        basis, diagonal, beside = carry
        q = basis[i]
        r = multiply(q)
        alpha = r @ q
        for _ in range(2):  # twice is enough (Parlett 1998, §6.9); rows not yet filled are zero
            r = r - basis.T @ (basis @ r)
        beta = jnp.linalg.norm(r)
        # An invariant subspace: what is left of r is rounding, and the rest of T stays zero beside it.
        alive = beta > 1e-6 * (jnp.abs(alpha) + jnp.where(i > 0, beside[i - 1], 0))
        row = jnp.where(alive, r / jnp.where(alive, beta, 1), 0)
        basis = basis.at[i + 1].set(row, mode="drop")
        return basis, diagonal.at[i].set(alpha), beside.at[i].set(jnp.where(alive, beta, 0))

    zeros = jnp.zeros(k, flat.dtype)
    basis, diagonal, beside = jax.lax.fori_loop(0, k, extend, (basis, zeros, zeros))
    filled = jnp.cumprod(jnp.concatenate([jnp.ones(1, bool), beside[:-1] > 0]).astype(jnp.int32)).astype(bool)
    diagonal = jnp.where(filled, diagonal, diagonal[0])  # a start's Rayleigh quotient lies inside the spectrum
    tridiagonal = jnp.diag(diagonal) + jnp.diag(beside[:-1], 1) + jnp.diag(beside[:-1], -1)
    ritz = jnp.linalg.eigvalsh(tridiagonal)
    lowest, highest = ritz[0], ritz[-1]
    epsilon = relative_error(n, k, failure / 2)
    if k == n:
        return Spectrum(lowest, highest, lowest, highest)
    if epsilon >= 0.5:
        return Spectrum(lowest, highest, jnp.full_like(lowest, -jnp.inf), jnp.full_like(highest, jnp.inf))
    slack = epsilon * (highest - lowest) / (1 - 2 * epsilon)  # the spread is at most (θ_k − θ₁)/(1 − 2ε)
    return Spectrum(lowest, highest, lowest - slack, highest + slack)


def relative_error(n: int, num_products: int, failure: float) -> float:
    """ε of the bound: the error at one end, in units of the spread, with probability of failure δ."""
    return (math.log(1.648 * math.sqrt(n) / failure) / (2 * num_products - 1)) ** 2
