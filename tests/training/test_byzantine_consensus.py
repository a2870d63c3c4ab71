"""`ByzantineConsensus`: one vote for NNX models, trees and files; f from the share and the count."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from flax import nnx

from capibara.consensus.models import vote_models
from capibara.core.model import ModularCapibaraModel, parameters, with_parameters
from capibara.errors import CertificateError, ConfigError, QuorumError
from capibara.files import tensors_to_bytes
from capibara.training.advanced_consensus_algorithms import ByzantineConsensus

LIAR = 3


@pytest.fixture(scope="module")
def models() -> list[ModularCapibaraModel]:
    """Five models near each other; one lies."""
    first = ModularCapibaraModel(small.config())
    rng, params = np.random.default_rng(0), parameters(first)

    def near(scale: float) -> ModularCapibaraModel:
        noise = {name: (0.01 * rng.normal(size=leaf.shape)).astype(np.float32) for name, leaf in params.items()}
        return with_parameters(first, {name: scale * leaf + noise[name] for name, leaf in params.items()})

    return [near(-20.0 if i == LIAR else 1.0) for i in range(5)]


@pytest.fixture(scope="module")
def voted(models) -> tuple[ByzantineConsensus, ModularCapibaraModel]:
    consensus = ByzantineConsensus(fault_tolerance=0.33, verification_rounds=3)
    return consensus, consensus.vote(models=models)


def test_the_liar_is_named_and_the_result_is_a_model_near_the_honest(models, voted):
    consensus, model = voted
    assert isinstance(model, ModularCapibaraModel)
    result = consensus.last_result
    assert result.reasons == ["outvoted" if i == LIAR else "backed" for i in range(5)]
    assert result.num_faulty == 1 and result.recomputed == 3
    honest = [parameters(m) for i, m in enumerate(models) if i != LIAR]
    for name, leaf in parameters(model).items():
        spread = np.abs(np.stack([p[name] for p in honest]) - np.mean([p[name] for p in honest], axis=0)).max()
        assert np.abs(leaf - np.mean([p[name] for p in honest], axis=0)).max() <= spread, name


def test_the_facade_is_equivalent_to_its_core_calls(models, voted):
    trees = [parameters(model) for model in models]
    f = min(math.floor(0.33 * len(trees)), (len(trees) - 1) // 3)
    same = with_parameters(models[0], vote_models(trees, f, verification_rounds=3).merged)
    for name, leaf in parameters(voted[1]).items():
        np.testing.assert_array_equal(parameters(same)[name], leaf)


def test_trees_and_files_give_the_same_numbers(models, voted, tmp_path: Path):
    """Files by text and by path, trees nested and flat."""
    trees = [parameters(model) for model in models]
    paths = [tmp_path / f"{i}.safetensors" for i in range(5)]
    for path, tree in zip(paths, trees, strict=True):
        path.write_bytes(tensors_to_bytes(tree))
    from_files = ByzantineConsensus().vote([str(paths[0]), *paths[1:]])
    from_trees = ByzantineConsensus().vote([{"inner": [tree]} for tree in trees])["inner"][0]
    for name, leaf in parameters(voted[1]).items():
        np.testing.assert_array_equal(from_files[name], leaf)
        np.testing.assert_array_equal(from_trees[name], leaf)


def test_any_nnx_module_can_be_voted_on_and_counters_are_not():
    """A module without a loss, with a counter that is no parameter: the first model's stays."""

    class Counted(nnx.Module):
        def __init__(self, value: float, count: int):
            self.weight = nnx.Param(jnp.full(3, value))
            self.count = nnx.Variable(jnp.array(count))

    model = ByzantineConsensus().vote([Counted(value, i) for i, value in enumerate((1.0, 1.0, 1.0, 50.0))])
    assert isinstance(model, Counted) and int(model.count[...]) == 0
    np.testing.assert_array_equal(model.weight[...], [1.0, 1.0, 1.0])


