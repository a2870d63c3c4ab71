"""Rechecks a run from its files alone: every certificate, the chain, every digest, and every vote whose deltas were kept.

    rounds.jsonl ── canonical, hash, previous, order of rounds, θ handed on
       ├── checkpoints/step-N/   every byte, and the digests of θ and of the merged delta that the line names
       └── deltas/round-N        every row's digest, Σ vᵢΔᵢ, and the vote itself

Nothing is written and nothing is trusted, so a problem never stops the check: all of them are reported, each with its
place. Integrity only: who rewrites the whole chain is caught by `expect`, a hash kept elsewhere, and by nothing else.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from capibara.consensus.certificate import GENESIS, check_link, digest_rows, digest_tree, parse_line
from capibara.errors import CapibaraError, CertificateError
from capibara.run.checkpoint import checkpoints, load_checkpoint, load_deltas
from capibara.run.directory import CERTIFICATES, check_format

Replay = Callable[[Mapping[str, Any], dict[str, np.ndarray]], tuple[Any, Any, Any]]
"""`(line, stack of raw deltas, leaves [n, ...]) -> (coefficients[n] or None, backing bool[n], merged delta)`."""

TOLERANCE = 1e-5
"""Of coefficients, and of merged deltas relative to the longest row that counts; the vote is done in float64, the sum of
the rows in float32 (docs/protocol.md, what must hold, 5)."""

UNDONE = "no_quorum"
COUNTED = ("backed", "outvoted")


class Problem(NamedTuple):
    """What does not check, and where: `rounds.jsonl line 4`, `checkpoints/step-00000003/params.safetensors`."""

    place: str
    what: str


class Report(NamedTuple):
    """The outcome of `verify`.

    Attributes:
      path: The run.
      head: Hash of the last certificate that could be read.
      checks: What was checked, one sentence each.
      problems: What does not check; empty in an intact run.
      notes: What was not checked and why, and what a crash may have left.
    """

    path: Path
    head: str
    checks: list[str]
    problems: list[Problem]
    notes: list[str]

    @property
    def ok(self) -> bool:
        """Whether everything checks."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "path": str(self.path),
            "ok": self.ok,
            "head": self.head,
            "checks": self.checks,
            "problems": [problem._asdict() for problem in self.problems],
            "notes": self.notes,
        }


def verify(path: Path | str, expect: str | None = None, replay: Replay | None = None) -> Report:
    """Checks everything in a run directory that a certificate vouches for; reads only, takes no lock.

    Cost: one read of all checkpoints and kept deltas; memory for two copies of one round's deltas.

    Args:
      path: The run directory.
      expect: The hash that the last certificate must have, from wherever it was kept.
      replay: Repeats the vote of a line from its kept deltas; called in order of rounds. None checks digests and sums
        only.

    Raises:
      RunError: If `path` is no run directory or is of a later format.
    """
    path = Path(path)
    check_format(path)
    report = Report(path, GENESIS, [], [], [])
    lines = _check_lines(report)
    report = report._replace(head=next((line["hash"] for line in reversed(lines) if line), GENESIS))
    _check_expected(report, lines, expect)
    known = [(number, line) for number, line in enumerate(lines, 1) if line is not None]
    _check_order(report, known)
    _check_checkpoints(report, [line for _, line in known])
    _check_deltas(report, known, replay)
    return report


def _check_lines(report: Report) -> list[dict[str, Any] | None]:
    """The certificates, None where one cannot be read; a broken line does not hide what is wrong after it."""
    try:
        raw = (report.path / CERTIFICATES).read_bytes()
    except FileNotFoundError:
        report.problems.append(Problem(CERTIFICATES, "is missing."))
        return []
    *whole, torn = raw.split(b"\n")
    lines: list[dict[str, Any] | None] = []
    previous: str | None = GENESIS
    for number, text in enumerate(whole, 1):
        line, place = None, f"{CERTIFICATES} line {number}"
        try:
            line = _with_fields(parse_line(text, number), number)
            if previous is not None:
                check_link(line, previous, number)
        except CertificateError as error:
            report.problems.append(Problem(place, _without(str(error), place)))
        lines.append(line)
        previous = line["hash"] if line else _claimed_hash(text)
    if torn:
        place = f"{CERTIFICATES} line {len(whole) + 1}"
        report.problems.append(Problem(place, "is not whole: it was cut, or a crash tore it. Resuming the run removes it."))
    report.checks.append(f"{len(whole)} certificates: canonical, hash, chain")
    return lines


