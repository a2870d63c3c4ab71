"""Tokenizers: what is encoded decodes to the same text, and a definition has one digest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capibara.core.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer, train_bpe
from capibara.errors import ConfigError

TEXTS = ["the quick brown fox jumps over the lazy dog. ", "naïve – 水豚 🙂\n\ttabs\r\n"] * 20


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe(TEXTS, 300)


@given(st.text())
def test_bytes_decode_to_the_text(text: str):
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint16 and len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


@given(st.text())
def test_bpe_decodes_to_the_text(bpe: Tokenizer, text: str):
    """Byte-level: no text is out of vocabulary. The separator's own spelling is an id, not text."""
    text = text.replace("<|end|>", "")
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert len(ids) == 0 or ids.max() < bpe.vocab_size


def test_bpe_of_its_own_text_is_shorter_than_bytes(bpe: Tokenizer):
    assert bpe.vocab_size == 300
    assert len(bpe.encode(TEXTS[0])) < len(TEXTS[0].encode()) / 2


def test_bpe_training_repeats(bpe: Tokenizer):
    assert train_bpe(TEXTS, 300).digest == bpe.digest


def test_a_batch_is_each_text_on_its_own(bpe: Tokenizer):
    for tokenizer in (byte_tokenizer(), bpe):
        for ids, text in zip(tokenizer.encode_batch(TEXTS[:2]), TEXTS[:2], strict=True):
            np.testing.assert_array_equal(ids, tokenizer.encode(text))


def test_no_text_encodes_to_a_separator_of_bytes():
    tokenizer = byte_tokenizer()
    assert tokenizer.eos == 256 and tokenizer.vocab_size == 257
    assert tokenizer.eos not in tokenizer.encode("<|end|>")


def test_separators_are_not_shown(bpe: Tokenizer):
    for tokenizer in (byte_tokenizer(), bpe):
        assert tokenizer.decode([*tokenizer.encode("ab"), tokenizer.eos, *tokenizer.encode("c")]) == "abc"


def test_bytes_that_are_no_text_are_shown_as_such():
    assert byte_tokenizer().decode([0xFF, ord("a")]) == "\ufffda"


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_a_saved_tokenizer_is_the_same(tmp_path: Path, bpe: Tokenizer, kind: str):
    tokenizer = byte_tokenizer() if kind == "byte" else bpe
    tokenizer.save(tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert (again.digest, again.eos, again.vocab_size) == (tokenizer.digest, tokenizer.eos, tokenizer.vocab_size)
    np.testing.assert_array_equal(again.encode(TEXTS[1]), tokenizer.encode(TEXTS[1]))


def test_tokenizers_differ_in_digest(bpe: Tokenizer):
    assert len({byte_tokenizer().digest, bpe.digest, train_bpe(TEXTS, 290).digest}) == 3


def test_large_vocabularies_need_32_bits(bpe: Tokenizer):
    assert bpe.encode("a").dtype == np.uint16
    import json

    definition = json.loads(bpe.definition)
    extra = {f"word{i}": 300 + i for i in range(70000)}
    definition["model"]["vocab"] |= extra
    from tokenizers import Tokenizer as Bpe

    assert Tokenizer(Bpe.from_str(json.dumps(definition))).encode("a").dtype == np.uint32


def test_errors_say_what_to_give(tmp_path: Path):
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text('{"a": 1}')
    for name in ("missing.json", "broken.json", "other.json"):
        with pytest.raises(ConfigError, match="is not a tokenizer.json.*Use 'byte'"):
            load_tokenizer(tmp_path / name)
    with pytest.raises(ConfigError, match="at least 257 tokens.*got 100"):
        train_bpe(TEXTS, 100)
