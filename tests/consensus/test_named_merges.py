"""Every named merge against the formula of its paper, written here again in NumPy float64 without the code's tricks."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capibara.consensus import dropout, magnitudes, spherical, task_vectors
from capibara.consensus.aggregate import chain
from capibara.consensus.ballot import Merge, Place, Survey, open_ballot
from capibara.consensus.dropout import dare, della
from capibara.consensus.model_stock import model_stock, model_stock_whole
from capibara.consensus.spherical import karcher, rda, slerp
from capibara.consensus.task_vectors import breadcrumbs, sce, task_arithmetic, ties, ties_tensor
from capibara.consensus.voting import majority
from capibara.errors import ConfigError

Tensors = list[np.ndarray]
"""A stack: float32[m, ...] arrays."""

SHAPES = ([(5,)], [(3, 4), (2,)])
"""Few, since every shape is compiled anew."""

few = settings(max_examples=20)
RELATIVE = 2e-6
"""Of the largest entry: float32 results of at most ten additions."""


def run(merge: Merge, stack: Tensors, weights: Any = None, key: Any = None) -> Tensors:
    """The merge as a round without tolerated faults runs it."""
    vote = chain(majority(), merge=merge)
    count = len(stack[0])
    ballot = open_ballot([jnp.asarray(leaf) for leaf in stack], np.ones(count) if weights is None else weights)
    delta, _, _ = vote.apply(ballot, vote.init(None), jax.random.key(0) if key is None else key)
    return [np.asarray(leaf, np.float64) for leaf in delta]


def agree(found: Tensors, expected: Tensors, stack: Tensors) -> None:
    scale = max(float(np.abs(leaf).max(initial=0)) for leaf in stack) * max(len(stack[0]), 1)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=RELATIVE * scale)


@st.composite
def stacks(draw, least: int = 1, most: int = 3) -> tuple[Tensors, np.ndarray]:
    """A stack and weights Σ = 1, none above 2/m: rows alike or not, some of them zero, some coordinates 0."""
    m = draw(st.integers(least, most))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shapes = draw(st.sampled_from(SHAPES))
    common, spread = draw(st.sampled_from([(0.0, 1.0), (1.0, 0.3), (1.0, 1.0)]))
    scale = 10.0 ** draw(st.sampled_from((-6, 0, 6)))
    stack = []
    for shape in shapes:
        leaf = common * random.normal(size=shape) + spread * random.normal(size=(m, *shape))
        stack.append((scale * leaf * (random.random((m, *shape)) < 0.9)).astype(np.float32))
    if draw(st.booleans()):
        for leaf in stack:
            leaf[random.integers(m)] = 0
    weights = np.ones(m) if draw(st.booleans()) else random.uniform(1, 1.5, m)
    return stack, weights / weights.sum()


def wide(stack: Tensors) -> Tensors:
    return [leaf.astype(np.float64) for leaf in stack]


def each(weights: np.ndarray, leaf: np.ndarray) -> np.ndarray:
    return weights.reshape(-1, *[1] * (leaf.ndim - 1))


def mean(weights: np.ndarray, leaf: np.ndarray) -> np.ndarray:
    return (each(weights, leaf) * leaf).sum(axis=0)


# ── spherical ────────────────────────────────────────────────────────────────────────────────────────────────────────


def shoemake(x: np.ndarray, y: np.ndarray, t: float) -> np.ndarray:
    """Shoemake 1985, of vectors of any length, with the angle between their directions."""
    cos = np.clip(x.ravel() @ y.ravel() / (np.linalg.norm(x) * np.linalg.norm(y)), -1, 1)
    angle = np.arccos(cos)
    return (np.sin((1 - t) * angle) * x + np.sin(t * angle) * y) / np.sin(angle)


def directions(leaf: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    flat = leaf.reshape(len(leaf), -1)
    norms = np.linalg.norm(flat, axis=1)
    return flat / np.where(norms > 0, norms, 1)[:, None], norms


@few
@given(st.integers(0, 2**32 - 1), st.floats(0.05, 0.95), st.sampled_from(SHAPES))
def test_slerp_of_two_rows_is_shoemakes_formula(seed, t, shapes):
    random = np.random.default_rng(seed)
    stack = [random.normal(size=(2, *shape)).astype(np.float32) for shape in shapes if np.prod(shape) > 1]
    found = run(slerp(), stack, np.array([1 - t, t]))
    agree(found, [shoemake(*leaf, t) for leaf in wide(stack)], stack)


@few
@given(stacks(least=2))
def test_slerp_of_more_rows_is_one_step_from_the_mean_direction(drawn):
    stack, w = drawn
    expected = []
    for leaf in wide(stack):
        u, norms = directions(leaf)
        b = w @ u
        if (norms == 0).any() or np.linalg.norm(b) < 1e-3 or leaf[0].size == 1:
            return
        b /= np.linalg.norm(b)
        cos = np.clip(u @ b, -1, 1)
        if (np.abs(cos) > 1 - 1e-6).any():
            return
        logs = (np.arccos(cos) / np.sin(np.arccos(cos)))[:, None] * (u - cos[:, None] * b)
        step = w @ logs
        end = np.cos(np.linalg.norm(step)) * b + np.sinc(np.linalg.norm(step) / np.pi) * step
        if np.linalg.matrix_rank(u, tol=1e-3) < len(u):  # the coefficients of `end` are then not unique
            return
        a = np.linalg.lstsq(u.T, end, rcond=None)[0]
        expected.append(mean(a, leaf))
    found = run(slerp(), stack, w)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * np.abs(other).max())


@few
@given(stacks())
def test_the_karcher_mean_is_where_the_weighted_angles_balance(drawn):
    """Σ wᵢ log_u(uᵢ) = 0 characterises it; the length is the mean length."""
    stack, w = drawn
    found = run(karcher(), stack, w)
    for leaf, one in zip(wide(stack), found, strict=True):
        u, norms = directions(leaf)
        within = u @ u.T
        if (norms == 0).any() or (within < 0.1).any():  # not all within a quarter: the mean may not be unique
            continue
        assert np.linalg.norm(one) == pytest.approx(w @ norms, rel=1e-5)
        p = one.ravel() / np.linalg.norm(one)
        cos = np.clip(u @ p, -1, 1)
        away = u - cos[:, None] * p
        angle = np.arctan2(np.linalg.norm(away, axis=1), cos)
        logs = away * (angle / np.maximum(np.linalg.norm(away, axis=1), 1e-30))[:, None]
        assert np.linalg.norm(w @ logs) < 1e-5


@few
@given(stacks())
def test_rda_is_the_mean_direction_at_the_mean_length(drawn):
    stack, w = drawn
    expected = []
    for leaf in wide(stack):
        u, norms = directions(leaf)
        direction = w @ u
        length = np.linalg.norm(direction)
        if 0 < length < 1e-3:
            return
        expected.append((direction / length * (w @ norms)).reshape(leaf.shape[1:]) if length else mean(w, leaf))
    agree(run(rda(), stack, w), expected, stack)


@pytest.mark.parametrize("merge", [slerp(), karcher(), rda()])
def test_antipodal_rows_have_no_direction_and_give_their_mean(merge):
    x = np.array([1.0, 2.0, -3.0], np.float32)
    np.testing.assert_allclose(run(merge, [np.stack([x, -x])])[0], 0, atol=1e-6)
    np.testing.assert_allclose(run(merge, [np.stack([x, -3 * x])])[0], -x, rtol=1e-6)


@pytest.mark.parametrize("merge", [slerp(), karcher()])
def test_a_zero_row_has_no_direction_and_gives_the_mean(merge):
    rows = np.array([[1.0, 2.0], [0.0, 0.0], [2.0, -1.0]], np.float32)
    np.testing.assert_allclose(run(merge, [rows])[0], rows.mean(axis=0), rtol=1e-6)


def test_slerp_keeps_the_length_that_a_mean_would_lose():
    rows = np.eye(2, dtype=np.float32)
    np.testing.assert_allclose(run(slerp(), [rows])[0], np.full(2, 0.5**0.5), rtol=1e-6)


# ── task vectors ─────────────────────────────────────────────────────────────────────────────────────────────────────


def kept_by_size(flat: np.ndarray, count: int) -> np.ndarray:
    """float64[d]: the entries not smaller than the `count`-th largest."""
    limit = np.sort(np.abs(flat))[len(flat) - count]
    return np.where(np.abs(flat) >= limit, flat, 0.0)


def elected(w: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Yadav et al. 2023, Alg. 1: elect, then the disjoint mean, with weights."""
    out = np.zeros(rows.shape[1:])
    for place in np.ndindex(*out.shape):
        values = rows[(slice(None), *place)]
        sign = np.sign((w * values).sum())
        inside = [i for i in range(len(values)) if np.sign(values[i]) == sign != 0]
        if inside:
            out[place] = sum(w[i] * values[i] for i in inside) / sum(w[i] for i in inside)
    return out


