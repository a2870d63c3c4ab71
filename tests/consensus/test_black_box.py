"""Line searches for a metric without gradients."""

from __future__ import annotations

import numpy as np
import pytest

from capibara.consensus.black_box import search


def test_a_smooth_metric_is_brought_near_its_minimum():
    target = np.array([0.2, 0.5, 0.0, 0.3])
    found = search(lambda w: float((w - target) @ (w - target)), np.full(4, 0.25), max_evaluations=400, line=12)
    np.testing.assert_allclose(found.weights, target, atol=0.02)


@pytest.mark.parametrize("budget", [1, 2, 7, 50])
def test_it_never_ends_worse_than_it_began_nor_asks_more_than_it_may(budget):
    asked = []

    def steps(w: np.ndarray) -> float:  # an accuracy: plateaus, no slope, a hole in the middle
        asked.append(w)
        return np.nan if 0.4 < w[1] < 0.45 else float(np.floor(10 * abs(w[0] - 0.62)) / 10)

    start = np.full(3, 1 / 3)
    first = float(np.floor(10 * abs(1 / 3 - 0.62)) / 10)
    found = search(steps, start, max_evaluations=budget)
    assert found.evaluations == len(asked) <= budget
    assert found.value <= first and found.value == steps(found.weights)
    assert all(w.min() >= 0 and abs(w.sum() - 1) < 1e-12 for w in asked)


def test_a_corner_of_nan_is_left():
    found = search(lambda w: np.nan if w[0] == 1 else float(w[0]), np.array([1.0, 0.0]), max_evaluations=40)
    assert found.value < 0.1
