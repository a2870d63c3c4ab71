"""The benchmark runner: every script is registered, and one that fails says so without costing the others' rows."""

from __future__ import annotations

import importlib
import types
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
LONG = {"quality"}
"""Scripts of hours, run on their own."""


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> types.ModuleType:
    """`benchmarks/run.py` with its folder in `tmp_path`."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("run")
    scripts = {
        "good": """print('on the way')\nprint('{"benchmark": "good", "rows": [{"measure": "m", "value": 2.0}]}')""",
        "bad": "print('no result')\nraise SystemExit(3)",
    }
    for name, source in scripts.items():
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results.jsonl")
    monkeypatch.setattr(module, "TABLE", tmp_path / "RESULTS.md")
    monkeypatch.setattr(module, "PEERS", tmp_path / "nowhere" / "python")
    monkeypatch.setattr(module, "BENCHMARKS", {"good": module.MAIN, "bad": module.MAIN, "peer": module.WITH_PEERS})
    return module


def test_every_script_is_registered(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    registered = importlib.import_module("run").BENCHMARKS
    scripts = {path.stem for path in BENCHMARKS.glob("*.py") if not path.stem.startswith("_")}
    assert scripts - {"run"} - LONG == set(registered)


def test_a_result_becomes_a_row(runner):
    runner.write_results({"good": runner.run_one("good")})
    assert "| m | 2.00 |" in runner.TABLE.read_text()
    assert runner.read_results()["good"]["rows"] == [{"measure": "m", "value": 2.0}]


def test_what_cannot_run_says_why(runner):
    assert runner.run_one("bad")["not_run"] == "exit code 3, no result line"
    assert "make peers" in runner.run_one("peer")["not_run"]
    runner.write_results({"bad": runner.run_one("bad")})
    assert "not run: exit code 3" in runner.TABLE.read_text()


def test_running_one_keeps_the_other_rows(runner, monkeypatch: pytest.MonkeyPatch):
    runner.write_results({"good": runner.run_one("good")})
    monkeypatch.setattr("sys.argv", ["run.py", "bad"])
    assert runner.main() == 1
    table = runner.TABLE.read_text()
    assert "| m | 2.00 |" in table and "not run: exit code 3" in table


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0812, "0.0812"), (2.8, "2.80"), (41.34, "41.3"), (412, "412"), (12345.6, "12,346"), (1e-6, "1.00e-06")],
)
def test_numbers_have_three_digits(runner, value: float, text: str):
    assert runner._number(value) == text