def near_a_tie(w: np.ndarray, rows: np.ndarray) -> bool:
    """Whether rounding decides an election."""
    total = np.abs((each(w, rows) * rows).sum(axis=0))
    return bool(((total < 1e-6 * np.abs(rows).max()) & (np.abs(rows).max(axis=0) > 0)).any())


@few
@given(stacks(), st.floats(-2, 2))
def test_task_arithmetic_is_the_scaled_sum(drawn, scale):
    stack, w = drawn
    expected = [scale * len(w) * mean(w, leaf) for leaf in wide(stack)]
    agree(run(task_arithmetic(scale), stack, w), expected, stack)


@few
@given(stacks(), st.sampled_from((0.01, 0.2, 0.5, 0.9, 1.0)))
def test_ties_trims_the_whole_vector_and_averages_the_elected(drawn, density):
    stack, w = drawn
    flat = np.concatenate([leaf.reshape(len(leaf), -1) for leaf in wide(stack)], axis=1)
    count = max(1, int(density * flat.shape[1] + 1e-9))
    kept = np.stack([kept_by_size(row, count) for row in flat])
    if near_a_tie(w, kept):
        return
    found = np.concatenate([leaf.ravel() for leaf in run(ties(density), stack, w)])
    agree([found], [elected(w, kept)], stack)


