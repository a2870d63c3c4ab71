"""Preparing text: shards that can be read back, made once, whole or not at all, and never of other inputs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capibara.core.tokenizer import Tokenizer, byte_tokenizer
from capibara.data.prepare import BLOCK, FEW_DOCUMENTS, _groups, check_shards, prepare, read_manifest
from capibara.data.source import Document
from capibara.data.split import HELD_OUT, SPLITS, split_of
from capibara.errors import DataError

BYTES = byte_tokenizer()
MANY = [Document(f"document {i} " * (1 + i % 7), {"file": f"{i}.txt", "folder": "many"}) for i in range(400)]
SHARDS = {f"{split}.{kind}" for split in SPLITS for kind in ("bin", "idx", "fields")}

FIRST = """
import sys
from pathlib import Path
from capibara.core.tokenizer import byte_tokenizer
from capibara.data.prepare import prepare
from capibara.data.source import Document

def documents():
    print("reading", flush=True)
    input()
    return [Document(f"document {i} " * 30, {"file": "a"}) for i in range(400)]

def note(text):
    print(text, flush=True)

manifest = prepare(documents, byte_tokenizer(), Path(sys.argv[1]), inputs="same", note=note)
print("done", manifest["digest"], flush=True)
"""


def shards(folder: Path) -> dict[str, bytes]:
    """Everything in a folder but its lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def documents_of(folder: Path, split: str) -> list[tuple[list[int], dict[str, str]]]:
    """Ids and fields of each document of a split, read by hand."""
    manifest = json.loads((folder / "manifest.json").read_text())
    ids = np.frombuffer((folder / f"{split}.bin").read_bytes(), manifest["dtype"])
    offsets = np.frombuffer((folder / f"{split}.idx").read_bytes(), "<i8")
    fields = [json.loads(line) for line in (folder / f"{split}.fields").read_text().splitlines()]
    assert offsets[0] == 0 and offsets[-1] == len(ids) and len(fields) == len(offsets) - 1
    return [(ids[a:b].tolist(), f) for a, b, f in zip(offsets[:-1], offsets[1:], fields, strict=True)]


