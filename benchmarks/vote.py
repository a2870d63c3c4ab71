"""The default vote on 8 deltas of 1e7 float32 numbers: against reading them twice, and against ByzFL 0.0.11.

    python benchmarks/vote.py [--columns 10000000] [--repeats 9]

All candidates run in turn in one process, with the allocator settings of our command. The vote is timed from ready
deltas to the merged delta and its verdict, trimmed mean and median from ready deltas to the merged one, as ByzFL does.
`read` is one pass over the deltas (`jnp.max`); the vote needs two. ByzFL's nearest pipeline is ARC, then NNM, then its
geometric median (3 smoothed steps; ours takes 32, then clips and outvotes). It gets a torch tensor, its fastest input,
and computes in float32. ARC overwrites its input, so from its second run on it finds the rows clipped. Before anything
is timed, the results are compared.

Exits with one sentence where torch or ByzFL is missing. ByzFL's experiment runner, which wants torchvision and more, is
replaced by an empty module: none of it is used here.
"""

from __future__ import annotations

import argparse
import sys
import types
from typing import Any

import numpy as np
from _common import emit, interleaved, row, say

from capibara.runtime import prepare_process

N, F = 8, 2
BEST_XLA = 2.8
FASTER_VOTE, FASTER_COORDINATES = 8, 10


def main() -> None:
    """Compares results, times everything, prints one line."""
    parser = argparse.ArgumentParser(description="Times the default vote.")
    parser.add_argument("--columns", type=int, default=10_000_000, help="numbers in a delta")
    parser.add_argument("--repeats", type=int, default=9, help="timed runs of each candidate")
    asked = parser.parse_args()
    torch, byzfl = peers()
    prepare_process()
    import jax
    import jax.numpy as jnp

    from capibara.consensus import merging, networks, voting
    from capibara.consensus.aggregate import chain

    deltas = (1 + np.random.default_rng(0).standard_normal((N, asked.columns), np.float32)).astype(np.float32)
    deltas[-F:] *= np.array([[-3.0], [50.0]], np.float32)
    say("comparing results …")
    gaps = parity(torch, byzfl, deltas[:, :200_000])
    stack = {"w": jnp.asarray(deltas)}
    vote = chain(voting.byzantine_tolerant(F), merge=merging.weighted_average())
    theirs = torch.tensor(deltas)  # a copy: ARC overwrites it
    read = jax.jit(jnp.max)
    arc, nnm, median = byzfl.ARC(f=F), byzfl.NNM(f=F), byzfl.GeometricMedian()
    say(f"timing {asked.repeats} rounds on {N} x {asked.columns:,} …")
    times = interleaved(
        {
            "read": lambda: read(stack["w"]).block_until_ready(),
            "vote": lambda: run_vote(vote, stack),
            "trimmed_mean": lambda: networks.trimmed_mean(stack["w"], F).block_until_ready(),
            "median": lambda: networks.median(stack["w"]).block_until_ready(),
            "byzfl vote": lambda: median(nnm(arc(theirs))),
            "byzfl trimmed_mean": lambda: byzfl.TrMean(f=F)(theirs),
            "byzfl median": lambda: byzfl.Median()(theirs),
        },
        repeats=asked.repeats,
    )
    ratio = times["vote"].median / (2 * times["read"].median)
    rows = [
        row(f"reading {N} × {asked.columns:,} once", _ms(times["read"].median), "ms", spread=_spread(times["read"])),
        row("the default vote", _ms(times["vote"].median), "ms", spread=_spread(times["vote"])),
        row("the vote / reading twice", round(ratio, 2), "×", limit=f"≤ {BEST_XLA} × (best XLA form known)",
            met=ratio <= BEST_XLA),
    ]  # fmt: skip
    for name, least in (("vote", FASTER_VOTE), ("trimmed_mean", FASTER_COORDINATES), ("median", FASTER_COORDINATES)):
        peer = times[f"byzfl {name}"]
        factor = peer.median / times[name].median
        rows += [
            row(f"ByzFL, {name}", _ms(peer.median), "ms", spread=_spread(peer)),
            row(f"ours, {name}, times as fast", round(factor, 1), "×", limit=f"≥ {least} ×", met=factor >= least),
        ]
    rows += [row(f"largest difference from ByzFL, {name}", gap, limit=f"≤ {most:g}", met=gap <= most)
             for name, (gap, most) in gaps.items()]  # fmt: skip
    emit("vote", rows, columns=asked.columns, repeats=asked.repeats)


def peers() -> tuple[Any, Any]:
    """torch and ByzFL, or the end of the program with a sentence."""
    try:
        import torch

        sys.modules.setdefault("byzfl.benchmark", types.ModuleType("byzfl.benchmark"))
        import byzfl
    except ImportError as error:
        sys.exit(
            f"benchmarks/vote.py compares with ByzFL 0.0.11 on torch, and {error.name!r} is not installed here. "
            "`make peers` makes an environment that has both."
        )
    return torch, byzfl


def run_vote(vote: Any, stack: Any) -> Any:
    """One vote from ready deltas, Gram matrix and verdict included."""
    import jax

    from capibara.consensus.ballot import open_ballot

    delta, _, _ = vote.apply(open_ballot(stack, np.ones(N)), vote.init({}), None)
    return jax.block_until_ready(delta)


def parity(torch: Any, byzfl: Any, deltas: np.ndarray) -> dict[str, tuple[float, float]]:
    """Largest difference, relative to the largest number, and how much is rounding, for each part we share."""
    import jax
    import jax.numpy as jnp

    from capibara.consensus import mixing, networks
    from capibara.consensus.row_algebra import gram_matrix

    stack = {"w": jnp.asarray(deltas)}
    mixed = byzfl.NNM(f=F)(byzfl.ARC(f=F)(torch.tensor(deltas))).numpy()
    gram, keep = gram_matrix(stack, np.ones(N)), np.ones(N, bool)
    with jax.enable_x64(True):
        factors, longest = mixing.adaptive_clip(gram, keep, F)
        rows = mixing.nearest_mean(jnp.diag(factors), gram, keep, F, mixing.FLOOR * longest)
        centre = np.asarray(mixing.geometric_median(rows, gram, keep, mixing.FLOOR * longest))
    rows, many = np.asarray(rows), byzfl.GeometricMedian(nu=1e-12, T=mixing.WEISZFELD_STEPS)
    found = {
        "ARC + NNM": (rows @ deltas.astype(np.float64), mixed, 5e-6),
        "geometric median of the mixed rows": (centre @ deltas.astype(np.float64), many(mixed), 5e-6),
        "trimmed mean": (networks.trimmed_mean(stack["w"], F), byzfl.TrMean(f=F)(torch.tensor(deltas)).numpy(), 1e-6),
        "median": (networks.median(stack["w"]), byzfl.Median()(torch.tensor(deltas)).numpy(), 1e-6),
    }
    return {name: (float(np.abs(a - b).max() / np.abs(b).max()), most) for name, (a, b, most) in found.items()}


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 1)


def _spread(timing: Any) -> tuple[float, float]:
    return _ms(timing.low), _ms(timing.high)


if __name__ == "__main__":
    main()
