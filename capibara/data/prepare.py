"""Documents → flat files of token ids, one per split, with a manifest of digests.

    SPLIT.bin    uint16 or uint32 ids, documents one after another      SPLIT.idx    int64 offsets of documents
    SPLIT.fields one JSON object a document                             manifest.json counts, digests, parameters

A document ends with the separator. Written as temporary files, fsynced and renamed, the manifest last: a folder with
a manifest is whole. One process prepares a folder at a time; others wait and find it there. The same inputs give the
same bytes.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from capibara.data.source import Document, pieces
from capibara.data.split import SPLITS, split_of
from capibara.errors import DataError
from capibara.files import Files

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
FEW_DOCUMENTS = 100
"""Below this many documents the text is held out by blocks of 4 kB instead of whole documents."""

BLOCK = 4096
BATCH = 64
BATCH_CHARACTERS = 4 * 2**20
"""A BPE keeps some 100 bytes a token while it encodes, so long documents are encoded few at a time."""

HASHED_AT_ONCE = 16 * 2**20
NOTE_EVERY = 64 * 2**20
"""Characters between two notes on progress."""

Note = Callable[[str], None]

_KINDS = ("bin", "idx", "fields")


def prepare(
    documents: Callable[[], Iterable[Document]],
    tokenizer: Any,
    folder: Path,
    *,
    held_out_fraction: float = 0.08,
    inputs: str = "",
    inputs_now: Callable[[], str] | None = None,
    note: Note | None = None,
    files: Files | None = None,
) -> dict[str, Any]:
    """Tokenises documents into `folder`, or finds them there already.

    Args:
      documents: Called for a fresh iteration over all documents.
      tokenizer: `capibara.core.tokenizer.Tokenizer`.
      folder: Where the shards go.
      held_out_fraction: Share of the text that is held out, over the four splits together; with 0 they stay empty.
      inputs: Digest of the inputs; shards of other inputs are made anew, and without one they always are.
      inputs_now: Computes that digest again, to see that no input changed while it was read.
      note: Gets a sentence now and then while much text is prepared, or while another process prepares it.
      files: For tests.

    Returns:
      The manifest.

    Raises:
      DataError: If there is no text, a split would be empty, an input changes meanwhile, or the folder cannot be
        written. Nothing half done is left.
    """
    files, note = files or Files(), note or (lambda text: None)
    wanted = {
        "format_version": FORMAT_VERSION,
        "inputs": inputs,
        "tokenizer": tokenizer.digest,
        "held_out_fraction": held_out_fraction,
    }
    if inputs and (found := _found(folder, wanted)):
        return found
    try:
        with _alone(folder, note):
            if inputs and (found := _found(folder, wanted)):
                return found
            _discard(folder, files)
            try:
                return _make(documents, tokenizer, folder, wanted, inputs_now, note, files)
            except BaseException:
                with suppress(OSError):  # what stays is removed by the next preparation
                    _discard(folder, files)
                raise
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{folder} cannot be written ({reason}). Make room or name another directory.") from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of prepared text.

    Raises:
      DataError: If it is missing or its bytes are not those that were written.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        whole = manifest["manifest_digest"] == _digest_of({k: v for k, v in manifest.items() if k != "manifest_digest"})
    except OSError as error:
        raise DataError(
            f"{folder} holds no prepared text: {MANIFEST} cannot be read ({error.strerror}). Prepare the text first."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole, manifest = False, {}
    if not whole:
        raise DataError(f"{folder / MANIFEST} has been changed; remove {folder} and prepare the text again.")
    return manifest


def check_shards(folder: Path, manifest: dict[str, Any]) -> None:
    """Raises DataError naming the first shard whose bytes are not those of the manifest."""
    for name, digest in manifest["digests"].items():
        path = folder / name
        if not path.is_file() or _digest(path) != digest:
            raise DataError(f"{path} has been changed or is missing; remove {folder} and prepare the text again.")


def hash_file(hasher: blake3, path: Path) -> None:
    """Feeds a file to a hash, 16 MB at a time; a mapped file would count as memory of the process, however long."""
    with open(path, "rb") as file:
        while chunk := file.read(HASHED_AT_ONCE):
            hasher.update(chunk)


def _make(
    documents: Callable[[], Iterable[Document]],
    tokenizer: Any,
    folder: Path,
    wanted: dict[str, Any],
    inputs_now: Callable[[], str] | None,
    note: Note,
    files: Files,
) -> dict[str, Any]:
    fraction = wanted["held_out_fraction"]
    by_blocks = _wants_blocks(documents(), fraction)
    source = iter(documents())
    if by_blocks:
        source = (block for d in source for block in pieces(d.text, d.fields, BLOCK, d.ends))
    counts = _write(source, tokenizer, folder, fraction, note, files)
    empty = [split for split in (SPLITS if fraction else SPLITS[:1]) if counts[split]["tokens"] < 2]
    if empty:
        hint = f", or raise data.held_out_fraction (now {fraction})" if fraction else ""
        raise DataError(f"The text is too short: nothing is left for {', '.join(empty)}. Give more text{hint}.")
    if inputs_now and inputs_now() != wanted["inputs"]:
        raise DataError("The text was changed while it was being read; start again when it is finished.")
    names = [f"{split}.{kind}" for split in SPLITS for kind in _KINDS]
    for name in names:
        files.rename(_temporary(folder, name), folder / name)
    files.fsync_folder(folder)
    digests = {name: _digest(folder / name) for name in names}
    manifest = wanted | {
        "dtype": np.dtype(tokenizer.dtype).name,
        "vocab_size": tokenizer.vocab_size,
        "eos": tokenizer.eos,
        "by_blocks": by_blocks,
        "splits": counts,
        "digests": digests,
        "digest": _digest_of(digests),
    }
    manifest["manifest_digest"] = _digest_of(manifest)
    files.write_atomic(folder / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True).encode())
    return manifest


def _wants_blocks(documents: Iterable[Document], fraction: float) -> bool:
    """Whether whole documents are too few to be held out and dealt: under 100, or none of them in one of the splits."""
    missing, whole = set(SPLITS if fraction else SPLITS[:1]), 0
    for document in documents:
        missing.discard(split_of(document.text, fraction))
        whole += document.ends
        if whole >= FEW_DOCUMENTS and not missing:
            return False
    return True


def _write(
    source: Iterator[Document], tokenizer: Any, folder: Path, fraction: float, note: Note, files: Files
) -> dict[str, dict[str, int]]:
    """Writes all splits as temporary files, fsynced."""
    counts = {split: {"documents": 0, "tokens": 0} for split in SPLITS}
    end = np.array([tokenizer.eos], tokenizer.dtype)
    characters = noted = 0
    with ExitStack() as stack:
        opened = {
            (split, kind): stack.enter_context(open(_temporary(folder, f"{split}.{kind}"), "wb"))
            for split in SPLITS
            for kind in _KINDS
        }
        for split in SPLITS:
            opened[split, "idx"].write(bytes(8))
        for group in _groups(source):
            for document, ids in zip(group, tokenizer.encode_batch([d.text for d in group]), strict=True):
                split = split_of(document.text, fraction)
                ids = np.concatenate([ids, end]) if document.ends else ids
                counts[split]["documents"] += 1
                counts[split]["tokens"] += len(ids)
                opened[split, "bin"].write(ids.tobytes())
                opened[split, "idx"].write(np.int64(counts[split]["tokens"]).tobytes())
                opened[split, "fields"].write(json.dumps(document.fields, sort_keys=True).encode() + b"\n")
                characters += len(document.text)
            if characters - noted >= NOTE_EVERY:
                noted = characters
                tokens = sum(count["tokens"] for count in counts.values())
                note(f"Preparing the text: {characters / 1e6:,.0f} M characters so far, {tokens / 1e6:,.0f} M tokens.")
        for file in opened.values():
            file.flush()
            files.fsync(file.fileno())
    return counts


def _groups(source: Iterator[Document]) -> Iterator[list[Document]]:
    """Documents to be encoded together: at most 64, and few of them where they are long."""
    group: list[Document] = []
    characters = 0
    for document in source:
        group.append(document)
        characters += len(document.text)
        if len(group) == BATCH or characters >= BATCH_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _found(folder: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest, if there is one of just these inputs; a damaged one counts as none."""
    try:
        manifest = read_manifest(folder)
    except DataError:
        return None
    return manifest if all(manifest.get(key) == value for key, value in wanted.items()) else None


@contextmanager
def _alone(folder: Path, note: Note) -> Iterator[None]:
    """Holds the folder's lock; the system releases it when a process dies."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note(f"Another process is preparing {folder}; waiting for it.")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _discard(folder: Path, files: Files) -> None:
    """Removes the manifest, and then what it vouched for or what was cut short."""
    for name in (MANIFEST, *(f"{split}.{kind}" for split in SPLITS for kind in _KINDS)):
        files.remove(folder / name)
        files.remove(_temporary(folder, name))


def _temporary(folder: Path, name: str) -> Path:
    return folder / f".{name}.tmp"


def _digest(path: Path) -> str:
    hasher = blake3(max_threads=blake3.AUTO)
    hash_file(hasher, path)
    return hasher.hexdigest()


def _digest_of(value: dict[str, Any]) -> str:
    return blake3(json.dumps(value, sort_keys=True).encode()).hexdigest()
