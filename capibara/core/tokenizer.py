"""Tokenizers: bytes as they are, or byte-level BPE by Hugging Face `tokenizers`. Both end a document with `<|end|>`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from capibara.errors import ConfigError

END = "<|end|>"
BYTE_DEFINITION = {"capibara": "byte", "end": END}


class Tokenizer:
    """Text to token ids and back.

    Attributes:
      vocab_size: Ids run from 0 to vocab_size − 1.
      eos: Id of the separator that ends a document.
      digest: BLAKE3 (hex) of the definition.
    """

    def __init__(self, bpe: Any = None):
        self._bpe = bpe
        self.vocab_size = 257 if bpe is None else bpe.get_vocab_size()
        eos = 256 if bpe is None else bpe.token_to_id(END)
        if eos is None and bpe is not None:
            for name in ("<|endoftext|>", "</s>", "<|im_end|>", "<eos>"):
                eos = bpe.token_to_id(name) if eos is None else eos
        if eos is None:
            raise ConfigError(f"The tokenizer has no token that ends a document; add {END!r} to it.")
        self.eos = int(eos)
        self.definition = json.dumps(BYTE_DEFINITION) if bpe is None else bpe.to_str()
        self.digest = blake3(self.definition.encode()).hexdigest()
        self.dtype = np.uint16 if self.vocab_size <= 65536 else np.uint32

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, without a separator: uint16 while they fit, else uint32."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """`encode` of several texts at once."""
        if self._bpe is None:
            return [np.frombuffer(text.encode(), np.uint8).astype(self.dtype) for text in texts]
        return [np.array(e.ids, self.dtype) for e in self._bpe.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; separators are dropped, bytes that are no UTF-8 are shown as �."""
        kept = [int(i) for i in ids if int(i) != self.eos]
        if self._bpe is None:
            return bytes(i for i in kept if i < 256).decode(errors="replace")
        return self._bpe.decode(kept)

    def save(self, path: Path | str) -> None:
        """Writes the definition as JSON; BPE in the `tokenizer.json` form."""
        Path(path).write_text(self.definition, encoding="utf-8")


def byte_tokenizer() -> Tokenizer:
    """Ids 0 to 255 are bytes, 256 ends a document."""
    return Tokenizer()


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of `vocab_size` tokens trained on texts.

    Raises:
      ConfigError: If `vocab_size` is below 257, the bytes and the separator.
    """
    if vocab_size < 257:
        raise ConfigError(f"A byte-level BPE needs at least 257 tokens (bytes and {END}); got {vocab_size}.")
    from tokenizers import Tokenizer as Bpe
    from tokenizers import decoders, models, pre_tokenizers, trainers

    bpe = Bpe(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet,
                                   show_progress=False)
    )
    return Tokenizer(bpe)


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """`byte`, or the path of a `tokenizer.json` (ours, or Hugging Face's).

    Raises:
      ConfigError: If there is no such file or it is no tokenizer.
    """
    if str(spec) == "byte":
        return byte_tokenizer()
    path = Path(spec)
    try:
        text = path.read_text(encoding="utf-8")
        definition = json.loads(text)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is not a tokenizer.json ({error}). Use 'byte', 'bpe:SIZE' or a file.") from None
    if definition == BYTE_DEFINITION:
        return byte_tokenizer()
    from tokenizers import Tokenizer as Bpe

    try:
        return Tokenizer(Bpe.from_str(text))
    except Exception as error:  # noqa: BLE001 - the library raises bare Exception for a bad file
        raise ConfigError(f"{path} is not a tokenizer.json ({error}). Use 'byte', 'bpe:SIZE' or a file.") from None
