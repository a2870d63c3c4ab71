"""What a chain of rules and a merge hands on: a delta like θ, a verdict about each node, how many rows it needs."""

from __future__ import annotations

import jax
import numpy as np
from rows import as_row, as_stack

from capibara.consensus import merging, voting
from capibara.consensus.aggregate import chain
from capibara.consensus.ballot import open_ballot
from capibara.consensus.row_algebra import gram_matrix


def test_the_verdict_holds_norms_and_cosines_of_the_raw_deltas():
    deltas = np.random.default_rng(0).normal(size=(7, 9)).astype(np.float32)
    for merge in (merging.weighted_average(), merging.median()):
        aggregator = chain(voting.byzantine_tolerant(1), merge=merge)
        delta, verdict, _ = aggregator.apply(open_ballot(as_stack(deltas), np.ones(7)), aggregator.init({}), None)
        merged, raw = as_row(delta), deltas.astype(np.float64)
        norms = np.linalg.norm(raw, axis=1)
        np.testing.assert_allclose(verdict.norms, norms, rtol=1e-12)
        np.testing.assert_allclose(verdict.cosine, raw @ merged / norms / np.linalg.norm(merged), rtol=1e-4, atol=1e-6)


def test_an_aggregator_needs_what_the_hungriest_of_its_rules_needs():
    assert chain(voting.byzantine_tolerant(2), voting.majority(), merge=merging.uniform()).least == 5


def test_leaves_are_float32_and_keep_their_shapes():
    deltas = np.random.default_rng(0).normal(size=(6, 9)).astype(np.float32)
    aggregator = chain(voting.majority(), merge=merging.median())
    stack = as_stack(deltas)
    delta, _, _ = aggregator.apply(open_ballot(stack, np.ones(6)), aggregator.init({}), None)
    for leaf, many in zip(jax.tree.leaves(delta), jax.tree.leaves(stack), strict=True):
        assert leaf.dtype == np.float32 and leaf.shape == many.shape[1:]


def test_products_that_are_known_already_open_the_same_ballot():
    """Bit for bit, also where they hold a row that does not count."""
    deltas = np.random.default_rng(3).normal(size=(6, 9)).astype(np.float32)
    deltas[4] *= np.float32(1e20)
    stack, weights = as_stack(deltas), np.array([1, 1, 0, 1, 0, 1.0])
    opened = open_ballot(stack, weights, gram=gram_matrix(stack, np.ones(6)))
    assert opened.gram.tobytes() == open_ballot(stack, weights).gram.tobytes()
