"""The default vote against an independent oracle, and what docs/protocol.md promises of it, over adversarial rows."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import vote
from rows import SIZES, Case, as_row, as_stack, cases

from capibara.consensus import merging, voting
from capibara.consensus.aggregate import chain
from capibara.consensus.ballot import Merge, open_ballot
from capibara.errors import ConfigError
from capibara.training import vocabulary

EVERY_SIZE = tuple((n, f) for n in range(4, 18) for f in range(1, (n - 1) // 3 + 1))
MERGES = {
    "mean": lambda f: merging.weighted_average(),
    "uniform": lambda f: merging.uniform(),
    "trimmed_mean": merging.trimmed_mean,
    "median": lambda f: merging.median(),
}
NAMED = tuple(name for name in vocabulary.MERGES if name not in (*MERGES, "weighted_average", "bulyan"))
fast = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
thorough = settings(fast, max_examples=4000)


def run(deltas, f, *, weights=None, merge="mean", **options):
    ballot = open_ballot(as_stack(deltas), np.ones(len(deltas)) if weights is None else weights)
    aggregator = chain(voting.byzantine_tolerant(f, **options), merge=(MERGES | vocabulary.MERGES)[merge](f))
    delta, verdict, _ = aggregator.apply(ballot, aggregator.init({}), jax.random.key(0))
    return as_row(delta), verdict


def by_value(deltas: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The coefficients, summed over rows that are copies of each other: between those they may move."""
    _, group = np.unique(deltas, axis=0, return_inverse=True)
    return np.bincount(group.ravel(), weights=v)


def length(x: np.ndarray) -> float:
    biggest = np.abs(x).max(initial=0.0)
    return float(biggest * np.linalg.norm(x / biggest)) if biggest > 0 else 0.0


def honest_length(case: Case) -> float:
    """The size of what is being voted on; float32 rounding of a merge is a share of it."""
    return max(length(case.deltas[i].astype(np.float64)) for i in range(case.n) if i not in case.liars)


def check_oracle(case: Case, merge_rows: str) -> None:
    merged, verdict = run(case.deltas, case.f, merge_rows=merge_rows)
    expected = vote(case.deltas, case.f, merge_rows=merge_rows)
    scale = max(honest_length(case), length(expected.merged))
    assert verdict.backing.tolist() == expected.backing.tolist()
    np.testing.assert_allclose(
        by_value(case.deltas, verdict.coefficients), by_value(case.deltas, expected.coefficients), atol=1e-5
    )
    assert length(merged - expected.merged) <= 1e-5 * scale
    assert verdict.tau == pytest.approx(expected.tau, rel=1e-5, abs=1e-6 * scale)
    np.testing.assert_allclose(verdict.distance, expected.distance, rtol=1e-5, atol=1e-6 * scale)


def check_bound(case: Case, merge_rows: str, merge: str) -> None:
    merged, verdict = run(case.deltas, case.f, merge_rows=merge_rows, merge=merge)
    mixed = merge == "mean" and merge_rows == "mixed"
    expected = vote(case.deltas, case.f, merge_rows="mixed" if mixed else "own", merge="mean")
    centre = verdict.centre @ case.deltas.astype(np.float64)
    honest = [i for i in expected.before_clipping if i not in case.liars]
    reach = max(length(expected.before_clipping[i] - expected.centre) for i in honest)
    assert length(merged - centre) <= reach * (1 + 1e-5) + 1e-6 * honest_length(case)


@fast
@given(cases(), st.sampled_from(("mixed", "own")))
def test_the_vote_is_the_oracle_to_1e_5(case, merge_rows):
    check_oracle(case, merge_rows)


@pytest.mark.slow
@pytest.mark.parametrize("merge_rows", ["mixed", "own"])
@thorough
@given(case=cases(sizes=EVERY_SIZE))
def test_the_vote_is_the_oracle_for_every_number_of_nodes(merge_rows, case):
    check_oracle(case, merge_rows)


@fast
@given(cases(), st.sampled_from(("mixed", "own")), st.sampled_from(tuple(MERGES)))
def test_no_merge_strays_from_the_centre_further_than_an_honest_row(case, merge_rows, merge):
    """Guarantee of docs/protocol.md: at least m−f rows are honest, so τ ≤ R, and the leash holds the merge within τ."""
    check_bound(case, merge_rows, merge)


@pytest.mark.slow
@thorough
@given(cases(sizes=EVERY_SIZE), st.sampled_from(("mixed", "own")), st.sampled_from(tuple(MERGES)))
def test_no_merge_strays_for_any_number_of_nodes(case, merge_rows, merge):
    check_bound(case, merge_rows, merge)


