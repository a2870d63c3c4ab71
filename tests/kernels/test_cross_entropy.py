"""Cross-entropy of a linear head against float64 NumPy: every instruction set, dtype, ragged size and map of JAX."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from capibara.core.loss import head_loss, head_losses
from capibara.kernels import library
from capibara.kernels.cross_entropy import CHUNK, cross_entropy, plain_losses, token_losses

SETS = library.instruction_sets()
needs_native = pytest.mark.skipif(not SETS, reason="the native kernels were not built, or are turned off")


class Case(NamedTuple):
    M: int
    D: int
    V: int
    chunk: int = 0


CASES = (
    Case(1, 1, 1),
    Case(5, 7, 7),
    Case(37, 16, 257, 16),
    Case(70, 33, 1000, 70),
    Case(300, 64, 256),
    Case(3, 48, 50304),
)


def inputs(case: Case, hidden: str = "float32", head: str = "float32"):
    """Logits of size about 3, a third of the weights 0, a target that counts from the end."""
    rng = np.random.default_rng(case.M * case.V)
    h = jnp.asarray(rng.standard_normal((case.M, case.D)), hidden)
    w = jnp.asarray(rng.standard_normal((case.V, case.D)) * 3 * case.D**-0.5, head)
    targets = rng.integers(0, case.V, case.M).astype(np.int32)
    targets[0] -= case.V
    weights = rng.random(case.M, np.float32) * (rng.random(case.M) < 0.67)
    return h, w, jnp.asarray(targets), jnp.asarray(weights)


def oracle(hidden, head, targets, weights, z_loss: float):
    """Losses, log-partitions, total and its gradients, in float64; the head in the dtype of the hidden states."""
    hidden, head = (np.asarray(x.astype(hidden.dtype).astype(jnp.float32), np.float64) for x in (hidden, head))
    targets, weights, rows = np.asarray(targets), np.asarray(weights, np.float64), np.arange(len(targets))
    logits = hidden @ head.T
    top = logits.max(-1)
    partition = top + np.log(np.exp(logits - top[:, None]).sum(-1))
    losses = partition - logits[rows, targets]
    slope = np.exp(logits - partition[:, None]) * (weights * (1 + 2 * z_loss * partition))[:, None]
    slope[rows, targets] -= weights
    return losses, partition, losses @ weights + z_loss * partition**2 @ weights, slope @ head, slope.T @ hidden


def slopes(args, case: Case, z_loss: float = 0.0):
    hidden, head, targets, weights = args

    def total(hidden, head):
        return cross_entropy(hidden, head, targets, weights, z_loss=z_loss, chunk=case.chunk)

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(hidden, head)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("z_loss", (0.0, 0.02))
def test_losses_and_gradients_are_the_formulas(forced: str, case: Case, z_loss: float):
    """Float32 sums of up to 300 terms of order 1, or of 50 304 shares of 1: 1e-6 of results that reach 30."""
    args = inputs(case)
    losses, partition, total, to_hidden, to_head = oracle(*args, z_loss)
    for found, wanted in zip(token_losses(*args[:3]), (losses, partition), strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-5)
    value, (of_hidden, of_head) = slopes(args, case, z_loss)
    assert float(value) == pytest.approx(total, rel=1e-5, abs=1e-5)
    np.testing.assert_allclose(of_hidden, to_hidden, atol=2e-5)
    np.testing.assert_allclose(of_head, to_head, atol=2e-5)


@pytest.mark.parametrize("case", (CASES[2], CASES[3]), ids=str)
@pytest.mark.parametrize(
    ("hidden", "head"), (("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16"))
)
def test_bfloat16_is_rounded_on_its_way_in_and_out_only(forced: str, case: Case, hidden: str, head: str):
    """The oracle has the head rounded to the hidden states' dtype; results are rounded to 8 bits, no logit is."""
    args = inputs(case, hidden, head)
    _, _, total, to_hidden, to_head = oracle(*args, 0.02)
    value, found = slopes(args, case, 0.02)
    assert float(value) == pytest.approx(total, rel=1e-5)
    for got, wanted, dtype in zip(found, (to_hidden, to_head), (hidden, head), strict=True):
        assert got.dtype == dtype
        rounding = 2**-8 if dtype == "bfloat16" else 1e-5
        np.testing.assert_allclose(np.asarray(got, np.float64), wanted, atol=2e-5, rtol=rounding)


