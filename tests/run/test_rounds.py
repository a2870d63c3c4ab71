"""Rounds in a run directory: stopped anywhere and resumed they end in the same hash; damage is mended or stops them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optax
import pytest
import tiny
from synthetic_run import CONFIG, Unsynced

from capibara.consensus.ballot import open_ballot
from capibara.engines.inline import InlineEngine
from capibara.errors import QuorumError, RunError
from capibara.round_state import RoundPlan
from capibara.run.checkpoint import checkpoints, load_checkpoint
from capibara.run.directory import CERTIFICATES, Run
from capibara.run.rounds import rounds
from capibara.run.verify import Report, verify

ROUNDS = 4


def plan(deliver: Callable[..., Any] | None = None, **config: Any) -> RoundPlan:
    """Five nodes, node 4 lies; deltas and two checkpoints are kept."""
    given = {"keep_deltas": True, "keep_checkpoints": 2, "attack": "sign_flip:4"} | config
    return tiny.plan(engine=InlineEngine(deliver), **given)


def go(path: Path, num_rounds: int, its_plan: RoundPlan | None = None) -> tuple[str, list[str]]:
    """Opens or creates the run and runs it up to `num_rounds`; its last hash, and what it said."""
    notes: list[str] = []
    its_plan = its_plan or plan()
    opened = Run.open(path, files=Unsynced()) if path.exists() else Run.create(path, CONFIG, files=Unsynced())
    with opened as run:
        for _ in rounds(its_plan, tiny.first_params(), run, num_rounds, on_note=notes.append):
            pass
        return run.head, notes


def check(path: Path, its_plan: RoundPlan | None = None) -> Report:
    """`verify` with every vote repeated."""
    vote = (its_plan or plan()).aggregator

    def replay(line, stack):
        entered = np.array([node["reason"] in ("backed", "outvoted") for node in line["nodes"]])
        delta, verdict, _ = vote.apply(open_ballot(stack, entered.astype(np.float64)), vote.init(None), None)
        names = np.where(verdict.backing, "backed", "outvoted")
        reasons = [
            str(name) if counted else node["reason"]
            for node, counted, name in zip(line["nodes"], entered, names, strict=True)
        ]
        return reasons, verdict.coefficients, {name: np.asarray(leaf) for name, leaf in delta.items()}

    return verify(path, replay=replay)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run that was never stopped, and its last hash."""
    path = tmp_path_factory.mktemp("whole") / "run"
    return path, go(path, ROUNDS)[0]


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    """That run, to be damaged."""
    import shutil

    return shutil.copytree(whole[0], tmp_path / "run")


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_a_finished_run_is_good_and_every_vote_can_be_repeated(whole):
    report = check(whole[0])
    assert report.ok, report.problems
    assert (report.lines, report.checkpoints, report.kept, report.replayed) == (ROUNDS, 2, ROUNDS, ROUNDS)
    assert report.head == whole[1]


def test_a_run_resumed_after_every_round_ends_in_the_same_bytes(whole, tmp_path):
    for num_rounds in range(1, ROUNDS + 1):
        head, notes = go(tmp_path / "run", num_rounds)
        assert not notes
    assert head == whole[1]
    newest, same = (checkpoints(path)[-1] for path in (tmp_path / "run", whole[0]))
    assert {file.name: file.read_bytes() for file in newest.iterdir()} == {
        file.name: file.read_bytes() for file in same.iterdir()
    }


def test_a_round_that_was_not_committed_is_run_again(whole, copy):
    lines = (copy / CERTIFICATES).read_bytes().splitlines(keepends=True)
    (copy / CERTIFICATES).write_bytes(b"".join(lines[:-1]) + lines[-1][:-50])
    assert go(copy, ROUNDS) == (whole[1], [])
    assert check(copy).ok


