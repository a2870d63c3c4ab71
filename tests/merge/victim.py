"""Merges in a process of its own that dies by kill -9 at the i-th point, or counts the points.

    python victim.py FOLDER OUT METHOD AT      AT = 0 counts; prints one line of JSON: points and digest
    python victim.py FOLDER OUT every STEP     dies at every STEP-th point, merges again, and says what was found

Forks of a process without JAX: a death costs milliseconds.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

from capibara.files import Files
from capibara.merge import output, passes
from capibara.merge.merge import merge
from capibara.merge.recipe import Recipe


class Dying(Files):
    """A point lies before and in the middle of every write, append, sync, rename and removal."""

    def __init__(self, at: int):
        self.at, self.points = at, 0

    def _point(self) -> None:
        self.points += 1
        if self.points == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def write(self, path, data):
        self._point()
        path.write_bytes(data[: len(data) // 2])
        self._point()
        super().write(path, data)

    def write_at(self, descriptor, data, offset):
        self._point()
        half = memoryview(data).cast("B")[: len(data) // 2]
        super().write_at(descriptor, half, offset)
        self._point()
        super().write_at(descriptor, data, offset)

    def append(self, path, data):
        self._point()
        with open(path, "ab") as file:
            file.write(data[: len(data) // 2])
        self._point()
        with open(path, "ab") as file:
            file.write(data[len(data) // 2 :])
        self._point()

    def reserve(self, descriptor, size):
        self._point()
        super().reserve(descriptor, size)

    def fsync(self, descriptor):
        self._point()

    def rename(self, source, target):
        self._point()
        super().rename(source, target)

    def remove(self, path):
        if path.exists():
            self._point()
        super().remove(path)


def main(folder: Path, out: Path, method: str, at: int) -> None:
    """One merge; small blocks and a sync for every tensor, so that there is much to interrupt."""
    passes.block_numbers = lambda jobs, n: 16  # pyright: ignore[reportAttributeAccessIssue]
    output.SYNC_BYTES = 1
    files = Dying(at)
    paths = tuple(sorted(folder.glob("m*.safetensors")))
    recipe = Recipe(paths, method=method, dtype="bfloat16", stochastic_rounding=True, shard_size=150)
    report = merge(recipe, out, files=files)
    found = {"points": files.points, "digest": report.record["digest"], "resumed": report.resumed}
    print(json.dumps(found), flush=True)


def every(folder: Path, out: Path, step: int) -> None:
    """One line of JSON for each point: what was left by the death, and by the same command after it."""
    assert forked(folder, out, 0) == 0
    expected, points = contents(out), json.loads(Path(f"{out}.said").read_text())["points"]
    for at in range(1, points + 1, step):
        shutil.rmtree(out)
        died = os.WIFSIGNALED(forked(folder, out, at))
        part = out.exists() and not expected.items() <= contents(out).items()
        lived = forked(folder, out, 0) == 0
        left = [path.name for path in out.parent.glob(".*")]
        same = lived and contents(out) == expected
        print(json.dumps({"at": at, "died": died, "part": part, "same": same, "left": left}))


def forked(folder: Path, out: Path, at: int) -> int:
    """The status of a merge in a fork."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    code = 1
    try:
        sys.stdout = open(f"{out}.said", "w")  # noqa: SIM115
        main(folder, out, "uniform", at)
        code = 0
    finally:
        os._exit(code)


def contents(folder: Path) -> dict[str, bytes]:
    """Name → bytes."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


if __name__ == "__main__":
    if sys.argv[3] == "every":
        every(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[4]))
        assert "jax" not in sys.modules
    else:
        main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