def test_large_logits_do_not_overflow(forced: str):
    args = inputs(CASES[3])
    args = (100 * args[0], *args[1:])
    losses, *_, to_hidden, _ = oracle(*args, 0.0)
    np.testing.assert_allclose(token_losses(*args[:3])[0], losses, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(slopes(args, CASES[3])[1][0], to_hidden, atol=1e-4)


@pytest.mark.parametrize("bad", (np.nan, np.inf, -np.inf))
def test_infinity_and_nan_go_where_they_go_in_plain_jax(forced: str, bad: float):
    """Logits of one token hold it in some columns; a target outside of the vocabulary has loss NaN and no gradient."""
    case = Case(20, 16, 300)
    hidden, head, targets, weights = inputs(case)
    hidden = jnp.abs(hidden).at[4].set(0.0).at[4, 0].set(1.0)
    head = jnp.abs(head).at[7, 0].set(bad).at[:, 1:].set(0.0)
    targets = targets.at[3].set(case.V + 5).at[4].set(7)
    hidden = hidden.at[jnp.arange(20) != 4, 0].set(0.0) if np.isinf(bad) else hidden
    for kernel in (True, False):
        value = cross_entropy(hidden, head, targets, weights, kernel=kernel)
        assert np.isnan(float(value))
    found, wanted = token_losses(hidden, head, targets), plain_losses(hidden, head, targets)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    back = [
        jax.grad(partial(cross_entropy, kernel=kernel, targets=targets, weights=weights), argnums=(0, 1))(hidden, head)
        for kernel in (True, False)
    ]
    for got, expected in zip(*back, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@needs_native
def test_the_hessian_is_that_of_the_plain_formula():
    """A Hessian-vector product, reverse over reverse, against the second derivative of all logits at once."""
    case = Case(12, 8, 21, 5)
    hidden, head, targets, weights = inputs(case)
    along = jax.random.normal(jax.random.key(0), head.shape)

    def by_kernel(hidden, head):
        return cross_entropy(hidden, head, targets, weights, z_loss=0.02, chunk=5)

    def by_all(hidden, head):
        losses, partition = plain_losses(hidden, head, targets)
        return losses @ weights + 0.02 * partition**2 @ weights

    def product(total):
        def turned(hidden, head):
            to_hidden, to_head = jax.grad(total, argnums=(0, 1))(hidden, head)
            return (to_head * along).sum() + jnp.sin(to_hidden).sum()

        return jax.jit(jax.grad(turned, argnums=(0, 1)))(hidden, head)

    for found, wanted in zip(product(by_kernel), product(by_all), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


@needs_native
def test_losses_have_the_gradients_of_plain_jax():
    case = CASES[2]
    hidden, head, targets, weights = inputs(case)

    def total(losses_of, hidden, head):
        losses, partition = losses_of(hidden, head, targets)
        return losses @ weights + jnp.sin(partition).sum()

    pairs = [jax.grad(partial(total, f), argnums=(0, 1))(hidden, head) for f in (token_losses, plain_losses)]
    for found, wanted in zip(*pairs, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


@needs_native
def test_vmap_over_nodes_and_scan_are_loops():
    case = Case(40, 16, 300, 16)
    hidden, head, targets, weights = inputs(case)
    stack = tuple(jnp.stack([x, x[::-1]]) for x in (hidden, head, targets % case.V, weights))

    def one(h, w, t, c):
        return jax.value_and_grad(lambda h, w: cross_entropy(h, w, t, c, chunk=16), argnums=(0, 1))(h, w)

    alone = [one(*(x[i] for x in stack)) for i in range(2)]
    looped = jax.lax.scan(lambda c, x: (c, one(*x)), None, stack)[1]
    for found in (jax.jit(jax.vmap(one))(*stack), looped):
        for i in range(2):
            same = jax.tree.map(lambda x, i=i: x[i], found)
            np.testing.assert_array_equal(same[1][0], alone[i][1][0])
            np.testing.assert_array_equal(same[1][1], alone[i][1][1])


@needs_native
def test_a_chunk_larger_than_the_tokens_is_all_of_them():
    case = Case(20, 8, 30)
    args = inputs(case)
    for one, other in zip(slopes(args, case)[1], slopes(args, case._replace(chunk=64))[1], strict=True):
        np.testing.assert_array_equal(one, other)


def digest() -> str:
    case = Case(64, 32, 3000, 40)
    return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in slopes(inputs(case), case)[1])).hexdigest()


@needs_native
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system cannot hold a process to one core")
def test_one_thread_and_all_of_them_give_the_same_bits():
    code = (
        "import os, sys; os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_cross_entropy as t; print(t.digest())"
    )
    alone = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert alone.stdout.strip() == digest(), alone.stderr


@pytest.mark.parametrize("dtype", (np.uint16, np.int8))
def test_targets_may_be_any_integers(dtype: type):
    rng = np.random.default_rng(0)
    hidden, head = (jnp.asarray(rng.normal(size=(n, 8)), jnp.float32) for n in (64, 2048))
    targets = rng.integers(0, 100, 64)
    for call in (head_losses, lambda *arrays: jax.value_and_grad(head_loss)(*arrays, jnp.ones(64, bool))):
        found, wanted = (call(hidden, head, jnp.asarray(targets, kind)) for kind in (dtype, np.int32))
        jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_gradients_are_scaled_before_they_are_rounded():
    """By 1/3, which bfloat16 has not: the ratio to the unscaled gradient is 1/3 to its own rounding on average."""
    rng = np.random.default_rng(0)
    hidden, head = (jnp.asarray(rng.normal(size=(n, 32)), jnp.bfloat16) for n in (64, 2048))
    targets, weights = jnp.asarray(rng.integers(0, 2048, 64)), jnp.ones(64)
    whole, third = (
        np.asarray(jax.grad(lambda h, s=scale: s * cross_entropy(h, head, targets, weights))(hidden), np.float64)
        for scale in (1.0, 1 / 3)
    )
    assert abs((third * whole).sum() / (whole * whole).sum() - 1 / 3) < 2e-4


def test_nothing_in_gives_nothing_out():
    head = jnp.ones((9, 4))
    losses, partition = token_losses(jnp.ones((0, 4)), head, jnp.zeros(0, jnp.int32))
    assert losses.shape == partition.shape == (0,)
    assert float(head_loss(jnp.ones((0, 4)), head, jnp.zeros(0, jnp.int32), jnp.zeros(0, bool))) == 0


@needs_native
@pytest.mark.parametrize("D", (384, 768))
def test_memory_is_that_of_a_chunk(D: int):
    """By the compiler's account: for GPT-2's vocabulary 256 of 2048 tokens are an eighth; 15 % with all the rest."""
    M, V = 2048, 50304
    shapes = (((M, D), jnp.float32), ((V, D), jnp.float32), ((M,), jnp.int32), ((M,), jnp.float32))
    step = jax.jit(jax.value_and_grad(cross_entropy, argnums=(0, 1)))
    compiled = step.lower(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)).compile()
    assert M > CHUNK
    assert compiled.memory_analysis().temp_size_in_bytes < 0.15 * 4 * M * V


@pytest.mark.parametrize("case", (Case(3, 16, 50), Case(40, 16, 1100)), ids=str)
def test_the_loss_of_the_model_is_the_same_whichever_way_it_takes(case: Case):
    """The first is small enough for plain JAX, the second takes the kernel where it was built."""
    hidden, head, targets, _ = inputs(case)
    mask = jnp.arange(case.M) % 3 > 0
    losses, partition, *_ = oracle(hidden, head, targets, mask, 0.0)
    for found, wanted in zip(head_losses(hidden, head, targets), (losses, partition), strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-5)
    _, _, total, to_hidden, to_head = oracle(hidden, head, targets, mask / mask.sum(), 0.02)
    loss = partial(head_loss, targets=targets, mask=mask, z_loss=0.02)
    value, found = jax.value_and_grad(loss, argnums=(0, 1))(hidden, head)
    assert float(value) == pytest.approx(total, rel=1e-5)
    for got, wanted in zip(found, (to_hidden, to_head), strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-5)
