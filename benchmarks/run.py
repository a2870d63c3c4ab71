"""Runs the benchmarks one after another and writes their table, RESULTS.md.

    python benchmarks/run.py                     every benchmark
    python benchmarks/run.py vote import_cost    these; the other rows stay as they are
    python benchmarks/run.py kernels step        groups of them
    python benchmarks/run.py --list

Each runs in a process of its own; its last line of output is its result (see `_common.py`). One that cannot run stands
in the table as `not run: why`. Results are kept one JSON line each in `results.jsonl`; RESULTS.md is written from it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from _common import machine, say, versions

HERE = Path(__file__).resolve().parent
RESULTS, TABLE = HERE / "results.jsonl", HERE / "RESULTS.md"
PEERS = HERE.parent / ".venv-peers" / "bin" / "python"
TIMEOUT_S = 1800

MAIN, WITH_PEERS = "this environment", ".venv-peers"
BENCHMARKS = {
    "import_cost": MAIN,
    "certificates": MAIN,
    "convex": MAIN,
    "loss_memory": MAIN,
    "allocator": MAIN,
    "overhead": MAIN,
    "stacked": MAIN,
    "merge_files": MAIN,
    "soups": MAIN,
    "bfloat16": MAIN,
    "kernel_step": MAIN,
    "kernel_curves": MAIN,
    "attention": WITH_PEERS,
    "layers": MAIN,
    "cross_entropy": WITH_PEERS,
    "step_vs_torch": WITH_PEERS,
    "generation": WITH_PEERS,
    "vote": WITH_PEERS,
}
"""Name of the script to the environment it runs in: this one, or the one that `make peers` makes."""

GROUPS = {
    "kernels": ("bfloat16", "attention", "layers", "cross_entropy", "vote"),
    "step": ("kernel_step", "kernel_curves", "step_vs_torch", "stacked", "generation"),
}
"""Name of a group to its benchmarks."""


def main() -> int:
    """Runs what was asked for; 1 when a benchmark could not run."""
    parser = argparse.ArgumentParser(description="Runs benchmarks and writes RESULTS.md.")
    parser.add_argument("names", nargs="*", metavar="name", help="benchmarks to run; none means all")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    asked = parser.parse_args()
    if asked.list:
        print("\n".join(f"{name:24}{where}" for name, where in BENCHMARKS.items()))
        return 0
    asked.names = [one for name in asked.names for one in GROUPS.get(name, (name,))]
    if unknown := [name for name in asked.names if name not in BENCHMARKS]:
        parser.error(f"unknown benchmark {unknown[0]!r}; known: {', '.join([*BENCHMARKS, *GROUPS])}")
    results = read_results()
    names = asked.names or list(BENCHMARKS)
    for name in names:
        say(f"{name} …")
        results[name] = run_one(name)
        say("  " + (results[name].get("not_run") or f"done in {results[name]['wall_s']:.0f} s"))
        write_results(results)
    say(f"wrote {HERE.name}/{TABLE.name}")
    return int(any("not_run" in results[name] for name in names))


def run_one(name: str) -> dict[str, Any]:
    """The result of one benchmark, with when and where it ran; under `not_run` the reason it has none."""
    stamp = {"benchmark": name, "date": datetime.date.today().isoformat(), "machine": machine()}
    python = sys.executable if BENCHMARKS[name] == MAIN else str(PEERS)
    if not Path(python).exists():
        return stamp | {"rows": [], "not_run": "needs torch, transformers and ByzFL: `make peers` installs them"}
    began = time.monotonic()
    try:
        done = subprocess.run(
            [python, str(HERE / f"{name}.py")], stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S, cwd=HERE.parent
        )
    except subprocess.TimeoutExpired:
        return stamp | {"rows": [], "not_run": f"still running after {TIMEOUT_S} s"}
    last = (done.stdout.strip().splitlines() or [""])[-1]
    try:
        result = json.loads(last)
        result["rows"] = list(result["rows"])
    except (ValueError, KeyError, TypeError):
        return stamp | {"rows": [], "not_run": f"exit code {done.returncode}, no result line"}
    if done.returncode:
        result["not_run"] = f"exit code {done.returncode}"
    return stamp | result | {"wall_s": round(time.monotonic() - began, 1), "versions": _versions(python)}


def read_results() -> dict[str, dict[str, Any]]:
    """The kept results by name; those of scripts that no longer exist are dropped."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    results = (json.loads(line) for line in lines)
    return {result["benchmark"]: result for result in results if result["benchmark"] in BENCHMARKS}


def write_results(results: dict[str, dict[str, Any]]) -> None:
    """Writes `results.jsonl` and RESULTS.md, in the order of `BENCHMARKS`."""
    ordered = [results[name] for name in BENCHMARKS if name in results]
    RESULTS.write_text("".join(json.dumps(result) + "\n" for result in ordered))
    TABLE.write_text(render(ordered))


def render(results: list[dict[str, Any]]) -> str:
    """RESULTS.md: one table, then the machines and versions it was measured with."""
    settings: list[str] = []
    lines = [
        "# Benchmark results",
        "",
        "Written by `python benchmarks/run.py`; what each measures is said at the top of its script. A value is the",
        "median of interleaved repeats, with the lowest and highest in brackets.",
        "",
        "| benchmark | measure | value | needed | met | setting |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        setting = _setting(result)
        if setting not in settings:
            settings.append(setting)
        link = f"[{result['benchmark']}]({result['benchmark']}.py)"
        where = f"{settings.index(setting) + 1}, {result['date']}"
        if reason := result.get("not_run"):
            lines.append(f"| {link} | not run: {reason} | | | | {where} |")
        for entry in result["rows"]:
            met = {True: "yes", False: "**no**", None: ""}[entry.get("met")]
            lines.append(
                f"| {link} | {entry['measure']} | {_value(entry)} | {entry.get('limit', '')} | {met} | {where} |"
            )
    lines += ["", "Settings:", ""]
    lines += [f"{number}. {setting}" for number, setting in enumerate(settings, 1)]
    return "\n".join(lines) + "\n"


def _value(entry: dict[str, Any]) -> str:
    unit = f" {entry['unit']}" if entry.get("unit") else ""
    if not isinstance(entry["value"], int | float):
        return f"{entry['value']}{unit}"
    spread = entry.get("spread")
    between = f" ({_number(spread[0])}–{_number(spread[1])})" if spread else ""
    return f"{_number(entry['value'])}{unit}{between}"


def _number(value: float) -> str:
    """Three significant digits, whole above 1000: `0.0812`, `2.80`, `41.3`, `12,345`."""
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    text = f"{value:#.3g}"
    return text.rstrip(".") if "e" not in text else f"{value:.2e}"


def _setting(result: dict[str, Any]) -> str:
    where = result["machine"]
    instructions = ", ".join(where["instructions"]) or "none of the instruction sets looked for"
    found = "; ".join(f"{name} {version}" for name, version in result.get("versions", {}).items())
    text = f"{where['cpu']} ({instructions}), {where['cores']} cores, {where['memory_gib']} GiB, {where['system']}"
    return f"{text}. {found}." if found else f"{text}."


def _versions(python: str) -> dict[str, str]:
    if python == sys.executable:
        return versions()
    code = f"import json, sys; sys.path.insert(0, {str(HERE)!r}); import _common; print(json.dumps(_common.versions()))"
    return json.loads(subprocess.run([python, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout)


if __name__ == "__main__":
    sys.exit(main())
