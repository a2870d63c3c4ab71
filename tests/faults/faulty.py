"""A file system that dies, or runs full, at the operation of one's choice."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

from synthetic_run import Unsynced


def kill_9() -> None:
    """The process ends here; nothing is flushed, nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def disk_full() -> None:
    """What the system says when there is no room."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FaultyFiles(Unsynced):
    """Fails at the `at`-th of its points, counted from 1, once armed.

    A point lies before every write, append, truncation, fsync, rename and removal, and in the middle of those that can
    be half done.

    Args:
      fault: What happens there.
      at: Which point; 0 only counts.
      again: Whether every later point fails too.
    """

    def __init__(self, fault: Callable[[], None], at: int = 0, *, again: bool = False, armed: bool = False):
        self.fault, self.at, self.again, self.armed = fault, at, again, armed
        self.trace: list[str] = []

    def write(self, path: Path, data: bytes | memoryview) -> None:
        """Half, then whole."""
        self._point(f"write {path.name}")
        path.write_bytes(data[: len(data) // 2])
        self._point(f"write half of {path.name}")
        super().write(path, data)

    def append(self, path: Path, data: bytes) -> None:
        """Half, then the rest; the fsync fails only after all of it is there."""
        self._point(f"append to {path.name}")
        with open(path, "ab") as file:
            file.write(data[: len(data) // 2])
        self._point(f"append half to {path.name}")
        super().append(path, data[len(data) // 2 :])

    def truncate(self, path: Path, size: int) -> None:
        """Fails before, or at its fsync."""
        self._point(f"truncate {path.name}")
        super().truncate(path, size)

    def fsync(self, descriptor: int) -> None:
        """Fails before."""
        self._point("fsync")
        super().fsync(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Fails before."""
        self._point(f"rename {target.name}")
        super().rename(source, target)

    def remove(self, path: Path) -> None:
        """A hidden folder can be half gone."""
        if not path.exists():
            return
        self._point(f"remove {path.name}")
        if path.is_dir() and path.name.startswith("."):
            for file in sorted(path.iterdir())[:1]:
                file.unlink()
            self._point(f"remove half of {path.name}")
        super().remove(path)

    def _point(self, name: str) -> None:
        if not self.armed:
            return
        self.trace.append(name)
        if len(self.trace) == self.at or (self.again and 0 < self.at < len(self.trace)):
            self.fault()
