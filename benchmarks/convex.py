"""Seconds until merge weights are certified: the mixture problem of T tokens and M models, from log-probabilities on.

The log-probabilities are float32, of models that agree on which tokens are hard (a Gamma-distributed loss), differ in
skill, and err apart; half of them are near-duplicates of the others, where a fixed point alone takes thousands of
steps. A gap is never claimed below the resolution of float32, about 3e-7 here. Solved without a penalty, and with KL to
equal weights at λ = 0.01, the default of `ConvexityController`; the baseline is Cover's fixed point alone for as long.
"""

from __future__ import annotations

import time

import numpy as np
from _common import Timing, emit, interleaved, row, say

from capibara.consensus.convex import jensen_gap, mixture, mixture_loss
from capibara.consensus.simplex import Solution, kl_penalty, no_penalty

TOKENS = 100_000
LIMIT_S, GAP = 2.0, 1e-6


def models(count: int) -> np.ndarray:
    """float32[T, M] log-probabilities."""
    rng = np.random.default_rng(0)
    half = (count + 1) // 2
    hard = rng.gamma(2, 1, (TOKENS, 1))
    logs = -np.abs(hard + 0.4 * rng.normal(size=(TOKENS, half)) + 0.05 * rng.random(half))
    again = logs[:, : count - half] + 1e-3 * rng.normal(size=(TOKENS, count - half))
    return np.concatenate([logs, again], axis=1).astype(np.float32)


def fixed_point_gap(logs: np.ndarray, seconds: float) -> tuple[float, int]:
    """The gap that w ← w∘c alone reaches in a time, and its steps."""
    smooth, w, steps = mixture_loss(logs), np.full(logs.shape[1], 1 / logs.shape[1]), 0
    assert smooth.gradient is not None
    began = time.perf_counter()
    while True:
        slope = smooth.gradient(w)
        if time.perf_counter() - began > seconds:
            return jensen_gap(w, slope), steps
        w, steps = w * -slope, steps + 1
        w = w / w.sum()


def main() -> None:
    """Solves both sizes with both penalties in turn."""
    rows = []
    for count, repeats in ((16, 7), (200, 1)):
        logs, equal = models(count), np.full(count, 1 / count)
        found: dict[str, Solution] = {}

        def solve(name: str, penalty, logs=logs, found=found) -> None:
            found[name] = mixture(logs, penalty=penalty)

        say(f"{count} models …")
        candidates = {
            "no penalty": lambda solve=solve, equal=equal: solve("no penalty", no_penalty(equal)),
            "KL, λ = 0.01": lambda solve=solve, equal=equal: solve("KL, λ = 0.01", kl_penalty(0.01, equal)),
        }
        timings: dict[str, Timing] = interleaved(candidates, repeats=repeats)
        for name, timing in timings.items():
            what, gap = f"{TOKENS:,} tokens, {count} models, {name}", found[name].gap
            limited = {"limit": f"≤ {LIMIT_S:.0f} s", "met": timing.median <= LIMIT_S} if count == 16 else {}
            spread = timing[1:] if repeats > 1 else None
            rows.append(row(f"{what}: time", timing.median, "s", spread=spread, **limited))
            limit = {"limit": f"< {GAP:.0e}", "met": gap < GAP}
            rows.append(row(f"{what}: gap, after {found[name].iterations} iterations", gap, "nats", **limit))
        if count == 16:
            gap, steps = fixed_point_gap(logs, timings["no penalty"].median)
            what = f"as long without a penalty by the fixed point alone: gap, after {steps} iterations"
            rows.append(row(what, gap, "nats"))
    emit("convex", rows)


if __name__ == "__main__":
    main()