@fast
@given(cases(sizes=SIZES[:1]), st.sampled_from(NAMED))
def test_no_named_merge_strays_from_the_centre_either(case, merge):
    check_bound(case, "mixed", merge)


@pytest.mark.slow
@pytest.mark.parametrize("merge", NAMED)
@settings(thorough, max_examples=400)
@given(case=cases())
def test_no_named_merge_strays_over_many_rows(merge, case):
    check_bound(case, "mixed", merge)


@fast
@given(cases(sizes=SIZES[:2]), st.sampled_from(("trimmed_mean", "median")))
def test_merges_by_coordinate_are_the_oracle_too(case, merge):
    merged, verdict = run(case.deltas, case.f, merge=merge)
    expected = vote(case.deltas, case.f, merge=merge)
    scale = max(honest_length(case), length(expected.merged))
    assert length(merged - expected.merged) <= 1e-5 * scale
    assert verdict.leash <= 1.0 and verdict.coefficients is None and verdict.coefficient_start is None


@fast
@given(cases(), st.lists(st.sampled_from((1, 2, 3, 50)), min_size=17, max_size=17))
def test_sample_counts_are_the_oracle_too(case, counts):
    weights = np.array(counts[: case.n], float)
    merged, verdict = run(case.deltas, case.f, weights=weights)
    expected = vote(case.deltas, case.f, weights=weights)
    scale = max(honest_length(case), length(expected.merged))
    assert length(merged - expected.merged) <= 1e-5 * scale
    if len(np.unique(case.deltas, axis=0)) == case.n:
        np.testing.assert_allclose(verdict.coefficients, expected.coefficients, atol=1e-5)


@fast
@given(cases(), st.sampled_from(("mixed", "own")))
def test_the_record_is_convex_and_reproduces_the_merge(case, merge_rows):
    merged, verdict = run(case.deltas, case.f, merge_rows=merge_rows)
    v = verdict.coefficients
    assert (v >= -1e-12).all() and v.sum() <= 1 + 1e-12
    assert verdict.coefficient_start == pytest.approx(1 - v.sum(), abs=1e-12)
    again = v @ case.deltas.astype(np.float64)
    assert length(merged - again) <= 1e-6 * max(honest_length(case), length(again))


@fast
@given(cases(), st.integers(0, 2**32 - 1))
def test_the_order_of_the_nodes_changes_the_merge_by_rounding_only(case, seed):
    order = np.random.default_rng(seed).permutation(case.n)
    merged, verdict = run(case.deltas, case.f)
    again, permuted = run(case.deltas[order], case.f)
    assert length(merged - again) <= 1e-5 * max(honest_length(case), length(merged))
    assert permuted.backing.tolist() == verdict.backing[order].tolist()