def _check_expected(report: Report, lines: list[dict[str, Any] | None], expect: str | None) -> None:
    if expect is None:
        report.notes.append(
            "No hash was given to expect: whoever can write the run can rewrite the whole chain, or remove its end."
        )
        return
    report.checks.append("the last hash is the one expected")
    if report.head == expect:
        return
    numbers = [number for number, line in enumerate(lines, 1) if line and line["hash"] == expect]
    if numbers:
        what = f"that is the hash of line {numbers[0]}; {len(lines) - numbers[0]} lines follow it."
    else:
        what = "no line has that hash: lines were removed from the end, or the chain was rewritten."
    report.problems.append(Problem(CERTIFICATES, f"ends in {report.head[:16]}…; {expect[:16]}… was expected: {what}"))


def _check_order(report: Report, known: list[tuple[int, dict[str, Any]]]) -> None:
    """Rounds count up by one, each begins with the θ the one before it ended with, and quorums are what they say."""
    before = None
    for number, line in known:
        wrong = []
        due = 0 if before is None else before["round"] + (before["outcome"] != UNDONE)
        if line["round"] != due:
            wrong.append(f"has round {line['round']}; round {due} is next.")
        if before is not None and line["start_digest"] != _end_digest(before):
            wrong.append("does not begin with the parameters that the line before it ended with.")
        backing, needed = line["quorum"]["backing"], line["quorum"]["needed"]
        if backing != sum(node["reason"] == "backed" for node in line["nodes"]):
            wrong.append(f"counts {backing} backing nodes; its reasons give another number.")
        if (line["outcome"] == UNDONE) != (backing < needed):
            wrong.append(f"has outcome {line['outcome']} with {backing} of {needed} needed nodes.")
        report.problems += [Problem(f"{CERTIFICATES} line {number}", what) for what in wrong]
        before = line
    if known:
        report.checks.append("rounds in order, parameters handed on, quorums")


def _check_checkpoints(report: Report, lines: list[dict[str, Any]]) -> None:
    by_hash = {line["hash"]: k for k, line in enumerate(lines)}
    folders = checkpoints(report.path)
    for folder in folders:
        place = f"checkpoints/{folder.name}"
        try:
            sections, state = load_checkpoint(folder)
        except CertificateError as error:
            file, _, what = str(error).partition(" ")
            report.problems.append(Problem(file, what))
            continue
        except (KeyError, TypeError, OSError) as error:
            report.problems.append(Problem(f"{place}/state.json", f"cannot be used ({error})."))
            continue
        params = digest_tree(sections["params"])[0] if "params" in sections else None
        if params != state.get("params_digest"):
            report.problems.append(Problem(f"{place}/params.safetensors", "does not have the digest in state.json."))
        head = state.get("head")
        if head in by_hash:
            report.problems += _against_line(place, lines[: by_hash[head] + 1], params, sections, state)
        elif head == GENESIS and not lines:
            continue
        elif folder.name == f"step-{_rounds_done(lines) + 1:08d}":
            report.notes.append(
                f"{place} belongs to a certificate that is not there: the run was stopped while it was committing that "
                "round, or the last line was removed. Resuming the run removes the checkpoint."
            )
        else:
            report.problems.append(Problem(place, "belongs to a certificate that is not in this run."))
    report.checks.append(f"{len(folders)} checkpoints: every byte" + (", and the line each belongs to" if lines else ""))


