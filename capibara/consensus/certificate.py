"""Certificates: canonical lines, a chain of hashes over them, and digests of trees. No JAX.

    hash = BLAKE3(canonical JSON of the line without hash, timing and environment); previous = hash of the line before

The chain proves integrity to someone who holds one hash of it; it does not say who wrote it (no authenticity).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from blake3 import blake3

from capibara.errors import CertificateError
from capibara.tree import named_leaves
from capibara.types import PyTree

GENESIS = "0" * 64
OUTSIDE_HASH = ("hash", "timing", "environment")


def canonical(value: Any) -> bytes:
    """The one JSON text of a value: sorted keys, no spaces, shortest round-trip floats, NaN and infinities as null."""
    text = json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise CertificateError("A certificate cannot hold half of a UTF-16 pair; its text must be Unicode.") from None


def line_hash(line: Mapping[str, Any]) -> str:
    """BLAKE3 (hex) of everything in a line that is inside the hash."""
    return blake3(canonical({key: value for key, value in line.items() if key not in OUTSIDE_HASH})).hexdigest()


def seal(line: Mapping[str, Any], previous: str) -> dict[str, Any]:
    """The line with `previous` and `hash` filled in, as it will be read back."""
    sealed = json.loads(canonical({**line, "previous": previous}))
    sealed["hash"] = line_hash(sealed)
    return sealed


def parse_line(raw: bytes, number: int, *, name: str = "rounds.jsonl") -> dict[str, Any]:
    """A line of a chain, checked to be canonical and to have the hash it claims.

    Raises:
      CertificateError: Naming the line, if it is not.
    """
    place = f"{name} line {number}"
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        raise CertificateError(f"{place} is not JSON.") from None
    if not isinstance(line, dict) or not isinstance(line.get("hash"), str) or not isinstance(line.get("previous"), str):
        raise CertificateError(f"{place} is not a certificate: it lacks `hash` or `previous`.")
    if not _is_canonical(line, raw.removesuffix(b"\n")):
        raise CertificateError(f"{place} is not canonical: its bytes have been changed.")
    if line_hash(line) != line["hash"]:
        raise CertificateError(
            f"{place} has been changed: its content has hash {line_hash(line)[:16]}…, it claims {line['hash'][:16]}…"
        )
    return line


def check_link(line: Mapping[str, Any], previous: str, number: int, *, name: str = "rounds.jsonl") -> None:
    """Raises CertificateError if a line does not follow the hash before it: one was changed, removed or moved."""
    if line["previous"] != previous:
        raise CertificateError(
            f"{name} line {number} does not follow the line before it: it names {line['previous'][:16]}… as previous, "
            f"the line before has {previous[:16]}…; a line was removed, added or moved there."
        )


def digest_leaf(path: str, leaf: Any) -> bytes:
    """BLAKE3 over (path, dtype, shape, little-endian bytes) of one leaf."""
    array = np.asarray(leaf)
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    array = np.ascontiguousarray(array).reshape(array.shape)
    hasher = blake3(f"{path}\0{array.dtype.name}\0{','.join(map(str, array.shape))}\0".encode())
    hasher.update(array.reshape(-1).view(np.uint8).data if array.size else b"")
    return hasher.digest()


def digest_tree(tree: PyTree) -> tuple[str, dict[str, str]]:
    """The digest of a tree, and that of every leaf, hex."""
    leaves = {path: digest_leaf(path, leaf) for path, leaf in named_leaves(tree).items()}
    return digest_over(leaves), {path: digest.hex() for path, digest in leaves.items()}


def digest_rows(stack: PyTree, num_rows: int, *, threads: int | None = None) -> list[str]:
    """The digest of each row of a stack, as `digest_tree` of that row alone would give; rows in threads."""
    leaves = {path: np.asarray(leaf) for path, leaf in named_leaves(stack).items()}

    def row(i: int) -> str:
        return digest_over({path: digest_leaf(path, leaf[i]) for path, leaf in leaves.items()})

    with ThreadPoolExecutor(threads or min(num_rows, os.cpu_count() or 1)) as pool:
        return list(pool.map(row, range(num_rows)))


def _is_canonical(line: Mapping[str, Any], text: bytes) -> bool:
    try:
        return canonical(line) == text
    except (CertificateError, RecursionError):
        return False


def digest_over(leaves: Mapping[str, bytes]) -> str:
    """The digest of a tree, of the digests of its leaves by path."""
    return blake3(b"".join(leaves[path] for path in sorted(leaves))).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, str) or value is None or isinstance(value, (bool, np.bool_)):
        return bool(value) if isinstance(value, np.bool_) else value
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        number = float(value)
        return number + 0.0 if math.isfinite(number) else None  # -0.0 + 0.0 = 0.0
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [_plain(one) for one in value]
    raise CertificateError(f"A certificate cannot hold a {type(value).__name__}.")
