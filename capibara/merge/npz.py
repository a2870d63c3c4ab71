"""NPZ archives: a member that is stored plainly is read in place, one that is compressed or transposed whole."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from capibara.errors import DataError
from capibara.merge.tensors import SAFETENSORS, Loaded, Stored, Tensor

LOCAL_HEADER = 30
"""Bytes of a member's header in the archive, before its name and extra field."""


def npz_tensors(path: Path) -> dict[str, Tensor]:
    """The arrays of an archive. Nothing is unpickled.

    Raises:
      DataError: If it is no archive of arrays of numbers, or is truncated.
    """
    tensors = {}
    try:
        with zipfile.ZipFile(path) as archive:
            members = sorted(archive.infolist(), key=lambda member: member.header_offset)
            for member in members:
                name = member.filename.removesuffix(".npy")
                if name in tensors:
                    raise DataError(f"{path} holds the array {name!r} twice.")
                tensors[name] = _tensor(path, archive, member, name)
    except (zipfile.BadZipFile, ValueError, OSError, EOFError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is not a whole NPZ archive ({error}).") from None
    return tensors


def _tensor(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str) -> Tensor:
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = reader(file)
        ahead = file.tell()
    ours = SAFETENSORS.get(dtype.newbyteorder("=").name)
    if dtype.hasobject or ours is None:
        raise DataError(f"{path}: array {name!r} has dtype {dtype}, which is none that can be merged.")
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if ahead + size != member.file_size:
        has = member.file_size - ahead
        raise DataError(f"{path}: array {name!r} of shape {shape} needs {size:,} bytes; it has {has:,}.")
    swapped = dtype.byteorder == ">"
    if member.compress_type != zipfile.ZIP_STORED or (fortran and len(shape) > 1) or swapped:
        return Tensor(ours, tuple(shape), Loaded(lambda: _load(path, name)))
    with open(path, "rb") as file:
        file.seek(member.header_offset)
        local = file.read(LOCAL_HEADER)
        lengths = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    return Tensor(ours, tuple(shape), Stored(path, member.header_offset + LOCAL_HEADER + lengths + ahead))


def _load(path: Path, name: str) -> np.ndarray:
    with np.load(path, allow_pickle=False) as arrays:
        array = np.ascontiguousarray(arrays[name]).reshape(arrays[name].shape)
    return array.astype(array.dtype.newbyteorder("<"), copy=False)