def test_a_damaged_checkpoint_is_walked_past_and_mended(whole, copy):
    good = load_checkpoint(checkpoints(copy)[-1])[1]["digests"]
    flip(checkpoints(copy)[-1] / "kept.safetensors")
    assert [problem.place for problem in check(copy).problems] == ["checkpoints/step-00000004/kept.safetensors"]
    head, notes = go(copy, ROUNDS)
    assert head == whole[1]
    assert "checkpoints/step-00000004/kept.safetensors has been changed" in notes[0]
    assert notes[1:] == ["Round 3 was run again from an older checkpoint and reproduced its certificate."]
    assert check(copy).ok
    assert load_checkpoint(checkpoints(copy)[-1])[1]["digests"] == good


def test_where_no_checkpoint_is_intact_the_run_goes_again_from_its_start(whole, copy):
    for folder in checkpoints(copy):
        (folder / "state.json").unlink()
    head, notes = go(copy, ROUNDS)
    assert head == whole[1]
    assert len(notes) == 2 + ROUNDS
    report = check(copy)
    assert report.ok, report.problems
    assert report.checkpoints == 2


def test_checkpoints_further_apart_make_no_difference_to_the_certificates(whole, tmp_path):
    apart = plan(checkpoint_every=3)
    go(tmp_path / "run", 2, apart)
    assert not checkpoints(tmp_path / "run")
    head, notes = go(tmp_path / "run", ROUNDS, apart)
    assert head == whole[1]
    assert len(notes) == 2, "two rounds were run again"
    assert check(tmp_path / "run").ok


def test_a_repeated_round_that_comes_out_otherwise_stops_the_run_and_changes_nothing(copy):
    flip(checkpoints(copy)[-1] / "kept.safetensors")
    before = (copy / CERTIFICATES).read_bytes()
    with pytest.raises(RunError, match="Round 3 was run again from an older checkpoint and came out differently"):
        go(copy, ROUNDS, plan(local_steps=4))
    assert (copy / CERTIFICATES).read_bytes() == before


def test_a_round_without_quorum_is_on_record_and_the_run_goes_on_with_another_draw(tmp_path):
    def fails(node, attempt, delta):
        if node < 3:
            raise RuntimeError("no power")
        return delta

    go(tmp_path / "run", 1)
    with pytest.raises(QuorumError, match="Round 1 found no quorum"):
        go(tmp_path / "run", 2, plan(fails, max_retries=1))
    report = check(tmp_path / "run")
    assert report.ok, report.problems
    assert (report.lines, report.kept, report.checkpoints) == (2, 1, 1)
    go(tmp_path / "run", 2)
    with Run.open(tmp_path / "run") as run:
        assert [line["outcome"] for line in run.lines] == ["committed", "no_quorum", "committed"]
        assert [line["round"] for line in run.lines] == [0, 1, 1]
        assert run.lines[2]["draw"] > run.lines[1]["draw"]
    assert check(tmp_path / "run").ok


def test_a_run_says_that_the_anchor_has_long_not_improved(tmp_path, monkeypatch):
    """An alarm, not an error: two steps that change nothing are no reason to stop."""
    monkeypatch.setattr("capibara.run.rounds.ANCHOR_ALARM", 2)
    still = plan(outer=optax.sgd(0.0), attack=None)
    _, notes = go(tmp_path / "run", 3, still)
    assert [note for note in notes if "anchor" in note] == [note for note in notes if "for 2 rounds" in note] != []


def test_refused_rounds_are_on_record_with_the_delta_that_was_refused(tmp_path):
    """An outer step 400 times too long worsens the model, which the final gate sees."""
    far = plan(outer=optax.sgd(400.0), max_refusals=2)
    with pytest.raises(RunError, match="2 rounds in a row were refused"):
        go(tmp_path / "run", 3, far)
    with Run.open(tmp_path / "run") as run:
        assert [line["outcome"] for line in run.lines] == ["refused", "refused"]
    report = check(tmp_path / "run", far)
    assert report.ok, report.problems
    assert report.replayed == 2
