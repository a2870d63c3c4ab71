"""A run is a directory; reopening it goes on bit for bit.

    config.toml        resolved configuration          rounds.jsonl   one certificate a line; appending one commits
    format.json        version of this layout          metrics.jsonl  losses and speeds
    checkpoints/step-N/  deltas/round-N.safetensors    logs/training.log
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from capibara.consensus.certificate import GENESIS, canonical, check_link, parse_line
from capibara.errors import RunError
from capibara.files import Files

FORMAT_VERSION = 1
CERTIFICATES = "rounds.jsonl"
FORMAT = "format.json"
LOCK = ".lock"
SOLO = "solo.json"
"""The file that tells a run of `UnifiedTrainer` (`capibara.training.solo`) from one of a consensus."""
FOLDERS = ("checkpoints", "logs", "deltas")


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
          RunError: If the directory holds anything already (what a creation that was cut short left does not count),
            is in use, or cannot be written.
        """
        path, files = Path(path), files or Files()
        try:
            _refuse_if_used(path)
            for folder in FOLDERS:
                (path / folder).mkdir(parents=True, exist_ok=True)
            run = cls(path, files, _take_lock(path))
        except OSError as error:
            raise _not_writable(path, error) from error
        with _closed_on_failure(run):
            _refuse_if_used(path)  # again, now that nobody else can be making it
            files.write_atomic(path / "config.toml", config_toml.encode())
            files.write_atomic(path / CERTIFICATES, b"")
            files.write_atomic(path / FORMAT, json.dumps({"format_version": FORMAT_VERSION}).encode() + b"\n")
            files.fsync_folder(path.parent)
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
        try:
            run = cls(path, files, _take_lock(path))
        except OSError as error:
            raise _not_writable(path, error) from error
        with _closed_on_failure(run):
            run.lines, torn_at = read_lines(path)
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
        """Appends a sealed certificate: the commit point of its round.

        Raises:
          RunError: If the disk is full or not writable; the certificates are as they were.
        """
        check_link(line, self.head, len(self.lines) + 1)
        path = self.path / CERTIFICATES
        size = path.stat().st_size
        try:
            self.files.append(path, canonical(line) + b"\n")
        except OSError as error:
            with suppress(OSError):  # a part that stays is torn, and removed when the run is opened again
                self.files.truncate(path, size)
            raise RunError(
                f"Certificate {len(self.lines) + 1} could not be written to {path} ({error.strerror or error}). "
                f"Nothing that was committed is lost: make room, then `capibara resume {self.path}`."
            ) from error
        self.lines.append(line)

    def discard(self) -> None:
        """Removes a run in which nothing has been trained yet, as far as it can be, and releases the lock."""
        if not self.lines and not any((self.path / "checkpoints").glob("*")):
            with suppress(OSError):
                for entry in self.path.iterdir():
                    self.files.remove(entry)
                self.path.rmdir()
        self.close()

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
        done = {line["round"] for line in self.lines if line["outcome"] != "no_quorum"}
        for folder in sorted((self.path / "checkpoints").glob("*")):
            if folder.name.startswith("."):
                self.files.remove(folder)
            elif _step(folder) > len(done) and not _is_listed(folder, {line["hash"] for line in self.lines}):
                self.files.remove(folder)
                self.notes.append(f"checkpoints/{folder.name} belonged to a round that was not committed; removed.")
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
    *whole, torn = raw.split(b"\n")  # not splitlines: a byte flipped to a carriage return must not end a line
    lines, previous = [], GENESIS
    for number, text in enumerate(whole, 1):
        line = parse_line(text, number)
        check_link(line, previous, number)
        lines.append(line)
        previous = line["hash"]
    return lines, len(raw) - len(torn) if torn else None


def check_format(path: Path) -> None:
    """Raises RunError if `path` is no run directory or was written by a later version of capibara."""
    try:
        version = json.loads((path / FORMAT).read_text())["format_version"]
        later = version > FORMAT_VERSION
    except (FileNotFoundError, NotADirectoryError):
        what = f"{path} is not a run directory (it has no {FORMAT})" if path.exists() else f"There is no run {path}"
        raise RunError(f"{what}. List runs with `capibara runs ls`.") from None
    except (ValueError, KeyError, TypeError):
        raise RunError(f"{path / FORMAT} does not say which format the run has; it has been damaged.") from None
    if later:
        raise RunError(
            f"{path} has format_version {version}; this capibara knows up to {FORMAT_VERSION}. Update capibara."
        )


def _step(folder: Path) -> int:
    number = folder.name.removeprefix("step-")
    return int(number) if number.isdigit() else 0


def _is_listed(folder: Path, hashes: set[str]) -> bool:
    try:
        return json.loads((folder / "state.json").read_text())["head"] in hashes | {GENESIS}
    except (OSError, ValueError, KeyError, TypeError):
        return True  # damaged, not unlisted: `newest_intact` walks past it and says so


def _refuse_if_used(path: Path) -> None:
    """Raises RunError unless the directory is new, empty, or what a creation that was cut short left behind."""
    if not path.exists():
        return
    if not path.is_dir():
        raise RunError(f"{path} is a file. Name a directory that does not exist yet.")
    names = {entry.name for entry in path.iterdir()}
    ours = {*FOLDERS, LOCK, "config.toml", CERTIFICATES}
    started = names - ours - {f".{name}.tmp" for name in (*ours, FORMAT)}
    if started or any(any((path / folder).glob("*")) for folder in FOLDERS) or _size(path / CERTIFICATES):
        raise RunError(f"{path} exists and is not empty. Resume it with `capibara resume {path}`, or name another.")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@contextmanager
def _closed_on_failure(run: Run) -> Iterator[None]:
    """Releases a run that cannot be made or opened; what the disk refused becomes our own error."""
    try:
        yield
    except OSError as error:
        run.close()
        raise _not_writable(run.path, error) from error
    except BaseException:
        run.close()
        raise


def _not_writable(path: Path, error: OSError) -> RunError:
    return RunError(f"{path} cannot be written ({error.strerror or error}). Make room or name another directory.")


def _take_lock(path: Path) -> int:
    descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise RunError(f"{path} is in use by process {holder}. Wait for it to end, or stop it first.") from None
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    return descriptor
