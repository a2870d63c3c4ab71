"""`ModularConfig`: frozen, hashable, written and read back without loss, and the packaged presets."""

from __future__ import annotations

import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from capibara.consensus.attacks import Attack
from capibara.consensus.ballot import Merge, Rule
from capibara.consensus.config import ConsensusConfig
from capibara.core import model as models
from capibara.core.config import BLOCK_KINDS, DataConfig, ModelConfig, ModularConfig, TrainingConfig
from capibara.core.toml import presets
from capibara.errors import ConfigError

CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "model": st.fixed_dictionaries(
            {},
            optional={
                "width": st.sampled_from([32, 64, 96]),
                "num_kv_heads": st.none() | st.sampled_from([1, 2]),
                "tie_embeddings": st.booleans(),
                "norm_eps": st.floats(1e-12, 1e-2),
                "dtype": st.sampled_from(["float32", "bfloat16"]),
            },
        ),
        "data": st.fixed_dictionaries(
            {},
            optional={
                "path": st.none() | st.text(min_size=1) | st.lists(st.text(), max_size=3),
                "field": st.none() | st.text(),
                "held_out_fraction": st.floats(1e-6, 0.99),
            },
        ),
        "training": st.fixed_dictionaries(
            {},
            optional={
                "clip_norm": st.none() | st.floats(1e-3, 1e9),
                "eval_every": st.none() | st.integers(1, 9),
                "learning_rate": st.floats(1e-30, 1e30),
                "num_rounds": st.none() | st.integers(1, 10**12),
            },
        ),
        "consensus": st.fixed_dictionaries(
            {},
            optional={
                "num_nodes": st.integers(1, 9),
                "consensus_timeout": st.none() | st.floats(1e-3, 1e6),
                "consensus_threshold": st.none() | st.floats(0.01, 1),
                "attack": st.none() | st.sampled_from(["nan", "scale:-10", "optimised:ipm"]),
                "split": st.sampled_from(["iid", "by_field", "dirichlet:0.33"]),
                "keep_deltas": st.booleans(),
                "attack_nodes": st.none() | st.just([0]) | st.just([]),
            },
        ),
    },
)


@given(CHANGES)
@settings(max_examples=60, deadline=None)
def test_what_is_written_reads_back_the_same(tmp_path_factory, changes):
    """Also unset values whose default is set, any text, and floats to the last bit."""
    if changes.get("consensus", {}).get("num_nodes") == 1:
        changes["consensus"].pop("attack_nodes", None)  # one node alone cannot attack
    for section in ("data",):
        for key in ("path", "field"):
            if changes.get(section, {}).get(key) == "none":
                changes[section].pop(key)
    config = ModularConfig().replace(**changes)
    path = tmp_path_factory.mktemp("config") / "c.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    again = ModularConfig.from_toml(path)
    assert again == config
    assert again.to_toml() == config.to_toml()
    assert again.digest() == config.digest() and hash(again) == hash(config)


@pytest.mark.parametrize("name", presets())
def test_presets_load_and_read_back(name, tmp_path):
    config = ModularConfig.preset(name)
    (tmp_path / "c.toml").write_text(config.to_toml(), encoding="utf-8")
    assert ModularConfig.from_toml(tmp_path / "c.toml") == config


@pytest.mark.parametrize(("name", "least", "most"), [("tiny-cpu", 2.5e5, 4e5), ("small", 1e6, 1.3e6)])
def test_presets_have_the_size_they_say(name, least, most):
    config = ModularConfig.preset(name)
    shape = nnx.eval_shape(lambda: models.ModularCapibaraModel(config))
    assert least <= sum(leaf.size for leaf in models.parameters(shape).values()) <= most


def test_the_demo_tolerates_two_liars():
    config = ModularConfig.preset("tiny-cpu", overrides=("consensus.attack=scale:-10",)).consensus
    assert (config.num_nodes, config.num_tolerated, config.attack_ids) == (8, 2, (6, 7))


def test_a_preset_that_is_not_there_names_the_nearest():
    with pytest.raises(ConfigError, match="Unknown preset 'tiny-cup'. Did you mean 'tiny-cpu'?"):
        ModularConfig.preset("tiny-cup")


