"""Disk, in one place: every write, fsync and rename goes through a `Files` object, so that tests can fail any of them.

Durability: a file counts when it has been written, fsynced and renamed, and its folder fsynced. Tensors are
safetensors; nothing is ever unpickled.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from capibara.errors import CertificateError, RunError


class Files:
    """The real file system. A test substitutes one that raises or dies at the i-th operation."""

    def write(self, path: Path, data: bytes | memoryview) -> None:
        """Writes a whole file and fsyncs it."""
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            self.fsync(file.fileno())

    def append(self, path: Path, data: bytes) -> None:
        """Appends to a file and fsyncs it."""
        with open(path, "ab") as file:
            file.write(data)
            file.flush()
            self.fsync(file.fileno())

    def truncate(self, path: Path, size: int) -> None:
        """Cuts a file to `size` bytes and fsyncs it."""
        with open(path, "r+b") as file:
            file.truncate(size)
            self.fsync(file.fileno())

    def fsync(self, descriptor: int) -> None:
        """Waits until a file's bytes are on the medium."""
        os.fsync(descriptor)

    def fsync_folder(self, path: Path) -> None:
        """Waits until a folder's entries are on the medium."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            self.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Renames atomically; an existing file is replaced."""
        os.replace(source, target)

    def remove(self, path: Path) -> None:
        """Removes a file or a whole folder, if it is there."""
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def write_atomic(self, path: Path, data: bytes | memoryview) -> None:
        """The file has its old content or its new content, never a part."""
        temporary = path.with_name(f".{path.name}.tmp")
        self.write(temporary, data)
        self.rename(temporary, path)
        self.fsync_folder(path.parent)


def write_new(path: Path, text: str) -> None:
    """Writes a text file that must not exist yet.

    Raises:
      RunError: If something of that name is there.
    """
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise RunError(f"{path} exists already; choose another name or remove it first.") from None


def tensors_to_bytes(tensors: Mapping[str, Any]) -> bytes:
    """A safetensors file of named arrays (any numeric type, bfloat16 included)."""
    from safetensors.numpy import save

    return save({name: np.ascontiguousarray(_numpy(value)) for name, value in tensors.items()})


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file.

    Raises:
      CertificateError: If the file is missing or is not a whole safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return load(path.read_bytes())
    except FileNotFoundError:
        raise CertificateError(f"{path} is missing.") from None
    except (SafetensorError, ValueError, KeyError) as error:
        raise CertificateError(f"{path} is not a whole safetensors file ({error}).") from None


def _numpy(value: Any) -> np.ndarray:
    array = np.asarray(value)
    return array.reshape(array.shape)