@few
@given(stacks(), st.sampled_from((0.01, 0.2, 0.5, 1.0)), st.sampled_from((1.0, -0.5)))
def test_ties_by_tensor_trims_each_tensor(drawn, density, scale):
    stack, w = drawn
    expected = []
    for leaf in wide(stack):
        size = leaf[0].size
        kept = np.stack([kept_by_size(row.ravel(), max(1, int(density * size + 1e-9))) for row in leaf])
        if near_a_tie(w, kept):
            return
        expected.append(scale * elected(w, kept).reshape(leaf.shape[1:]))
    agree(run(ties_tensor(density, scale), stack, w), expected, stack)


def test_where_ties_trims_decides_what_is_left():
    """The two variants that share a name: a tensor of small entries loses all of them, or none of its share."""
    stack = [np.array([[9.0, 8.0]], np.float32), np.array([[0.2, 0.1]], np.float32)]
    assert [leaf.tolist() for leaf in run(ties(0.5), stack)] == [[9, 8], [0, 0]]
    np.testing.assert_allclose(np.concatenate(run(ties_tensor(0.5), stack)), [9, 0, 0.2, 0], rtol=1e-6)


def test_an_election_that_is_a_draw_leaves_the_base():
    assert run(ties_tensor(1.0), [np.array([[1.0, 2.0], [-1.0, 2.0]], np.float32)])[0].tolist() == [0, 2]


