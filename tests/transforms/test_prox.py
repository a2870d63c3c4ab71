"""Proximal operators: each is the minimiser it claims to be, Euclidean and under a metric, beside its conjugate."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capibara.errors import ConfigError
from capibara.transforms import projections, prox

OPERATORS = {
    "zero": prox.zero(),
    "l1": prox.l1(0.7),
    "ridge": prox.ridge(0.4),
    "elastic_net": prox.elastic_net(0.5, 0.3),
    "group_lasso": prox.group_lasso(0.9),
    "group_lasso of rows": prox.group_lasso(0.9, axis=1),
    "nuclear_norm": prox.nuclear_norm(0.8),
    "box": projections.box(-0.5, 1.25),
    "non_negative": projections.non_negative(),
    "l2_ball": projections.l2_ball(1.5),
    "l1_ball": projections.l1_ball(2.0),
    "simplex": projections.simplex(1.5),
}
NO_METRIC = {"nuclear_norm"}
SEEDS = range(5)


@pytest.fixture(autouse=True)
def float64():
    """Inclusions are checked to 1e-9."""
    with jax.enable_x64(True):
        yield


@functools.cache
def compiled(name: str, what: str):
    """One program an operator, for all points and steps."""
    return jax.jit(getattr(OPERATORS[name], what))


def apply(name: str, x, t: float, d=None):
    return compiled(name, "apply")(x, t) if d is None else compiled(name, "apply")(x, t, d)


def value(name: str, x) -> float:
    return float(compiled(name, "value")(x))


def point(seed: int, scale: float = 1.0) -> dict[str, jax.Array]:
    random = np.random.default_rng(seed)
    return {"w": jnp.asarray(scale * random.normal(size=(4, 3))), "b": jnp.asarray(scale * random.normal(size=3))}


def metric(seed: int) -> dict[str, jax.Array]:
    return {name: jnp.asarray(np.exp(leaf)) for name, leaf in point(seed + 100).items()}


def inner(a, b) -> float:
    return sum(float(np.vdot(a[name], b[name])) for name in a)


def minus(a, b):
    return {name: np.asarray(a[name]) - np.asarray(b[name]) for name in a}


def others(name: str, p, seed: int):
    """Points of the domain, far and near; those outside are brought in by the operator."""
    for k in range(8):
        far = point(1000 * seed + k, 10.0 ** (k % 4 - 2))
        for z in (far, {leaf: np.asarray(p[leaf]) + 1e-3 * np.asarray(far[leaf]) for leaf in far}):
            yield z if np.isfinite(value(name, z)) else apply(name, z, 1e-9)


@pytest.mark.parametrize("scaled", [False, True], ids=["euclidean", "metric"])
@pytest.mark.parametrize("name", OPERATORS)
def test_the_residual_is_a_subgradient(name, scaled):
    """p minimises r(z) + Σ D (z − x)²/2t exactly when u = D(x − p)/t is a subgradient: r(z) ≥ r(p) + ⟨u, z − p⟩."""
    if scaled and name in NO_METRIC:
        pytest.skip("has no operator under a metric")
    for seed in SEEDS:
        x, t = point(seed, 1.5), 0.6
        d = metric(seed) if scaled else None
        p = apply(name, x, t, d)
        u = {leaf: np.asarray(1 if d is None else d[leaf]) * minus(x, p)[leaf] / t for leaf in x}
        at_p = value(name, p)
        assert np.isfinite(at_p)
        for z in others(name, p, seed):
            at_z = value(name, z)
            assert at_z >= at_p + inner(u, minus(z, p)) - 1e-9 * (1 + abs(at_z))


@pytest.mark.parametrize("name", [name for name in OPERATORS if name not in NO_METRIC])
def test_a_metric_of_ones_is_the_euclidean_operator(name):
    x = point(3, 2.0)
    with_ones, euclidean = apply(name, x, 0.6, jax.tree.map(jnp.ones_like, x)), apply(name, x, 0.6)
    for leaf in x:
        np.testing.assert_allclose(with_ones[leaf], euclidean[leaf], atol=1e-9)


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_firmly_nonexpansive(name):
    for seed in SEEDS:
        x, y = point(seed, 2.0), point(seed + 50, 2.0)
        gap = minus(apply(name, x, 0.6), apply(name, y, 0.6))
        assert inner(gap, gap) <= inner(gap, minus(x, y)) + 1e-12


@pytest.mark.parametrize("name", OPERATORS)
def test_value_and_conjugate_meet_at_the_residual(name):
    """Fenchel–Young with equality, r(p) + r*(u) = ⟨u, p⟩ for u = (x − p)/t: Moreau's identity without a second prox."""
    for seed in SEEDS:
        x, t = point(seed, 1.5), 0.6
        p = apply(name, x, t)
        u = {leaf: gap / t for leaf, gap in minus(x, p).items()}
        both = value(name, p) + float(compiled(name, "conjugate")(u))
        assert both == pytest.approx(inner(u, p), abs=1e-9)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_shrunk_dual_point_is_feasible_and_no_smaller_than_need_be(name):
    u = {leaf: np.abs(values) for leaf, values in point(7, 5.0).items()}
    s = float(compiled(name, "shrink")(u))
    assert 0 <= s <= 1
    conjugate = compiled(name, "conjugate")
    assert np.isfinite(float(conjugate({leaf: s * values for leaf, values in u.items()})))
    if 0 < s < 1:
        assert np.isinf(float(conjugate({leaf: 1.001 * s * values for leaf, values in u.items()})))


def test_soft_threshold_ridge_and_group_in_numbers():
    x = {"w": jnp.array([[3.0, 0.3], [4.0, 0.4]])}
    assert prox.l1(1.0).apply(x, 0.5)["w"].tolist() == [[2.5, 0.0], [3.5, 0.0]]
    assert prox.ridge(1.0).apply(x, 1.0)["w"].tolist() == [[1.5, 0.15], [2.0, 0.2]]
    # Columns of length 5 and 0.5, height 1: factors 0.8 and 0.
    np.testing.assert_allclose(prox.group_lasso(1.0).apply(x, 1.0)["w"], [[2.4, 0.0], [3.2, 0.0]], rtol=1e-12)


def test_operators_keep_float32():
    x = {leaf: values.astype(jnp.float32) for leaf, values in point(1).items()}
    d = {leaf: values.astype(jnp.float32) for leaf, values in metric(1).items()}
    for name, operator in OPERATORS.items():
        found = jax.eval_shape(operator.apply, x, jnp.float32(0.5), *(() if name in NO_METRIC else (d,)))
        assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}, name


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: prox.l1(0.0), "l1 needs a positive finite number; got 0.0."),
        (lambda: projections.l2_ball(float("inf")), "l2_ball needs a positive finite number; got inf."),
        (lambda: projections.box(1.0, 0.0), "box needs low ≤ high; got 1.0 and 0.0."),
        (lambda: prox.elastic_net(-1.0, 1.0), "elastic_net needs l1_strength of 0 or more; got -1.0."),
        (lambda: prox.nuclear_norm(1.0).apply({"w": jnp.zeros((2000, 2000))}, 1.0), "side of at most 1024"),
        (lambda: prox.nuclear_norm(1.0).apply(point(0), 1.0, metric(0)), "no operator under a diagonal metric"),
    ],
)
def test_what_cannot_be_meant_is_refused(make, expected):
    with pytest.raises(ConfigError, match=expected):
        make()
