"""A run in words: tables for a terminal and dicts for `--json`. Returns text; printing is the command's."""

from __future__ import annotations

import io
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from capibara.errors import RunError
from capibara.run.directory import SOLO, check_format, read_lines
from capibara.run.metrics import read_metrics
from capibara.run.verify import UNDONE, Report

WIDTH = 110
"""Of tables; a longer cell is wrapped, never cut."""


def describe_run(path: Path) -> dict[str, Any]:
    """What `capibara runs show` says: rounds, reasons, losses, the last hash; of one model, its steps and losses.

    Raises:
      RunError, CertificateError: If it is no run, or a certificate does not check.
    """
    check_format(path)
    if (path / SOLO).is_file():
        return {"run": str(path), "steps": list(read_metrics(path / "metrics.jsonl"))}
    lines, _ = read_lines(path)
    return {"run": str(path), "rounds": history(path, lines), "head": lines[-1]["hash"] if lines else None}


def history(path: Path, lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One dict for each certificate, with the losses that `metrics.jsonl` has for its round."""
    logged = {entry["round"]: entry for entry in read_metrics(path / "metrics.jsonl") if "round" in entry}
    rounds = []
    for line in lines:
        known = logged.get(line["round"], {}) if line["outcome"] != UNDONE else {}
        rounds.append(
            {
                "round": line["round"],
                "outcome": line["outcome"],
                "loss": known.get("loss"),
                "test_loss": known.get("test_loss"),
                "backing": line["quorum"]["backing"],
                "reasons": [node["reason"] for node in line["nodes"]],
            "strategies": [node.get("strategy", "") for node in line["nodes"]],
                "seconds": sum(line.get("timing", {}).get("phases_s", {}).values()),
            }
        )
    return rounds


def describe_runs(folder: Path) -> list[dict[str, Any]]:
    """One entry for every run directory in a folder; a damaged one is listed with what is wrong."""
    found = []
    runs = [path for path in folder.glob("*") if (path / "format.json").is_file()] if folder.is_dir() else []
    for path in sorted(runs, key=_by_number):
        try:
            run = describe_run(path)
        except RunError as error:
            found.append({"run": str(path), "problem": str(error)})
            continue
        entries, is_solo = run.get("rounds", run.get("steps", [])), "steps" in run
        tests = [loss for entry in entries if (loss := entry.get("eval_loss" if is_solo else "test_loss")) is not None]
        found.append(
            {
                "run": str(path),
                **({"steps": entries[-1]["step"] if entries else 0} if is_solo else {"rounds": len(entries)}),
                "committed": sum(entry.get("outcome") == "committed" for entry in entries),
                "test_loss": tests[-1] if tests else None,
                "head": run.get("head"),
            }
        )
    return found


def runs_text(found: list[dict[str, Any]], folder: Path) -> str:
    """The list of runs as a table."""
    if not found:
        return f"There are no runs in {folder}. `capibara demo` makes one."
    table = _table("run", "rounds", "committed", "test loss", "last hash", left=("run", "last hash"))
    for run in found:
        if "problem" in run:
            table.add_row(run["run"], "–", "–", "–", "damaged")
        elif "steps" in run:
            table.add_row(run["run"], "–", "–", _loss(run["test_loss"]), f"one model, {run['steps']} steps")
        else:
            head = (run["head"] or "–")[:16]
            table.add_row(run["run"], str(run["rounds"]), str(run["committed"]), _loss(run["test_loss"]), head)
    return "\n".join([_text(table), *(f"{run['run']}: {run['problem']}" for run in found if "problem" in run)])


def run_text(description: dict[str, Any]) -> str:
    """A run as a table of its rounds."""
    run = description["run"]
    if "steps" in description:
        table = _table("step", "train loss", "eval loss", "tokens/s")
        for entry in description["steps"]:
            table.add_row(
                str(entry["step"]), _loss(entry["loss"]), _loss(entry.get("eval_loss")), f"{entry['tokens_per_s']:,.0f}"
            )
        return f"{run}: one model of UnifiedTrainer, no votes.\n" + _text(table)
    if not description["rounds"]:
        return f"{run} has no round yet. Go on with: capibara resume {run}"
    return _text(rounds_table(description["rounds"])) + f"\nlast hash {description['head']}"


def rounds_table(rounds: list[dict[str, Any]]) -> Table:
    """One row a round."""
    table = _table(
        "round", "outcome", "train loss", "test loss", "backing", "kept out", "seconds", left=("outcome", "kept out")
    )
    for entry in rounds:
        table.add_row(
            str(entry["round"] + 1), entry["outcome"].replace("_", " "), _loss(entry["loss"]),
            _loss(entry["test_loss"]), f"{entry['backing']}/{len(entry['reasons'])}",
            kept_out(entry["reasons"]) or "–", f"{entry['seconds']:.1f}",
        )  # fmt: skip
    return table


def kept_out(reasons: Sequence[str]) -> str:
    """Nodes that did not back a round, by reason: `6, 7 outvoted; 2 late`; empty where all did."""
    by_reason: dict[str, list[str]] = {}
    for node, reason in enumerate(reasons):
        if reason != "backed":
            by_reason.setdefault(reason, []).append(str(node))
    return "; ".join(f"{', '.join(nodes)} {reason.replace('_', ' ')}" for reason, nodes in by_reason.items())


def result_text(results: Any) -> str:
    """The end of a run: the table of rounds, who is named, the test loss, a sample, and three next commands."""
    run, parts = results.run_path, [_text(rounds_table(results.history)), results.summary()]
    if results.sample:
        parts.append("A sample of the merged model:\n" + _indented(results.sample[:300].strip()))
    name = _command()
    parts.append(
        f"Next:\n  {name} verify {run} --expect {results.head}\n  {name} generate {run} --prompt 'The people'\n"
        f"  {name} runs show {run}"
    )
    return "\n\n".join(parts)


def _command() -> str:
    """What a shell finds the command by: its name, or the path it was called by where its folder is not searched."""
    called = Path(sys.argv[0])
    return str(called) if called.name == "capibara" and shutil.which("capibara") is None else "capibara"


def verify_text(report: Report) -> str:
    """The outcome of a check in a few lines."""
    checked = (
        f"{_count(report.lines, 'certificate')}, {_count(report.checkpoints, 'checkpoint')}, "
        f"{report.replayed} of {report.kept} kept votes replayed; last hash {report.head}"
    )
    notes = [f"note: {note}" for note in report.notes]
    if report.ok:
        return "\n".join([*notes, f"good: {checked}"])
    bad = [f"BAD  {p.place}: {p.what}" for p in report.problems]
    return "\n".join([*bad, *notes, f"{_count(len(report.problems), 'problem')}; {checked}"])


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def _indented(text: str) -> str:
    return "\n".join(f"  {line}".rstrip() for line in text.splitlines())


def _by_number(path: Path) -> list[Any]:
    """`demo-2` before `demo-10`."""
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.split(r"(\d+)", path.name)]


def _table(*columns: str, left: tuple[str, ...] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right", overflow="fold")
    return table


def _text(table: Table) -> str:
    console = Console(file=io.StringIO(), width=WIDTH, record=True)
    console.print(table)
    return "\n".join(line.rstrip() for line in console.export_text().rstrip().splitlines())
