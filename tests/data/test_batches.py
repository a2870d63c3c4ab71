"""Batches: a pure function of (seed, round, draw, node), of that node's text alone; held-out text never trains."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capibara.core.config import DataConfig
from capibara.core.tokenizer import byte_tokenizer, train_bpe
from capibara.data.batches import TextSource, documents_of, open_source
from capibara.data.prepare import prepare
from capibara.data.source import Document
from capibara.data.split import HELD_OUT, split_of
from capibara.errors import DataError

BYTES = byte_tokenizer()
LENGTH = 16
FIELDS = ("law", "play", "song")


def words(i: int) -> str:
    """A text that says which document it is of at every place: its number over and over."""
    return f"{i:04d}," * (6 + i % 5)


DOCUMENTS = [Document(words(i), {"file": f"{i}.txt", "folder": "f", "kind": FIELDS[i % 3]}) for i in range(300)]

DIGEST = """
import sys
from pathlib import Path
from blake3 import blake3
from capibara.data.batches import TextSource
source = TextSource(Path(sys.argv[1]), num_nodes=3, sequence_length=16, seed=5)
batch = source.batches(round=2, draw=1, node=2, steps=2, batch_size=3)
print(blake3(b"".join(batch[name].tobytes() for name in sorted(batch))).hexdigest())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("batches") / "shards"
    prepare(lambda: DOCUMENTS, BYTES, path, held_out_fraction=0.4)
    return path


@pytest.fixture(scope="module")
def source(folder: Path) -> TextSource:
    return TextSource(folder, num_nodes=3, sequence_length=LENGTH)


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def numbers(batch) -> set[int]:
    """Documents that a batch has tokens of: whole numbers of four digits in its segments."""
    found = set()
    tokens, segments, mask = (batch[n].reshape(-1, batch[n].shape[-1]) for n in ("tokens", "segments", "mask"))
    for row in range(len(tokens)):
        for segment in range(1, segments[row].max() + 1):
            ids = tokens[row][(segments[row] == segment) & mask[row]]
            text = bytes(int(i) for i in ids if i < 256).decode()
            found |= {int(part) for part in text.split(",") if len(part) == 4}
    return found


