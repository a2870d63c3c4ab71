"""The files being written: room reserved, every tensor at its known place, synced while the next is computed.

The caller's thread writes. A thread of its own syncs and journals finished tensors, so that the medium is busy from the
first tensor on and not only at the end.
"""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from capibara.errors import RunError
from capibara.files import Files
from capibara.merge.header import Entry
from capibara.merge.journal import Journal
from capibara.merge.layout import Layout
from capibara.merge.stream import leaf_hasher

SYNC_BYTES = 2**26
"""Finished tensors are synced when this much has been written since the last time."""

CHUNK = 2**20


class Output:
    """The weight files of an output that is being made.

    Args:
      journal: Of the folder that they are in.
      layout: What they will be.
      files: Where everything is written through.

    Raises:
      OSError: If there is no room for them.
    """

    def __init__(self, journal: Journal, layout: Layout, files: Files):
        self.journal, self.files = journal, files
        self.place: dict[str, tuple[int, Entry]] = {}
        self.error: BaseException | None = None
        self._descriptors: list[int] = []
        self._queue: SimpleQueue[tuple[int, dict[str, Any]] | None] = SimpleQueue()
        try:
            for shard in layout.shards:
                descriptor = os.open(journal.folder / shard.name, os.O_RDWR | os.O_CREAT, 0o644)
                self._descriptors.append(descriptor)
                files.reserve(descriptor, shard.size)
                files.write_at(descriptor, shard.header, 0)
                self.place |= {name: (descriptor, entry) for name, entry in shard.entries.items()}
        except BaseException:
            self._close_files()
            raise
        self._thread = threading.Thread(target=self._sync, daemon=True)
        self._thread.start()

    def write(self, name: str, offset: int, data: np.ndarray) -> None:
        """Writes bytes of a tensor, `offset` bytes from its start."""
        if self.error is not None:
            raise self.error
        descriptor, entry = self.place[name]
        self.files.write_at(descriptor, data.data, entry.offset + offset)

    def finish(self, name: str, line: dict[str, Any]) -> None:
        """All of a tensor has been written; the line is journalled when it is on the medium."""
        self._queue.put((self.place[name][0], line))

    def digest(self, name: str) -> str:
        """The digest of a tensor as the file holds it."""
        descriptor, entry = self.place[name]
        hasher, done = leaf_hasher(name, entry.dtype, entry.shape), 0
        while done < entry.size:
            part = os.pread(descriptor, min(CHUNK, entry.size - done), entry.offset + done)
            if not part:
                break
            hasher.update(part)
            done += len(part)
        return hasher.hexdigest()

    def close(self, *, whole: bool) -> None:
        """Waits for what has been written to be on the medium; with `whole` an error of that is raised."""
        if self._thread.is_alive() or self.error is None:
            self._queue.put(None)
            self._thread.join()
        try:
            if whole:
                if self.error is not None:
                    raise self.error
                for descriptor in self._descriptors:
                    self.files.fsync(descriptor)
        finally:
            self._close_files()

    def _sync(self) -> None:
        try:
            closing = False
            while not closing:
                waiting: list[tuple[int, dict[str, Any]]] = []
                size = 0
                while size < SYNC_BYTES:
                    item = self._queue.get()
                    if item is None:
                        closing = True
                        break
                    waiting.append(item)
                    size += self.place[item[1]["tensor"]][1].size
                for descriptor in dict.fromkeys(descriptor for descriptor, _ in waiting):
                    self.files.fsync(descriptor)
                if waiting:
                    self.journal.append([line for _, line in waiting])
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that writes
            self.error = error

    def _close_files(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())


def out_of_room(path: Path, error: OSError, *, kept: bool) -> RunError:
    """The error for a disk that cannot be written."""
    goes_on = " The same command goes on where this one stopped." if kept else ""
    forbidden = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
    cure = "Name a place that you may write to." if forbidden else "Make room or name another place."
    return RunError(f"{path} cannot be written ({error.strerror or error}). {cure}{goes_on}")