@few
@given(stacks(), st.sampled_from(((0.9, 0.01), (0.5, 0.25), (0.3, 0.0), (1.0, 0.0), (0.01, 0.99))))
def test_breadcrumbs_drops_both_tails_and_sums(drawn, shares):
    stack, w = drawn
    density, gamma = shares
    expected = []
    for leaf in wide(stack):
        flat = leaf.reshape(len(leaf), -1)
        size = flat.shape[1]
        count = max(1, int(density * size + 1e-9))
        top = min(int(gamma * size + 1e-9), size - count)
        bottom = size - top - count
        ordered = np.sort(np.abs(flat), axis=1)
        low, high = ordered[:, bottom][:, None], ordered[:, size - 1 - top][:, None]
        kept = np.where((np.abs(flat) >= low) & (np.abs(flat) <= high), flat, 0.0)
        expected.append(0.4 * len(w) * mean(w, kept).reshape(leaf.shape[1:]))
    agree(run(breadcrumbs(density, gamma), stack, w), expected, stack)


@pytest.mark.parametrize("size", [1, 2, 5, 99])
def test_breadcrumbs_keeps_tensors_too_small_for_an_outlier(size):
    """γ · d < 1: a slice that ends at -0 would be empty, and the tensor's delta lost without a word."""
    rows = np.arange(1, size + 1, dtype=np.float32)[None]
    kept = max(1, int(0.9 * size))
    expected = np.where(rows[0] > size - kept, rows[0], 0)
    assert run(breadcrumbs(0.9, 0.01, 1.0), [rows])[0].tolist() == expected.tolist()


@few
@given(stacks(), st.sampled_from((0.01, 0.3, 0.6, 1.0)), st.booleans())
def test_sce_selects_calculates_and_erases(drawn, density, divide):
    stack, _ = drawn
    expected = []
    for leaf in wide(stack):
        flat = leaf.reshape(len(leaf), -1)
        size = flat.shape[1]
        variance = flat.var(axis=0)
        count = max(1, int(density * size + 1e-9))
        limit = np.sort(variance)[size - count]
        if (np.abs(variance - limit) < 1e-5 * variance.max()).sum() > 1:  # rounding would choose
            if len(np.unique(flat, axis=0)) > 1:
                return
            limit = 0.0
        chosen = np.where(variance >= limit, flat, 0.0)
        if near_a_tie(np.ones(len(flat)), chosen):
            return
        energy = (chosen**2).sum(axis=1)
        eta = energy / energy.sum() if energy.sum() else np.full(len(flat), 1 / len(flat))
        left = np.where(np.sign(chosen) == np.sign(chosen.sum(axis=0)), chosen, 0.0)
        share = eta @ (left != 0) if divide else 1.0
        expected.append((eta @ left / np.where(share == 0, 1, share)).reshape(leaf.shape[1:]))
    agree(run(sce(density, divide=divide), stack), expected, stack)


# ── by lot ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def lots(key: Any, nodes: Any, leaf: int, shape: tuple[int, ...]) -> np.ndarray:
    """The uniform numbers of rows."""
    nodes = np.atleast_1d(nodes)
    seeds = magnitudes.row_seeds(key, nodes, leaf)
    drawn = magnitudes.uniforms(seeds, magnitudes.first_of(Place(leaf)), (len(nodes), *shape))
    return np.asarray(drawn, np.float64)


@few
@given(stacks(), st.sampled_from((0.1, 0.5, 1.0)), st.booleans(), st.booleans())
def test_dare_drops_by_lot_and_rescales(drawn, density, norm_matched, elect):
    stack, w = drawn
    key, expected = jax.random.key(3), []
    for number, leaf in enumerate(wide(stack)):
        rows = []
        for row, u in zip(leaf, lots(key, np.arange(len(leaf)), number, leaf.shape[1:]), strict=True):
            kept = np.where(u < density, row, 0.0)
            left = np.abs(kept).sum()
            rows.append(kept * (np.abs(row).sum() / left if left else 0.0) if norm_matched else kept / density)
        rows = np.stack(rows)
        if elect and near_a_tie(w, rows):
            return
        expected.append(elected(w, rows) if elect else mean(w, rows))
    found = run(dare(density, norm_matched=norm_matched, elect=elect), stack, w, key)
    agree(found, expected, [leaf / density * leaf[0].size for leaf in stack])


