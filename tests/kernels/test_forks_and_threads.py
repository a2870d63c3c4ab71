"""Kernels in a forked child, which has none of its parent's threads, and in two Python threads at once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from attention_cases import Case, inputs
from test_attention import compiled

FORKS = """
import multiprocessing, os, signal
import jax, numpy as np
from capibara.kernels import arrays
from capibara.kernels.attention import fast_attention
from capibara.kernels.library import native

rows = np.random.default_rng(0).standard_normal((3, 300_000), np.float32)
q = jax.numpy.asarray(rows.reshape(-1)[: 2 * 64 * 4 * 16].reshape(2, 64, 4, 16))
attend = jax.jit(lambda q: fast_attention(q, q, q, causal=True))

def call():
    return [x.tobytes() for x in (
        arrays.gram(rows, threads=3), arrays.weighted_sum(rows, [1, 2, 3], threads=3), arrays.to_bfloat16(rows[0]),
        *([np.asarray(attend(q))] if native() else []),
    )]

wanted = call()

def again():
    signal.alarm(60)  # ends a child that hangs
    os._exit(0 if call() == wanted else 3)

child = os.fork()
if child == 0:
    again()
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
process = multiprocessing.get_context("fork").Process(target=again)
process.start()
process.join()
assert process.exitcode == 0, process.exitcode
assert call() == wanted
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_gets_the_same_bits():
    """In a process of its own, as JAX warns of every fork.

    In a child, XLA's own products wait for ever for threads that are not there: of jitted code only our kernel is
    called, on the thread of the caller.
    """
    environment = {**os.environ, "JAX_CPU_ENABLE_ASYNC_DISPATCH": "false"}
    code = [sys.executable, "-W", "ignore", "-c", FORKS]
    done = subprocess.run(code, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr


def test_two_threads_may_attend_at_once():
    """Forward and backward, each with more heads than threads: the bits are those of one alone."""
    runs = []
    for case in (Case(2, 130, 130, 4, 2, 32, bias="NTS"), Case(2, 130, 131, 4, 2, 32, rotary=True)):
        given = inputs(case)
        runs.append((compiled(case, "float32", native=True), (*given[:4], given.bias)))
    wanted = [[np.asarray(x) for x in run(*arrays)] for run, arrays in runs]
    start, right = threading.Barrier(len(runs)), []

    def call(i: int) -> None:
        run, arrays = runs[i]
        start.wait()
        for _ in range(20):
            right.append(all(np.array_equal(x, y) for x, y in zip(run(*arrays), wanted[i], strict=True)))

    callers = [threading.Thread(target=call, args=(i,)) for i in range(len(runs))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert right == [True] * 40
