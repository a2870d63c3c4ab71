"""The benchmark runner: every script is registered, and one that fails says so without costing the others' rows."""

from __future__ import annotations

import importlib
import json
import os
import types
from pathlib import Path

import numpy as np
import pytest

from capibara.merge.methods import METHODS

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
LONG = {"quality", "merge_quality", "merge_llama", "int8_loss"}
"""Scripts of hours, or of a model and text that are given to them, run on their own."""


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


@pytest.fixture
def merges(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """`benchmarks/merge_quality.py`."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("merge_quality")


def test_what_others_are_compared_with_is_computed_before_them(merges):
    cells = list(merges.cells(merges.Setting()))
    assert len({cell.name for cell in cells}) == len(cells)
    for place, cell in enumerate(cells):
        before = {(c.family, c.row, c.seed) for c in cells[:place] if c.part == cell.part}
        bases = [base for base in merges.BASES[cell.part] if cell.row not in merges.BASES[cell.part]]
        assert before >= {(cell.family, base, cell.seed) for base in bases}


@pytest.mark.slow
def test_the_command_takes_every_row_of_the_merged_llama(merges, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """What the benchmark writes as Llama's folder is read back as the same model."""
    from capibara.cli import main

    bench, llama = importlib.import_module("merge_llama"), importlib.import_module("_merge_llama")
    llama.write_random_llama(tmp_path / "base")
    params, inputs = llama.read_llama(tmp_path / "base")[1], []
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "Fellow citizens. " * 20}) + "\n")
    for i in range(3):
        tuned = {name: leaf + np.float32(0.01 * (i + 1)) for name, leaf in params.items()}
        bench.write_folder(tmp_path / "base", tmp_path / f"tuned{i}", tuned)
        read = llama.read_llama(tmp_path / f"tuned{i}")[1]
        assert read.keys() == tuned.keys() and all(np.array_equal(read[name], tuned[name]) for name in tuned)
        inputs.append(str(tmp_path / f"tuned{i}"))
    rows = bench.merges(tmp_path / "base", 3, tmp_path / "text.jsonl")
    commands = {name: options for name, options in rows.items() if options is not None}
    assert len(commands) == len(METHODS) + 1
    for name, options in commands.items():
        with pytest.raises(SystemExit) as caught:
            main(["merge", *inputs, "-o", str(tmp_path / f"merged {name}"), *map(os.fspath, options)])
        assert caught.value.code == 0, name


def test_the_page_on_merges_counts_seeds_whose_interval_clears_zero(merges, tmp_path: Path):
    def line(row: str, seed: int, loss: float, **against: list[float]) -> dict:
        return {"part": "soup", "family": "sweep", "row": row, "seed": seed, "loss": loss, "seconds": 1.0,
                "against": {name.replace("_", " "): pair for name, pair in against.items()}, "name": f"{row}{seed}",
                "parameters": 7, "setting": merges.Setting().digest}  # fmt: skip

    entries = [
        *(line("best single", seed, 2.0) for seed in (0, 1)),
        line("greedy, sorted", 0, 1.9, best_single=[-0.1, 0.03]),
        line("greedy, sorted", 1, 2.0, best_single=[0.02, 0.04]),
        {**line("greedy, sorted", 2, 9.0), "setting": "another"},
    ]
    results, page = tmp_path / "lines.jsonl", tmp_path / "page.md"
    results.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    merges.table((merges.Setting(), merges.LLAMA), results, page)
    text = page.read_text()
    # mean (−0.1 + 0.02)/2, standard error √(0.03² + 0.04²)/2
    assert "| greedy, sorted | 2 | 1.9500 | -0.0400 ± 0.0250 | 1 | 0 | – | 1 |" in text
    assert text.count("Not run.") == 6


@pytest.mark.slow
def test_a_merge_benchmark_that_stopped_goes_on(merges, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """What is done is not done again, but a base whose losses are gone is; on one run at constant rate."""
    wanted = [
        merges.Cell("soup", "trajectory", "best single", 0), merges.Cell("soup", "trajectory", "uniform", 0),
        merges.Cell("number", "trajectory", "1 to all", 0),
    ]  # fmt: skip
    monkeypatch.setattr(merges, "cells", lambda setting: iter(wanted))
    results = tmp_path / "lines.jsonl"

    def lines() -> list[dict]:
        merges.work(merges.SMALL, tmp_path, results)
        return [json.loads(line) for line in results.read_text().splitlines()]

    first = lines()
    curve = first[2]["curve"]
    assert [point["k"] for point in curve] == [1, 2, 3, 4]
    assert curve[3]["uniform"] == pytest.approx(first[1]["loss"], abs=1e-6)
    assert curve[0]["certified"] == curve[0]["ensemble"] == curve[0]["uniform"]
    models = list(tmp_path.rglob("constant-*.safetensors"))
    times = [path.stat().st_mtime_ns for path in models]
    assert len(models) == 4 and lines() == first
    next(tmp_path.rglob("soup-trajectory-best_single-0.npy")).unlink()
    again = lines()
    assert len(again) == 4 and again[3]["loss"] == first[0]["loss"]
    assert [path.stat().st_mtime_ns for path in models] == times