@few
@given(stacks(), st.sampled_from(((0.5, 0.2), (0.5, 1.0), (0.9, 0.0), (1.0, 0.0), (0.2, 0.3))))
def test_della_drops_small_entries_with_a_higher_chance(drawn, chances):
    stack, w = drawn
    density, epsilon = chances
    key, expected = jax.random.key(4), []
    for number, leaf in enumerate(wide(stack)):
        rows, k = np.zeros_like(leaf), leaf.shape[-1]
        drawn_lots = lots(key, np.arange(len(leaf)), number, leaf.shape[1:])
        for node, (row, u) in enumerate(zip(leaf, drawn_lots, strict=True)):
            for place in np.ndindex(*row.shape):
                line = np.abs(row[place[:-1]])
                rank = sorted(range(k), key=lambda j, line=line: (-line[j], j)).index(place[-1])
                drop = 1 - density - epsilon / 2 + epsilon * rank / k
                if abs(u[place] - drop) < 1e-6:
                    return
                rows[(node, *place)] = row[place] / (1 - drop) if u[place] > drop else 0.0
        if near_a_tie(w, rows):
            return
        expected.append(elected(w, rows))
    agree(run(della(density, epsilon), stack, w, key), expected, [leaf / density * 2 for leaf in stack])


@pytest.mark.parametrize("merge", [dare(0.3), dare(0.3, norm_matched=True)], ids=lambda merge: merge.name)
def test_dare_gives_the_mean_of_the_rows_on_average(merge):
    """The paper's claim E[τ̃] = τ, over 100 keys, 4 standard errors of all coordinates' mean. L1 matching is
    biased coordinate by coordinate in tiny tensors but keeps the sum of an all-positive row exactly."""
    rows = np.full((2, 20), [[1.0], [3.0]], np.float32)
    found = np.stack([run(merge, [rows], key=jax.random.key(seed))[0] for seed in range(100)])
    assert found.mean() == pytest.approx(2.0, abs=0.02 + 4 * found.std() / np.sqrt(found.size))
    if merge.name == "dare_norm":
        np.testing.assert_allclose(found.sum(axis=1), 40, rtol=1e-4)


def test_lots_are_uniform_and_independent_between_rows_leaves_and_keys():
    """10⁵ draws: mean and 16 bins within 5 standard errors, and no correlation above 5/√n."""
    places = ((0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0))
    drawn = [lots(jax.random.key(key), node, leaf, (100_000,))[0] for key, node, leaf in places]
    for one in drawn:
        assert 0 <= one.min() and one.max() < 1
        counts = np.histogram(one, 16, (0, 1))[0]
        assert np.abs(counts - 6250).max() < 5 * np.sqrt(6250)
        assert abs(np.corrcoef(one[1:], one[:-1])[0, 1]) < 5 / np.sqrt(1e5)
    assert np.abs(np.corrcoef(drawn) - np.eye(4)).max() < 5 / np.sqrt(1e5)


def test_a_file_cut_into_blocks_draws_the_same_lots():
    key, nodes = jax.random.key(0), np.arange(2)
    seeds = magnitudes.row_seeds(key, nodes, 7)
    whole = np.asarray(magnitudes.uniforms(seeds, magnitudes.first_of(Place(7)), (2, 1000)))
    places = [magnitudes.first_of(Place(7, first)) for first in range(0, 1000, 250)]
    parts = [magnitudes.uniforms(seeds, place, (2, 250)) for place in places]
    assert np.concatenate(parts, axis=1).tobytes() == whole.tobytes()


def test_lots_go_on_beyond_32_bits():
    """A block across coordinate 2³² is the block before it and the block after it."""
    seeds = magnitudes.row_seeds(jax.random.key(0), np.arange(1), 0)
    draw = partial(magnitudes.uniforms, seeds)
    across = draw(magnitudes.first_of(Place(0, 2**32 - 3)), (1, 6))
    before, after = (draw(magnitudes.first_of(Place(0, first)), (1, 3)) for first in (2**32 - 3, 2**32))
    assert np.asarray(across).tobytes() == np.concatenate([before, after], axis=1).tobytes()
    assert not np.array_equal(after, draw(magnitudes.first_of(Place(0)), (1, 3)))