def _against_line(
    place: str, lines: list[dict[str, Any]], params: str | None, sections: dict[str, Any], state: dict[str, Any]
) -> list[Problem]:
    """What a checkpoint says otherwise than the line it belongs to, which is the last of `lines`."""
    problems, line = [], lines[-1]
    if state.get("round") != line["round"] + 1 or not place.endswith(f"{line['round'] + 1:08d}"):
        problems.append(Problem(place, f"is not the checkpoint after round {line['round']}, whose hash it names."))
    if params != _end_digest(line):
        problems.append(
            Problem(f"{place}/params.safetensors", f"does not hold the parameters that round {line['round']} ended with.")
        )
    committed = next((one for one in reversed(lines) if one["outcome"] == "committed"), None)
    if committed and "merged" in sections and digest_tree(sections["merged"])[0] != committed["delta_digest"]:
        problems.append(Problem(f"{place}/merged.safetensors", f"is not the merged delta of round {committed['round']}."))
    return problems


def _check_deltas(report: Report, known: list[tuple[int, dict[str, Any]]], replay: Replay | None) -> None:
    expected = _keeps_deltas(report)
    replayed = kept = 0
    for number, line in known:
        if line["outcome"] == UNDONE:
            continue
        name = f"deltas/round-{line['round']:08d}.safetensors"
        if not (report.path / name).exists():
            if expected:
                report.problems.append(Problem(name, "is missing, although the run keeps its deltas."))
            continue
        kept += 1
        try:
            stack, merged = load_deltas(report.path / name, len(line["nodes"]))
            wrong = _delta_problems(line, stack, merged)
        except CertificateError as error:
            wrong = [_without(str(error), name)]
            stack = merged = {}
        report.problems += [Problem(name, what) for what in wrong]
        if replay is None or wrong:
            continue
        try:
            wrong = _replay_problems(line, stack, merged, replay)
        except CapibaraError as error:
            wrong = [f"cannot be voted on again ({error})"]
        report.problems += [Problem(f"{CERTIFICATES} line {number}", f"its vote, repeated from {name}: {w}") for w in wrong]
        replayed += 1
    if not kept:
        report.notes.append("No deltas were kept (keep_deltas = false), so no vote could be repeated.")
        return
    report.checks.append(f"kept deltas of {kept} rounds: every row's digest, and that the coefficients give the merge")
    if replay is not None:
        report.checks.append(f"{replayed} votes repeated")


def _delta_problems(line: Mapping[str, Any], stack: dict[str, np.ndarray], merged: dict[str, np.ndarray]) -> list[str]:
    nodes, wrong = line["nodes"], []
    digests = digest_rows(stack, len(nodes))
    for i, node in enumerate(nodes):
        if node["digest"] is not None and digests[i] != node["digest"]:
            wrong.append(f"the row of node {node['id']} is not the one that the certificate names.")
        if node["digest"] is None and any(leaf[i].any() for leaf in stack.values()):
            wrong.append(f"has a row for node {node['id']}, which delivered nothing ({node['reason']}).")
    if digest_tree(merged)[0] != line["delta_digest"]:
        wrong.append("the merged delta is not the one that the certificate names.")
    if wrong or any(node["coefficient"] is None for node in nodes):
        return wrong
    v = np.array([node["coefficient"] for node in nodes], np.float64)
    if (v < 0).any() or abs(max(0.0, 1 - v.sum()) - line["coefficient_start"]) > TOLERANCE:
        wrong.append(f"the certificate's coefficients {v.tolist()} and {line['coefficient_start']} are not shares of one.")
    counted = [i for i in range(len(nodes)) if v[i] != 0]
    if _distance(_combination(v, stack), merged) > TOLERANCE * _longest(stack, counted):
        wrong.append("the merged delta is not the sum that the certificate's coefficients give.")
    return wrong


