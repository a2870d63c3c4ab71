"""Drawn shapes, dtypes, layouts and addresses against the reference, on every instruction set.

Rows lie side by side, spread out, backwards or at odd addresses; outputs, weights and steps at odd addresses too.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from attention_cases import Case, inputs, oracle
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_attention import both_ways

from capibara.consensus.comparators import comparators
from capibara.kernels import arrays, library, reference

SETS = library.instruction_sets()
BF16 = np.dtype(ml_dtypes.bfloat16)
NUMBERS = st.sampled_from((np.dtype(np.float32), BF16))
LENGTHS = st.one_of(st.integers(0, 70), st.integers(0, 5000), st.sampled_from((65536, 65537)))
LAYOUTS = ("side by side", "odd", "spread", "backwards")
FORCED = st.sampled_from(SETS or (None,))
bounded = settings(max_examples=50)


@pytest.fixture(autouse=True, scope="module")
def the_best_set_afterwards():
    yield
    force(SETS[0] if SETS else None)


def force(name: str | None) -> None:
    """Makes a set run; None is the plain path, where there is nothing to choose."""
    if name:
        library.use(name)


def odd(values: np.ndarray) -> np.ndarray:
    """A writable copy at an odd address."""
    room = np.empty(values.nbytes + 2, np.uint8)
    start = 1 - room.ctypes.data % 2
    found = room[start : start + values.nbytes].view(values.dtype)
    found[:] = values
    return found


def laid_out(row: np.ndarray, layout: str) -> np.ndarray:
    if layout == "odd":
        return odd(row)
    if layout == "spread":
        return np.repeat(row, 3)[::3]
    return row[::-1].copy()[::-1] if layout == "backwards" else row


@st.composite
def stacks(draw: st.DrawFn, least: int = 0, hidden: bool = True) -> tuple[list[np.ndarray], np.ndarray]:
    """Rows of one length and dtype, and weights at an odd address; where `hidden`, rows of weight 0 are NaN."""
    n, length, dtype = draw(st.integers(least, 9)), draw(LENGTHS), draw(NUMBERS)
    weights = odd(np.float64(draw(st.lists(st.sampled_from((0.0, 0.3, -2.0, 1.0)), min_size=n, max_size=n))))
    values = np.random.default_rng(length + n).standard_normal((n, length), np.float32).astype(dtype)
    if hidden:
        values[weights == 0] = np.nan
    return [laid_out(row, draw(st.sampled_from(LAYOUTS))) for row in values], weights


@given(forced=FORCED, stack=stacks(), wide=st.booleans(), centred=st.booleans(), threads=st.integers(1, 3))
@bounded
def test_products(forced, stack, wide: bool, centred: bool, threads: int):
    """16 products of float32 a lane, then float64: 1e-6 of ‖a‖ ‖b‖. Wide ones are exact, their sums good to 1e-14."""
    force(forced)
    rows, weights = stack
    centre = odd(np.float32(np.random.default_rng(1).normal(size=len(rows[0])))) if centred and rows else None
    found = arrays.gram(rows, weights, centre=centre, wide=wide, threads=threads)
    wanted = reference.gram(rows, weights, centre)
    norms = np.sqrt(np.diag(wanted))
    assert np.all(np.abs(found - wanted) <= (1e-14 if wide else 1e-6) * np.outer(norms, norms))


@given(forced=FORCED, stack=stacks(1), threads=st.integers(1, 3))
@bounded
def test_weighted_sums_to_the_bit(forced, stack, threads: int):
    force(forced)
    rows, weights = stack
    out = odd(np.full(len(rows[0]), np.nan, np.float32))
    assert arrays.weighted_sum(rows, weights, out, threads=threads) is out
    np.testing.assert_array_equal(out, reference.weighted_sum(rows, weights, np.empty(len(out), np.float32)))


@given(
    forced=FORCED,
    stack=stacks(1, hidden=False),
    places=st.tuples(st.integers(0, 8), st.integers(0, 8)),
    threads=st.integers(1, 3),
)
@bounded
def test_sorted_middles_to_the_bit(forced, stack, places: tuple[int, int], threads: int):
    force(forced)
    rows, _ = stack
    low = places[0] % len(rows)
    high = low + 1 + places[1] % (len(rows) - low)
    steps = odd(np.int32(comparators(len(rows))).ravel()).reshape(-1, 2)
    out = odd(np.full(len(rows[0]), 7, np.float32))
    arrays.sorted_mean(rows, steps, low, high, out, threads=threads)
    np.testing.assert_array_equal(out, reference.sorted_mean(rows, low, high, np.empty(len(out), np.float32)))


@given(forced=FORCED, length=LENGTHS, dtype=NUMBERS, layout=st.sampled_from(LAYOUTS), share=st.floats(-2, 2, width=32))
@bounded
def test_moves_to_the_bit(forced, length: int, dtype, layout: str, share: float):
    force(forced)
    start, to = np.random.default_rng(length).standard_normal((2, length), np.float32)
    start, to = odd(start), laid_out(to.astype(dtype), layout)
    wanted = start + (to.astype(np.float32) - start) * np.float32(share)
    np.testing.assert_array_equal(arrays.moved(start, to, share, odd(start)), wanted)
    np.testing.assert_array_equal(arrays.moved(start, to, share, start), wanted)


@given(forced=FORCED, length=LENGTHS, threads=st.integers(1, 3))
@bounded
def test_roundings_to_the_bit(forced, length: int, threads: int):
    force(forced)
    values = odd(np.random.default_rng(length).standard_normal(length, np.float32))
    out = odd(np.zeros(length, BF16))
    arrays.to_bfloat16(values, out, threads=threads)
    np.testing.assert_array_equal(out.view(np.uint16), values.astype(BF16).view(np.uint16))


EDGES = st.one_of(st.integers(1, 20), st.sampled_from((47, 48, 49, 96, 255, 256, 257, 300)))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    T = draw(EDGES)
    S, K = draw(st.one_of(st.just(T), EDGES)), draw(st.integers(1, 2))
    window = draw(st.one_of(st.none(), st.integers(1, 300)))
    N, H = K * draw(st.integers(1, 3)), draw(st.sampled_from((1, 2, 3, 16, 17, 64, 65, 130)))
    bias = draw(st.one_of(st.none(), st.sampled_from(("BNTS", "NTS", "TS", "BS", "BN", "NT", ""))))
    rotary = H % 2 == 0 and T <= S and draw(st.booleans())
    segments = T == S and draw(st.booleans())
    return Case(draw(st.integers(1, 2)), T, S, N, K, H, draw(st.booleans()), window, segments, bias, rotary)


@given(forced=FORCED, case=cases(), dtype=st.sampled_from(("float32", "bfloat16")))
@example(forced=(SETS or (None,))[-1], case=Case(1, 256, 257, 2, 1, 65), dtype="float32")
@example(forced=(SETS or (None,))[0], case=Case(2, 49, 257, 2, 1, 130, bias="NTS", rotary=True), dtype="bfloat16")
@settings(max_examples=6)
def test_attention(forced, case: Case, dtype: str):
    """Tolerances are those of `test_attention.py`: float32 sums of some 600 products, and bfloat16's roundings.

    Errors of a shared bias's gradient add up as steps of a random walk over the scores that share it.
    """
    force(forced)
    given = inputs(case, dtype)
    atol, rtol = (3e-5, 1e-5) if dtype == "float32" else (5e-2, 2e-2)
    walks = [1.0] * 4
    if given.bias is not None:
        walks.append((case.B * case.N * case.T * case.S / given.bias.size) ** 0.5)
    for found, wanted, walk in zip(both_ways(case, given, forced or "plain"), oracle(case, given), walks, strict=True):
        np.testing.assert_allclose(np.asarray(found, np.float64), wanted, atol=atol * walk, rtol=rtol)
