"""A run directory: one process at a time, nothing half done, nothing of a later version."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic_run import CONFIG, finished, make_run, snapshot

from capibara.consensus.certificate import GENESIS, canonical, seal
from capibara.errors import CertificateError, RunError
from capibara.run.commit import commit
from capibara.run.directory import CERTIFICATES, Run, check_format

HOLD = """
import sys
from capibara.run.directory import Run
run = Run.open(sys.argv[1])
print("open", flush=True)
input()
"""


def lines_of(path: Path) -> list[bytes]:
    return (path / CERTIFICATES).read_bytes().splitlines(keepends=True)


def test_a_run_comes_back_as_it_was_left(tmp_path):
    with make_run(tmp_path / "run", 3) as run:
        lines, head = run.lines, run.head
    before = snapshot(tmp_path / "run")
    with Run.open(tmp_path / "run") as again:
        assert (again.lines, again.head, again.notes) == (lines, head, [])
    assert snapshot(tmp_path / "run") == before


def test_a_new_run_begins_at_genesis(tmp_path):
    with Run.create(tmp_path / "a" / "b", CONFIG) as run:
        assert (run.head, run.lines) == (GENESIS, [])
    assert (tmp_path / "a" / "b" / "config.toml").read_text() == CONFIG


def test_a_directory_with_anything_in_it_is_no_place_for_a_new_run(tmp_path):
    make_run(tmp_path / "run", 0).close()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("run", "notes", "file"):
        before = snapshot(tmp_path)
        with pytest.raises(RunError, match=name):
            Run.create(tmp_path / name, CONFIG)
        assert snapshot(tmp_path) == before


def test_a_process_that_is_using_a_run_is_named_and_kill_9_frees_it(tmp_path):
    make_run(tmp_path / "run", 1).close()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "run"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout and holder.stdout.readline() == "open\n"
        with pytest.raises(RunError, match=rf"in use by process {holder.pid}\b"):
            Run.open(tmp_path / "run")
        os.kill(holder.pid, signal.SIGKILL)
        assert holder.wait() == -signal.SIGKILL
    with Run.open(tmp_path / "run") as run:
        assert len(run.lines) == 1


def test_this_process_is_named_too_and_an_error_frees_the_run(tmp_path):
    with make_run(tmp_path / "run", 1):
        with pytest.raises(RunError, match=rf"process {os.getpid()}\b"):
            Run.open(tmp_path / "run")
    file = tmp_path / "run" / CERTIFICATES
    good = file.read_bytes()
    for bad in (b"nonsense\n", None):
        file.unlink() if bad is None else file.write_bytes(bad)
        with pytest.raises(RunError):
            Run.open(tmp_path / "run")
    file.write_bytes(good)
    Run.open(tmp_path / "run").close()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format_version": 2}', "format_version 2; this capibara knows up to 1. Update"),
        ('{"format_version": "x"}', "damaged"),
        ("{}", "damaged"),
        ("[1]", "damaged"),
        ("", "damaged"),
        (None, "is not a run directory"),
    ],
)
def test_a_later_or_unreadable_format_is_refused_and_untouched(tmp_path, content, message):
    make_run(tmp_path / "run", 1).close()
    form = tmp_path / "run" / "format.json"
    form.unlink() if content is None else form.write_text(content)
    before = snapshot(tmp_path)
    with pytest.raises(RunError, match=message):
        Run.open(tmp_path / "run")
    with pytest.raises(RunError, match=message):
        check_format(tmp_path / "run")
    assert snapshot(tmp_path) == before


def test_a_torn_last_line_is_removed_wherever_it_was_torn(tmp_path):
    run = make_run(tmp_path / "run", 2)
    run.close()
    whole = (tmp_path / "run" / CERTIFICATES).read_bytes()
    third = canonical(seal({"round": 2}, run.head)) + b"\n"
    for torn in {1, len(third) // 2, len(third) - 1}:
        (tmp_path / "run" / CERTIFICATES).write_bytes(whole + third[:torn])
        with Run.open(tmp_path / "run") as again:
            assert again.notes and "had not been written whole" in again.notes[0]
            assert again.lines == run.lines
        assert (tmp_path / "run" / CERTIFICATES).read_bytes() == whole


def test_a_byte_that_became_a_carriage_return_does_not_cut_the_chain(tmp_path):
    make_run(tmp_path / "run", 3).close()
    raw = bytearray((tmp_path / "run" / CERTIFICATES).read_bytes())
    raw[100] = ord("\r")
    (tmp_path / "run" / CERTIFICATES).write_bytes(raw)
    with pytest.raises(CertificateError, match="line 1"):
        Run.open(tmp_path / "run")
    assert (tmp_path / "run" / CERTIFICATES).read_bytes() == raw


@pytest.mark.parametrize(
    ("damage", "place"),
    [
        (lambda lines: [lines[0], lines[1].replace(b'"outvoted"', b'"backed"'), *lines[2:]], "line 2"),
        (lambda lines: [lines[0], *lines[2:]], "line 2"),
        (lambda lines: [lines[0], lines[2], lines[1], lines[3]], "line 2"),
        (lambda lines: [lines[0], lines[0], *lines[1:]], "line 2"),
        (lambda lines: lines[1:], "line 1"),
        (lambda lines: [lines[0], lines[1][:40] + b"\n", *lines[2:]], "line 2"),
        (lambda lines: [lines[0], b"\n", *lines[1:]], "line 2"),
        (lambda lines: [*lines[:3], lines[3][:-1] + b" \n"], "line 4"),
    ],
)
def test_a_broken_chain_is_refused_with_its_line_and_nothing_is_changed(tmp_path, damage, place):
    make_run(tmp_path / "run", 4).close()
    (tmp_path / "run" / CERTIFICATES).write_bytes(b"".join(damage(lines_of(tmp_path / "run"))))
    before = snapshot(tmp_path)
    with pytest.raises(CertificateError, match=rf"rounds\.jsonl {place}\b"):
        Run.open(tmp_path / "run")
    assert snapshot(tmp_path) == before


def test_a_line_that_does_not_follow_is_not_appended(tmp_path):
    with make_run(tmp_path / "run", 1) as run:
        before = snapshot(tmp_path)
        with pytest.raises(CertificateError, match="line 2"):
            run.append(seal({"round": 1}, GENESIS))
        assert snapshot(tmp_path) == before


def test_what_a_stopped_commit_left_is_discarded(tmp_path):
    with make_run(tmp_path / "run", 2) as run:
        unlisted, before = finished(2, run.head), snapshot(tmp_path)
        lines = (tmp_path / "run" / CERTIFICATES).read_bytes()
        commit(run, unlisted, 3)
    (tmp_path / "run" / CERTIFICATES).write_bytes(lines)
    (tmp_path / "run" / "checkpoints" / ".step-00000009.tmp").mkdir()
    (tmp_path / "run" / "deltas" / ".round-00000009.safetensors.tmp").write_text("half")
    with Run.open(tmp_path / "run") as again:
        assert again.notes == ["checkpoints/step-00000003 belonged to a round that was not committed; removed."]
    assert snapshot(tmp_path) == before
    assert not list((tmp_path / "run" / "checkpoints").glob(".*")) + list((tmp_path / "run" / "deltas").glob(".*"))


def test_a_damaged_checkpoint_is_not_taken_for_an_unlisted_one(tmp_path):
    make_run(tmp_path / "run", 2).close()
    file = tmp_path / "run" / "checkpoints" / "step-00000002" / "state.json"
    state = json.loads(file.read_text())
    file.write_text(json.dumps(state | {"head": "f" * 64}))
    with Run.open(tmp_path / "run") as run:
        assert run.notes == []
    assert file.exists()


def test_a_creation_that_was_cut_short_can_be_repeated(tmp_path):
    make_run(tmp_path / "run", 0).close()
    for name in ("format.json", CERTIFICATES, "config.toml"):
        (tmp_path / "run" / name).unlink()
        with pytest.raises(RunError):
            Run.open(tmp_path / "run")
        (tmp_path / "run" / f".{name}.tmp").write_text("ha")
    Run.create(tmp_path / "run", CONFIG).close()
    Run.open(tmp_path / "run").close()
