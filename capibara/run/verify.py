"""Rechecks a finished run: every line, the chain, every digest and, where deltas were kept, every vote.

Nothing in the run is believed: a problem is reported with its place, and the check goes on to the next thing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from capibara.consensus.certificate import GENESIS, check_link, digest_rows, digest_tree, parse_line
from capibara.errors import CapibaraError, CertificateError, RunError
from capibara.run.checkpoint import checkpoints, load_checkpoint, load_deltas
from capibara.run.directory import CERTIFICATES, check_format

COEFFICIENTS_AGREE = 1e-5
"""v is computed in float64 from the same bytes; other machines differ in their last bits, liars in the first ones."""

Replay = Callable[[dict[str, Any], dict[str, np.ndarray]], tuple[list[str], np.ndarray | None, dict[str, np.ndarray]]]
"""`(line, stack) -> (reasons after the vote, coefficients or None, merged delta)`."""


@dataclass(frozen=True)
class Problem:
    """What is wrong, and where: `rounds.jsonl line 4`, `checkpoints/step-00000003/params.safetensors`, …"""

    place: str
    what: str


@dataclass
class Report:
    """The outcome of a check.

    Attributes:
      lines: Certificates read.
      checkpoints: Checkpoints whose every byte checks.
      replayed: Votes that were repeated and agreed.
      kept: Rounds whose deltas were kept.
      head: Hash of the last certificate.
      problems: Everything that does not check.
    """

    lines: int = 0
    checkpoints: int = 0
    replayed: int = 0
    kept: int = 0
    head: str = GENESIS
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True where nothing was found."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "ok": self.ok,
            "lines": self.lines,
            "checkpoints": self.checkpoints,
            "kept": self.kept,
            "replayed": self.replayed,
            "head": self.head,
            "problems": [{"place": p.place, "what": p.what} for p in self.problems],
        }


def verify(path: Path, *, expect: str | None = None, replay: Replay | None = None) -> Report:
    """Checks a run directory without changing it.

    Args:
      path: The run directory; it may be in use.
      expect: The hash that the last certificate must have: what makes the check one of more than consistency.
      replay: Repeats a vote from kept deltas; None checks digests only.

    Raises:
      RunError: If `path` is no run directory.
    """
    check_format(path)
    report = Report()
    lines = _check_lines(path, report)
    if expect is not None and report.head != expect:
        report.problems.append(
            Problem(CERTIFICATES, f"the last certificate has hash {report.head}, expected {expect}: lines are missing "
                    "at the end, or this is another run")
        )  # fmt: skip
    _check_checkpoints(path, lines, report)
    committed = {line["round"]: line for line in lines if line["outcome"] != "no_quorum"}
    for file in sorted((path / "deltas").glob("round-*.safetensors")):
        number = file.stem.removeprefix("round-")
        line = committed.get(int(number)) if number.isdigit() else None
        if line is None:
            report.problems.append(Problem(f"deltas/{file.name}", "belongs to no certificate"))
            continue
        report.kept += 1
        try:
            _check_deltas(file, line, replay, report)
        except CapibaraError as error:
            report.problems.append(Problem(f"deltas/{file.name}", str(error)))
    _check_kept(path, committed, report)
    return report


def _check_lines(path: Path, report: Report) -> list[dict[str, Any]]:
    try:
        raw = (path / CERTIFICATES).read_bytes()
    except FileNotFoundError:
        raise RunError(f"{path} has no {CERTIFICATES}; it is not a whole run directory.") from None
    lines, previous = [], GENESIS
    for number, text in enumerate(raw.splitlines(keepends=True), 1):
        place = f"{CERTIFICATES} line {number}"
        try:
            line = parse_line(text, number)
            if not text.endswith(b"\n"):
                report.problems.append(Problem(place, "has been cut at its end"))
            check_link(line, previous, number)
        except CertificateError as error:
            report.problems.append(Problem(place, str(error).removeprefix(place).strip()))
            if "is not JSON" in str(error) or "lacks" in str(error):
                continue
            line = _content(text)
        lines.append(line)
        previous = line["hash"]
    report.lines, report.head = len(lines), previous
    for line, following in zip(lines, lines[1:], strict=False):
        expected = line["start_digest"] if line["outcome"] != "committed" else line["merged_digest"]
        if following["start_digest"] != expected:
            report.problems.append(
                Problem(f"{CERTIFICATES} round {following['round']}", "does not begin with the model of the round before")
            )
    return lines


def _content(text: bytes) -> dict[str, Any]:
    import json

    return json.loads(text)


def _check_checkpoints(path: Path, lines: list[dict[str, Any]], report: Report) -> None:
    by_hash = {line["hash"]: line for line in lines}
    for folder in checkpoints(path):
        place = f"checkpoints/{folder.name}"
        try:
            sections, state = load_checkpoint(folder)
        except CertificateError as error:
            where = str(error).split(" ")[0]
            report.problems.append(Problem(where, str(error).removeprefix(where).strip()))
            continue
        line = by_hash.get(state["head"])
        if line is None:
            report.problems.append(Problem(place, f"belongs to certificate {state['head'][:16]}…, which is not there"))
            continue
        expected = line["merged_digest"] if line["outcome"] == "committed" else line["start_digest"]
        if digest_tree(sections["params"])[0] != expected:
            report.problems.append(
                Problem(f"{place}/params.safetensors", f"is not the model that the certificate of round {line['round']} names")
            )
            continue
        report.checkpoints += 1


def _check_deltas(file: Path, line: dict[str, Any], replay: Replay | None, report: Report) -> None:
    place = f"deltas/{file.name}"
    stack, merged = load_deltas(file, len(line["nodes"]))
    before = len(report.problems)
    for node, digest in zip(line["nodes"], digest_rows(stack, len(line["nodes"])), strict=True):
        if node["digest"] is not None and node["digest"] != digest:
            report.problems.append(Problem(place, f"the delta of node {node['id']} is not the one that was certified"))
    if line["outcome"] == "committed" and digest_tree(merged)[0] != line["delta_digest"]:
        report.problems.append(Problem(place, "the merged delta is not the one that was certified"))
    if replay is None or len(report.problems) > before:
        return
    reasons, coefficients, delta = replay(line, stack)
    wrong = [n["id"] for n, reason in zip(line["nodes"], reasons, strict=True) if n["reason"] != reason]
    if wrong:
        report.problems.append(Problem(place, f"the vote repeated gives other reasons for nodes {wrong}"))
    recorded = [node["coefficient"] for node in line["nodes"]]
    if coefficients is not None:
        apart = np.abs(np.array([x or 0.0 for x in recorded]) - coefficients).max()
        if apart > COEFFICIENTS_AGREE:
            report.problems.append(Problem(place, f"the vote repeated gives coefficients that differ by {apart:.2g}"))
    if line["outcome"] == "committed" and not _close(delta, merged):
        report.problems.append(Problem(place, "the vote repeated gives another merged delta"))
    report.replayed += len(report.problems) == before


def _check_kept(path: Path, committed: dict[int, dict[str, Any]], report: Report) -> None:
    """Where deltas were kept at all, those of every round must be there."""
    if not report.kept:
        return
    for number in committed:
        name = f"round-{number:08d}.safetensors"
        if not (path / "deltas" / name).exists():
            report.problems.append(Problem(f"deltas/{name}", "is missing"))


def _close(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    """Equal to the rounding of float32 sums, against the length of the whole tree."""
    gap = sum(float(((a[name].astype(np.float64) - b[name]) ** 2).sum()) for name in b)
    length = sum(float((b[name].astype(np.float64) ** 2).sum()) for name in b)
    return gap <= 1e-10 * length
