"""Min/max networks against sorting."""

from __future__ import annotations

import numpy as np
import pytest

from capibara.consensus import networks
from capibara.errors import ConfigError


def rows(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(-4, 5, size=(count, 3, 50)).astype(np.float32)


@pytest.mark.parametrize("count", range(1, 33))
def test_the_comparators_sort_every_number_of_rows(count):
    """A network that sorts every 0-1 sequence sorts everything (Knuth, 5.3.4): all to 12 rows, 4,096 random above."""
    random = np.random.default_rng(count)
    bits = (
        (np.arange(2**count)[:, None] >> np.arange(count)) & 1
        if count <= 12
        else (random.random((4096, count)) < random.random((4096, 1))).astype(int)
    )
    expected = np.sort(bits, axis=1)
    for i, j in networks.comparators(count):
        bits[:, i], bits[:, j] = bits[:, [i, j]].min(axis=1), bits[:, [i, j]].max(axis=1)
    assert (bits == expected).all()


@pytest.mark.parametrize(("count", "trim"), [(1, 0), (3, 1), (8, 2), (9, 4)])
def test_trimmed_mean_is_that_of_sorted_values(count, trim):
    x = rows(count)
    expected = np.sort(x, axis=0)[trim : count - trim].mean(axis=0)
    np.testing.assert_allclose(networks.trimmed_mean(x, trim), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_median_is_numpys(count):
    np.testing.assert_allclose(networks.median(rows(count)), np.median(rows(count), axis=0), rtol=1e-6)


@pytest.mark.parametrize(("count", "near"), [(5, 1), (7, 3), (8, 4)])
def test_mean_around_the_median_takes_the_nearest_values(count, near):
    x = np.random.default_rng(0).normal(size=(count, 200)).astype(np.float32)
    middle = np.median(x, axis=0)
    order = np.argsort(np.abs(x - middle), axis=0, kind="stable")[:near]
    expected = np.take_along_axis(x, order, axis=0).mean(axis=0)
    np.testing.assert_allclose(networks.mean_around_median(x, near), expected, rtol=1e-4, atol=1e-5)


def test_more_than_32_rows_are_refused_with_a_rule_that_would_do():
    with pytest.raises(ConfigError, match="at most 32 rows; got 33. Vote by 'byzantine_tolerant'"):
        networks.median(np.zeros((33, 2), np.float32))
