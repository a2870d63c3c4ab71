"""Kills a process at every point of a commit, a creation and a recovery, and says what is found afterwards.

    python killed.py FOLDER        prints one JSON line per point: {"of": …, "point": …, "found": "before" | "after"}

Each victim is a fork of this process, which loads no JAX, so a point costs milliseconds.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from faulty import FaultyFiles, kill_9  # noqa: E402
from synthetic_run import CONFIG, Unsynced, finished, make_run, replay, snapshot  # noqa: E402

from capibara.run.checkpoint import newest_intact  # noqa: E402
from capibara.run.commit import commit  # noqa: E402
from capibara.run.directory import CERTIFICATES, Run  # noqa: E402
from capibara.run.verify import verify  # noqa: E402

KEEP = 2
LAST = 4


def main(folder: Path) -> None:
    """Every scenario, every point."""
    make_run(folder / "before", 3, keep_checkpoints=KEEP).close()
    make_run(folder / "after", 4, keep_checkpoints=KEEP).close()
    make_run(folder / "end", LAST + 1, keep_checkpoints=KEEP).close()
    known = {state(folder / name): name for name in ("before", "after")}
    end = snapshot(folder / "end")

    def check(of: str, point: str, path: Path) -> None:
        with Run.open(path):
            pass
        found = known.get(state(path))
        report = verify(path, replay=replay)
        finish(path)
        say(of=of, point=point, found=found, good=report.ok, notes=report.notes, same_end=snapshot(path) == end)

    for point, path in deaths(folder, lambda path: shutil.copytree(folder / "before", path), commit_next):
        check("commit", point, path)

    def stopped(path: Path) -> None:
        """All of the next round is there but the second half of its line."""
        shutil.copytree(folder / "after", path)
        lines = (path / CERTIFICATES).read_bytes()
        (path / CERTIFICATES).write_bytes(lines[:-200])

    for point, path in deaths(folder, stopped, lambda path, files: arm_and_open(path, files)):
        check("recovery", point, path)

    for point, path in deaths(folder, lambda path: None, create):
        try:
            Run.open(path).close()
            found = "after"
        except Exception as error:
            found = type(error).__name__
            Run.create(path, CONFIG).close()
        finish(path)
        say(of="creation", point=point, found=found, good=verify(path).ok, notes=[], same_end=snapshot(path) == end)


def deaths(
    folder: Path, prepare: Callable[[Path], object], act: Callable[[Path, FaultyFiles], None]
) -> Iterator[tuple[str, Path]]:
    """Prepares a run, lets a forked process die at point 1, 2, … of `act`, until one survives."""
    counting = FaultyFiles(kill_9)
    path = folder / "counted"
    prepare(path)
    act(path, counting)
    shutil.rmtree(path)
    for at, point in enumerate(counting.trace, 1):
        path = folder / f"victim-{at}"
        prepare(path)
        child = os.fork()
        if not child:
            act(path, FaultyFiles(kill_9, at))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"point {at}, {point}: the victim survived"
        yield f"{at} {point}", path
        shutil.rmtree(path)


def commit_next(path: Path, files: FaultyFiles) -> None:
    """Commits the fourth round."""
    with Run.open(path, files=files) as run:
        files.armed = True
        commit(run, finished(3, run.head), KEEP)


def arm_and_open(path: Path, files: FaultyFiles) -> None:
    """Opens a run that needs recovery."""
    files.armed = True
    Run.open(path, files=files).close()


def create(path: Path, files: FaultyFiles) -> None:
    """Creates a run."""
    files.armed = True
    Run.create(path, CONFIG, files=files).close()


def state(path: Path) -> str:
    """What a resumed run goes on from: certificates, the newest checkpoint, kept deltas, and no other visible files."""
    with Run.open(path) as run:
        found = newest_intact(run)
        newest = f"checkpoints/step-{found.meta['round']:08d}/"
    files = {name: data.hex() for name, data in snapshot(path).items() if "checkpoints" not in name or newest in name}
    return json.dumps([found.notes, files], sort_keys=True)


def finish(path: Path) -> None:
    """Goes on to the end, as `rounds` does."""
    with Run.open(path, files=Unsynced()) as run:
        for round_ in range(len(run.lines), LAST + 1):
            commit(run, finished(round_, run.head), KEEP)


def say(**values: object) -> None:
    """One line of the result."""
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    assert "jax" not in sys.modules
