"""Votes over finished models, which share no start."""

from __future__ import annotations

import numpy as np
import pytest

from capibara.consensus import models as votes
from capibara.consensus.models import vote_models
from capibara.errors import ConfigError, QuorumError

N, F = 7, 2


@pytest.fixture
def honest() -> np.ndarray:
    return (3 + 0.1 * np.random.default_rng(0).normal(size=(N, 12))).astype(np.float32)


def as_models(rows: np.ndarray) -> list[dict]:
    return [{"w": row[:8].reshape(2, 4), "b": row[8:]} for row in rows]


def as_row(model: dict) -> np.ndarray:
    return np.concatenate([np.ravel(model["w"]), np.ravel(model["b"])])


@pytest.mark.parametrize("lie", [1e20, -30.0, 0.0, np.nan])
def test_f_arbitrary_models_do_not_move_the_consensus_from_the_honest(honest, lie):
    middle, spread = honest[:5].mean(axis=0), 0.1 * np.sqrt(12)
    honest[5:] = lie
    result = vote_models(as_models(honest), F)
    assert np.linalg.norm(as_row(result.merged) - middle) < 2 * spread
    assert result.reasons[:5] == ["backed"] * 5
    assert set(result.reasons[5:]) == {"not_finite" if np.isnan(lie) else "outvoted"}
    assert result.recomputed == 3


def test_a_common_offset_of_all_models_is_kept(honest):
    """There is no start: adding the same tree to every model adds it to the consensus."""
    plain = as_row(vote_models(as_models(honest), F).merged)
    moved = as_row(vote_models(as_models(honest + np.float32(64)), F).merged)
    np.testing.assert_allclose(moved, plain + 64, atol=1e-4)


def test_equal_models_are_their_own_consensus(honest):
    result = vote_models(as_models(np.tile(honest[0], (N, 1))), F)
    np.testing.assert_array_equal(as_row(result.merged), honest[0])
    assert result.reasons == ["backed"] * N


def test_three_models_are_averaged(honest):
    result = vote_models(as_models(honest[:3]), 0)
    np.testing.assert_allclose(as_row(result.merged), honest[:3].mean(axis=0), rtol=1e-6)


def test_a_recomputation_that_differs_is_an_error_even_beside_a_huge_lie(honest, monkeypatch):
    honest[6] = 1e20
    real, calls = votes.byzantine_tolerant, []

    def unsteady(f, **options):
        calls.append(f)
        return real(f, **options) if len(calls) == 1 else real(0)

    monkeypatch.setattr(votes, "byzantine_tolerant", unsteady)
    with pytest.raises(QuorumError, match="did not agree"):
        vote_models(as_models(honest), F)


def test_too_few_finite_models_are_named(honest):
    honest[:3] = np.nan
    with pytest.raises(QuorumError, match="4 of 7 models count and 5 are needed .model 0: not_finite"):
        vote_models(as_models(honest), F)


def test_models_that_do_not_fit_each_other_are_refused(honest):
    models = as_models(honest)
    models[3] = {"w": models[3]["w"].T, "b": models[3]["b"]}
    with pytest.raises(ConfigError, match="Model 3 cannot be voted on beside model 0: wrong shape"):
        vote_models(models, F)
    with pytest.raises(ConfigError, match="at least one"):
        vote_models([], 0)
