"""Learning-rate schedules against their closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from capibara.errors import ConfigError
from capibara.strategies.schedules import SCHEDULES, schedule

PEAK, TOTAL, WARMUP, LEAST = 2e-3, 100, 10, 0.1
CLOSE = 1e-6 * PEAK
"""optax computes in float32: relative error 1e-7 a step of the formula."""


def by_hand(name: str, step: int, *, warmup: int = WARMUP, decay: int = 20) -> float:
    if step < warmup:
        return PEAK * step / warmup
    if name == "cosine":
        done = min((step - warmup) / (TOTAL - warmup), 1.0)
        return PEAK * (LEAST + (1 - LEAST) * 0.5 * (1 + math.cos(math.pi * done)))
    if name == "wsd":
        done = min(max(step - (TOTAL - decay), 0) / decay, 1.0)
        return PEAK * (1 - (1 - LEAST) * done)
    return PEAK


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_step_is_the_closed_form(name: str):
    rate = schedule(name, PEAK, TOTAL, warmup_steps=WARMUP, min_ratio=LEAST, decay_fraction=0.2)
    got = [float(rate(step)) for step in range(TOTAL + 20)]
    np.testing.assert_allclose(got, [by_hand(name, step) for step in range(TOTAL + 20)], rtol=0, atol=CLOSE)


@pytest.mark.parametrize("name", ["cosine", "wsd"])
@pytest.mark.parametrize("warmup", [0, 1, 30])
@pytest.mark.parametrize("fraction", [0.01, 0.5, 1.0])
def test_the_last_step_has_the_least_rate(name: str, warmup: int, fraction: float):
    """Also where the warm-up and the decay together are longer than the training."""
    rate = schedule(name, PEAK, TOTAL, warmup_steps=warmup, min_ratio=LEAST, decay_fraction=fraction)
    assert float(rate(TOTAL)) == pytest.approx(LEAST * PEAK, rel=1e-5)
    assert max(float(rate(step)) for step in range(TOTAL)) == pytest.approx(PEAK, rel=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("total", [1, 2, 3])
def test_a_warm_up_is_cut_to_half_of_a_short_training(name: str, total: int):
    rate = schedule(name, PEAK, total, warmup_steps=1000, min_ratio=LEAST)
    assert float(rate(total // 2)) == pytest.approx(PEAK, rel=1e-6)
    assert all(math.isfinite(float(rate(step))) for step in range(total + 1))


def test_an_unknown_name_and_no_steps_are_refused():
    with pytest.raises(ConfigError, match=r"Unknown schedule 'cosin'\. Did you mean 'cosine'\?"):
        schedule("cosin", PEAK, TOTAL)
    with pytest.raises(ConfigError, match="at least 1 step; got 0"):
        schedule("wsd", PEAK, 0)
