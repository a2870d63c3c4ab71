"""Ctrl-C while a round is being committed: it waits, and nothing is half done."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from faulty import FaultyFiles
from synthetic_run import finished, make_run, snapshot

from capibara.run.commit import commit
from capibara.run.directory import Run
from capibara.runtime import interrupts_wait


@pytest.fixture(autouse=True)
def interrupts_raise():
    """Also where the tests run in the background of a shell, which ignores interrupts there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press() -> None:
    """Ctrl-C."""
    signal.raise_signal(signal.SIGINT)


def committed(path: Path, files: FaultyFiles) -> Run:
    """A run of two rounds whose second is committed under `files`."""
    run = make_run(path, 1, files=files)
    files.armed = True
    commit(run, finished(1, run.head), keep_checkpoints=1)
    return run


def test_an_interrupt_at_any_point_of_a_commit_arrives_when_all_of_it_is_on_disk(tmp_path):
    calm = FaultyFiles(press)
    with committed(tmp_path / "calm", calm) as run:
        head = run.head
    expected = snapshot(tmp_path / "calm")
    assert len(calm.trace) > 20
    for at in range(1, len(calm.trace) + 1):
        path = tmp_path / f"at-{at}"
        with pytest.raises(KeyboardInterrupt):
            committed(path, FaultyFiles(press, at))
        assert snapshot(path) == expected, calm.trace[at - 1]
    assert head in expected["rounds.jsonl"].decode()


def test_several_interrupts_arrive_as_one_and_the_next_is_not_held():
    after = []
    with pytest.raises(KeyboardInterrupt), interrupts_wait():
        press()
        press()
        after.append("went on")
    assert after == ["went on"]
    with pytest.raises(KeyboardInterrupt):
        press()


def test_a_failure_is_told_before_the_interrupt_that_came_with_it():
    with pytest.raises(OSError, match="full"), interrupts_wait():
        press()
        raise OSError("full")


def test_ignored_interrupts_stay_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interrupts_wait():
        press()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.parametrize(("ours", "expected"), [("exit_undisturbed()", ""), ("pass", "KeyboardInterrupt")])
def test_an_interrupt_while_the_process_ends_tells_nothing(ours, expected):
    """A clean-up registered before ours, as JAX's is, is interrupted; without ours that prints a traceback."""
    code = (
        "import atexit, os, signal, time\n"
        "from capibara.runtime import exit_undisturbed\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "atexit.register(lambda: (os.kill(os.getpid(), signal.SIGINT), time.sleep(0.05)))\n"
        f"{ours}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == "" if not expected else expected in done.stderr
