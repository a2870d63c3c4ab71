"""Every vote with every merge it allows passes the same battery (docs/protocol.md, "What must hold", 1 to 3)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capibara.consensus import convex_shares, dropout, merging, model_stock, robust, spherical, task_vectors, voting
from capibara.consensus.aggregate import chain
from capibara.consensus.ballot import Aggregator, Merge, Rule, open_ballot
from capibara.errors import ConfigError

N, F = 8, 1


class Entry(NamedTuple):
    """A vote, whether it must see at least `least` rows, and the merge that belongs to it alone, if there is one."""

    rule: Rule
    least: int
    alone: Merge | None = None


RULES = {
    "byzantine_tolerant": Entry(voting.byzantine_tolerant(F), 3),
    "byzantine_tolerant mixed": Entry(voting.byzantine_tolerant(F, merge_rows="mixed"), 3),
    "majority": Entry(voting.majority(), 1),
    "geometric_median": Entry(robust.geometric_median(F), 3),
    "centered_clipping": Entry(robust.centered_clipping(F), 3),
    "krum": Entry(robust.krum(F), 5),
    "multi_krum": Entry(robust.multi_krum(F), 5),
    "trimmed_mean": Entry(robust.coordinates("trimmed_mean", F), 3, merging.trimmed_mean(F)),
    "median": Entry(robust.coordinates("median", F), 3, merging.median()),
    "bulyan": Entry(robust.bulyan(F), 7, robust.bulyan_merge(F)),
}
MERGES = {
    "weighted_average": merging.weighted_average(),
    "uniform": merging.uniform(),
    "trimmed_mean": merging.trimmed_mean(F),
    "median": merging.median(),
    "convex_optimization": convex_shares.convex_optimization(),
}
NAMED = [
    spherical.slerp(), spherical.karcher(), spherical.rda(), task_vectors.task_arithmetic(), task_vectors.ties(),
    task_vectors.ties_tensor(), task_vectors.breadcrumbs(), task_vectors.sce(), dropout.dare(),
    dropout.dare(norm_matched=True), dropout.dare(elect=True), dropout.della(), model_stock.model_stock(),
    model_stock.model_stock_whole(),
]  # fmt: skip
"""Behind two votes, one with a leash and one without; behind the others nothing new could happen."""

BY_LOT = ("dare", "dare_norm", "dare_ties", "della")
"""Each node has its own lots, so other names for the nodes are other lots."""

NOT_THE_ROW = ("task_arithmetic", "breadcrumbs", "ties", "ties_tensor", *BY_LOT)
"""They sum, trim or draw lots: equal rows give something else, by definition, unless a leash of length 0 holds."""

PAIRS = [
    (f"{name}+{merge.name}", name, merge.name, chain(entry.rule, merge=merge), entry.least)
    for name, entry in RULES.items()
    for merge in (
        [entry.alone]
        if entry.alone
        else [*MERGES.values(), *(NAMED if name in ("byzantine_tolerant", "majority") else [])]
    )
]


def pairs(without: Callable[[str, str], bool] = lambda vote, merge: False):
    """Parametrises a test by all pairs but those of which `without(vote, merge)` says that the claim is not theirs."""
    chosen = [pytest.param(one, least, id=i) for i, vote, merge, one, least in PAIRS if not without(vote, merge)]
    return pytest.mark.parametrize(("aggregator", "least"), chosen)


every_pair = pairs()


@pytest.fixture
def deltas() -> np.ndarray:
    random = np.random.default_rng(7)
    deltas = (1 + random.normal(size=(N, 6))).astype(np.float32)
    deltas[2] *= -30
    return deltas


def run(aggregator: Aggregator, deltas: np.ndarray, weights=None):
    stack = {"a": jnp.asarray(deltas[:, :2]), "b": jnp.asarray(deltas[:, 2:].reshape(len(deltas), 2, -1))}
    ballot = open_ballot(stack, np.ones(len(deltas)) if weights is None else weights)
    delta, verdict, _ = aggregator.apply(ballot, aggregator.init({}), jax.random.key(0))
    return np.concatenate([np.ravel(delta["a"]), np.ravel(delta["b"])]), verdict


@pairs(without=lambda vote, merge: merge in BY_LOT)
def test_permuting_the_nodes_changes_rounding_only(aggregator, least, deltas):
    order = np.random.default_rng(0).permutation(N)
    merged, verdict = run(aggregator, deltas)
    again, permuted = run(aggregator, deltas[order])
    np.testing.assert_allclose(again, merged, rtol=1e-5, atol=1e-5)
    assert permuted.backing.tolist() == verdict.backing[order].tolist()


@every_pair
def test_a_nan_row_with_weight_0_changes_not_one_bit(aggregator, least, deltas):
    weights = np.ones(N)
    weights[5] = 0
    merged, verdict = run(aggregator, deltas, weights)
    deltas[5] = np.nan
    again, other = run(aggregator, deltas, weights)
    assert again.tobytes() == merged.tobytes() and np.isfinite(merged).all()
    assert other.backing.tolist() == verdict.backing.tolist() and not verdict.backing[5]


@pairs(without=lambda vote, merge: vote == "majority" and merge in NOT_THE_ROW)
def test_all_rows_equal_is_that_row(aggregator, least, deltas):
    merged, verdict = run(aggregator, np.tile(deltas[0], (N, 1)))
    np.testing.assert_allclose(merged, deltas[0], rtol=1e-6)
    assert verdict.backing.all()


@every_pair
@pytest.mark.parametrize("scale", [1e-12, -3.0, 1e12])
def test_scaling_the_deltas_scales_the_merge(aggregator, least, deltas, scale):
    merged, _ = run(aggregator, deltas)
    scaled, _ = run(aggregator, deltas * np.float32(scale))
    np.testing.assert_allclose(scaled / np.float32(scale), merged, rtol=1e-4, atol=1e-5)


@every_pair
def test_the_bound_is_checked_with_the_rows_that_count(aggregator, least, deltas):
    weights = np.ones(N)
    weights[least:] = 0
    assert aggregator.least == least
    merged, verdict = run(aggregator, deltas, weights)
    assert np.isfinite(merged).all() and verdict.backing.sum() <= least
    if least > 1:
        weights[0] = 0
        with pytest.raises(ConfigError, match=rf"needs (at least {least}|more than {least - 1}) rows"):
            run(aggregator, deltas, weights)


@every_pair
def test_a_linear_merge_is_told_by_its_coefficients(aggregator, least, deltas):
    merged, verdict = run(aggregator, deltas)
    if verdict.coefficients is None:
        assert verdict.coefficient_start is None
        return
    np.testing.assert_allclose(verdict.coefficients @ deltas.astype(np.float64), merged, rtol=1e-5, atol=1e-5)
    assert verdict.coefficient_start == pytest.approx(max(0, 1 - verdict.coefficients.sum()), abs=1e-9)


@every_pair
def test_the_second_call_with_the_same_shapes_compiles_nothing(aggregator, least, deltas, compilations):
    run(aggregator, deltas)
    compilations.clear()
    run(aggregator, deltas[::-1].copy())
    assert compilations == []


def test_the_default_vote_compiles_once_for_any_number_of_rows_that_count(deltas, compilations):
    aggregator = chain(voting.byzantine_tolerant(F), merge=merging.weighted_average())
    for count in (N, N - 1, N - 2):
        compilations.clear()
        run(aggregator, deltas, (np.arange(N) < count).astype(float))
    assert compilations == []


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """What JAX compiled since the list was last cleared, by its own log."""
    found: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "Finished XLA compilation" in record.getMessage():
                found.append(record.getMessage())

    listener, logger = Listener(), logging.getLogger("jax")
    logger.addHandler(listener)
    with jax.log_compiles():
        yield found
    logger.removeHandler(listener)
