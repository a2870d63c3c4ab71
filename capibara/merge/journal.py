"""What a merge has finished, line by line, so that the same command goes on after any death.

    {"identity": …}                              what is merged, how, from which files
    {"validation": …}                            the weights found on text, and what is certain of them
    {"gram": …}                                  what a first pass over the inputs found
    {"tensor": name, "digest": …, "inputs": […]} a tensor whose bytes are on the medium

A line is appended after the bytes it vouches for have been synced. A torn last line is as if it had not been written.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from capibara.consensus.certificate import canonical
from capibara.errors import RunError
from capibara.files import Files

NAME = ".journal.jsonl"
LOCK = ".lock"


class Journal:
    """The journal of one output, and the folder it is made in, locked against other processes.

    Attributes:
      folder: Where the output is made; it becomes the output.
      lines: What was found, without the identity.
      resumed: Whether there was a journal of the same identity.
    """

    def __init__(self, folder: Path, identity: str, files: Files):
        self.folder, self.files = folder, files
        self.path = folder / NAME
        self.lines: list[dict[str, Any]] = []
        folder.mkdir(exist_ok=True)
        self._lock = _take_lock(folder)
        try:
            self.resumed = self._open(identity)
        except BaseException:
            self.close()
            raise

    def _open(self, identity: str) -> bool:
        lines, whole = read_journal(self.path)
        if lines and lines[0].get("identity") == identity:
            if whole < self.path.stat().st_size:
                self.files.truncate(self.path, whole)
            self.lines = lines[1:]
            return True
        for entry in sorted(self.folder.iterdir(), key=lambda entry: entry.name != NAME):
            if entry.name != LOCK:
                self.files.remove(entry)
        self.files.append(self.path, canonical({"identity": identity}) + b"\n")
        self.files.fsync_folder(self.folder)
        return False

    def append(self, lines: list[dict[str, Any]]) -> None:
        """Adds lines; what they vouch for has been synced."""
        self.files.append(self.path, b"".join(canonical(line) + b"\n" for line in lines))
        self.lines += lines

    def close(self) -> None:
        """Releases the lock."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def read_journal(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines up to the first that is torn or damaged, and their bytes."""
    raw = path.read_bytes() if path.is_file() else b""
    lines, whole = [], 0
    for text in raw.split(b"\n")[:-1]:
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not isinstance(line, dict):
            break
        lines.append(line)
        whole += len(text) + 1
    return lines, whole


def _take_lock(folder: Path) -> int:
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise RunError(f"Another process is merging into {folder}. Wait for it, or name another output.") from None
    return descriptor
