"""`MetaConsensusSystem`: what a configuration names in one run directory, resumed as if never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import tiny

from capibara.core.config import ModularConfig
from capibara.core.model import ModularCapibaraModel, parameters
from capibara.core.tokenizer import train_bpe
from capibara.engines.stacked import StackedEngine
from capibara.errors import ConfigError, DataError, QuorumError
from capibara.run.directory import read_lines
from capibara.training import ConsensusConfig, MetaConsensusSystem
from capibara.training.replay import verify_run
from capibara.training.session import load_model, open_session

FAST = {"num_nodes": 4, "local_steps": 2}
ROUNDS = 3


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve speeches, enough for four nodes and the gates."""
    return small.speeches(tmp_path_factory.mktemp("text") / "train", 0, 12, 12_000)


def base(**sections: dict[str, Any]) -> ModularConfig:
    """A third of the text is held out, so that every split of so little text has its sequences."""
    return small.config(data={"sequence_length": 32, "held_out_fraction": 0.3}, training={"batch_size": 2}).replace(
        **sections
    )


def train(text: Path, folder: Path | None, *, consensus: dict[str, Any] | None = None, **options: Any):
    system = MetaConsensusSystem(ConsensusConfig(**FAST | (consensus or {})), base=base())
    given = {"data_path": str(text), "num_rounds": ROUNDS, "run_dir": folder} | options
    return system, system.train(**given)


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    return train(text, tmp_path_factory.mktemp("whole") / "run", consensus={"attack": "scale:-10"})


def same(a: Any, b: Any) -> None:
    a, b = parameters(a), parameters(b)
    assert a.keys() == b.keys()
    for name, leaf in a.items():
        np.testing.assert_array_equal(b[name], leaf, err_msg=name)


def test_the_results_have_what_the_specification_names(whole):
    _, results = whole
    assert isinstance(results.consensus_model, ModularCapibaraModel) and results.rounds == ROUNDS
    assert [entry["outcome"] for entry in results.history] == ["committed"] * ROUNDS
    lines, _ = read_lines(results.run_path)
    assert results.certificate_path == results.run_path / "rounds.jsonl" and len(lines) == ROUNDS
    assert results.head == lines[-1]["hash"]
    assert results.named() == [3] and "Named as lying or broken: node 3" in results.summary()
    assert verify_run(results.run_path, expect=results.head).ok


def test_the_consensus_model_is_the_last_checkpoint_and_speaks(whole):
    _, results = whole
    same(load_model(results.run_path), results.consensus_model)
    same(ModularCapibaraModel.load(results.run_path / "model"), results.consensus_model)
    assert isinstance(results.consensus_model.generate("We ", 4), str)
    assert results.after.loss != results.before.loss


def test_the_facade_is_equivalent_to_its_core_calls(text, whole, tmp_path):
    consensus = ConsensusConfig(**FAST, attack="scale:-10")
    shape = base().replace(data={"path": str(text)}, training={"num_rounds": ROUNDS})
    config = ModularConfig(model=shape.model, data=shape.data, training=shape.training, consensus=consensus)
    with open_session(config, run_dir=tmp_path / "run") as session:
        results = session.train()
    same(results.consensus_model, whole[1].consensus_model)
    assert results.head == whole[1].head


def test_the_parts_that_were_built_can_be_looked_at(whole):
    system, _ = whole
    plan = system.session.plan
    assert plan.engine.name == "stacked" and [s.name for s in plan.strategies] == ["plain"]
    assert plan.hostile == (3,) and system.session.num_rounds == ROUNDS


class Stops(StackedEngine):
    """Ctrl-C in the middle of a round."""

    def __init__(self, round_: int):
        super().__init__()
        self.round = round_

    def map(self, cohorts, assignment):
        if assignment.round == self.round:
            raise KeyboardInterrupt
        return super().map(cohorts, assignment)


@pytest.mark.parametrize("stop", range(ROUNDS))
def test_stopped_in_any_round_and_called_again_it_ends_in_the_same_hash(text, whole, tmp_path, stop: int):
    with pytest.raises(KeyboardInterrupt):
        train(text, tmp_path / "run", consensus={"attack": "scale:-10", "engine": Stops(stop)})
    assert len(read_lines(tmp_path / "run")[0]) == stop
    _, results = train(text, tmp_path / "run", consensus={"attack": "scale:-10"}, resume=True)
    assert results.head == whole[1].head and results.rounds == ROUNDS
    same(results.consensus_model, whole[1].consensus_model)


@pytest.mark.slow
def test_without_a_model_the_default_preset_is_trained(tmp_path, monkeypatch):
    """The preset `development`, in a run directory of its own under `runs/`."""
    monkeypatch.chdir(tmp_path)
    text = small.speeches(tmp_path / "text", 0, 60, 16_000)
    system = MetaConsensusSystem(ConsensusConfig(num_nodes=1, local_steps=1))
    results = system.train(data_path=str(text), num_rounds=1, batch_size=1)
    preset = ModularConfig.preset("development")
    assert system.base == preset and results.consensus_model.config == preset.model
    assert results.run_path == Path("runs/consensus-1")