def test_a_type_of_lower_precision_is_kept():
    tree = ByzantineConsensus().vote([{"w": jnp.full(4, value, jnp.bfloat16)} for value in (1.0, 2.0, 3.0, 4.0)])
    assert tree["w"].dtype == jnp.bfloat16


def f_of(share: float, count: int) -> int:
    consensus = ByzantineConsensus(share, verification_rounds=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        consensus.vote([{"w": jnp.array([float(i), 1.0])} for i in range(count)])
    return consensus.last_result.num_faulty


@pytest.mark.parametrize(
    ("share", "count", "f"),
    [(0.33, 1, 0), (0.33, 3, 0), (0.33, 4, 1), (0.9, 4, 1), (0.2, 4, 0), (0.33, 7, 2), (0.0, 7, 0), (0.2, 7, 1)],
)  # fmt: skip
def test_f_is_the_smaller_of_the_share_and_a_third(share: float, count: int, f: int):
    assert f_of(share, count) == f == min(int(share * count + 1e-9), (count - 1) // 3)


@pytest.mark.parametrize("count", [2, 3])
def test_too_few_models_for_any_fault_are_said_once(count: int):
    models = [{"w": jnp.array([float(i)])} for i in range(count)]
    with pytest.warns(UserWarning, match=f"{count} models tolerate f = 0 wrong ones.*n = 4 is the least") as said:
        merged = ByzantineConsensus().vote(models)
    assert len(said) == 1
    np.testing.assert_allclose(merged["w"], [(count - 1) / 2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ByzantineConsensus(fault_tolerance=0.0).vote(models)


def test_validation_data_gates_out_a_ruined_model():
    """Within the vote's reach, but its loss is not: every other byte is wrong with certainty."""
    honest, batch = [small.Pairs(seed) for seed in range(3)], {"tokens": np.arange(64).reshape(4, 16) % 257}
    batch |= {"targets": batch["tokens"] + 1, "mask": np.ones((4, 16), bool)}
    table = 0.02 * jax.random.normal(jax.random.key(9), (257, 257))
    ruined = with_parameters(small.Pairs(), {"table": table.at[jnp.arange(64), jnp.arange(1, 65)].add(-30.0)})
    consensus = ByzantineConsensus()
    merged = consensus.vote([*honest, ruined], validation_data=batch)
    assert consensus.last_result.reasons == ["backed"] * 3 + ["low_quality"]
    assert consensus.last_result.quality.mean[3] > 1.0
    assert float(merged.loss(batch)) == pytest.approx(np.log(257), abs=0.05)


def test_validation_data_without_a_loss_to_judge_by_is_refused():
    trees = [{"w": jnp.array([float(i)])} for i in range(4)]
    with pytest.raises(ConfigError, match="validation_data needs NNX models with `loss.batch.`.*type dict"):
        ByzantineConsensus().vote(trees, validation_data={"tokens": np.zeros((2, 2))})


def test_what_cannot_be_voted_on_is_an_error_in_words(tmp_path: Path):
    with pytest.raises(ConfigError, match="at least one"):
        ByzantineConsensus().vote([])
    with pytest.raises(ConfigError, match="Model 2 cannot be voted on beside model 0: wrong shape"):
        ByzantineConsensus().vote([{"w": jnp.ones(3)}, {"w": jnp.ones(3)}, {"w": jnp.ones(4)}, {"w": jnp.ones(3)}])
    with pytest.raises(ConfigError, match="at most 32 of them.*got 33. Leave some out"):
        ByzantineConsensus().vote([{"w": jnp.ones(1)}] * 33)
    with pytest.raises(CertificateError, match="none.safetensors is missing"):
        ByzantineConsensus().vote([tmp_path / "none.safetensors"])
    with pytest.raises(QuorumError, match="2 of 4 models count and 3 are needed"):
        ByzantineConsensus().vote([{"w": jnp.array([value])} for value in (1.0, 2.0, jnp.nan, jnp.inf)])
    for wrong in ({"fault_tolerance": 1.0}, {"fault_tolerance": -0.1}, {"verification_rounds": -1}):
        with pytest.raises(ConfigError):
            ByzantineConsensus(**wrong)
