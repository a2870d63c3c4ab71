"""The command itself, in processes of its own, stopped in every way there is: it goes on to the same last hash."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import tiny_text
from tiny_text import capibara, start

from capibara.run.directory import CERTIFICATES
from capibara.run.verify import verify

pytestmark = pytest.mark.slow

ROUNDS = 8


def head(run: Path) -> str:
    return json.loads((run / CERTIFICATES).read_text().splitlines()[-1])["hash"]


def rounds_on_disk(run: Path) -> int:
    path = run / CERTIFICATES
    return path.read_bytes().count(b"\n") if path.exists() else 0


def checked(run: Path) -> None:
    report = verify(run)
    assert report.ok, report.problems


def flip(file: Path, at: int = -1) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, str]:
    """A folder with text, a configuration and a run that was never stopped; and its last hash."""
    folder = tiny_text.make(tmp_path_factory.mktemp("whole"), rounds=ROUNDS)
    done = capibara("train", folder / "tiny.toml", "--run", folder / "whole", "--attack", "sign_flip:4")
    assert done.returncode == 0, done.stderr
    checked(folder / "whole")
    return folder, head(folder / "whole")


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    """That run, to be damaged; beside the prepared text, as the first one is."""
    shutil.copytree(whole[0] / ".data", tmp_path / ".data")
    return shutil.copytree(whole[0] / "whole", tmp_path / "run")


def go_on(folder: Path, run: Path, **options):
    """Starts the run, or resumes it once there is one."""
    if (run / "format.json").exists():
        return start("resume", run, **options)
    return start("train", folder / "tiny.toml", "--run", run, "--attack", "sign_flip:4", **options)


def await_lock(run: Path, process: subprocess.Popen[str]) -> None:
    lock = run / ".lock"
    while process.poll() is None and not (lock.exists() and lock.read_text() == str(process.pid)):
        time.sleep(0.002)


def stop_at_random(folder: Path, run: Path, number: int, seed: int) -> list[int]:
    """Sends a signal a few times, each somewhere between the start and the next rounds; the exit codes."""
    generator, codes = random.Random(seed), []
    while rounds_on_disk(run) < ROUNDS and len(codes) < 8:
        further = generator.choice((0, 1, 1, 2))
        until = rounds_on_disk(run) + further
        process = go_on(folder, run)
        if number == signal.SIGINT:
            await_lock(run, process)  # before it, Python itself may be the one that is interrupted
        while process.poll() is None and rounds_on_disk(run) < until:
            time.sleep(0.002)
        time.sleep(generator.uniform(0, 0.08) if further else generator.uniform(0, 4))
        process.send_signal(number)
        _, told = process.communicate(timeout=120)
        assert "Traceback" not in told, told
        codes.append(process.returncode)
    return codes


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_anywhere_it_ends_in_the_same_hash(whole, tmp_path, seed):
    folder, expected = whole
    codes = stop_at_random(folder, tmp_path / "run", signal.SIGKILL, seed)
    assert codes.count(-signal.SIGKILL) >= 2, "the kills met a living process"
    done = go_on(folder, tmp_path / "run")
    _, told = done.communicate(timeout=250)
    assert done.returncode == 0, told
    assert head(tmp_path / "run") == expected
    checked(tmp_path / "run")


def test_interrupted_anywhere_it_ends_with_130_and_goes_on_to_the_same_hash(whole, tmp_path):
    folder, expected = whole
    codes = stop_at_random(folder, tmp_path / "run", signal.SIGINT, 3)
    assert codes.count(130) >= 2 and set(codes) <= {130, 0}, codes
    done = go_on(folder, tmp_path / "run")
    _, told = done.communicate(timeout=250)
    assert done.returncode == 0, told
    assert head(tmp_path / "run") == expected
    checked(tmp_path / "run")


def test_an_interrupt_says_how_to_go_on(whole, tmp_path):
    folder, run = whole[0], tmp_path / "run"
    process = start("train", folder / "tiny.toml", "--run", run, "--set", "training.num_rounds=100000")
    while process.poll() is None and rounds_on_disk(run) < 2:
        time.sleep(0.01)
    second = capibara("resume", run)
    assert second.returncode == 1 and f"is in use by process {process.pid}" in second.stderr
    process.send_signal(signal.SIGINT)
    out, told = process.communicate(timeout=120)
    assert process.returncode == 130 and not out
    finished = rounds_on_disk(run)
    last = f"interrupted: Saved after round {finished} of 100000. Go on with: capibara resume {run}"
    assert told.splitlines()[-1] == last


def test_a_flipped_byte_in_a_checkpoint_is_walked_past_and_mended(whole, copy):
    flip(copy / f"checkpoints/step-{ROUNDS:08d}/params.safetensors")
    resumed = capibara("resume", copy)
    assert resumed.returncode == 0, resumed.stderr
    assert f"step-{ROUNDS:08d}/params.safetensors has been changed" in resumed.stderr
    assert f"Round {ROUNDS - 1} was run again from an older checkpoint and reproduced" in resumed.stderr
    assert head(copy) == whole[1]
    checked(copy)


def test_a_disk_that_runs_full_at_a_commit_loses_nothing(whole, copy):
    """The deltas of four nodes do not fit into 60 kB; everything before them does."""
    lines = (copy / CERTIFICATES).read_bytes().splitlines(keepends=True)
    (copy / CERTIFICATES).write_bytes(b"".join(lines[:-2]))
    before = (copy / CERTIFICATES).read_bytes()
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))"
    full = capibara("resume", copy, first=limit)
    assert full.returncode == 1
    error = full.stderr.splitlines()[-1]
    assert error.startswith(f"error: The deltas of round {ROUNDS - 2} could not be written to")
    assert error.endswith(f"then `capibara resume {copy}`.")
    assert (copy / CERTIFICATES).read_bytes() == before
    checked(copy)
    assert capibara("resume", copy).returncode == 0
    assert head(copy) == whole[1]
    checked(copy)


def test_five_refusals_in_a_row_stop_the_run_with_the_evidence(whole, tmp_path):
    """An outer step of 10⁵ throws the model away, which the final gate sees."""
    run = tmp_path / "run"
    far = ("--set", "consensus.outer_learning_rate=1e5", "--set", "training.num_rounds=40")
    done = capibara("train", whole[0] / "tiny.toml", "--run", run, *far)
    assert done.returncode == 1
    assert "error: 5 rounds in a row were refused by the final gate (last: +" in done.stderr
    lines = [json.loads(line) for line in (run / CERTIFICATES).read_text().splitlines()]
    assert [line["outcome"] for line in lines[-5:]] == ["refused"] * 5
    assert all(line["final_gate"]["anchor"]["mean"] > 0 for line in lines[-5:])
    shown = capibara("runs", "show", run)
    assert shown.stdout.count("refused") == sum(line["outcome"] == "refused" for line in lines)
    checked(run)


def test_a_run_without_quorum_goes_on_once_its_nodes_are_mended(whole, tmp_path):
    run = tmp_path / "run"
    broken = ("--attack", "nan", "--set", "consensus.attack_nodes=[0, 1]", "--set", "consensus.max_retries=1")
    done = capibara("train", whole[0] / "tiny.toml", "--run", run, *broken, "--set", "training.num_rounds=2")
    assert done.returncode == 1
    assert "2 of 4 nodes back a commit and 3 are needed (node 0: not_finite, node 1: not_finite)" in done.stderr
    checked(run)
    config = (run / "config.toml").read_text()
    (run / "config.toml").write_text(config.replace("attack_nodes = [0, 1]", "attack_nodes = [0]"))
    resumed = capibara("resume", run, "--json")
    assert resumed.returncode == 0, resumed.stderr
    outcome = json.loads(resumed.stdout)
    assert outcome["named"] == [0] and outcome["rounds"] == 2
    outcomes = [json.loads(line)["outcome"] for line in (run / CERTIFICATES).read_text().splitlines()]
    assert outcomes == ["no_quorum", "committed", "committed"]
    checked(run)