def _replay_problems(
    line: Mapping[str, Any], stack: dict[str, np.ndarray], merged: dict[str, np.ndarray], replay: Replay
) -> list[str]:
    coefficients, backing, delta = replay(line, stack)
    nodes, wrong = line["nodes"], []
    for node, backs in zip(nodes, np.asarray(backing), strict=True):
        if node["reason"] in COUNTED and bool(backs) != (node["reason"] == "backed"):
            wrong.append(f"node {node['id']} is {'backed' if backs else 'outvoted'}, the line says {node['reason']}.")
    if coefficients is not None and all(node["coefficient"] is not None for node in nodes):
        recorded = np.array([node["coefficient"] for node in nodes])
        gap = np.abs(np.asarray(coefficients) - recorded)
        if not gap.max() <= TOLERANCE:
            i = int(np.argmax(gap))
            wrong.append(f"node {nodes[i]['id']} gets {np.asarray(coefficients)[i]:.6g}, the line says {recorded[i]:.6g}.")
    counted = [i for i, node in enumerate(nodes) if node["reason"] in COUNTED]
    plain = {name: np.asarray(leaf) for name, leaf in delta.items()}
    if plain.keys() != merged.keys() or not _distance(plain, merged) <= TOLERANCE * _longest(stack, counted):
        wrong.append("the merged delta comes out differently.")
    return wrong


def _combination(v: np.ndarray, stack: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Σ vᵢ Δᵢ in float64; a row with coefficient 0 contributes nothing, whatever it holds."""
    used = np.flatnonzero(v)
    return {
        name: sum((v[i] * leaf[i].astype(np.float64) for i in used), np.zeros(leaf.shape[1:]))
        for name, leaf in stack.items()
    }


def _distance(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    gaps = (np.subtract(a[name], b[name], dtype=np.float64).ravel() for name in b)
    return float(np.sqrt(sum(gap @ gap for gap in gaps)))


def _longest(stack: dict[str, np.ndarray], rows: list[int]) -> float:
    """The largest norm of the given rows; float64 holds the squares of any float32."""
    squares = [sum(float(np.sum(np.square(leaf[i], dtype=np.float64))) for leaf in stack.values()) for i in rows]
    return float(np.sqrt(max(squares, default=0.0)))


def _with_fields(line: dict[str, Any], number: int) -> dict[str, Any]:
    """The line, if it has the fields that the checks after this one read; its hash proves nothing about them."""
    place = f"{CERTIFICATES} line {number}"
    wanted = {"round": int, "outcome": str, "start_digest": str, "nodes": list, "quorum": dict}
    if line.get("outcome") != UNDONE:
        wanted |= {"delta_digest": str, "merged_digest": str}
    for field, kind in wanted.items():
        if not isinstance(line.get(field), kind):
            raise CertificateError(f"{place} has no usable `{field}`.")
    node_fields = {"id", "reason", "digest", "coefficient"}
    if not all(isinstance(node, dict) and node_fields <= node.keys() for node in line["nodes"]):
        raise CertificateError(f"{place} has no usable `nodes`.")
    if not all(isinstance(line["quorum"].get(field), int) for field in ("backing", "needed")):
        raise CertificateError(f"{place} has no usable `quorum`.")
    return line


def _claimed_hash(text: bytes) -> str | None:
    """The hash that a line claims which does not check, so that the line after it is not blamed too."""
    try:
        return str(json.loads(text)["hash"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _end_digest(line: Mapping[str, Any]) -> str:
    return line["merged_digest"] if line["outcome"] == "committed" else line["start_digest"]


def _rounds_done(lines: list[dict[str, Any]]) -> int:
    return sum(line["outcome"] != UNDONE for line in lines)


def _keeps_deltas(report: Report) -> bool:
    try:
        return bool(tomllib.loads((report.path / "config.toml").read_text())["consensus"]["keep_deltas"])
    except KeyError:
        return False
    except (OSError, ValueError, TypeError) as error:
        report.problems.append(Problem("config.toml", f"cannot be read ({error})."))
        return False


def _without(sentence: str, place: str) -> str:
    return sentence.removeprefix(place).lstrip()
