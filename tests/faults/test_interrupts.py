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


LATE = {
    "clean-up": "atexit.register(lambda: (os.kill(os.getpid(), signal.SIGINT), time.sleep(0.05)))",
    "a thread": "threading.Thread(target=lambda: (threading.main_thread().join(), "
    "os.kill(os.getpid(), signal.SIGINT))).start()",
}
"""An interrupt while a process ends: in a clean-up, as JAX has one, and while Python waits for threads."""


@pytest.mark.parametrize("late", LATE)
@pytest.mark.parametrize(("ours", "expected"), [("end_process(0)", ""), ("sys.exit(0)", "KeyboardInterrupt")])
def test_an_interrupt_while_the_process_ends_tells_nothing(ours, expected, late):
    """Without ours it prints a traceback."""
    done = ended(f"{LATE[late]}\n{ours}\n")
    assert done.returncode == 0
    assert done.stderr == "" if not expected else expected in done.stderr


def test_an_interrupt_while_a_program_is_compiled_ends_the_process_with_130():
    """XLA compiles in a thread of its own; freeing its client meanwhile is a segmentation fault in JAX 0.10.2."""
    done = ended(
        "import jax, jax.numpy as jnp\n"
        "def long(x):\n"
        "    for i in range(600): x = jnp.sin(x @ x) + i\n"
        "    return x\n"
        "lowered = jax.jit(long).lower(jnp.ones((64, 64)))\n"
        "threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "try:\n"
        "    lowered.compile()\n"
        "except KeyboardInterrupt:\n"
        "    print('told')\n"
        "    end_process(130)\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "told\n", "")


def ended(code: str) -> subprocess.CompletedProcess[str]:
    first = (
        "import atexit, os, signal, sys, threading, time\n"
        "from capibara.cli_output import end_process\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    )
    return subprocess.run([sys.executable, "-c", first + code], capture_output=True, text=True)
