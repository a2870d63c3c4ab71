"""Weights of merges."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capibara.consensus.merging import capped, trimmed_mean, uniform


@given(st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 1e6)), min_size=1, max_size=12).filter(any))
def test_no_row_owns_more_than_2_of_m(weights):
    """A node that claims many samples must not own the merge; docs/protocol.md, step 7."""
    weights = np.array(weights)
    share, m = capped(weights), (weights > 0).sum()
    assert share.sum() == pytest.approx(1.0)
    assert (share <= 2 / m * (1 + 1e-9)).all() and (share >= 0).all()
    assert ((share > 0) == (weights > 0)).all()
    larger = np.argsort(weights, kind="stable")
    assert (np.diff(share[larger]) >= -1e-12).all()


def test_weights_within_the_cap_are_only_normalised():
    np.testing.assert_allclose(capped(np.array([1.0, 2.0, 0.0, 3.0])), np.array([1, 2, 0, 3]) / 6)


def test_what_is_cut_off_goes_to_the_others_in_proportion():
    np.testing.assert_allclose(capped(np.array([100.0, 1.0, 3.0, 0.0, 0.0])), [2 / 3, 1 / 12, 1 / 4, 0, 0])


def test_uniform_ignores_how_large_a_weight_is():
    np.testing.assert_allclose(uniform().weights(np.array([5.0, 0.0, 1.0])), [0.5, 0, 0.5])


def test_trimmed_mean_of_too_few_rows_leaves_one():
    """After outvoting fewer than 2f+1 rows may be left; the quorum decides then, the merge must not fall over."""
    rows = np.array([[1.0], [5.0], [6.0]], np.float32)
    assert trimmed_mean(3).leaf(rows) == pytest.approx(5.0)