def test_epochs_are_passes_over_the_text_of_all_nodes(text, tmp_path):
    """Rounds = ceil(epochs · tokens / (n · H · tokens a step)), also where the base names rounds."""
    system = MetaConsensusSystem(ConsensusConfig(**FAST), base=base(training={"num_rounds": 7}))
    results = system.train(data_path=str(text), num_epochs=0.02, run_dir=tmp_path / "run")
    tokens = system.session.source.train_tokens
    assert results.rounds == -(-int(0.02 * tokens) // (4 * 2 * 2 * 32)) < 7


def test_a_model_of_ones_own_keeps_its_shape_and_its_tokenizer(text, tmp_path):
    """The run's configuration describes the model that was given, so that the run can be loaded without it."""
    speech = next(text.iterdir()).read_text()
    shape = small.config(model={"width": 24, "vocab_size": 300})
    model = ModularCapibaraModel(shape, seed=5)
    model.tokenizer = train_bpe([speech], 300)
    before = {name: np.asarray(leaf) for name, leaf in parameters(model).items()}
    alone, options = {"num_nodes": 1, "local_steps": 1}, {"num_rounds": 1, "gradient_checkpointing": True}
    system, results = train(text, tmp_path / "run", consensus=alone, model=model, **options)
    assert results.consensus_model.config == model.config
    assert results.consensus_model.tokenizer.digest == model.tokenizer.digest
    assert system.session.source.vocab_size == model.tokenizer.vocab_size
    same(load_model(tmp_path / "run"), results.consensus_model)
    for name, leaf in before.items():
        np.testing.assert_array_equal(parameters(model)[name], leaf, err_msg="the given model is not changed")


def test_ids_that_the_model_does_not_know_are_refused(text, tmp_path):
    """JAX would clamp them to the last one without a word."""
    with pytest.raises(ConfigError, match="The model knows 100 tokens and the tokenizer has 257"):
        train(text, tmp_path / "run", model=ModularCapibaraModel(small.config(model={"vocab_size": 100})))
    assert not (tmp_path / "run").exists()


def test_a_model_that_cannot_recompute_its_blocks_says_so(text, tmp_path):
    with pytest.raises(ConfigError, match="Pairs has none"):
        train(text, tmp_path / "run", model=small.Pairs(), gradient_checkpointing=True)


def test_any_module_source_strategy_and_loss_can_be_given_as_objects(text, tmp_path):
    """Two strategies, dealt round-robin, of which the certificate has the names."""
    shouts = tiny.STRATEGY._replace(name="shout")
    system = MetaConsensusSystem(ConsensusConfig(**FAST))

    class Line(small.nnx.Module):
        def __init__(self):
            self.w, self.b = small.nnx.Param(np.zeros(4, np.float32)), small.nnx.Param(np.zeros((), np.float32))

    def loss(model, batch, key):
        return tiny.OBJECTIVE.loss({"w": model.w[...], "b": model.b[...]}, batch, key)[0]

    results = system.train(
        model=Line(), source=tiny.Points(), loss=loss, strategies=["plain", shouts], num_rounds=2,
        run_dir=tmp_path / "run", learning_rate=0.1,
    )  # fmt: skip
    assert isinstance(results.consensus_model, Line) and float(np.abs(results.consensus_model.w[...]).sum()) > 0
    lines, _ = read_lines(tmp_path / "run")
    assert [node["strategy"] for node in lines[0]["nodes"]] == ["plain", "shout", "plain", "shout"]
    assert system.config.strategies == ("plain",), "the configuration that was given is not changed"


def test_no_quorum_leaves_the_run_to_be_gone_on_with(text, tmp_path):
    with pytest.raises(QuorumError, match="node 3: not_finite"):
        train(text, tmp_path / "run", consensus={"attack": "nan", "consensus_threshold": 1.0, "max_retries": 0,
              "num_faulty": 0, "attack_nodes": (3,)})  # fmt: skip
    lines, _ = read_lines(tmp_path / "run")
    assert [line["outcome"] for line in lines] == ["no_quorum"]


def test_what_cannot_be_meant_is_an_error_in_words(text, tmp_path):
    with pytest.raises(ConfigError, match="Unknown strategy 'plane'. Did you mean 'plain'"):
        train(text, tmp_path / "run", strategies=["plane"])
    with pytest.raises(ConfigError, match="Did you mean 'batch_size'"):
        train(text, tmp_path / "run", batch_sise=4)
    with pytest.raises(ConfigError, match="resume goes on with the run in run_dir; name that directory"):
        train(text, None, resume=True)
    with pytest.raises(DataError, match="No text is named"):
        train(text, tmp_path / "run", data_path=None)
    assert not (tmp_path / "run").exists()