def test_a_row_keeps_its_lots_when_another_leaves():
    rows = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32)
    alone = run(dare(0.5), [rows], np.array([0, 0, 1.0]))[0]
    dropped = np.where(lots(jax.random.key(0), 2, 0, (50,))[0] < 0.5, 2.0 * rows[2], 0)
    np.testing.assert_allclose(alone, dropped, rtol=1e-6)


def test_lots_without_a_key_are_refused():
    for merge in (dare(), della()):
        vote = chain(majority(), merge=merge)
        with pytest.raises(ConfigError, match="needs a PRNG key"):
            vote.apply(open_ballot([jnp.ones((2, 3))], np.ones(2)), vote.init(None), None)


# ── Model Stock ──────────────────────────────────────────────────────────────────────────────────────────────────────


def stock(tensors: Tensors) -> Tensors:
    """Jang et al. 2024: t from the mean cosine over all pairs of the flattened rows."""
    flat = np.concatenate([leaf.reshape(len(leaf), -1) for leaf in tensors], axis=1)
    m, pairs = len(flat), []
    for i in range(m):
        for j in range(i):
            size = np.linalg.norm(flat[i]) * np.linalg.norm(flat[j])
            pairs.append(flat[i] @ flat[j] / size if size else 0.0)
    cos = max(np.mean(pairs), 0.0) if pairs else 1.0
    t = m * cos / (1 + (m - 1) * cos)
    return [t * leaf.mean(axis=0) for leaf in tensors]


@few
@given(stacks())
def test_model_stock_goes_as_far_as_the_angles_allow(drawn):
    stack, w = drawn
    agree(run(model_stock(), stack, w), [stock([leaf])[0] for leaf in wide(stack)], stack)
    agree(run(model_stock_whole(), stack, w), stock(wide(stack)), stack)


# ── what all share ───────────────────────────────────────────────────────────────────────────────────────────────────

ALL = [
    slerp(), karcher(), rda(), task_arithmetic(), ties(), ties_tensor(), dare(), dare(norm_matched=True),
    dare(elect=True), della(), breadcrumbs(), model_stock(), model_stock_whole(), sce(),
]  # fmt: skip
every = pytest.mark.parametrize("merge", ALL, ids=lambda merge: merge.name)


@every
def test_zero_rows_merge_to_zero(merge):
    found = run(merge, [np.zeros((3, 2, 3), np.float32), np.zeros((3, 4), np.float32)])
    assert not any(leaf.any() for leaf in found)


@every
def test_a_tensor_of_zeros_beside_others_stays_zero(merge):
    random = np.random.default_rng(0)
    found = run(merge, [np.zeros((3, 2, 3), np.float32), random.normal(size=(3, 4)).astype(np.float32)])
    assert not found[0].any() and np.isfinite(found[1]).all()


@every
def test_scalars_and_tensors_of_one_entry_are_tensors(merge):
    found = run(merge, [np.array([1.0, 2.0], np.float32), np.array([[1.0], [2.0]], np.float32)])
    assert found[0].shape == () and found[1].shape == (1,)
    assert all(np.isfinite(leaf).all() for leaf in found)


@every
@pytest.mark.parametrize("power", [-60, 60])
def test_rows_far_from_1_neither_overflow_nor_vanish(merge, power):
    """Powers of two, so that scaling is exact: float32 squares of these would be 0 and infinite."""
    rows = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)
    plain, far = run(merge, [rows])[0], run(merge, [rows * np.float32(2.0**power)])[0]
    np.testing.assert_allclose(far / 2.0**power, plain, rtol=1e-5, atol=1e-7)


IDENTITY_ALONE = [
    slerp(), karcher(), rda(), task_arithmetic(1.0), ties(1.0), ties_tensor(1.0), dare(1.0),
    dare(1.0, norm_matched=True), dare(1.0, elect=True), della(1.0, 0.0), breadcrumbs(1.0, 0.0, 1.0), model_stock(),
    model_stock_whole(), sce(1.0),
]  # fmt: skip


