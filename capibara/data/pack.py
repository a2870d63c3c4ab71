"""Packing at read time: documents of any length, cut into rows of T (token, target) pairs without waste.

A document of L tokens has L − 1 pairs. The pairs of all documents stand in one line; row r is the r-th stretch of T of
them. Where a row crosses from one document to the next, the segment number rises and positions begin again at 0.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Line(NamedTuple):
    """The pairs of documents in a row: `first[k]` is the first pair of the k-th, `token[k]` where its ids begin."""

    first: np.ndarray
    token: np.ndarray
    num_pairs: int


def line_up(offsets: np.ndarray, documents: np.ndarray) -> Line:
    """The line of the given documents; those of fewer than two tokens have no pair and are left out."""
    lengths = offsets[documents + 1] - offsets[documents]
    documents, lengths = documents[lengths > 1], lengths[lengths > 1]
    first = np.concatenate([[0], np.cumsum(lengths - 1)]).astype(np.int64)
    return Line(first[:-1], offsets[documents], int(first[-1]))


def num_rows(line: Line, length: int, shift: int = 0) -> int:
    """Whole rows of `length` pairs after the first `shift`; 1, to be padded, where less is left; 0 where nothing is."""
    left = line.num_pairs - shift
    return max(left // length, 1) if left > 0 else 0


def pack(ids: np.ndarray, line: Line, rows: np.ndarray, length: int, shift: int = 0) -> dict[str, np.ndarray]:
    """Rows as arrays of shape `rows.shape + (length,)`: tokens, targets, segments, positions int32, and mask bool.

    Args:
      ids: Token ids of all documents, possibly a memory map.
      line: Of the documents that may appear.
      rows: Row numbers, any shape.
      length: T.
      shift: Pairs skipped before row 0, so that rows begin elsewhere from draw to draw.
    """
    begin = shift + rows[..., None].astype(np.int64) * length
    pair = begin + np.arange(length)
    inside = pair < line.num_pairs
    pair = np.minimum(pair, line.num_pairs - 1)
    document = np.searchsorted(line.first, pair.ravel(), side="right").reshape(pair.shape) - 1
    start = line.first[document]
    at = line.token[document] + pair - start
    segments = document - document[..., :1] + 1
    positions = pair - np.maximum(start, begin)
    return {
        "tokens": np.where(inside, ids[at], 0).astype(np.int32),
        "targets": np.where(inside, ids[at + 1], 0).astype(np.int32),
        "segments": np.where(inside, segments, 0).astype(np.int32),
        "positions": np.where(inside, positions, 0).astype(np.int32),
        "mask": inside,
    }