def test_an_answer_depends_on_nothing_but_its_arguments(folder, source):
    """Asked again, in another order, of another object, of another process: the same bytes."""
    asked = [dict(round=r, draw=d, node=n, steps=2, batch_size=3) for r in (0, 7) for d in (0, 1) for n in range(3)]
    first = [source.batches(**question) for question in asked]
    other = TextSource(folder, num_nodes=3, sequence_length=LENGTH)
    again = [other.batches(**question) for question in reversed(asked)][::-1]
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    said = {
        subprocess.run([sys.executable, "-c", DIGEST, folder], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert len(said) == 1


def test_rounds_draws_nodes_and_seeds_differ(folder, source):
    def tokens(seed: int = 0, **changed: int) -> bytes:
        asked = {"round": 1, "draw": 0, "node": 0, "steps": 2, "batch_size": 3} | changed
        of = source if seed == 0 else TextSource(folder, num_nodes=3, sequence_length=LENGTH, seed=seed)
        return of.batches(**asked)["tokens"].tobytes()

    different = [tokens(), tokens(round=2), tokens(draw=1), tokens(node=1), tokens(node=2), tokens(seed=1)]
    assert len(set(different)) == len(different)
    swapped = {tokens(round=a, draw=b, node=c) for a, b, c in ((0, 1, 2), (1, 0, 2), (2, 1, 0), (0, 2, 1))}
    assert len(swapped) == 4, "round, draw and node are not added up"


def test_leaves_have_the_shapes_and_types_that_training_expects(source):
    batch = source.batches(round=0, draw=0, node=1, steps=2, batch_size=3)
    assert {name: (leaf.shape, leaf.dtype.name) for name, leaf in batch.items()} == {
        **{name: ((2, 3, LENGTH), "int32") for name in ("tokens", "targets", "segments", "positions")},
        "mask": ((2, 3, LENGTH), "bool"),
    }
    assert source.held_out("gate", round=0, draw=0, count=5)["mask"].shape == (5, LENGTH)


@pytest.mark.parametrize("split", ["iid", "by_field", "dirichlet:0.3"])
def test_nodes_train_on_different_documents_and_never_on_held_out_ones(folder, split):
    """Every text says which document it is, so the tokens themselves are the witness. Everything is seen in the end."""
    source = TextSource(folder, num_nodes=3, split=split, field="kind", sequence_length=LENGTH)
    seen = [
        set().union(*(numbers(source.batches(round=r, draw=0, node=node, steps=5, batch_size=40)) for r in range(6)))
        for node in range(3)
    ]
    held = [
        numbers(source.held_out(name, round=0, draw=0, count=source.num_sequences(name))) for name in HELD_OUT
    ]
    by_hash = {name: {i for i, d in enumerate(DOCUMENTS) if split_of(d.text, 0.4) == name}
               for name in ("train", *HELD_OUT)}  # fmt: skip
    everyone = [*seen, *held]
    assert all(not a & b for k, a in enumerate(everyone) for b in everyone[:k])
    assert set().union(*seen) == by_hash["train"]
    assert all(len(by_hash[name] - held[k]) <= 1 and held[k] <= by_hash[name] for k, name in enumerate(HELD_OUT))
    if split == "by_field":
        assert [{FIELDS[i % 3] for i in numbers_of} for numbers_of in seen] in [
            [{a}, {b}, {c}] for a in FIELDS for b in FIELDS for c in FIELDS
        ]
        assert sorted(source.node_description(node) for node in range(3)) == sorted(FIELDS)


def test_train_tokens_are_the_pairs_of_all_nodes(source):
    train = [d for d in DOCUMENTS if split_of(d.text, 0.4) == "train"]
    assert source.train_tokens == sum(len(d.text) for d in train), "n characters and a separator have n pairs"


def test_no_row_comes_twice_while_there_are_enough(source):
    rows = source.train_tokens // 3 // LENGTH - 8
    batch = source.batches(round=3, draw=0, node=0, steps=1, batch_size=rows)
    pairs = Counter(map(bytes, np.concatenate([batch["tokens"], batch["targets"]], -1).reshape(rows, -1)))
    assert max(pairs.values()) == 1


@pytest.fixture(scope="module")
def alphabet(tmp_path_factory: pytest.TempPathFactory) -> TextSource:
    """80 different characters: 80 pairs, 5 rows, and each token says where in the text it stands."""
    path = tmp_path_factory.mktemp("alphabet") / "shards"
    text = "".join(map(chr, range(33, 33 + 80)))
    prepare(lambda: [Document(text, {"file": "a"})], BYTES, path, held_out_fraction=0.0)
    return TextSource(path, sequence_length=LENGTH)


@given(st.integers(0, 50), st.integers(1, 40), st.integers(1, 5))
def test_rows_come_equally_often_where_there_are_too_few(alphabet: TextSource, round_: int, steps: int, size: int):
    """k draws of m rows: each is drawn ⌊k/m⌋ or ⌈k/m⌉ times."""
    batch = alphabet.batches(round=round_, draw=0, node=0, steps=steps, batch_size=size)
    first = batch["tokens"][..., 0].ravel() - 33
    shift, wanted = int(first[0]) % LENGTH, steps * size
    available = (80 - shift) // LENGTH
    counts = Counter(first.tolist())
    assert set(counts) <= {shift + LENGTH * row for row in range(available)}
    assert len(counts) == min(wanted, available)
    assert set(counts.values()) <= {wanted // available, -(-wanted // available)}


def test_rows_begin_elsewhere_from_round_to_round(source):
    """The same stretch of text is not always cut at the same places, so every pair can follow every context."""
    starts = set()
    for round_ in range(200):
        first = source.batches(round=round_, draw=0, node=0, steps=1, batch_size=1)["positions"][0, 0]
        starts.add(int(first[-1]))
    assert len(starts) == LENGTH


def test_text_shorter_than_a_row_is_one_padded_row(tmp_path):
    prepare(lambda: [Document("abcd", {"file": "a"})], BYTES, tmp_path, held_out_fraction=0.0)
    batch = TextSource(tmp_path, sequence_length=8).batches(round=0, draw=0, node=0, steps=1, batch_size=2)
    for row in range(2):
        assert bytes(batch["tokens"][0, row].astype(np.uint8)) == b"abcd\0\0\0\0"
        assert batch["targets"][0, row].tolist() == [98, 99, 100, 256, 0, 0, 0, 0]
        assert batch["mask"][0, row].tolist() == [True] * 4 + [False] * 4


def test_in_order_takes_every_row_once_an_epoch_in_an_order_of_its_own(folder):
    source = TextSource(folder, sequence_length=LENGTH)
    rows = source.train_tokens // LENGTH
    whole = source.in_order(first_step=0, steps=2 * rows, batch_size=1)["tokens"][:, 0]
    first, second = whole[:rows], whole[rows:]
    assert sorted(map(bytes, first)) == sorted(map(bytes, second)) and not np.array_equal(first, second)
    line = "".join(d.text for d in DOCUMENTS if split_of(d.text, 0.4) == "train").encode()
    expected = np.frombuffer(line, np.uint8)[: rows * LENGTH].reshape(rows, LENGTH).astype(np.int32)
    assert sorted(map(bytes, first)) == sorted(map(bytes, expected)), "every token of a text is the first of a pair"


@given(st.integers(0, 400), st.integers(1, 9), st.integers(1, 7))
def test_in_order_goes_on_where_it_was_left(source: TextSource, first_step: int, steps: int, batch_size: int):
    whole = source.in_order(first_step=first_step, steps=steps, batch_size=batch_size)
    for step in range(steps):
        one = source.in_order(first_step=first_step + step, steps=1, batch_size=batch_size)
        assert all(np.array_equal(one[name][0], whole[name][step]) for name in whole)


def test_held_out_rows_are_different_ones_the_same_for_all_and_redrawn(source):
    gate = source.held_out("gate", round=1, draw=0, count=12)
    assert len(set(map(bytes, gate["tokens"]))) == 12
    assert same(gate, source.held_out("gate", round=1, draw=0, count=12))
    for other in (("gate", 2, 0), ("gate", 1, 1), ("merge", 1, 0), ("final_gate", 1, 0), ("test", 1, 0)):
        name, round_, draw = other
        assert not same(gate, source.held_out(name, round=round_, draw=draw, count=12))
    everything = source.num_sequences("gate")
    assert len(source.held_out("gate", round=0, draw=0, count=everything)["tokens"]) == everything


@pytest.mark.parametrize("name", HELD_OUT)
def test_a_held_out_split_that_is_too_small_is_refused_with_both_numbers(source, name):
    has = source.num_sequences(name)
    with pytest.raises(DataError) as caught:
        source.held_out(name, round=0, draw=0, count=has + 1)
    words = f"split {name!r} has {has} sequences of {LENGTH} tokens; {has + 1} are needed. Give more text, raise"
    assert words in str(caught.value) and "verification_rounds" in str(caught.value)


def test_a_field_that_documents_lack_is_refused_with_the_fields_they_have(folder):
    with pytest.raises(DataError, match=r"of \d+\.txt has no field 'author'; .* one of file, folder, kind\."):
        TextSource(folder, num_nodes=2, split="by_field", field="author")
    with pytest.raises(DataError, match="needs data.field"):
        TextSource(folder, num_nodes=2, split="by_field")


def test_fewer_values_than_nodes_are_refused_with_both_numbers(folder):
    with pytest.raises(DataError, match="data.field has 3 different values and there are 4 nodes.*'dirichlet:0.33'"):
        TextSource(folder, num_nodes=4, split="by_field", field="kind")


def test_fewer_documents_than_nodes_are_refused_with_both_numbers(folder):
    train = sum(split_of(d.text, 0.4) == "train" for d in DOCUMENTS)
    with pytest.raises(DataError, match=rf"{train} training documents cannot be dealt to 1000 nodes"):
        TextSource(folder, num_nodes=1000)


def test_a_node_that_dirichlet_leaves_no_pair_is_named(tmp_path):
    """Documents of which all but one are a single token: whoever has none of the long one has nothing to learn."""

    class Mute:
        vocab_size, eos, dtype, digest = 9, 0, np.uint16, "mute"

        def encode_batch(self, texts):
            return [np.arange(len(t), dtype=np.uint16) % 9 for t in texts]

    documents = [Document("x", {"file": "a"}, ends=False)] * 150 + [Document("x" * 50, {"file": "b"})]
    prepare(lambda: documents, Mute(), tmp_path, held_out_fraction=0.0)
    with pytest.raises(DataError, match="Node . has no text under split = 'dirichlet:0.1'; use fewer nodes"):
        TextSource(tmp_path, num_nodes=2, split="dirichlet:0.1")


def test_shards_and_manifests_that_were_changed_are_refused(folder, tmp_path):
    for name in ("train.bin", "manifest.json"):
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        content = bytearray((copy / name).read_bytes())
        content[len(content) // 2] ^= 4
        (copy / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name} has been changed"):
            TextSource(copy)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no prepared text"):
        TextSource(tmp_path / "empty")


def make_text(path: Path) -> Path:
    """Files enough to be held out whole."""
    for i in range(150):
        (path / FIELDS[i % 3]).mkdir(parents=True, exist_ok=True)
        (path / FIELDS[i % 3] / f"{i}.txt").write_text(words(i) * 3)
    return path


def opened(path: str | tuple[str, ...], cache: Path, **changed) -> TextSource:
    asked = {"num_nodes": 2, "split": "iid", "seed": 0, "cache": cache, "tokenizer": BYTES} | changed
    data = DataConfig(path=path, sequence_length=LENGTH, held_out_fraction=0.4, field="folder")
    return open_source(data, **asked)


def test_text_is_prepared_once_and_again_when_anything_it_comes_from_changes(tmp_path):
    text, cache = make_text(tmp_path / "text"), tmp_path / "cache"
    first = opened(str(text), cache)
    assert same(first.held_out("test", round=0, draw=0, count=3),
                opened(str(text), cache).held_out("test", round=0, draw=0, count=3))  # fmt: skip
    assert len(list(cache.iterdir())) == 1
    digests = {first.digest}
    changes = [
        lambda: (text / "law" / "0.txt").write_text("other words " * 9),
        lambda: (text / "law" / "new.md").write_text("more words " * 9),
        lambda: (text / "law" / "3.txt").unlink(),
        lambda: (text / "law" / "6.txt").rename(text / "law" / "7b.txt"),
        lambda: (text / "song").rename(text / "hymn"),
    ]
    for number, change in enumerate(changes, 2):
        change()
        digests.add(opened(str(text), cache).digest)
        assert len(digests) == number == len(list(cache.iterdir()))


def test_another_tokenizer_or_held_out_share_has_shards_of_its_own(tmp_path):
    text, cache = make_text(tmp_path / "text"), tmp_path / "cache"
    plain = opened(str(text), cache)
    bpe = train_bpe((d.text for d in DOCUMENTS), 300)
    short = opened(str(text), cache, tokenizer=bpe)
    assert (plain.vocab_size, short.vocab_size) == (257, 300) and short.train_tokens < plain.train_tokens
    batch = short.batches(round=0, draw=0, node=0, steps=1, batch_size=1)
    shown = "".join(bpe.decode(batch["tokens"][0, 0]))
    assert shown and set(shown) <= set("0123456789,")


def test_text_that_changes_while_it_is_prepared_is_noticed(tmp_path):
    text, cache = make_text(tmp_path / "text"), tmp_path / "cache"

    class Meddling:
        vocab_size, eos, dtype, digest = BYTES.vocab_size, BYTES.eos, BYTES.dtype, BYTES.digest

        def encode_batch(self, texts):
            (text / "law" / "0.txt").write_text("written by somebody else, just now")
            return BYTES.encode_batch(texts)

    with pytest.raises(DataError, match="changed while it was being read"):
        opened(str(text), cache, tokenizer=Meddling())
    assert opened(str(text), cache).train_tokens


@pytest.mark.parametrize("path", [None, "", ()])
def test_no_text_at_all_is_refused_with_what_to_set(path):
    with pytest.raises(DataError, match="set data.path to a folder of .txt, .md or .jsonl files, or to 'demo:sotu'"):
        documents_of(path)


def test_several_paths_are_read_as_one_text(tmp_path):
    text = make_text(tmp_path / "text")
    parts = tuple(str(text / kind) for kind in FIELDS)
    whole, split = (opened(path, tmp_path / "cache") for path in (str(text), parts))
    assert whole.digest == split.digest


def test_json_lines_carry_the_field_that_deals_them(tmp_path):
    lines = [json.dumps({"text": d.text, "kind": d.fields["kind"]}) for d in DOCUMENTS]
    (tmp_path / "all.jsonl").write_text("\n".join(lines))
    data = DataConfig(path=str(tmp_path / "all.jsonl"), sequence_length=LENGTH, held_out_fraction=0.4, field="kind")
    source = open_source(data, num_nodes=3, split="by_field", seed=0, cache=tmp_path / "cache", tokenizer=BYTES)
    assert sorted(source.node_description(node) for node in range(3)) == sorted(FIELDS)
    for node in range(3):
        kinds = {FIELDS[i % 3] for i in numbers(source.batches(round=0, draw=0, node=node, steps=2, batch_size=20))}
        assert kinds == {source.node_description(node)}