@pytest.mark.parametrize("merge", IDENTITY_ALONE, ids=lambda merge: merge.name)
def test_one_row_of_which_everything_is_kept_is_the_merge(merge):
    rows = np.random.default_rng(2).normal(size=(1, 6)).astype(np.float32)
    np.testing.assert_allclose(run(merge, [rows])[0], rows[0], rtol=1e-6)


SUMS = ("task_arithmetic", "breadcrumbs")


@pytest.mark.parametrize("merge", [m for m in IDENTITY_ALONE if m.name not in SUMS], ids=lambda merge: merge.name)
def test_equal_rows_of_which_everything_is_kept_are_the_merge(merge):
    """Task arithmetic and breadcrumbs sum: m equal rows are scale · m times the row, by definition."""
    rows = np.tile(np.random.default_rng(2).normal(size=(1, 6)), (4, 1)).astype(np.float32)
    np.testing.assert_allclose(run(merge, [rows])[0], rows[0], rtol=1e-6)


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("merge", [m for m in ALL if m.prepare and not m.whole_tensors], ids=lambda m: m.name)
def test_merges_that_need_no_whole_tensors_do_blocks(merge, block):
    """What a merge of files bigger than memory relies on."""
    rows = jnp.asarray(np.random.default_rng(5).normal(size=(3, 8)), jnp.float32)
    one = merge.prepare(Survey(np.full(3, 1 / 3), np.arange(3), lambda: iter([rows]), jax.random.key(0)))
    parts = [one(rows[:, i : i + block], Place(0, i)) for i in range(0, 8, block)]
    assert np.concatenate(parts).tobytes() == np.asarray(one(rows, Place(0))).tobytes()


@few
@given(st.integers(1, 200), st.integers(0, 2**32 - 1), st.sampled_from((1.0, 1e-38, 1e30)), st.booleans())
def test_the_kth_largest_is_that_of_sorting(size, seed, scale, ties_too):
    random = np.random.default_rng(seed)
    rows = random.normal(size=(2, size)) * scale
    rows = (np.round(rows / scale * 2) * scale if ties_too else rows).astype(np.float32)
    ranks = [1, random.integers(1, size + 1), size]
    cut = random.integers(0, size + 1)
    found = magnitudes.kth_largest(lambda: [rows[:, :cut], rows[:, cut:].reshape(2, 1, -1)], ranks)
    expected = -np.sort(-np.abs(rows), axis=1)[:, np.array(ranks) - 1].T
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    "build",
    [ties, ties_tensor, dare, partial(dare, norm_matched=True), della, breadcrumbs, sce],
)
@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, float("nan")])
def test_a_density_outside_0_to_1_is_refused(build, density):
    with pytest.raises(ConfigError, match=r"density.* must lie in \(0, 1\]; got"):
        build(density)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: della(1.0, 0.2), "at most 0"),
        (lambda: della(0.5, -0.1), "epsilon = -0.1"),
        (lambda: breadcrumbs(0.9, 0.2), r"gamma must lie in \[0, 1 − density\] = \[0, 0.1\]; got 0.2"),
        (lambda: task_arithmetic(float("inf")), "scale must be a finite number; got inf"),
    ],
)
def test_parameters_that_cannot_be_meant_are_refused(build, sentence):
    with pytest.raises(ConfigError, match=sentence):
        build()


def test_docstrings_say_what_is_tolerated_what_it_costs_and_when_it_fails():
    for function in (
        spherical.slerp, spherical.karcher, spherical.rda, task_vectors.task_arithmetic, task_vectors.ties,
        task_vectors.ties_tensor, task_vectors.breadcrumbs, task_vectors.sce, dropout.dare, dropout.della,
        model_stock, model_stock_whole,
    ):  # fmt: skip
        assert all(word in (function.__doc__ or "") for word in ("Tolerates:", "Cost:", "Fails when:"))
