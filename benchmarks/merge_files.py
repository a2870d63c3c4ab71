"""Merging of files at the speed of the disk: our command against `dd` and mergekit on the same files, and its memory.

    python benchmarks/merge_files.py            writes up to 11 GB into the temporary folder, and removes it

Eight bfloat16 safetensors files of 1.07 GB each, that share a base. `dd` reads every input and writes the output with
fsync, as one process after another would; our time is that of the whole command, in a process of its own: start,
digests of every input and of the output, fsync, rename. All are warm: the inputs were read just before, and whatever of
them the page cache holds it holds for all; outputs are removed, and written pages synced, between runs. Candidates take
turns. mergekit runs where `CAPIBARA_MERGEKIT` names an interpreter that has it, or the peers' environment does.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _common import emit, row, say

NUM_MODELS = 8
TENSORS, SIDE = 32, 4096
"""16.8 million numbers each, 1.07 GB a file."""

REPEATS = 3
NEEDED = 12 * 10**9
PEERS = Path(__file__).resolve().parents[1] / ".venv-peers" / "bin" / "python"

RUN = """
import json, sys
from pathlib import Path
from capibara.merge.merge import merge
from capibara.merge.recipe import Recipe
method, out, *inputs = sys.argv[1:]
merge(Recipe(tuple(map(Path, inputs)), method=method), out)
print(json.dumps({"rss": 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])}))
"""
"""What `capibara merge` does, and the peak memory of its process; `ru_maxrss` would be that of the one before it."""


def main() -> None:
    """Makes the files, takes turns, prints the rows."""
    folder = Path(tempfile.mkdtemp(prefix="merge_files-"))
    try:
        if shutil.disk_usage(folder).free < NEEDED:
            emit("merge_files", [row("merging files", f"not run: {folder} has less than {NEEDED / 1e9:.0f} GB free")])
            return
        paths = write_models(folder, NUM_MODELS, TENSORS)
        small = write_models(folder / "small", 4, TENSORS // 8)
        rows = measure(folder, paths, small)
    finally:
        shutil.rmtree(folder)
    emit("merge_files", rows)


def measure(folder: Path, paths: list[Path], small: list[Path]) -> list[dict[str, Any]]:
    """Every row of the table."""
    out, peak = folder / "out", {}

    def ours(method: str, inputs: list[Path]) -> float:
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", RUN, method, str(out), *map(str, inputs)], check=True, stdout=subprocess.PIPE
        )
        seconds = time.perf_counter() - began
        peak[method, len(inputs), inputs[0].stat().st_size] = json.loads(done.stdout)["rss"]
        return seconds

    def dd(inputs: list[Path]) -> float:
        began = time.perf_counter()
        for path in inputs:
            subprocess.run(["dd", f"if={path}", "of=/dev/null", "bs=16M"], check=True, stderr=subprocess.DEVNULL)
        size = inputs[0].stat().st_size
        write = ["dd", "if=/dev/zero", f"of={out}", "bs=16M", f"count={-(-size // 2**24)}", "conv=fsync"]
        subprocess.run(write, check=True, stderr=subprocess.DEVNULL)
        return time.perf_counter() - began

    four = paths[:4]
    candidates = {
        "dd 4": lambda: dd(four),
        "uniform 4": lambda: ours("uniform", four),
        "uniform 8": lambda: ours("uniform", paths),
        "median 8": lambda: ours("median", paths),
        "geometric_median 8": lambda: ours("geometric_median", paths),
    }
    python = mergekit_python()
    if python:
        candidates["mergekit 4"] = lambda: mergekit(python, folder, four, out)
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for repeat in range(REPEATS):
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            read_all(four if name.endswith("4") else paths)
            seconds[name].append(candidates[name]())
            remove(out)
            os.sync()
            say(f"  {name}: {seconds[name][-1]:.2f} s")
    read_all(small)
    ours("uniform", small)
    remove(out)
    size, blocks = four[0].stat().st_size, 4 * 2**24
    large, little = peak["uniform", 4, size], peak["uniform", 4, small[0].stat().st_size]
    rows = [
        share_row("uniform merge of 4 × 1.07 GB: speed against dd", seconds["dd 4"], seconds["uniform 4"], 80),
        row("… read and written", 5 * size / 1e9 / median(seconds["uniform 4"]), "GB/s"),
        cost_row("median of 8 against their uniform merge", seconds["median 8"], seconds["uniform 8"], 1.6),
        cost_row("geometric median of 8 (two reads)", seconds["geometric_median 8"], seconds["uniform 8"], 2.1),
        row("peak memory of the uniform merge of 4", large / 1e6, "MB", limit="≤ 256 MB + 4 × 16 MiB",
            met=large <= 256e6 + blocks),
        row("… of files an eighth as large", little / 1e6, "MB", limit="flat: within 32 MB",
            met=abs(large - little) <= 32e6),
        row("peak memory of the geometric median of 8", peak["geometric_median", 8, size] / 1e6, "MB",
            limit="≤ 256 MB + 8 × 16 MiB", met=peak["geometric_median", 8, size] <= 256e6 + 2 * blocks),
    ]  # fmt: skip
    if python:
        theirs, mine = seconds["mergekit 4"], seconds["uniform 4"]
        rows.append(cost_row("mergekit's time for the same linear merge of 4", theirs, mine, 3, least=True))
    else:
        rows.append(row("mergekit on the same files", "not run: CAPIBARA_MERGEKIT names no interpreter that has it"))
    return rows


def share_row(measure: str, theirs: list[float], ours: list[float], least: float) -> dict[str, Any]:
    """Speed as a share of theirs, of runs in the same turn."""
    shares = [100 * a / b for a, b in zip(theirs, ours, strict=True)]
    value = median(shares)
    return row(measure, value, "%", spread=(min(shares), max(shares)), limit=f"≥ {least} %", met=value >= least)


def cost_row(measure: str, a: list[float], b: list[float], bound: float, *, least: bool = False) -> dict[str, Any]:
    """Time as a multiple."""
    shares = [x / y for x, y in zip(a, b, strict=True)]
    value = median(shares)
    return row(measure, value, "×", spread=(min(shares), max(shares)), limit=f"{'≥' if least else '≤'} {bound:g}",
               met=value >= bound if least else value <= bound)  # fmt: skip


def median(values: list[float]) -> float:
    """The middle one."""
    return float(np.median(values))


def write_models(folder: Path, count: int, tensors: int) -> list[Path]:
    """Files of the same tensors that differ by a hundredth."""
    from capibara.merge.header import build_header

    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    base, other = (rng.standard_normal(SIDE * SIDE, dtype=np.float32) for _ in range(2))
    header, _ = build_header([(f"layers.{i}.weight", "BF16", (SIDE, SIDE)) for i in range(tensors)], {"format": "pt"})
    paths = []
    for i in range(count):
        paths.append(folder / f"model-{i}.safetensors")
        bits = (base + np.float32(0.01) * np.roll(other, 977 * i)).view(np.uint32)
        with open(paths[-1], "wb") as file:
            file.write(header)
            for t in range(tensors):
                file.write(np.roll((bits >> 16).astype(np.uint16), 13 * t).data)
    os.sync()
    return paths


def read_all(paths: list[Path]) -> None:
    """Brings files into the page cache, as far as it holds them."""
    for path in paths:
        subprocess.run(["dd", f"if={path}", "of=/dev/null", "bs=16M"], check=True, stderr=subprocess.DEVNULL)


def remove(out: Path) -> None:
    """A folder or a file."""
    shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)


def mergekit_python() -> str | None:
    """An interpreter that has mergekit."""
    for python in (os.environ.get("CAPIBARA_MERGEKIT"), str(PEERS)):
        if python and Path(python).exists():
            done = subprocess.run([python, "-c", "import mergekit"], capture_output=True)
            if done.returncode == 0:
                return python
    return None


def mergekit(python: str, folder: Path, paths: list[Path], out: Path) -> float:
    """Its raw-file merge, which needs no architecture: linear, weights of 1, as its recipe says."""
    recipe = folder / "mergekit.yml"
    models = "".join(f"  - model: {path}\n    parameters:\n      weight: 1.0\n" for path in paths)
    recipe.write_text(f"merge_method: linear\nmodels:\n{models}dtype: bfloat16\n")
    began = time.perf_counter()
    command = [str(Path(python).with_name("mergekit-pytorch")), str(recipe), str(out), "--lazy-unpickle"]
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