def wide_tokenizer() -> Tokenizer:
    """A word tokenizer of 70,000 words, too many for 16 bits."""
    from tokenizers import Tokenizer as Words
    from tokenizers import models, pre_tokenizers

    words = Words(models.WordLevel({**{f"w{i}": i for i in range(70_000)}, "<|end|>": 70_000}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Tokenizer(words)


def test_whole_documents_are_held_out_by_their_hash_and_all_are_kept(tmp_path):
    """Oracle: `split_of` of each text; its bytes and the separator; its fields. Order is that of the documents."""
    manifest = prepare(lambda: MANY, BYTES, tmp_path, held_out_fraction=0.3)
    assert not manifest["by_blocks"]
    for split in SPLITS:
        expected = [([*d.text.encode(), 256], d.fields) for d in MANY if split_of(d.text, 0.3) == split]
        assert documents_of(tmp_path, split) == expected
        tokens = sum(len(ids) for ids, _ in expected)
        assert manifest["splits"][split] == {"documents": len(expected), "tokens": tokens} and tokens


def test_one_file_is_held_out_by_blocks_that_join_to_it(tmp_path):
    """Oracle: the text cut every 4,096 characters; only the end of the document has a separator."""
    text = "".join(f"line {i}: é\n" for i in range(40_000))
    manifest = prepare(lambda: [Document(text, {"file": "a"})], BYTES, tmp_path, held_out_fraction=0.4)
    blocks = [text[i : i + BLOCK] for i in range(0, len(text), BLOCK)]
    assert manifest["by_blocks"] and len(blocks) > 100
    for split in SPLITS:
        expected = [list(b.encode()) + [256] * (b == blocks[-1]) for b in blocks if split_of(b, 0.4) == split]
        assert [ids for ids, _ in documents_of(tmp_path, split)] == expected


def test_a_long_file_that_was_cut_is_one_document_with_one_separator(tmp_path):
    """150 pieces of 1 MB are one document: held out by blocks, whose number no chance can leave without a gate."""
    parts = [Document(f"{i:07d} " * 1024, {"file": "a"}, ends=i == 149) for i in range(150)]
    manifest = prepare(lambda: parts, BYTES, tmp_path)
    assert manifest["by_blocks"] and sum(s["documents"] for s in manifest["splits"].values()) == 300
    separators = [ids.count(256) for split in SPLITS for ids, _ in documents_of(tmp_path, split)]
    assert sum(separators) == 1


def test_documents_that_leave_a_split_empty_are_held_out_by_blocks(tmp_path):
    """100 documents, of which 2 % each should be held out: which are is chance, and here no gate would come of it."""
    documents = []
    while len(documents) < FEW_DOCUMENTS + 20:
        text = f"{len(documents)} " * 6000
        while split_of(text, 0.08) == "gate":
            text += "x"
        documents.append(Document(text, {"file": "a"}))
    manifest = prepare(lambda: documents, BYTES, tmp_path)
    assert manifest["by_blocks"] and all(manifest["splits"][split]["tokens"] for split in SPLITS)


def test_equal_documents_are_never_on_both_sides(tmp_path):
    texts = [f"text {i % 130}" for i in range(520)]
    prepare(lambda: [Document(t, {"file": "a"}) for t in texts], BYTES, tmp_path, held_out_fraction=0.4)
    found = [{bytes(ids[:-1]) for ids, _ in documents_of(tmp_path, split)} for split in SPLITS]
    assert set().union(*found) == {t.encode() for t in texts}
    assert sum(map(len, found)) == 130


def test_with_no_held_out_share_all_is_training_text(tmp_path):
    manifest = prepare(lambda: MANY, BYTES, tmp_path, held_out_fraction=0.0)
    assert manifest["splits"]["train"]["documents"] == len(MANY)
    assert all((tmp_path / f"{split}.bin").stat().st_size == 0 for split in HELD_OUT)
    check_shards(tmp_path, manifest)


def test_ids_take_16_bits_while_they_fit_and_32_when_not(tmp_path):
    wide = wide_tokenizer()
    documents = [Document(f"w{69_000 + i} w1 w{i}", {"file": "a"}) for i in range(400)]
    manifest = prepare(lambda: documents, wide, tmp_path / "wide", held_out_fraction=0.3)
    assert (manifest["dtype"], manifest["vocab_size"], manifest["eos"]) == ("uint32", 70_001, 70_000)
    assert (tmp_path / "wide" / "train.bin").stat().st_size == 4 * manifest["splits"]["train"]["tokens"]
    expected = [[69_000 + i, 1, i, 70_000] for i, d in enumerate(documents) if split_of(d.text, 0.3) == "train"]
    assert [ids for ids, _ in documents_of(tmp_path / "wide", "train")] == expected
    assert prepare(lambda: MANY, BYTES, tmp_path / "bytes")["dtype"] == "uint16"


def test_the_same_inputs_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        prepare(lambda: MANY, BYTES, tmp_path / name, inputs="x")
    assert shards(tmp_path / "a") == shards(tmp_path / "b")
    assert shards(tmp_path / "a").keys() == SHARDS | {"manifest.json"}


@given(st.lists(st.integers(0, 3 * 2**20), max_size=90))
def test_documents_are_encoded_few_at_a_time_where_they_are_long(sizes: list[int]):
    """No group could lose its last document and still be full."""

    class Long(str):
        def __new__(cls, size: int):
            made = super().__new__(cls)
            made.size = size  # type: ignore[attr-defined]
            return made

        def __len__(self) -> int:
            return self.size  # type: ignore[attr-defined]

    groups = list(_groups(iter([Document(Long(size), {}) for size in sizes])))
    assert [len(d.text) for group in groups for d in group] == sizes
    for group in groups:
        assert len(group) <= 64 and sum(len(d.text) for d in group[:-1]) < 4 * 2**20
    for group in groups[:-1]:
        assert len(group) == 64 or sum(len(d.text) for d in group) >= 4 * 2**20


def test_what_is_prepared_is_not_prepared_again(tmp_path):
    prepare(lambda: MANY, BYTES, tmp_path, inputs="x")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}

    def never():
        raise AssertionError("the text was read again")

    assert prepare(never, BYTES, tmp_path, inputs="x") == read_manifest(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("change", ["inputs", "tokenizer", "held_out_fraction", "version", "no inputs", "manifest"])
def test_text_of_other_inputs_is_prepared_again(tmp_path, change):
    prepare(lambda: MANY, BYTES, tmp_path, inputs="x")
    tokenizer = BYTES
    settings: dict[str, Any] = {"inputs": "x"}
    if change == "inputs":
        settings["inputs"] = "y"
    elif change == "tokenizer":
        tokenizer = wide_tokenizer()
    elif change == "held_out_fraction":
        settings["held_out_fraction"] = 0.3
    elif change == "no inputs":
        settings.clear()
    elif change == "version":
        text = (tmp_path / "manifest.json").read_text()
        (tmp_path / "manifest.json").write_text(text.replace('"format_version": 2', '"format_version": 1'))
    else:
        (tmp_path / "manifest.json").write_bytes(b"\xff{")
    other = [Document(f"other {i} text", {"file": "b"}) for i in range(400)]
    manifest = prepare(lambda: other, tokenizer, tmp_path, **settings)
    assert manifest == read_manifest(tmp_path)
    check_shards(tmp_path, manifest)
    assert sum(split["documents"] for split in manifest["splits"].values()) == 400
    assert documents_of(tmp_path, "train")[0][1] == {"file": "b"}


@pytest.mark.parametrize("name", sorted(SHARDS))
def test_a_changed_or_missing_shard_is_named(tmp_path, name):
    manifest = prepare(lambda: MANY, BYTES, tmp_path, held_out_fraction=0.3)
    check_shards(tmp_path, manifest)
    content = bytearray((tmp_path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name} has been changed or is missing; remove"):
        check_shards(tmp_path, manifest)
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=rf"{name} has been changed or is missing; remove"):
        check_shards(tmp_path, manifest)


def test_any_flipped_bit_of_the_manifest_is_noticed(tmp_path):
    """But in white space between two values, which says nothing."""
    manifest = prepare(lambda: MANY, BYTES, tmp_path)
    path = tmp_path / "manifest.json"
    whole = path.read_bytes()
    for at in range(0, len(whole), 7):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << at % 7
        path.write_bytes(flipped)
        try:
            assert read_manifest(tmp_path) == manifest
        except DataError as error:
            assert "manifest.json has been changed; remove" in str(error)
        else:
            assert chr(whole[at]).isspace()
    for wrong in (b"", b"[]", b"null", b"[" * 10**5, whole[:-20]):
        path.write_bytes(wrong)
        with pytest.raises(DataError, match="manifest.json has been changed; remove"):
            read_manifest(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match="holds no prepared text"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("texts", "fraction", "words"),
    [
        ([], 0.08, r"nothing is left for train, gate, merge, final_gate, test\. Give more text, or raise"),
        (["short"], 0.08, r"The text is too short: nothing is left for gate, merge.* \(now 0\.08\)"),
        ([], 0.0, r"nothing is left for train\. Give more text\.$"),
    ],
)
def test_too_little_text_is_refused_and_leaves_nothing(tmp_path, texts, fraction, words):
    with pytest.raises(DataError, match=words):
        prepare(lambda: [Document(t, {"file": "a"}) for t in texts], BYTES, tmp_path, held_out_fraction=fraction)
    assert shards(tmp_path) == {}


class Stopped(Exception):
    """What ends a preparation in the middle."""


@pytest.mark.parametrize("error", [KeyboardInterrupt, Stopped, DataError, MemoryError])
def test_a_preparation_that_is_interrupted_leaves_nothing(tmp_path, error):
    calls = 0

    def documents():
        nonlocal calls
        calls += 1
        for number, document in enumerate(MANY):
            if calls == 2 and number == 300:
                assert any(path.suffix == ".tmp" for path in tmp_path.iterdir()), "it is in the middle of writing"
                raise error("stop")
            yield document

    with pytest.raises(error):
        prepare(documents, BYTES, tmp_path, inputs="x")
    assert calls == 2 and shards(tmp_path) == {}
    manifest = prepare(lambda: MANY, BYTES, tmp_path, inputs="x")
    check_shards(tmp_path, manifest)


def test_a_limit_on_the_size_of_files_is_said_and_leaves_nothing(tmp_path):
    """A real failure of `write`, not one of ours: the system refuses to let a file grow."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
    code = limit + FIRST.replace("input()", "")
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert done.returncode and f"{tmp_path} cannot be written (File too large)" in done.stderr
    assert shards(tmp_path) == {}


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/shards cannot be written \(Not a directory\)"):
        prepare(lambda: MANY, BYTES, tmp_path / "file" / "shards")


def test_of_two_processes_one_prepares_and_the_other_waits_and_finds_it(tmp_path):
    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", FIRST, tmp_path / "shards"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    with start() as first:
        assert first.stdout and first.stdout.readline() == "reading\n"
        with start() as second:
            assert second.stdout
            assert second.stdout.readline() == f"Another process is preparing {tmp_path / 'shards'}; waiting for it.\n"
            said, _ = first.communicate("\n" * 9)
            heard, _ = second.communicate("\n" * 9)
    assert said.startswith("reading\ndone ")
    assert heard == said.removeprefix("reading\n"), "the second read no text, and has the same shards"


def test_a_process_that_is_killed_while_it_prepares_frees_the_others(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", FIRST, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout and first.stdout.readline() == "reading\n"
        os.kill(first.pid, signal.SIGKILL)
    manifest = prepare(lambda: MANY, BYTES, tmp_path, inputs="same")
    check_shards(tmp_path, manifest)


def test_inputs_that_change_while_they_are_read_are_noticed(tmp_path):
    with pytest.raises(DataError, match="changed while it was being read"):
        prepare(lambda: MANY, BYTES, tmp_path, inputs="before", inputs_now=lambda: "after")
    assert shards(tmp_path) == {}
    assert prepare(lambda: MANY, BYTES, tmp_path, inputs="before", inputs_now=lambda: "before")["inputs"] == "before"


def test_much_text_is_prepared_with_a_note_now_and_then_and_little_without(tmp_path, monkeypatch):
    notes: list[str] = []
    prepare(lambda: MANY, BYTES, tmp_path / "little", note=notes.append)
    assert notes == []
    monkeypatch.setattr("capibara.data.prepare.NOTE_EVERY", 2_000_000)
    documents = [Document(f"{i:09d} " * 4000, {"file": "a"}) for i in range(200)]  # 8 M characters
    prepare(lambda: documents, BYTES, tmp_path / "much", note=notes.append)
    assert len(notes) == 3 and notes[-1].startswith("Preparing the text: ")
    characters = [int(note.split()[3]) for note in notes]
    assert characters == sorted(set(characters)) and 2 <= characters[0] and characters[-1] <= 8
