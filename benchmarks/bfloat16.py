"""bfloat16 products on this CPU: XLA's own dot against the same after widening to float32, casts included.

One core, in turn, in one process, for the three products of a linear layer of 384 × 1536 on 2048 tokens. Which of the
two the model takes on this processor is decided by `capibara.kernels.matmul.widens`; the first row says it.
"""

from __future__ import annotations

import os

os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # before JAX counts the cores

import numpy as np  # noqa: E402
from _common import emit, interleaved, row, say  # noqa: E402

TOKENS, INPUTS, OUTPUTS = 2048, 384, 1536
REPEATS = 15


def main() -> None:
    """Prints the rate of both, and their ratio, for every product."""
    import jax
    import jax.numpy as jnp

    from capibara.kernels.matmul import widens
    from capibara.runtime import prepare_process

    prepare_process()
    rng = np.random.default_rng(0)
    x, w, g = (
        jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
        for shape in ((TOKENS, INPUTS), (INPUTS, OUTPUTS), (TOKENS, OUTPUTS))
    )
    products = {"forward": (x, w, (1,), (0,)), "to inputs": (g, w, (1,), (1,)), "to weights": (x, g, (0,), (0,))}
    rows = [row("this processor widens bfloat16", "yes" if widens() else "no")]
    for name, (a, b, of_a, of_b) in products.items():

        def dot(a: jax.Array, b: jax.Array, axes: tuple = (of_a, of_b)) -> jax.Array:
            return jax.lax.dot_general(a, b, (axes, ((), ())), preferred_element_type=jnp.float32)

        plain = jax.jit(dot)
        wide = jax.jit(lambda a, b, dot=dot: dot(a.astype(jnp.float32), b.astype(jnp.float32)))
        timings = interleaved(
            {
                "plain": lambda a=a, b=b, f=plain: f(a, b).block_until_ready(),
                "widened": lambda a=a, b=b, f=wide: f(a, b).block_until_ready(),
            },
            repeats=REPEATS,
        )
        operations = 2e-9 * TOKENS * INPUTS * OUTPUTS
        for how, t in timings.items():
            spread = operations / t.high, operations / t.low
            rows.append(row(f"{name}, {how}", round(operations / t.median, 1), "GFLOP/s", spread=spread))
        ratio = timings["plain"].median / timings["widened"].median
        rows.append(row(f"{name}: time plain / widened", round(ratio, 2), "×"))
        say(f"{name}: {ratio:.2f}")
    emit("bfloat16", rows)


if __name__ == "__main__":
    main()
