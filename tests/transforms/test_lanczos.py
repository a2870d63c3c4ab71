"""Ends of a spectrum by Lanczos: estimates from inside, bounds from outside that fail no more often than they say."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capibara.errors import ConfigError
from capibara.transforms.lanczos import extreme_eigenvalues, relative_error


def diagonal(values: np.ndarray):
    """The operator diag(values) on a tree of two leaves."""
    cut = len(values) // 3
    parts = {"a": jnp.asarray(values[:cut]), "b": jnp.asarray(values[cut:])}
    return (lambda v: jax.tree.map(lambda d, x: d * x, parts, v)), parts


@pytest.mark.parametrize("seed", range(4))
def test_estimates_lie_inside_and_bounds_outside(seed):
    random = np.random.default_rng(seed)
    values = random.normal(size=300).astype(np.float32)
    product, template = diagonal(values)
    found = extreme_eigenvalues(product, template, jax.random.key(seed), num_products=60, failure=1e-6)
    spread = float(values.max() - values.min())
    assert found.lower_bound <= values.min() <= found.lowest + 1e-5 * spread
    assert found.highest - 1e-5 * spread <= values.max() <= found.upper_bound
    assert found.lowest == pytest.approx(values.min(), abs=0.02 * spread)


def test_as_many_products_as_dimensions_are_exact():
    with jax.enable_x64(True):
        random = np.random.default_rng(0)
        a = random.normal(size=(12, 12))
        a = a + a.T
        found = extreme_eigenvalues(lambda v: a @ v, jnp.zeros(12), jax.random.key(0), num_products=40)
        expected = np.linalg.eigvalsh(a)
        assert [float(x) for x in found] == pytest.approx([expected[0], expected[-1]] * 2, abs=1e-9)


def test_few_distinct_eigenvalues_end_the_iteration_without_harm():
    """Krylov's space is exhausted after two products; rounding must not be taken for a third eigenvalue."""
    product, template = diagonal(np.repeat(np.float32([-2.0, 5.0]), [40, 60]))
    found = extreme_eigenvalues(product, template, jax.random.key(1), num_products=30)
    assert [float(found.lowest), float(found.highest)] == pytest.approx([-2, 5], abs=1e-4)


def test_the_bound_fails_no_more_often_than_it_says():
    """Evenly spread eigenvalues, whose ends nine products miss: 1,000 draws, δ = 0.2, at most 200 failures."""
    values = np.linspace(-0.6, 1, 200, dtype=np.float32)
    product, template = diagonal(values)

    @jax.jit
    @jax.vmap
    def bounds(key):
        found = extreme_eigenvalues(product, template, key, num_products=9, failure=0.2)
        return found.lower_bound, found.upper_bound, found.lowest

    low, high, lowest = bounds(jax.random.split(jax.random.key(0), 1000))
    assert np.all(np.isfinite(low)) and np.mean((low > values.min()) | (high < values.max())) <= 0.2
    assert np.mean(lowest > values.min() + 1e-2) > 0.9  # the estimate alone flatters


def test_too_few_products_for_the_failure_asked_for_give_no_bound():
    product, template = diagonal(np.linspace(-1, 1, 500, dtype=np.float32))
    found = extreme_eigenvalues(product, template, jax.random.key(0), num_products=5, failure=1e-6)
    assert np.isneginf(found.lower_bound) and np.isposinf(found.upper_bound)
    assert relative_error(500, 5, 5e-7) > 0.5


@pytest.mark.parametrize("options", [{"num_products": 1}, {"failure": 0.0}, {"failure": 1.0}])
def test_unusable_options_are_refused(options):
    with pytest.raises(ConfigError, match="num_products ≥ 2 and failure in"):
        extreme_eigenvalues(lambda v: v, jnp.zeros(4), jax.random.key(0), **options)
