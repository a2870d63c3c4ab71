"""Holding out and dealing: every document in exactly one place, shares as asked for, nobody empty."""

from __future__ import annotations

import math

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from capibara.data.split import HELD_OUT, SPLITS, deal, split_of
from capibara.errors import ConfigError, DataError

SIZES = st.lists(st.integers(0, 1000), min_size=1, max_size=60).map(lambda sizes: np.array(sizes, np.int64))


def loads(owned: list[np.ndarray], sizes: np.ndarray) -> np.ndarray:
    """Tokens of each node."""
    return np.array([sizes[documents].sum() for documents in owned])


@given(st.text(), st.floats(0.001, 0.999))
def test_the_split_is_that_of_the_hash(text: str, fraction: float):
    """Oracle: the hash as a number in [0, 1); four equal stretches from 0 on are held out, the rest is for training."""
    place = int.from_bytes(blake3(text.encode()).digest()[:8], "little") / 2**64
    edges = [fraction * k / 4 for k in range(1, 5)]
    stretch = sum(place >= edge for edge in edges)
    if min(abs(place - edge) for edge in edges) > 1e-12:
        assert split_of(text, fraction) == (*HELD_OUT, "train")[stretch]


@given(st.text(), st.floats(0.001, 0.99), st.floats(0, 1))
def test_a_smaller_held_out_share_takes_nothing_new_from_training(text: str, fraction: float, part: float):
    if split_of(text, fraction) == "train":
        assert split_of(text, fraction * part) == "train"


def test_nothing_is_held_out_where_that_is_asked_for():
    assert {split_of(str(i), 0.0) for i in range(500)} == {"train"}


def test_the_held_out_share_is_the_one_asked_for():
    """20,000 different texts; 5 standard errors of a binomial count."""
    count, fraction = 20_000, 0.2
    found = [split_of(f"text {i}", fraction) for i in range(count)]
    for split in SPLITS:
        share = 1 - fraction if split == "train" else fraction / 4
        assert abs(found.count(split) - count * share) < 5 * math.sqrt(count * share * (1 - share))


@given(SIZES, st.integers(1, 8), st.sampled_from(["iid", "dirichlet:0.05", "dirichlet:1", "dirichlet:1e300"]),
       st.booleans(), st.integers(0, 5))  # fmt: skip
def test_dealing_covers_every_document_once_and_leaves_nobody_empty(sizes, num_nodes, how, with_field, seed):
    values = [str(i % 3) for i in range(len(sizes))] if with_field else None
    if len(sizes) < num_nodes:
        with pytest.raises(DataError, match=rf"{len(sizes)} training documents cannot be dealt to {num_nodes} nodes"):
            deal(how, num_nodes, sizes, values, seed)
        return
    owned = deal(how, num_nodes, sizes, values, seed)
    assert len(owned) == num_nodes and all(len(documents) for documents in owned)
    assert sorted(np.concatenate(owned)) == list(range(len(sizes)))
    assert all((np.diff(documents) > 0).all() for documents in owned)
    again = deal(how, num_nodes, sizes, values, seed)
    assert all((a == b).all() for a, b in zip(owned, again, strict=True))


@given(st.integers(1, 8), st.integers(0, 40), st.integers(0, 5))
def test_iid_deals_counts_that_differ_by_one_at_the_most(num_nodes: int, more: int, seed: int):
    owned = deal("iid", num_nodes, np.ones(num_nodes + more, np.int64), None, seed)
    counts = [len(documents) for documents in owned]
    assert max(counts) - min(counts) <= 1


@given(st.lists(st.integers(0, 7), min_size=8, max_size=60), st.integers(1, 8), st.data())
def test_by_field_keeps_each_value_on_one_node(codes: list[int], num_nodes: int, data):
    """And balances: no node has more than the lightest plus the largest value (the bound of the greedy rule)."""
    values = [f"v{code}" for code in codes]
    sizes = np.array(data.draw(st.lists(st.integers(1, 1000), min_size=len(codes), max_size=len(codes))), np.int64)
    different = len(set(values))
    if different < num_nodes:
        with pytest.raises(DataError, match=f"data.field has {different} different values and there are {num_nodes}"):
            deal("by_field", num_nodes, sizes, values, 0)
        return
    owned = deal("by_field", num_nodes, sizes, values, 0)
    assert sorted(np.concatenate(owned)) == list(range(len(values)))
    homes = {value: {n for n, docs in enumerate(owned) if value in {values[d] for d in docs}} for value in set(values)}
    assert all(len(home) == 1 for home in homes.values())
    largest = max(sum(size for v, size in zip(values, sizes, strict=True) if v == value) for value in set(values))
    assert loads(owned, sizes).max() <= loads(owned, sizes).min() + largest


