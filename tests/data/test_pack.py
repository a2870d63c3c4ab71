"""Packing: every pair of neighbouring tokens once, none across documents, and no row sees another document."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from capibara.data.pack import line_up, num_rows, pack

LENGTHS = st.lists(st.integers(0, 12), min_size=1, max_size=12)


def corpus(lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Ids that are all different, so that an id says where it stands, and the documents' offsets."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return np.arange(100, 100 + offsets[-1], dtype=np.uint16), offsets


def pairs_of(lengths: list[int], documents: list[int]) -> list[tuple[int, int, int, int]]:
    """Oracle by loops: (document, place in it, token, target) of every pair, in order."""
    ids, offsets = corpus(lengths)
    return [
        (document, i, int(ids[offsets[document] + i]), int(ids[offsets[document] + i + 1]))
        for document in documents
        for i in range(lengths[document] - 1)
    ]


@given(LENGTHS, st.data(), st.integers(1, 9))
def test_rows_hold_every_pair_once_and_in_order(lengths: list[int], data, length: int):
    documents = sorted(data.draw(st.sets(st.integers(0, len(lengths) - 1), min_size=1)))
    ids, offsets = corpus(lengths)
    expected = pairs_of(lengths, documents)
    shift = data.draw(st.integers(0, max(len(expected) - 1, 0)))
    line = line_up(offsets, np.array(documents))
    assert line.num_pairs == len(expected)
    rows = num_rows(line, length, shift)
    left = len(expected) - shift
    assert rows == (0 if not left else max(left // length, 1))
    if not rows:
        return
    batch = pack(ids, line, np.arange(rows), length, shift)
    inside = batch["mask"]
    found = list(zip(batch["tokens"][inside].tolist(), batch["targets"][inside].tolist(), strict=True))
    assert found == [pair[2:] for pair in expected[shift : shift + rows * length]]


@given(LENGTHS, st.integers(1, 9), st.data())
def test_a_row_is_what_a_loop_over_its_pairs_says(lengths: list[int], length: int, data):
    """Segments count the documents of the row from 1, positions the tokens of a segment from 0, padding is all zero."""
    ids, offsets = corpus(lengths)
    expected = pairs_of(lengths, list(range(len(lengths))))
    if not expected:
        return
    line = line_up(offsets, np.arange(len(lengths)))
    row = data.draw(st.integers(0, num_rows(line, length) - 1))
    batch = pack(ids, line, np.array([row]), length)
    names = ("tokens", "targets", "segments", "positions", "mask")
    assert [(batch[n].shape, batch[n].dtype) for n in names] == [((1, length), np.int32)] * 4 + [((1, length), bool)]
    segment = position = 0
    previous = None
    for t in range(length):
        here = {n: batch[n][0, t].item() for n in names}
        if row * length + t >= len(expected):
            assert here == dict.fromkeys(names, 0)
            continue
        document, _, token, target = expected[row * length + t]
        segment, position = (segment, position + 1) if document == previous else (segment + 1, 0)
        previous = document
        assert here == {"tokens": token, "targets": target, "segments": segment, "positions": position, "mask": True}


@given(LENGTHS, st.integers(2, 9))
def test_tokens_of_one_segment_and_their_targets_are_of_one_document(lengths: list[int], length: int):
    """What attention may look at (equal segment numbers) and what is predicted from it never leaves a document."""
    ids, offsets = corpus(lengths)
    line = line_up(offsets, np.arange(len(lengths)))
    if not line.num_pairs:
        return
    batch = pack(ids, line, np.arange(num_rows(line, length)), length)
    home = np.repeat(np.arange(len(lengths)), lengths)
    for row in range(len(batch["tokens"])):
        kept = batch["mask"][row]
        token_home, target_home = (home[batch[n][row][kept] - 100] for n in ("tokens", "targets"))
        segments = batch["segments"][row][kept]
        assert (token_home == target_home).all()
        same_segment = segments[:, None] == segments[None]
        assert (same_segment == (token_home[:, None] == token_home[None])).all()


@given(LENGTHS, st.integers(1, 9))
def test_rows_of_any_shape_are_the_same_rows(lengths: list[int], length: int):
    ids, offsets = corpus(lengths)
    line = line_up(offsets, np.arange(len(lengths)))
    rows = num_rows(line, length)
    if not rows:
        return
    wanted = np.arange(6).reshape(2, 3) % rows
    nested, flat = pack(ids, line, wanted, length), pack(ids, line, wanted.ravel(), length)
    for name, leaf in nested.items():
        assert leaf.shape == (2, 3, length)
        np.testing.assert_array_equal(leaf.reshape(6, length), flat[name])


def test_an_example_by_hand():
    """Documents abc|, d| and ef| have the pairs ab, bc, c|, d|, ef, f|: two rows of three."""
    text = "abc|d|ef|"
    ids = np.frombuffer(text.encode(), np.uint8)
    line = line_up(np.array([0, 4, 6, 9]), np.arange(3))
    batch = pack(ids, line, np.arange(num_rows(line, 3)), 3)
    shown = [["".join(map(chr, row)) for row in batch[name]] for name in ("tokens", "targets")]
    assert shown == [["abc", "def"], ["bc|", "|f|"]]
    assert batch["segments"].tolist() == [[1, 1, 1], [1, 2, 2]]
    assert batch["positions"].tolist() == [[0, 1, 2], [0, 0, 1]]


def test_wide_ids_and_offsets_beyond_2_to_the_32_are_kept():
    """A line that begins 5·10⁹ tokens into a shard, without such a shard: ids are asked for where they lie."""

    class Far:
        def __getitem__(self, at: np.ndarray) -> np.ndarray:
            assert at.dtype == np.int64
            return (at - 5 * 10**9).astype(np.uint32) + 70_000

    line = line_up(np.array([0, 5 * 10**9, 5 * 10**9 + 8]), np.array([1]))
    batch = pack(Far(), line, np.array([0]), 7)  # type: ignore[arg-type]
    assert batch["tokens"].tolist() == [list(range(70_000, 70_007))]
    assert batch["targets"].tolist() == [list(range(70_001, 70_008))]
