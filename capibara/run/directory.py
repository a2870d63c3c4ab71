"""A run is a directory; reopening it goes on bit for bit.

    config.toml        resolved configuration          rounds.jsonl   one certificate a line; appending one commits
    format.json        version of this layout          metrics.jsonl  losses and speeds
    checkpoints/step-N/  deltas/round-N.safetensors    logs/training.log
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from capibara.consensus.certificate import GENESIS, check_link, parse_line
from capibara.errors import CertificateError, RunError
from capibara.files import Files

FORMAT_VERSION = 1
CERTIFICATES = "rounds.jsonl"


class Run:
    """An open run directory, locked against other processes until it is closed.

    Attributes:
      path: The directory.
      lines: Certificates so far, oldest first.
      files: Where everything is written through.
    """

    def __init__(self, path: Path, files: Files, lock: int):
        self.path, self.files, self._lock = path, files, lock
        self.lines: list[dict[str, Any]] = []
        self.notes: list[str] = []

    @classmethod
    def create(cls, path: Path | str, config_toml: str, *, files: Files | None = None) -> Run:
        """A new run directory.

        Raises:
          RunError: If the directory holds anything already.
        """
        path, files = Path(path), files or Files()
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise RunError(f"{path} exists and is not empty. Resume it with `capibara resume {path}`, or name another.")
        for folder in ("checkpoints", "logs", "deltas"):
            (path / folder).mkdir(parents=True, exist_ok=True)
        run = cls(path, files, _take_lock(path))
        files.write_atomic(path / "config.toml", config_toml.encode())
        files.write_atomic(path / CERTIFICATES, b"")
        files.write_atomic(path / "format.json", json.dumps({"format_version": FORMAT_VERSION}).encode() + b"\n")
        return run

    @classmethod
    def open(cls, path: Path | str, *, files: Files | None = None) -> Run:
        """An existing run, checked and locked; what a crash left half done is put away.

        Raises:
          RunError: If it is no run directory, is of a later format, or is in use by another process.
          CertificateError: If a certificate other than a torn last line does not check.
        """
        path, files = Path(path), files or Files()
        check_format(path)
        run = cls(path, files, _take_lock(path))
        try:
            run.lines, torn_at = read_lines(path)
        except CertificateError:
            run.close()
            raise
        if torn_at is not None:
            files.truncate(path / CERTIFICATES, torn_at)
            run.notes.append(f"The last line of {CERTIFICATES} had not been written whole and was removed.")
        run._discard_unlisted()
        return run

    @property
    def head(self) -> str:
        """Hash of the last certificate, or the genesis hash."""
        return self.lines[-1]["hash"] if self.lines else GENESIS

    def append(self, line: dict[str, Any]) -> None:
        """Appends a sealed certificate: the commit point of its round."""
        from capibara.consensus.certificate import canonical

        check_link(line, self.head, len(self.lines) + 1)
        self.files.append(self.path / CERTIFICATES, canonical(line) + b"\n")
        self.lines.append(line)

    def close(self) -> None:
        """Releases the lock."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _discard_unlisted(self) -> None:
        """Removes checkpoints and deltas of rounds whose line was never appended, and temporary files."""
        hashes = {line["hash"] for line in self.lines}
        for folder in sorted((self.path / "checkpoints").glob("*")):
            if folder.name.startswith(".") or not _is_listed(folder, hashes):
                self.files.remove(folder)
                self.notes.append(f"checkpoints/{folder.name} belonged to a round that was not committed; removed.")
        done = {line["round"] for line in self.lines if line["outcome"] != "no_quorum"}
        for file in sorted((self.path / "deltas").glob("*")):
            number = file.stem.removeprefix("round-")
            if file.name.startswith(".") or not (number.isdigit() and int(number) in done):
                self.files.remove(file)


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int | None]:
    """All certificates of a run, checked and linked, and the offset of a torn last line (None where there is none).

    Raises:
      CertificateError: Naming the first line that does not check.
    """
    try:
        raw = (path / CERTIFICATES).read_bytes()
    except FileNotFoundError:
        raise RunError(f"{path} has no {CERTIFICATES}; it is not a whole run directory.") from None
    lines, previous, offset = [], GENESIS, 0
    for number, text in enumerate(raw.splitlines(keepends=True), 1):
        if not text.endswith(b"\n"):
            return lines, offset
        line = parse_line(text, number)
        check_link(line, previous, number)
        lines.append(line)
        previous, offset = line["hash"], offset + len(text)
    return lines, None


def check_format(path: Path) -> None:
    """Raises RunError if `path` is no run directory or was written by a later version of capibara."""
    try:
        version = json.loads((path / "format.json").read_text())["format_version"]
    except FileNotFoundError:
        raise RunError(f"{path} is not a run directory (it has no format.json). List runs with `capibara runs ls`.") \
            from None
    except (ValueError, KeyError, TypeError):
        raise RunError(f"{path / 'format.json'} does not say which format the run has; it has been damaged.") from None
    if version > FORMAT_VERSION:
        raise RunError(
            f"{path} has format_version {version}; this capibara knows up to {FORMAT_VERSION}. Update capibara."
        )


def _is_listed(folder: Path, hashes: set[str]) -> bool:
    try:
        return json.loads((folder / "state.json").read_text())["head"] in hashes | {GENESIS}
    except (OSError, ValueError, KeyError, TypeError):
        return True  # damaged, not unlisted: `newest_intact` walks past it and says so


def _take_lock(path: Path) -> int:
    descriptor = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise RunError(f"{path} is in use by process {holder}. Wait for it to end, or stop it first.") from None
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return descriptor
