"""A session: parts by name or as objects, a directory that is made whole or not at all, and what it refuses to open."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import small
import tiny

from capibara.core.config import ModularConfig
from capibara.core.model import parameters
from capibara.engines.inline import InlineEngine
from capibara.errors import ConfigError, RunError
from capibara.run.checkpoint import checkpoints
from capibara.strategies.outer import outer_learning_rate
from capibara.training import ConsensusConfig, vocabulary
from capibara.training.session import (
    load_model,
    next_run_path,
    num_rounds,
    open_session,
    reopen_session,
)


class Line(small.nnx.Module):
    """y = w·x + b; nothing to compile but five numbers."""

    def __init__(self):
        self.w, self.b = small.nnx.Param(np.zeros(4, np.float32)), small.nnx.Param(np.zeros((), np.float32))

    def loss(self, batch):
        return tiny.OBJECTIVE.loss({"w": self.w[...], "b": self.b[...]}, batch, None)[0]


def points(**consensus) -> ModularConfig:
    given = ConsensusConfig(**{"num_nodes": 4, "local_steps": 2, **consensus})
    training = {"num_rounds": 2, "batch_size": 4, "warmup_steps": 0, "learning_rate": 0.1}
    base = ModularConfig().replace(training=training)
    return ModularConfig(model=base.model, data=base.data, training=base.training, consensus=given)


def opened(folder: Path, **consensus):
    return open_session(points(**consensus), run_dir=folder, model=Line(), source=tiny.Points())


def test_a_session_trains_judges_and_saves(tmp_path):
    with opened(tmp_path / "run") as session:
        results = session.train()
        assert session.save() == 2
    change, se = results.after.against(results.before)
    assert results.rounds == 2 and change < -2 * se
    assert len(results.after.sums) == 64, "eval_sequences"
    assert [folder.name for folder in checkpoints(tmp_path / "run")][-1] == "step-00000002"


def test_save_writes_the_newest_round_where_checkpoints_are_rare(tmp_path):
    """checkpoint_every = 5: after two rounds there is none until a Ctrl-C asks for one."""
    with opened(tmp_path / "run", checkpoint_every=5) as session:
        session.train()
        assert session.save() == 2
        assert [folder.name for folder in checkpoints(tmp_path / "run")] == ["step-00000002"]


def test_a_finished_session_opened_again_has_nothing_left_to_do(tmp_path):
    with opened(tmp_path / "run") as session:
        first = session.train()
    parts = {"config": points(), "model": Line(), "source": tiny.Points()}
    with reopen_session(tmp_path / "run", **parts) as session:
        again = session.train()
    assert again.head == first.head and again.history == first.history
    jax.tree.map(np.testing.assert_array_equal, parameters(again.consensus_model), parameters(first.consensus_model))


def test_a_session_that_cannot_begin_leaves_no_directory(tmp_path):
    with pytest.raises(ConfigError, match="controls no node, since f = 0"):
        opened(tmp_path / "run", attack="sign_flip", num_faulty=0)
    assert not (tmp_path / "run").exists()


def test_a_directory_in_use_or_of_another_kind_is_refused(tmp_path):
    with opened(tmp_path / "run"), pytest.raises(RunError, match="in use"):
        reopen_session(tmp_path / "run", config=points(), model=Line(), source=tiny.Points())
    with pytest.raises(RunError):
        opened(tmp_path / "run")
    (tmp_path / "run" / "solo.json").write_text("{}")
    with pytest.raises(RunError, match="holds one model of UnifiedTrainer, not a consensus"):
        reopen_session(tmp_path / "run")


def test_a_run_without_a_checkpoint_has_no_model_yet(tmp_path):
    with opened(tmp_path / "run"):
        pass
    with pytest.raises(RunError, match="has no intact checkpoint yet; let it finish a round"):
        load_model(tmp_path / "run")


@pytest.mark.parametrize(("epochs", "rounds"), [(1.0, 32), (0.5, 16), (0.01, 1), (3.0, 94)])
def test_rounds_are_epochs_of_the_tokens_of_all_nodes(epochs: float, rounds: int):
    """1000 tokens; a round takes 4 nodes · 2 steps · 4 sequences of one token: ⌈1000 e / 32⌉."""
    config = points().replace(training={"num_rounds": None, "num_epochs": epochs})
    assert num_rounds(config, tiny.Points()) == rounds


def test_the_next_run_is_the_first_free_number(tmp_path):
    (tmp_path / "train-1").mkdir()
    (tmp_path / "train-3").mkdir()
    assert next_run_path(tmp_path, "train") == tmp_path / "train-2"
    assert next_run_path(tmp_path / "none", "demo") == tmp_path / "none" / "demo-1"


def test_names_and_the_objects_they_stand_for_are_the_same_parts():
    """An object passes through; a name becomes one. Outer Nesterov takes η from the table unless it is given."""
    engine, outer, strategy = InlineEngine(), optax.sgd(0.5), tiny.STRATEGY
    given = ConsensusConfig(engine=engine, outer=outer, strategies=(strategy,))
    assert vocabulary.engine(given) is engine and vocabulary.outer(given) is outer
    assert vocabulary.engine(ConsensusConfig(engine="inline")).name == "inline"
    training = points().training
    assert vocabulary.strategies(("plain", strategy), tiny.OBJECTIVE, training, 4, 2)[1] is strategy

    def first_move(**config) -> float:
        outer = vocabulary.outer(ConsensusConfig(num_nodes=8, **config))
        return -float(outer.update(np.float32(1.0), outer.init(np.float32(0.0)), np.float32(0.0))[0])

    rate = outer_learning_rate(8, 100)
    assert first_move(outer="nesterov", local_steps=100) == pytest.approx(1.9 * rate, rel=1e-6)
    assert first_move(outer="nesterov", outer_learning_rate=0.5, outer_momentum=0.5) == pytest.approx(0.75, rel=1e-6)
    assert first_move(outer="nesterov", outer_momentum=0.0, local_steps=30) == pytest.approx(0.8, rel=1e-6)
    assert first_move() == 1.0 and first_move(outer_learning_rate=0.5) == 0.5
