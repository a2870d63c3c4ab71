"""Disk, in one place: every write, fsync and rename goes through a `Files` object, so that tests can fail any of them.

Durability: a file counts when it has been written, fsynced and renamed, and its folder fsynced. Tensors are
safetensors; nothing is ever unpickled.
"""

from __future__ import annotations

import errno
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

    def write_at(self, descriptor: int, data: bytes | memoryview, offset: int) -> None:
        """Writes all of `data` at an offset of an open file; it counts after `fsync`."""
        rest = memoryview(data).cast("B")
        while len(rest):
            written = os.pwrite(descriptor, rest, offset)
            rest, offset = rest[written:], offset + written

    def reserve(self, descriptor: int, size: int) -> None:
        """Makes an open file `size` bytes long, with room for all of them where the file system can promise it."""
        if hasattr(os, "posix_fallocate") and size:
            try:
                os.posix_fallocate(descriptor, 0, size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise
        os.ftruncate(descriptor, size)

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
        """Removes a file or folder, if it is there; a folder is hidden first, so that it is never half there."""
        if not path.is_dir():
            path.unlink(missing_ok=True)
        elif path.name.startswith("."):
            shutil.rmtree(path)
        else:
            hidden = path.with_name(f".{path.name}.removed")
            self.remove(hidden)
            self.rename(path, hidden)
            self.remove(hidden)

    def write_atomic(self, path: Path, data: bytes | memoryview) -> None:
        """The file has its old content or its new content, never a part."""
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            self.write(temporary, data)
            self.rename(temporary, path)
        except OSError:
            self.remove(temporary)  # what did not fit must not keep the room
            raise
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

    return save({name: _numpy(value) for name, value in tensors.items()})


def read_tensors(path: Path, *, digest: str | None = None, name: str | None = None) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file.

    Args:
      path: The file.
      digest: BLAKE3 (hex) that its bytes must have, checked on the very bytes that are read.
      name: What to call the file in errors, if not by its path.

    Raises:
      CertificateError: If the file is missing, has another digest, or is not a whole safetensors file.
    """
    from blake3 import blake3
    from safetensors import SafetensorError, deserialize

    name = name or str(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CertificateError(f"{name} is missing.") from None
    if digest is not None and blake3(data).hexdigest() != digest:
        raise CertificateError(f"{name} has been changed: its digest is not the one on record.")
    try:
        return {key: _view(**tensor) for key, tensor in deserialize(data)}
    except (SafetensorError, ValueError, KeyError) as error:
        raise CertificateError(f"{name} is not a whole safetensors file ({error}).") from None


_DTYPES = {
    "BOOL": "bool", "F16": "float16", "F32": "float32", "F64": "float64",
    "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64",
}  # fmt: skip
"""Names in safetensors files to those of NumPy, bfloat16 apart; `safetensors.numpy.load` does not know that one."""


def _view(dtype: str, shape: list[int], data: bytes | bytearray) -> np.ndarray:
    if dtype == "BF16":
        from ml_dtypes import bfloat16

        return np.frombuffer(data, bfloat16).reshape(shape)
    return np.frombuffer(data, _DTYPES[dtype]).reshape(shape)


def _numpy(value: Any) -> np.ndarray:
    array = np.asarray(value)
    return np.ascontiguousarray(array).reshape(array.shape)  # ascontiguousarray alone makes a scalar one-dimensional
