"""Documents → flat files of token ids, one per split, with a manifest of digests.

    SPLIT.bin    uint16 or uint32 ids, documents one after another      SPLIT.idx    int64 offsets of documents
    SPLIT.fields one JSON object a document                             manifest.json counts, digests, parameters

A document ends with the separator. Written as temporary files, fsynced and renamed, the manifest last: a folder with
a manifest is whole. The same inputs give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from capibara.data.source import Document, pieces
from capibara.data.split import SPLITS, split_of
from capibara.errors import DataError
from capibara.files import Files

FORMAT_VERSION = 1
FEW_DOCUMENTS = 100
"""Below this many documents the text is held out by blocks of 4 kB instead of whole documents."""

BLOCK = 4096
BATCH = 64


def prepare(
    documents: Callable[[], Iterable[Document]],
    tokenizer: Any,
    folder: Path,
    *,
    held_out_fraction: float = 0.08,
    inputs: str = "",
    files: Files | None = None,
) -> dict[str, Any]:
    """Tokenises documents into `folder`, or finds them there already.

    Args:
      documents: Called for a fresh iteration over all documents.
      tokenizer: `capibara.core.tokenizer.Tokenizer`.
      folder: Where the shards go.
      held_out_fraction: Share of the text that is held out, over the four splits together; with 0 they stay empty.
      inputs: Digest of the inputs; shards of other inputs are made anew.
      files: For tests.

    Returns:
      The manifest.

    Raises:
      DataError: If there is no text, or a split would be empty.
    """
    files, wanted = files or Files(), {
        "format_version": FORMAT_VERSION,
        "inputs": inputs,
        "tokenizer": tokenizer.digest,
        "held_out_fraction": held_out_fraction,
    }
    manifest_path = folder / "manifest.json"
    if manifest_path.is_file():
        manifest = json.loads(manifest_path.read_text())
        if inputs and all(manifest.get(key) == value for key, value in wanted.items()):
            return manifest
        files.remove(manifest_path)
    folder.mkdir(parents=True, exist_ok=True)
    few = len(list(islice(documents(), FEW_DOCUMENTS))) < FEW_DOCUMENTS
    source = (block for d in documents() for block in pieces(d.text, d.fields, BLOCK)) if few else iter(documents())
    counts = _write(source, tokenizer, folder, held_out_fraction, files)
    wanted_splits = SPLITS if held_out_fraction else SPLITS[:1]
    empty = [split for split in wanted_splits if counts[split]["tokens"] < 2]
    if empty:
        hint = f", or raise data.held_out_fraction (now {held_out_fraction})" if held_out_fraction else ""
        raise DataError(f"The text is too short: nothing is left for {', '.join(empty)}. Give more text{hint}.")
    digests = {f"{split}.{kind}": _digest(folder / f"{split}.{kind}") for split in SPLITS for kind in _KINDS}
    manifest = wanted | {
        "dtype": np.dtype(tokenizer.dtype).name,
        "vocab_size": tokenizer.vocab_size,
        "eos": tokenizer.eos,
        "by_blocks": few,
        "splits": counts,
        "digests": digests,
    }
    manifest["digest"] = blake3(json.dumps(digests, sort_keys=True).encode()).hexdigest()
    files.write_atomic(manifest_path, json.dumps(manifest, indent=1, sort_keys=True).encode())
    return manifest


def check_shards(folder: Path, manifest: dict[str, Any]) -> None:
    """Raises DataError naming the first shard whose bytes are not those of the manifest."""
    for name, digest in manifest["digests"].items():
        path = folder / name
        if not path.is_file() or _digest(path) != digest:
            raise DataError(f"{path} has been changed or is missing; remove {folder} and prepare the text again.")


def _write(
    source: Iterator[Document], tokenizer: Any, folder: Path, fraction: float, files: Files
) -> dict[str, dict[str, int]]:
    opened = {(split, kind): open(folder / f".{split}.{kind}.tmp", "wb") for split in SPLITS for kind in _KINDS}
    lengths: dict[str, list[int]] = {split: [] for split in SPLITS}
    end = np.array([tokenizer.eos], tokenizer.dtype)
    try:
        while group := list(islice(source, BATCH)):
            for document, ids in zip(group, tokenizer.encode_batch([d.text for d in group]), strict=True):
                split = split_of(document.text, fraction)
                ids = np.concatenate([ids, end]) if document.ends else ids
                opened[split, "bin"].write(ids.tobytes())
                opened[split, "fields"].write(json.dumps(document.fields, sort_keys=True).encode() + b"\n")
                lengths[split].append(len(ids))
        counts = {}
        for split in SPLITS:
            offsets = np.concatenate([[0], np.cumsum(lengths[split], dtype=np.int64)]).astype(np.int64)
            opened[split, "idx"].write(offsets.tobytes())
            counts[split] = {"documents": len(lengths[split]), "tokens": int(offsets[-1])}
    finally:
        for file in opened.values():
            file.flush()
            files.fsync(file.fileno())
            file.close()
    for split, kind in opened:
        files.rename(folder / f".{split}.{kind}.tmp", folder / f"{split}.{kind}")
    files.fsync_folder(folder)
    return counts


def _digest(path: Path) -> str:
    return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()


_KINDS = ("bin", "idx", "fields")