@fast
@given(cases(), st.sampled_from((0.0, np.nan, 1e30, -np.inf)), st.sampled_from(tuple(MERGES)))
def test_a_row_that_does_not_count_changes_not_one_bit(case, rubbish, merge):
    if case.n - 1 <= 2 * case.f:
        return
    weights = np.ones(case.n)
    weights[1] = 0.0
    plain, changed = case.deltas.copy(), case.deltas.copy()
    changed[1] = rubbish
    (first, verdict), (second, again) = (run(d, case.f, weights=weights, merge=merge) for d in (plain, changed))
    assert first.tobytes() == second.tobytes()
    assert not again.backing[1]
    for one, other in zip(verdict, again, strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@fast
@given(cases(sizes=((7, 2),)), st.sampled_from((-40, -3, 5, 40)))
def test_scaling_all_rows_scales_the_merge(case, power):
    merged, verdict = run(case.deltas, case.f)
    with np.errstate(over="ignore", under="ignore"):
        scaled = case.deltas * np.float32(2.0**power)
    if not np.isfinite(scaled).all() or (np.abs(scaled[scaled != 0]) < 1e-35).any():
        return
    again, larger = run(scaled, case.f)
    np.testing.assert_allclose(larger.coefficients, verdict.coefficients, atol=1e-9)
    assert length(again - merged * 2.0**power) <= 1e-6 * 2.0**power * max(honest_length(case), length(merged))


@pytest.mark.parametrize(("n", "f"), [(4, 1), (7, 2), (10, 3)])
@pytest.mark.parametrize("dimension", [1, 5, 1001])
@pytest.mark.parametrize("value", [0.0, 1.0, 1e-20, 1e20])
def test_all_rows_equal_is_that_row_and_nobody_is_outvoted(n, f, dimension, value):
    """Copies must count as copies: rounding of the Gram matrix once outvoted one node of seven identical ones."""
    row = (value * np.random.default_rng(n).normal(size=dimension)).astype(np.float32)
    merged, verdict = run(np.tile(row, (n, 1)), f)
    assert verdict.backing.all()
    assert verdict.tau <= 1e-12 * length(row.astype(np.float64))
    np.testing.assert_allclose(merged, row, rtol=1e-6)


def test_gross_liars_are_outvoted_and_leave_nothing_in_the_centre():
    random = np.random.default_rng(0)
    deltas = (1 + 0.1 * random.normal(size=(7, 5))).astype(np.float32)
    honest = deltas[:5].mean(axis=0)
    deltas[5:] = (1e20 * random.normal(size=(2, 5))).astype(np.float32)
    merged, verdict = run(deltas, 2)
    assert verdict.backing.tolist() == [True] * 5 + [False] * 2
    assert np.abs(verdict.coefficients[5:]).max() == 0 and np.abs(verdict.centre[5:]).max() == 0
    assert np.isnan(verdict.clipped[5:]).all()
    np.testing.assert_allclose(merged, honest, rtol=0.1)


def test_a_gated_liar_costs_no_honest_node_its_vote():
    """Of three rows left two are always close to each other; with f spent on the fourth the third is not outvoted."""
    deltas = np.float32([[1, 0], [1.01, 0], [2, 1], [-50, 3]])
    weights = np.float64([1, 1, 1, 0])
    _, verdict = run(deltas, 1, weights=weights)
    assert verdict.backing.tolist() == [True, True, True, False]
    assert verdict.distance[2] > 3 * np.sort(verdict.distance[:3])[1]  # κ alone would have named it
    assert verdict.clipped[2] < 1  # it is clipped all the same


@pytest.mark.parametrize("seed", range(8))
def test_no_more_than_f_are_kept_out_in_all_unless_they_were_before(seed):
    random = np.random.default_rng(seed)
    deltas = (random.normal(size=(10, 4)) * 10.0 ** random.integers(-1, 3, size=(10, 1))).astype(np.float32)
    for absent in range(4):
        weights = np.where(np.arange(10) < absent, 0.0, 1.0)
        _, verdict = run(deltas, 3, weights=weights)
        assert (~verdict.backing).sum() <= 3
        np.testing.assert_array_equal(verdict.backing, vote(deltas, 3, weights=weights).backing)


def test_without_tolerated_faults_the_plain_mean_is_merged():
    deltas = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    merged, verdict = run(deltas, 0)
    np.testing.assert_allclose(merged, deltas.mean(axis=0), rtol=1e-5)
    assert verdict.centre is None and verdict.leash is None and verdict.backing.all()


def test_a_vote_of_no_more_than_2f_rows_is_refused():
    with pytest.raises(ConfigError, match="f = 2 needs more than 4 rows that count; got 4"):
        run(np.ones((7, 5), np.float32), 2, weights=np.array([1, 1, 1, 1, 0, 0, 0]))


def test_other_merges_see_the_nodes_own_rows_not_the_mixed_ones():
    """Mixing averages away what a merge by coordinate wants to tell apart (docs/protocol.md, step 7)."""
    deltas = np.random.default_rng(3).normal(size=(7, 6)).astype(np.float32)
    merged, verdict = run(deltas, 1, merge="median")
    expected = vote(deltas, 1, merge="median")
    np.testing.assert_allclose(merged, expected.merged, rtol=1e-4, atol=1e-6)
    assert verdict.tau == pytest.approx(expected.tau, rel=1e-9)


def test_a_merge_that_strays_is_drawn_back_to_within_tau_of_the_centre():
    deltas = np.random.default_rng(0).normal(size=(7, 6)).astype(np.float32)
    aggregator = chain(voting.byzantine_tolerant(2), merge=Merge("far", leaf=lambda rows: 100 * rows[0]))
    delta, verdict, _ = aggregator.apply(open_ballot(as_stack(deltas), np.ones(7)), aggregator.init({}), None)
    centre = verdict.centre @ deltas
    assert verdict.leash < 0.1
    assert length(as_row(delta) - centre) == pytest.approx(verdict.tau, rel=1e-5)


@pytest.mark.parametrize("merge", ["task_arithmetic", "breadcrumbs"])
def test_a_sum_of_rows_is_drawn_back_by_its_coefficients_or_leaf_by_leaf(merge):
    """0.4 · 7 rows of length about 1 end far outside; the leash of a linear merge is arithmetic on n numbers."""
    deltas = (1 + 0.1 * np.random.default_rng(0).normal(size=(7, 6))).astype(np.float32)
    merged, verdict = run(deltas, 2, merge=merge)
    assert verdict.leash < 0.5
    assert length(merged - verdict.centre @ deltas) == pytest.approx(verdict.tau, rel=1e-4)
    if merge == "task_arithmetic":
        np.testing.assert_allclose(verdict.coefficients @ deltas.astype(np.float64), merged, rtol=1e-5)
