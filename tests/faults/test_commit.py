"""A commit happens or it does not: killed or out of disk at any point, the run is before it or after it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from faulty import FaultyFiles, disk_full
from synthetic_run import CONFIG, finished, make_run, replay, snapshot

from capibara.errors import RunError
from capibara.run.checkpoint import newest_intact
from capibara.run.commit import commit
from capibara.run.directory import CERTIFICATES, Run
from capibara.run.verify import verify

KILLED = Path(__file__).with_name("killed.py")


@pytest.fixture(scope="module")
def deaths(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What `killed.py` found after each death."""
    done = subprocess.run(
        [sys.executable, KILLED, tmp_path_factory.mktemp("killed")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_kill_9_at_every_point_of_a_commit_leaves_the_state_before_or_after_it(deaths):
    found = [death for death in deaths if death["of"] == "commit"]
    points = Counter(" ".join(death["point"].split(" ")[1:3]) for death in found)
    assert points["fsync"] >= 10 and points["rename step-00000004"] == 1
    assert len(found) >= 30
    wrong = [death for death in found if death["found"] not in ("before", "after") or not death["good"]]
    assert not wrong, wrong
    order = [death["found"] for death in found]
    assert order == sorted(order, reverse=True), "once a commit counts, it counts at every later point"
    first = next(death for death in found if death["found"] == "after")
    assert first["point"].endswith("fsync"), "the line counts when all of it is in the file"


def test_kill_9_at_every_point_of_a_recovery_leaves_what_the_recovery_would(deaths):
    found = [death for death in deaths if death["of"] == "recovery"]
    assert len(found) > 5
    wrong = [death for death in found if death["found"] != "before" or not death["good"]]
    assert not wrong, wrong


def test_kill_9_at_every_point_of_a_creation_leaves_nothing_or_a_run(deaths):
    found = [death for death in deaths if death["of"] == "creation"]
    assert len(found) > 10
    assert {death["found"] for death in found} == {"RunError", "after"}


def test_whenever_it_was_killed_the_run_ends_in_the_same_bytes(deaths):
    assert not [death for death in deaths if not death["same_end"]]


def everything(run: Run) -> tuple[int, dict, dict[str, bytes]]:
    """What a resumed run finds: certificates, the numbers of the newest checkpoint, every other file."""
    found = newest_intact(run)
    visible = snapshot(run.path)
    return len(run.lines), found.meta, {name: visible[name] for name in visible if not name.startswith("checkpoints")}


@pytest.mark.parametrize("again", [False, True], ids=["once", "from then on"])
def test_a_full_disk_at_any_point_of_a_commit_is_a_clear_error_and_changes_nothing(tmp_path, again):
    path = tmp_path / "run"
    run = make_run(path, 2, keep_checkpoints=2)
    before = everything(run)
    done = finished(2, run.head)
    at, states = 0, []
    while True:
        at += 1
        run.files = files = FaultyFiles(disk_full, at, again=again, armed=True)
        try:
            commit(run, done, 2)
            break
        except RunError as error:
            assert "No space left on device" in str(error) and str(path) in str(error), files.trace
            assert "Nothing that was committed is lost" in str(error) or "committed is intact" in str(error)
        run.close()
        run = Run.open(path)
        assert verify(path, replay=replay).ok
        states.append(everything(run) == before)
        if len(run.lines) == 3:  # the line stood before the disk was full
            break
    assert at > 20
    assert all(states[:-1]), "only a fault after the commit point may leave the round committed"
    run.close()


def test_after_a_full_disk_the_same_process_can_commit_again(tmp_path):
    run = make_run(tmp_path / "run", 1)
    done = finished(1, run.head)
    points = FaultyFiles(disk_full, armed=True)
    run.files = points
    commit(run, done, 9)
    names = points.trace
    run.close()
    for at, name in enumerate(names, 1):
        run = make_run(tmp_path / f"run{at}", 1)
        run.files = FaultyFiles(disk_full, at, armed=True)
        with pytest.raises(RunError):
            commit(run, done, 9)
        assert len(run.lines) == 1, name
        commit(run, done, 9)
        run.close()
        assert snapshot(tmp_path / f"run{at}") == snapshot(tmp_path / "run"), name


def test_a_full_disk_leaves_no_half_files_behind(tmp_path):
    """What did not fit is removed at once: a full disk must not be kept full by its own wreckage."""
    with make_run(tmp_path / "run", 1) as run:
        for name in ("write half of state.json", "write half of .round-00000001.safetensors.tmp"):
            counting = FaultyFiles(disk_full, armed=True)
            while name not in counting.trace:
                counting = FaultyFiles(disk_full, len(counting.trace) + 1, armed=True)
                run.files = counting
                with pytest.raises(RunError):
                    commit(run, finished(1, run.head), 3)
            hidden = [file.name for file in run.path.rglob(".*") if file.name != ".lock"]
            assert not hidden


def test_a_full_disk_at_a_creation_leaves_room_for_another_attempt(tmp_path):
    at = 0
    while True:
        at += 1
        try:
            run = Run.create(tmp_path / "run", CONFIG, files=FaultyFiles(disk_full, at, armed=True))
            break
        except RunError as error:
            assert "No space left on device" in str(error)
            if (tmp_path / "run" / "format.json").exists():  # it was the last fsync: the run is whole
                run = Run.open(tmp_path / "run")
                break
    assert at > 10
    run.close()


def test_a_full_disk_at_a_recovery_is_a_clear_error_and_frees_the_run(tmp_path):
    path = tmp_path / "run"
    make_run(path, 2).close()
    lines = (path / CERTIFICATES).read_bytes()
    (path / CERTIFICATES).write_bytes(lines[:-100])
    with pytest.raises(RunError, match="No space left on device"):
        Run.open(path, files=FaultyFiles(disk_full, 1, armed=True))
    with Run.open(path) as run:
        assert len(run.lines) == 1


def test_every_file_of_a_commit_is_on_the_medium_before_its_name_is(tmp_path):
    """Write, fsync, rename, fsync of the folder; deltas before the checkpoint, the checkpoint before the line."""
    with make_run(tmp_path / "run", 1) as run:
        run.files = files = FaultyFiles(disk_full, armed=True)
        commit(run, finished(1, run.head), 3)
    trace = [point for point in files.trace if "half" not in point]
    for k, point in enumerate(trace):
        if point.startswith(("write", "rename", "append")):
            assert trace[k + 1] == "fsync", trace[k : k + 2]
    assert trace[trace.index("rename step-00000002") - 1] == "fsync"
    renames = [point for point in trace if not point.startswith(("write", "fsync"))]
    assert renames == ["rename round-00000001.safetensors", "rename step-00000002", f"append to {CERTIFICATES}"]