@pytest.mark.parametrize(
    ("section", "values", "expected"),
    [
        (ModelConfig, {"width": 100, "num_heads": 3}, "width = 100 is not a multiple of num_heads = 3"),
        (ModelConfig, {"width": 12, "num_heads": 4}, "rotary positions need an even one"),
        (ModelConfig, {"num_kv_heads": 3}, "num_heads = 4 is not a multiple of num_kv_heads = 3"),
        (ModelConfig, {"blocks": ["attension"]}, "Unknown blocks 'attension'. Did you mean 'attention'?"),
        (ModelConfig, {"dtype": "float16"}, "dtype should be 'float32' or 'bfloat16'; got 'float16'."),
        (DataConfig, {"path": 3}, "path should be a valid string or a list; got 3."),
        (DataConfig, {"sequence_lenght": 3}, "Did you mean 'sequence_length'?"),
        (TrainingConfig, {"batch_size": 8, "accumulation_steps": 3}, "not a multiple of accumulation_steps = 3"),
        (TrainingConfig, {"learning_rate": float("inf")}, "learning_rate should be a finite number"),
        (TrainingConfig, {"schedule": "linear"}, "schedule should be 'cosine', 'wsd' or 'constant'"),
        (ModularConfig, {"consensus": {"num_node": 8}}, "Did you mean 'num_nodes'?"),
        (ModularConfig, {"consensu": {}}, "Unknown key 'consensu'. Did you mean 'consensus'?"),
        (ModularConfig, {"consensus": 4}, "consensus should be"),
    ],
)
def test_what_cannot_be_meant_is_one_clear_sentence(section, values, expected):
    with pytest.raises(ConfigError) as error:
        section(**values)
    assert expected in str(error.value)
    with pytest.raises(ConfigError) as error:
        section.model_validate(values)
    assert expected in str(error.value)


def test_replace_refuses_what_is_not_there():
    with pytest.raises(ConfigError, match="Unknown section 'trainin'. Did you mean 'training'?"):
        ModularConfig().replace(trainin={"batch_size": 4})
    with pytest.raises(ConfigError, match="Did you mean 'batch_size'?"):
        ModularConfig().replace(training={"batch_sise": 4})


def test_a_configuration_is_frozen_and_hashable():
    config = ModularConfig()
    with pytest.raises(ConfigError, match="ModularConfig is frozen"):
        config.model = ModelConfig(width=64)  # type: ignore[misc]
    assert {config: 1}[ModularConfig()] == 1
    assert config != config.replace(model={"width": 64})


def test_the_digest_tells_what_decides_the_outcome():
    config = ModularConfig()
    same = {
        "data": {"path": "elsewhere"},
        "training": {"num_rounds": 3, "eval_every": 2},
        "consensus": {"engine": "inline", "keep_deltas": True, "keep_checkpoints": 9},
    }
    assert config.replace(**same).digest() == config.digest()
    for other in (
        {"model": {"width": 64}},
        {"training": {"clip_norm": None}},
        {"training": {"seed": 1}},
        {"consensus": {"consensus_timeout": None}},
        {"consensus": {"merge_rows": "mixed"}},
    ):
        assert config.replace(**other).digest() != config.digest()


def test_an_object_is_written_as_one_and_cannot_be_read_back(tmp_path):
    class Mine:
        name = "mine"

    config = ModularConfig(consensus=ConsensusConfig(voting_strategy=Mine(), num_nodes=5))
    assert '"<object mine>"' in config.to_toml()
    path = tmp_path / "c.toml"
    path.write_text(config.to_toml(), encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        ModularConfig.from_toml(path)
    assert "voting_strategy was given as an object, <object mine>, which a file cannot hold." in str(error.value)
    assert "pass the object again" in str(error.value) and 'voting_strategy = "<object mine>"' in str(error.value)


def test_rules_merges_and_attacks_are_written_by_name_and_digested_without_their_addresses():
    """They are NamedTuples, which must not be taken for lists of functions."""

    def config() -> ModularConfig:
        rule = Rule("mine", lambda params: (), lambda *ballot: ballot)
        merge = Merge("middle", leaf=lambda rows: rows[0])
        parts = {"voting_strategy": rule, "merge_strategy": merge, "attack": Attack("lies"), "strategies": (rule,)}
        return ModularConfig(consensus=ConsensusConfig(num_nodes=5, **parts))

    text = config().to_toml()
    for name in ("mine", "middle", "lies"):
        assert f'= "<object {name}>"' in text
    assert 'strategies = ["<object mine>"]' in text
    assert config().digest() == config().digest()


def test_the_names_of_blocks_are_those_of_the_model():
    assert set(BLOCK_KINDS) == set(models.BLOCKS)


def test_derived_sizes():
    config = ModelConfig(width=96, num_heads=4)
    assert (config.head_size, config.kv_heads, config.hidden_size) == (24, 4, 256)