def test_by_field_is_greedy_from_the_largest_value():
    """Worked by hand: 9 → node 0, 7 → node 1, 5 → node 1 (12), 4 → node 0 (13), 1 → node 1 (13)."""
    values, sizes = list("abcde"), np.array([4, 9, 1, 7, 5])
    owned = deal("by_field", 2, sizes, values, 0)
    assert [documents.tolist() for documents in owned] == [[0, 1], [2, 3, 4]]


def test_by_field_without_a_field_says_which_setting_is_missing():
    with pytest.raises(DataError, match="needs data.field"):
        deal("by_field", 2, np.ones(5, np.int64), None, 0)


def test_dirichlet_that_leaves_a_node_nothing_takes_a_document_from_the_richest():
    """γ = 1e-6 gives all of a value to one node; with one value seven of eight nodes would have nothing."""
    sizes = np.full(100, 10)
    for seed in range(5):
        counts = sorted(len(d) for d in deal("dirichlet:1e-6", 8, sizes, ["same"] * 100, seed))
        assert counts == [1] * 7 + [93]


def test_dirichlet_shares_have_the_mean_and_variance_of_the_distribution():
    """Dir(γ, …, γ): mean 1/n, variance (n − 1) / (n² (nγ + 1)). 2,000 values of 250 documents; 6 standard errors."""
    n, gamma, groups, documents = 4, 0.5, 2000, 250
    sizes = np.ones(groups * documents, np.int64)
    values = np.repeat(np.arange(groups), documents).astype(str).tolist()
    owned = deal(f"dirichlet:{gamma}", n, sizes, values, 3)
    share = np.stack([np.bincount(d // documents, minlength=groups) for d in owned]) / documents
    variance = (n - 1) / (n**2 * (n * gamma + 1))
    assert np.abs(share.mean(1) - 1 / n).max() < 6 * math.sqrt(variance / groups)
    assert np.abs(share.var(1) - variance).max() < 6 * math.sqrt(2 / groups) * variance + 1e-3


def test_dirichlet_goes_from_one_node_a_value_to_equal_shares():
    sizes, values = np.full(4000, 10), [str(i % 4) for i in range(4000)]
    even = loads(deal("dirichlet:1e6", 5, sizes, values, 0), sizes)
    assert np.abs(even / sizes.sum() - 0.2).max() < 0.01
    for huge in ("dirichlet:1e300", "dirichlet:1e308"):
        assert np.abs(loads(deal(huge, 5, sizes, values, 0), sizes) / sizes.sum() - 0.2).max() < 0.01
    owned = deal("dirichlet:1e-6", 4, sizes, values, 1)
    whole = [sum(1 for d in owned if sum(values[i] == v for i in d) >= 990) for v in "0123"]
    assert whole == [1, 1, 1, 1]


def test_dirichlet_without_a_field_deals_stretches_of_the_text():
    """Neighbouring documents stay together far more often than under iid: with γ small a stretch has one owner."""
    sizes = np.full(4000, 10)

    def neighbours(how: str) -> float:
        owner = np.empty(len(sizes), int)
        for node, documents in enumerate(deal(how, 4, sizes, None, 0)):
            owner[documents] = node
        return float((owner[1:] == owner[:-1]).mean())

    assert neighbours("dirichlet:1e-6") > 0.99
    assert abs(neighbours("iid") - 0.25) < 0.05


@pytest.mark.parametrize("how", ["iid", "dirichlet:0.5"])
def test_another_seed_deals_otherwise(how):
    first, second = (deal(how, 4, np.ones(100, np.int64), None, seed) for seed in (0, 1))
    assert any(a.tolist() != b.tolist() for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("how", ["dirichlet", "dirichlet:", "dirichlet:0", "dirichlet:-1", "dirichlet:nan",
                                 "dirichlet:inf", "dirichlet:few"])  # fmt: skip
def test_a_concentration_that_is_no_positive_number_is_refused(how):
    with pytest.raises(ConfigError, match="needs a positive number, e.g. 'dirichlet:0.33'"):
        deal(how, 2, np.ones(5, np.int64), None, 0)


def test_a_misspelt_split_is_told_the_nearest():
    with pytest.raises(ConfigError, match="Unknown split 'by_feild'. Did you mean 'by_field'?"):
        deal("by_feild", 2, np.ones(5, np.int64), ["a"] * 5, 0)
