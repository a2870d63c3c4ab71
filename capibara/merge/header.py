"""The safetensors header, read as what it is, untrusted input, and written with every offset known in advance.

    8 bytes: length of the JSON, little-endian │ JSON: name → dtype, shape, [begin, end) │ tensors, without gaps

The parser allocates nothing that the file's own size does not justify, and refuses whatever is not one tensor behind
the other from the first byte to the last.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from capibara.errors import DataError

LARGEST_HEADER = 100_000_000
"""Bytes; the limit of the reference implementation."""

ITEMSIZE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip


class Entry(NamedTuple):
    """Where a tensor lies in a file.

    Attributes:
      dtype: As safetensors names it, `BF16`.
      shape: Its dimensions.
      offset: Of its first byte, from the start of the file.
      size: Bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int


class Header(NamedTuple):
    """Tensors in the order in which they lie in the file, and the free-form metadata."""

    entries: dict[str, Entry]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """The header of a safetensors file, every claim checked against the file's size.

    Raises:
      DataError: Saying what is wrong: truncated, larger than the file, no JSON, duplicate names, an unknown dtype, a
        size that does not follow from the shape, overlapping tensors, gaps, or bytes that belong to no tensor.
    """
    try:
        with open(path, "rb") as file:
            total = os.fstat(file.fileno()).st_size
            raw = file.read(8)
            if len(raw) < 8:
                raise _bad(path, f"it has {total} bytes; the length of the header alone takes 8")
            length = int.from_bytes(raw, "little")
            if length > total - 8:
                raise _bad(path, f"its header claims {length:,} bytes; {total - 8:,} are left in the file")
            if length > LARGEST_HEADER:
                raise _bad(path, f"its header claims {length:,} bytes; at most {LARGEST_HEADER:,} are read")
            text = file.read(length)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}).") from error
    return parse_header(text, total, path)


def parse_header(text: bytes, total: int, path: Path) -> Header:
    """The header whose JSON is `text`, of a file of `total` bytes; `path` is for errors."""

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise _bad(path, f"its header names {twice!r} twice")
        return found

    try:
        content = json.loads(text, object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise _bad(path, "its header is not JSON") from None
    if not isinstance(content, dict):
        raise _bad(path, "its header is not a JSON object")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _bad(path, "its __metadata__ is not an object of strings")
    start = 8 + len(text)
    entries = {name: _entry(path, name, value, start, total) for name, value in content.items()}
    return Header(_in_order(path, entries, start, total), metadata)


def build_header(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, Entry]]:
    """The first bytes of a file that will hold tensors (name, dtype, shape) in this order, and where each will lie.

    The header is padded with spaces to a multiple of 8 bytes, so that tensors are aligned.
    """
    content: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    place, entries = 0, {}
    for name, dtype, shape in tensors:
        size = math.prod(shape) * ITEMSIZE[dtype]
        content[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, place + size]}
        entries[name] = Entry(dtype, shape, place, size)
        place += size
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    moved = {name: entry._replace(offset=entry.offset + start) for name, entry in entries.items()}
    return len(text).to_bytes(8, "little") + text, moved


def _entry(path: Path, name: str, value: Any, start: int, total: int) -> Entry:
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise _bad(path, f"tensor {name!r} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise _bad(path, f"tensor {name!r} has the unknown dtype {dtype!r}; known: {', '.join(ITEMSIZE)}")
    if not isinstance(shape, list) or not all(type(side) is int and side >= 0 for side in shape):
        raise _bad(path, f"tensor {name!r} has the shape {shape!r}, which is no list of numbers of 0 or more")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(o) is int and o >= 0 for o in offsets):
        raise _bad(path, f"tensor {name!r} has the data_offsets {offsets!r}, which are no pair of numbers")
    begin, end = offsets
    if end < begin:
        raise _bad(path, f"tensor {name!r} ends at {end:,}, before it begins at {begin:,}")
    if start + end > total:
        raise _bad(path, f"tensor {name!r} ends at byte {start + end:,} of a file of {total:,} bytes: truncated")
    needed = math.prod(shape) * ITEMSIZE[dtype]
    if needed != end - begin:
        raise _bad(
            path, f"tensor {name!r} of shape {tuple(shape)} and dtype {dtype} needs {needed:,} bytes; {end - begin:,} "
            "are given to it"
        )
    return Entry(dtype, tuple(shape), start + begin, end - begin)


def _in_order(path: Path, entries: dict[str, Entry], start: int, total: int) -> dict[str, Entry]:
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].offset, item[1].offset + item[1].size)))
    place, before = start, None
    for name, entry in ordered.items():
        if entry.offset < place:
            raise _bad(path, f"tensors {before!r} and {name!r} overlap")
        if entry.offset > place:
            raise _bad(path, f"{entry.offset - place:,} bytes before tensor {name!r} belong to no tensor")
        place, before = entry.offset + entry.size, name
    if place != total:
        raise _bad(path, f"{total - place:,} bytes at its end belong to no tensor")
    return ordered


def _bad(path: Path, reason: str) -> DataError:
    return DataError(f"{path} is not a whole safetensors file: {reason}. Copy or save it anew.")
