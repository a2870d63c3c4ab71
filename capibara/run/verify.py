"""Rechecks a run from its files alone: certificates, their chain, every digest, every vote whose deltas were kept.

    rounds.jsonl ── canonical, hash, previous, order of rounds, θ handed on
       ├── checkpoints/step-N/   every byte, and the digests of θ and of the merged delta that the line names
       └── deltas/round-N        every row's digest, Σ vᵢΔᵢ, and the vote itself

Nothing is written and nothing is trusted, so a problem never stops the check: all of them are reported, each with its
place. Integrity only: who rewrites the whole chain is caught by `expect`, a hash kept elsewhere, and by nothing else.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from capibara.consensus.certificate import GENESIS, check_link, digest_tree, parse_line
from capibara.errors import CapibaraError, CertificateError
from capibara.run.checkpoint import checkpoints, load_checkpoint, load_deltas
from capibara.run.directory import CERTIFICATES, SOLO, check_format
from capibara.run.verify_votes import Replay, delta_problems, replay_problems

UNDONE = "no_quorum"


@dataclass(frozen=True)
class Problem:
    """What does not check, and where: `rounds.jsonl line 4`, `checkpoints/step-00000003/params.safetensors`."""

    place: str
    what: str


@dataclass
class Report:
    """The outcome of `verify`.

    Attributes:
      lines: Certificates in the run.
      checkpoints: Checkpoints whose every byte checks.
      kept: Rounds whose deltas were kept.
      replayed: Votes that were repeated and agreed.
      head: Hash of the last certificate that could be read.
      problems: What does not check; empty in an intact run.
      notes: What was not checked and why, and what a crash may have left.
    """

    lines: int = 0
    checkpoints: int = 0
    kept: int = 0
    replayed: int = 0
    head: str = GENESIS
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether everything checks."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        return {"ok": self.ok} | asdict(self)

    def blame(self, place: str, *sentences: str) -> None:
        """Adds problems that all have the same place."""
        self.problems += [Problem(place, sentence.removeprefix(place).strip()) for sentence in sentences]


def verify(path: Path | str, *, expect: str | None = None, replay: Replay | None = None) -> Report:
    """Checks everything in a run directory that a certificate vouches for; reads only, takes no lock.

    Cost: one read of all checkpoints and kept deltas; memory for one checkpoint, or two copies of a round's deltas.

    Args:
      path: The run directory; it may be in use.
      expect: The hash that the last certificate must have, from wherever it was kept: what makes the check one of more
        than consistency.
      replay: Repeats the vote of a line from its kept deltas; called in order of rounds. None checks digests and sums
        only.

    Raises:
      RunError: If `path` is no run directory or is of a later format.
    """
    path, report = Path(path), Report()
    check_format(path)
    lines = _check_lines(path, report)
    known = {number: line for number, line in enumerate(lines, 1) if line is not None}
    report.lines = len(lines)
    if (path / SOLO).is_file():
        report.notes.append("This is one model of UnifiedTrainer: it has checkpoints and no votes.")
    elif not lines:
        report.notes.append("No round has been finished yet, so there is nothing to check but the files.")
    report.head = next((line["hash"] for line in reversed(known.values())), GENESIS)
    _check_expected(lines, expect, report)
    _check_order(known, report)
    _check_checkpoints(path, list(known.values()), report)
    _check_deltas(path, known, replay, report)
    return report


def _check_lines(path: Path, report: Report) -> list[dict[str, Any] | None]:
    """The certificates, None where one cannot be read; a broken line does not hide what is wrong after it."""
    try:
        raw = (path / CERTIFICATES).read_bytes()
    except FileNotFoundError:
        report.blame(CERTIFICATES, "is missing.")
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
            report.blame(place, str(error))
        lines.append(line)
        previous = line["hash"] if line else _claimed_hash(text)
    if torn:
        report.blame(
            f"{CERTIFICATES} line {len(whole) + 1}",
            "is not whole: it was cut, or a crash tore it. Resuming the run removes it.",
        )
    return lines


def _check_expected(lines: list[dict[str, Any] | None], expect: str | None, report: Report) -> None:
    if expect is None and lines:
        report.notes.append(
            "No hash was given to expect: whoever can write the run can rewrite the whole chain, or remove its end."
        )
    if expect in (None, report.head):
        return
    numbers = [number for number, line in enumerate(lines, 1) if line and line["hash"] == expect]
    if numbers:
        what = f"that is the hash of line {numbers[0]}; {len(lines) - numbers[0]} lines follow it."
    else:
        what = "no line has that hash: lines were removed from the end, or the chain was rewritten."
    report.blame(CERTIFICATES, f"ends in {report.head}, expected {expect}: {what}")


def _check_order(known: dict[int, dict[str, Any]], report: Report) -> None:
    """Rounds count up by one, each begins with the θ the one before it ended with, and quorums are what they say."""
    for number, line in known.items():
        wrong = []
        before = known.get(number - 1)  # None where it cannot be read: then it has been blamed, and this line is not
        due = 0 if before is None else before["round"] + (before["outcome"] != UNDONE)
        if line["round"] != due and (before is not None or number == 1):
            wrong.append(f"has round {line['round']}; round {due} is next.")
        if before is not None and line["start_digest"] != _end_digest(before):
            wrong.append("does not begin with the parameters that the line before it ended with.")
        backing, needed = line["quorum"]["backing"], line["quorum"]["needed"]
        if backing != sum(node["reason"] == "backed" for node in line["nodes"]):
            wrong.append(f"counts {backing} backing nodes; its reasons give another number.")
        if (line["outcome"] == UNDONE) != (backing < needed):
            wrong.append(f"has outcome {line['outcome']} with {backing} of {needed} needed nodes.")
        report.blame(f"{CERTIFICATES} line {number}", *wrong)


def _check_checkpoints(path: Path, lines: list[dict[str, Any]], report: Report) -> None:
    by_hash = {line["hash"]: k for k, line in enumerate(lines)}
    done = sum(line["outcome"] != UNDONE for line in lines)
    for folder in checkpoints(path):
        place, before = f"checkpoints/{folder.name}", len(report.problems)
        try:
            sections, state = load_checkpoint(folder)
            params, head = digest_tree(sections["params"])[0], state["head"]
            if params != state["params_digest"]:
                report.blame(f"{place}/params.safetensors", "does not have the digest in state.json.")
        except CertificateError as error:
            report.blame(*str(error).split(" ", 1))
            continue
        except (KeyError, TypeError, AttributeError, OSError) as error:
            report.blame(f"{place}/state.json", f"cannot be used ({error!r}).")
            continue
        if head in by_hash:
            _check_against_line(place, lines[: by_hash[head] + 1], params, sections, report)
        elif len(lines) < report.lines:
            report.notes.append(f"{place} cannot be compared with its certificate: not every line can be read.")
        elif lines and folder.name != f"step-{done + 1:08d}" or not lines and head != GENESIS and done:
            report.blame(place, "belongs to a certificate that is not in this run.")
        elif head != GENESIS:
            report.notes.append(
                f"{place} belongs to a certificate that is not there: the run was stopped while it was committing that "
                "round, or the last line was removed. Resuming the run removes the checkpoint."
            )
        report.checkpoints += len(report.problems) == before


def _check_against_line(
    place: str, lines: list[dict[str, Any]], params: str, sections: dict[str, Any], report: Report
) -> None:
    """What a checkpoint holds otherwise than the line it belongs to, the last of `lines`, says."""
    last = lines[-1]["round"]
    if not place.endswith(f"step-{last + 1:08d}"):
        report.blame(place, f"names the hash of round {last}, whose checkpoint is step-{last + 1:08d}.")
    if params != _end_digest(lines[-1]):
        report.blame(f"{place}/params.safetensors", f"does not hold the parameters that round {last} ended with.")
    committed = next((line for line in reversed(lines) if line["outcome"] == "committed"), None)
    if committed and digest_tree(sections.get("merged", {}))[0] != committed["delta_digest"]:
        report.blame(f"{place}/merged.safetensors", f"is not the merged delta of round {committed['round']}.")


def _check_deltas(path: Path, known: dict[int, dict[str, Any]], replay: Replay | None, report: Report) -> None:
    voted = {line["round"]: (number, line) for number, line in known.items() if line["outcome"] != UNDONE}
    names = {name.name for name in (path / "deltas").glob("round-*.safetensors")}
    expected = bool(names) or _keeps_deltas(path, report)
    for round_, (number, line) in voted.items():
        name = f"round-{round_:08d}.safetensors"
        place = f"deltas/{name}"
        if name not in names:
            if expected:
                report.blame(place, "is missing, although the run keeps its deltas.")
            continue
        names.remove(name)
        report.kept += 1
        try:
            stack, merged = load_deltas(path / place, len(line["nodes"]))
            wrong = delta_problems(line, stack, merged)
            report.blame(place, *wrong)
            if wrong or replay is None:
                continue
            wrong = replay_problems(line, stack, merged, replay)
            report.blame(f"{CERTIFICATES} line {number}", *(f"its vote, repeated from {place}: {w}" for w in wrong))
            report.replayed += not wrong
        except CapibaraError as error:
            report.blame(place, str(error))
    for name in sorted(names):
        if len(known) < report.lines:
            report.notes.append(f"deltas/{name} cannot be compared with its certificate: not every line can be read.")
        elif voted and name != f"round-{max(voted) + 1:08d}.safetensors":
            report.blame(f"deltas/{name}", "belongs to a certificate that is not in this run.")
        else:
            report.notes.append(f"deltas/{name} belongs to a round that is not committed; resuming removes it.")
    if voted and not report.kept and not expected:
        report.notes.append("No deltas were kept (keep_deltas = false), so no vote could be repeated.")


def _with_fields(line: dict[str, Any], number: int) -> dict[str, Any]:
    """The line, if it has the fields that the checks after this one read; its hash proves nothing about them."""
    place = f"{CERTIFICATES} line {number}"
    wanted = {"round": int, "outcome": str, "start_digest": str, "nodes": list, "quorum": dict}
    if line.get("outcome") != UNDONE:
        wanted |= {"delta_digest": str, "merged_digest": str}
    for name, kind in wanted.items():
        if not isinstance(line.get(name), kind):
            raise CertificateError(f"{place} has no usable `{name}`.")
    node_fields = {"id", "reason", "digest", "coefficient"}
    if not all(isinstance(node, dict) and node_fields <= node.keys() for node in line["nodes"]):
        raise CertificateError(f"{place} has no usable `nodes`.")
    if not all(isinstance(line["quorum"].get(name), int) for name in ("backing", "needed")):
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


def _keeps_deltas(path: Path, report: Report) -> bool:
    try:
        return bool(tomllib.loads((path / "config.toml").read_text()).get("consensus", {}).get("keep_deltas"))
    except (OSError, ValueError, AttributeError) as error:
        report.blame("config.toml", f"cannot be read ({error}).")
        return False
