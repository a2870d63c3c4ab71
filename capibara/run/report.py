"""A run in words: tables for a terminal and dicts for `--json`. Returns text; printing is the command's."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from capibara.errors import RunError
from capibara.run.directory import check_format, read_lines
from capibara.run.metrics import read_metrics
from capibara.run.verify import Report


def describe_run(path: Path) -> dict[str, Any]:
    """What `capibara runs show` says: rounds, reasons, losses, the last hash.

    Raises:
      RunError, CertificateError: If it is no run, or a certificate does not check.
    """
    check_format(path)
    lines, _ = read_lines(path)
    logged = {entry["round"]: entry for entry in read_metrics(path / "metrics.jsonl") if "round" in entry}
    rounds = [
        {
            "round": line["round"],
            "outcome": line["outcome"],
            "loss": logged.get(line["round"], {}).get("loss"),
            "test_loss": logged.get(line["round"], {}).get("test_loss"),
            "backing": line["quorum"]["backing"],
            "reasons": [node["reason"] for node in line["nodes"]],
            "seconds": sum(line.get("timing", {}).get("phases_s", {}).values()),
        }
        for line in lines
    ]
    return {"run": str(path), "rounds": rounds, "head": lines[-1]["hash"] if lines else None}


def describe_runs(folder: Path) -> list[dict[str, Any]]:
    """One entry for every run directory in a folder; a damaged one is listed with what is wrong."""
    found = []
    for path in sorted(p for p in folder.glob("*") if (p / "format.json").is_file()) if folder.is_dir() else []:
        try:
            run = describe_run(path)
        except RunError as error:
            found.append({"run": str(path), "problem": str(error)})
            continue
        tests = [entry["test_loss"] for entry in run["rounds"] if entry["test_loss"] is not None]
        committed = sum(entry["outcome"] == "committed" for entry in run["rounds"])
        found.append(
            {
                "run": str(path),
                "rounds": len(run["rounds"]),
                "committed": committed,
                "test_loss": tests[-1] if tests else None,
                "head": run["head"],
            }
        )
    return found


def runs_text(found: list[dict[str, Any]], folder: Path) -> str:
    """The list of runs as a table."""
    if not found:
        return f"There are no runs in {folder}. `capibara demo` makes one."
    table = Table("run", "rounds", "committed", "test loss", "last hash")
    for run in found:
        if "problem" in run:
            table.add_row(run["run"], "", "", "", run["problem"])
        else:
            table.add_row(
                run["run"], str(run["rounds"]), str(run["committed"]), _loss(run["test_loss"]), (run["head"] or "")[:16]
            )
    return _text(table)


def run_text(description: dict[str, Any]) -> str:
    """A run as a table of its rounds."""
    if not description["rounds"]:
        return f"{description['run']} has no round yet. Go on with: capibara resume {description['run']}"
    return _text(rounds_table(description["rounds"])) + f"\nlast hash {description['head']}"


def rounds_table(history: list[dict[str, Any]]) -> Table:
    """One row a round."""
    table = Table("round", "outcome", "train loss", "test loss", "backing", "kept out", "seconds")
    for entry in history:
        out = ", ".join(
            f"{node} {reason.replace('_', ' ')}" for node, reason in enumerate(entry["reasons"]) if reason != "backed"
        )
        table.add_row(
            str(entry["round"] + 1), entry["outcome"], _loss(entry["loss"]), _loss(entry["test_loss"]),
            f"{entry['backing']}/{len(entry['reasons'])}", out or "–", f"{entry['seconds']:.1f}",
        )  # fmt: skip
    return table


def result_text(results: Any, sample: bool = False) -> str:
    """The end of a run: the table of rounds, the summary, a sample, and three next commands."""
    parts = [_text(rounds_table(results.history)), results.summary()]
    for node, reasons in sorted(results.accused().items()):
        if sum(reasons.values()) * 2 > results.rounds:
            parts.append(f"Node {node} is named as a liar or broken: it was kept out in most rounds.")
    if sample and results.sample:
        parts.append(f"A sample:\n  {results.sample.strip()[:300]}")
    run = results.run_path
    parts.append(
        f"Next:\n  capibara verify {run} --expect {results.head}\n  capibara generate {run} --prompt 'The people'\n"
        f"  capibara runs show {run}"
    )
    return "\n\n".join(parts)


def verify_text(report: Report) -> str:
    """The outcome of a check in a few lines."""
    checked = (
        f"{report.lines} certificates, {report.checkpoints} checkpoints, {report.replayed} of {report.kept} kept votes "
        f"replayed; last hash {report.head}"
    )
    notes = [f"note {note}" for note in report.notes]
    if report.ok:
        return "\n".join([*notes, f"good: {checked}"])
    bad = [f"BAD  {p.place}: {p.what}" for p in report.problems]
    return "\n".join([*bad, *notes, f"{len(report.problems)} problem{'s' * (len(report.problems) > 1)}; {checked}"])


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _text(table: Table) -> str:
    console = Console(file=io.StringIO(), width=110, record=True)
    console.print(table)
    return console.export_text().rstrip()
