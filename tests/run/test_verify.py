"""`verify` names the place of every change, and finds nothing in a run that nobody touched."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from synthetic_run import NODES, finished, make_run, merge, replay, snapshot

from capibara.consensus.certificate import GENESIS, canonical, seal
from capibara.errors import RunError
from capibara.files import read_tensors, tensors_to_bytes
from capibara.run.checkpoint import _state_digest
from capibara.run.commit import commit
from capibara.run.directory import CERTIFICATES
from capibara.run.verify import Report, verify

REASONS = ["backed", "backed", "outvoted"]
CHECKPOINT = "checkpoints/step-00000003"
DELTAS = "deltas/round-00000002.safetensors"


@pytest.fixture
def run(tmp_path) -> Path:
    """A closed run of four rounds, three checkpoints."""
    make_run(tmp_path / "run", 4).close()
    return tmp_path / "run"


def places(report: Report) -> list[str]:
    return [problem.place for problem in report.problems]


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def rewrite(path: Path, change) -> None:
    """Changes the certificates and seals the whole chain anew, as who can write the run can."""
    previous, lines = GENESIS, []
    for number, raw in enumerate((path / CERTIFICATES).read_bytes().splitlines()):
        line = json.loads(raw)
        change(number, line)
        lines.append(seal({k: v for k, v in line.items() if k not in ("hash", "previous")}, previous))
        previous = lines[-1]["hash"]
    (path / CERTIFICATES).write_bytes(b"".join(canonical(line) + b"\n" for line in lines))


def put_right(folder: Path, head: str | None = None) -> None:
    """Makes a changed checkpoint agree with itself again, as who can write the run can."""
    from blake3 import blake3

    from capibara.consensus.certificate import digest_tree

    state = json.loads((folder / "state.json").read_text())
    state["digests"] = {name: blake3((folder / name).read_bytes()).hexdigest() for name in state["digests"]}
    state["params_digest"] = digest_tree(read_tensors(folder / "params.safetensors"))[0]
    state["head"] = head or state["head"]
    (folder / "state.json").write_text(json.dumps(state | {"digest": _state_digest(state)}))


def change_leaf(file: Path, leaf: str, by: float) -> None:
    tensors = dict(read_tensors(file))
    tensors[leaf] = tensors[leaf] + np.float32(by)
    file.write_bytes(tensors_to_bytes(tensors))


def test_an_untouched_run_is_good_and_stays_untouched(run):
    before = snapshot(run)
    head = json.loads((run / CERTIFICATES).read_bytes().splitlines()[-1])["hash"]
    report = verify(run, expect=head, replay=replay)
    assert report.ok and not report.problems and not report.notes
    assert (report.lines, report.checkpoints, report.kept, report.replayed, report.head) == (4, 3, 4, 4, head)
    assert json.loads(json.dumps(report.to_json()))["ok"] is True
    assert snapshot(run) == before


def test_it_takes_no_lock(tmp_path):
    with make_run(tmp_path / "run", 1):
        assert verify(tmp_path / "run").ok


@pytest.mark.parametrize(
    ("damage", "place"),
    [
        (lambda lines: [lines[0], lines[1].replace(b'"coefficient":0.5', b'"coefficient":0.25', 1), *lines[2:]], 2),
        (lambda lines: [lines[0], *lines[2:]], 2),
        (lambda lines: [*lines[:3], lines[3][:-30]], 4),
        (lambda lines: [*lines[:3], lines[3][:-30] + b"\n"], 4),
        (lambda lines: [*lines[:2], b"nonsense\n", lines[3]], 3),
        (lambda lines: lines[1:], 1),
    ],
)
def test_a_changed_removed_or_cut_line_is_named(run, damage, place):
    lines = (run / CERTIFICATES).read_bytes().splitlines(keepends=True)
    (run / CERTIFICATES).write_bytes(b"".join(damage(lines)))
    assert places(verify(run))[0] == f"rounds.jsonl line {place}"


def test_a_changed_line_is_blamed_and_its_neighbours_are_not(run):
    lines = (run / CERTIFICATES).read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b'"backing":2', b'"backing":3')
    (run / CERTIFICATES).write_bytes(b"".join(lines))
    report = verify(run, replay=replay)
    assert places(report) == ["rounds.jsonl line 2"]
    assert (report.lines, report.replayed) == (4, 3)
    assert "cannot be compared" in " ".join(report.notes)


def test_lines_in_another_order_are_named(run):
    lines = (run / CERTIFICATES).read_bytes().splitlines(keepends=True)
    (run / CERTIFICATES).write_bytes(b"".join([lines[0], lines[2], lines[1], lines[3]]))
    found = set(places(verify(run)))
    assert {"rounds.jsonl line 2", "rounds.jsonl line 3", "rounds.jsonl line 4"} <= found


def test_what_lies_outside_the_hash_may_change(run):
    raw = (run / CERTIFICATES).read_bytes()
    (run / CERTIFICATES).write_bytes(raw.replace(b'"train_s":0.25', b'"train_s":9.25'))
    assert verify(run, replay=replay).ok


def test_every_byte_of_every_line_counts(run):
    raw = (run / CERTIFICATES).read_bytes()
    ends = [i for i, byte in enumerate(raw) if byte == ord("\n")]
    for place in range(5, len(raw) - 30, 97):
        data = bytearray(raw)
        data[place] ^= 2
        if b'"timing"' in data[raw.rindex(b"{", 0, place + 1) - 10 : place]:
            continue
        (run / CERTIFICATES).write_bytes(data)
        number = 1 + sum(end < place for end in ends)
        assert f"rounds.jsonl line {number}" in places(verify(run)), place


def test_an_expected_hash_shows_a_removed_end_and_a_rewritten_chain(run):
    lines = (run / CERTIFICATES).read_bytes().splitlines(keepends=True)
    head = json.loads(lines[-1])["hash"]
    assert verify(run, expect=head).ok
    earlier = verify(run, expect=json.loads(lines[1])["hash"])
    assert places(earlier) == ["rounds.jsonl"]
    assert "the hash of line 2; 2 lines follow it" in earlier.problems[0].what
    (run / CERTIFICATES).write_bytes(b"".join(lines[:3]))
    report = verify(run, expect=head)
    assert places(report) == ["rounds.jsonl"]
    assert "no line has that hash" in report.problems[0].what
    assert verify(run).ok, "without a hash, a run without its end is a run that was stopped there"
    assert "step-00000004 belongs to a certificate that is not there" in " ".join(verify(run).notes)


@pytest.mark.parametrize("name", ["params", "anchor", "kept", "merged"])
@pytest.mark.parametrize("place", [3, 30, -1])
def test_one_flipped_bit_of_a_checkpoint_is_named(run, name, place):
    flip(run / CHECKPOINT / f"{name}.safetensors", place)
    report = verify(run, replay=replay)
    assert places(report) == [f"{CHECKPOINT}/{name}.safetensors"]
    assert report.checkpoints == 2


def test_one_flipped_bit_of_a_state_is_named(run):
    for place in (0, 40, -3):
        flip(run / CHECKPOINT / "state.json", place)
        assert places(verify(run)) == [f"{CHECKPOINT}/state.json"]
        flip(run / CHECKPOINT / "state.json", place)
    (run / CHECKPOINT / "state.json").unlink()
    assert places(verify(run)) == [f"{CHECKPOINT}/state.json"]


@pytest.mark.parametrize("content", ["[]", "{}", '"x"', "nonsense", '{"digest": 1}'])
def test_a_state_of_another_kind_is_named(run, content):
    (run / CHECKPOINT / "state.json").write_text(content)
    assert places(verify(run)) == [f"{CHECKPOINT}/state.json"]


@pytest.mark.parametrize("name", ["params", "merged"])
def test_a_checkpoint_that_agrees_with_itself_must_also_agree_with_its_line(run, name):
    change_leaf(run / CHECKPOINT / f"{name}.safetensors", "head", 1.0)
    put_right(run / CHECKPOINT)
    assert places(verify(run)) == [f"{CHECKPOINT}/{name}.safetensors"]


def test_a_checkpoint_of_another_round_or_run_is_named(run):
    lines = [json.loads(raw) for raw in (run / CERTIFICATES).read_bytes().splitlines()]
    put_right(run / CHECKPOINT, head=lines[1]["hash"])
    assert set(places(verify(run))) == {
        CHECKPOINT, f"{CHECKPOINT}/params.safetensors", f"{CHECKPOINT}/merged.safetensors"
    }  # fmt: skip
    for head in ("f" * 64, GENESIS):
        put_right(run / CHECKPOINT, head=head)
        assert places(verify(run)) == [CHECKPOINT]


def test_one_flipped_bit_of_kept_deltas_is_named(run):
    size = (run / DELTAS).stat().st_size
    for place in (0, 9, 60, size // 2, size - 90, size - 1):
        flip(run / DELTAS, place)
        report = verify(run, replay=replay)
        assert set(places(report)) == {DELTAS}, place
        assert report.replayed == 3
        flip(run / DELTAS, place)
    assert verify(run, replay=replay).ok


def test_missing_deltas_are_named(run):
    (run / DELTAS).unlink()
    assert places(verify(run)) == [DELTAS]
    for file in (run / "deltas").glob("*"):
        file.unlink()
    assert len(places(verify(run))) == 4, "config.toml says that they are kept"
    (run / "config.toml").write_text("[consensus]\nkeep_deltas = false\n")
    report = verify(run)
    assert report.ok and "no vote could be repeated" in " ".join(report.notes)


def test_deltas_of_no_certificate_are_named(run):
    (run / "deltas" / "round-00000009.safetensors").write_bytes((run / DELTAS).read_bytes())
    assert places(verify(run)) == ["deltas/round-00000009.safetensors"]


def test_a_row_of_a_node_that_delivered_nothing_must_be_zero(tmp_path):
    done = finished(0, GENESIS)
    nodes = [*done.line["nodes"][:2], done.line["nodes"][2] | {"reason": "late", "digest": None}]
    with make_run(tmp_path / "run", 0) as run:
        commit(run, finished(0, GENESIS, nodes=nodes), 3)
    (problem,) = verify(tmp_path / "run").problems
    assert problem.place == "deltas/round-00000000.safetensors"
    assert "node 2, which delivered nothing (late)" in problem.what


def test_coefficients_that_do_not_give_the_merge_are_named(run):
    """Sealed anew: the chain is whole, the numbers are not."""

    def change(number, line):
        if number == 2:
            line["nodes"][0]["coefficient"], line["nodes"][1]["coefficient"] = 0.6, 0.4

    rewrite(run, change)
    for folder in (run / "checkpoints").iterdir():
        lines = [json.loads(raw) for raw in (run / CERTIFICATES).read_bytes().splitlines()]
        put_right(folder, head=lines[int(folder.name[-8:]) - 1]["hash"])
    (problem,) = verify(run).problems
    assert problem.place == DELTAS and "not the sum that the certificate's coefficients give" in problem.what


@pytest.mark.parametrize(
    ("outcome", "what"),
    [
        ((["backed"] * 3, np.array([0.5, 0.5, 0.0]), None), "node 2 is backed, the line says outvoted"),
        ((REASONS, np.array([0.5, 0.50002, 0.0]), None), "node 1 gets 0.50002, the line says 0.5"),
        ((REASONS, np.array([np.nan, 0.5, 0.0]), None), "node 0 gets nan"),
        ((REASONS, None, 1e-3), "the merged delta comes out differently"),
    ],
)
def test_a_vote_that_comes_out_otherwise_is_named(run, outcome, what):
    reasons, coefficients, shift = outcome

    def other(line, stack):
        if line["round"] != 2:
            return replay(line, stack)
        return reasons, coefficients, {name: leaf + np.float32(shift or 0) for name, leaf in merge(stack).items()}

    report = verify(run, replay=other)
    assert places(report) == ["rounds.jsonl line 3"]
    assert what in report.problems[0].what and DELTAS in report.problems[0].what
    assert report.replayed == 3


def test_rounding_of_another_machine_is_no_problem(run):
    def nearly(line, stack):
        reasons, v, delta = replay(line, stack)
        return reasons, v + 1e-9, {name: np.nextafter(leaf, np.float32(9)) for name, leaf in delta.items()}

    assert verify(run, replay=nearly).ok


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda line: line.update(round=5), "has round 5; round 2 is next"),
        (lambda line: line.update(start_digest="0" * 64), "does not begin with the parameters"),
        (lambda line: line["quorum"].update(backing=3), "counts 3 backing nodes"),
        (lambda line: line["quorum"].update(needed=3), "has outcome committed with 2 of 3 needed nodes"),
        (lambda line: line.pop("nodes"), "has no usable `nodes`"),
        (lambda line: line.update(nodes=[1]), "has no usable `nodes`"),
        (lambda line: line.update(quorum={}), "has no usable `quorum`"),
        (lambda line: line.update(round="2"), "has no usable `round`"),
    ],
)
def test_a_line_that_contradicts_itself_or_its_neighbours_is_named(run, change, what):
    """Sealed anew by somebody who can write the run."""
    rewrite(run, lambda number, line: change(line) if number == 2 else None)
    found = [problem.what for problem in verify(run).problems if problem.place == "rounds.jsonl line 3"]
    assert any(what in one for one in found)


def test_a_refused_round_hands_on_what_it_began_with(tmp_path):
    with make_run(tmp_path / "run", 1) as run:
        start = run.lines[0]["merged_digest"]
        done = finished(1, run.head, outcome="refused")
        assert done.line["start_digest"] == start and done.sections is not None
        before = finished(0, GENESIS).sections
        assert before is not None
        kept = done.sections | {"params": before["params"], "merged": before["merged"]}
        commit(run, done._replace(sections=kept), 3)
        failed = {"round": 2, "start_digest": start, "outcome": "no_quorum", "quorum": {"needed": 3, "backing": 2}}
        line = seal(done.line | failed | {"delta_digest": None, "merged_digest": None}, run.head)
        commit(run, done._replace(line=line, sections=None, rows=None), 3)
    report = verify(tmp_path / "run", replay=replay)
    assert report.ok, report.problems
    assert (report.lines, report.kept, report.checkpoints) == (3, 2, 2)


def test_a_run_without_certificates_is_checked_too(tmp_path):
    from capibara.run.checkpoint import save_checkpoint

    with make_run(tmp_path / "run", 0) as run:
        save_checkpoint(run, 7, {"params": {"w": np.ones(NODES)}}, {"head": run.head, "step": 7})
    assert verify(tmp_path / "run").checkpoints == 1
    flip(tmp_path / "run" / "checkpoints" / "step-00000007" / "params.safetensors", -1)
    assert places(verify(tmp_path / "run")) == ["checkpoints/step-00000007/params.safetensors"]


def test_no_run_is_an_error_and_no_report(tmp_path):
    with pytest.raises(RunError, match="is not a run directory"):
        verify(tmp_path)


def test_a_missing_file_of_certificates_is_named(run):
    (run / CERTIFICATES).unlink()
    assert places(verify(run))[0] == CERTIFICATES
