"""What consensus costs: everything in a round that is not training, as a share of the round, split by phase.

    python benchmarks/overhead.py [--rounds 4]

The `small` preset as it stands (8 nodes, H = 30, batches of 8 sequences, the default vote, the engine `stacked`, real
text by president) in a run directory: checkpoint, certificate and their fsyncs are part of the round. `train` is what
nodes would do without a vote; everything else is overhead. Deltas are hashed in threads while they are validated and
gated; what is left to wait for then is shown beside the time that hashing them takes alone.

Shares are taken within a round, where a machine that slows down slows both sides; the first rounds compile.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from _common import emit, interleaved, row, say

from capibara.runtime import prepare_process

WARM_UP, ROUNDS = 2, 4
MOST, MOST_GATE = 5.0, 3.5
PHASES = {
    "train": "training, batches included",
    "validate": "validation",
    "gate": "the gate",
    "hashing": "digests of the deltas, what is left of them after the gate",
    "vote": "the vote and the merge of the deltas",
    "merge": "the outer step",
    "final_gate": "the final gate",
    "digest": "digests of the merge, and the drift",
    "between": "between the phases: keys, certificate line, Python",
    "commit": "commit: checkpoint, certificate, fsyncs",
}


def main() -> None:
    """Runs rounds, prints each phase's share of them and the total."""
    parser = argparse.ArgumentParser(description="What consensus costs, as a share of a round.")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="timed rounds")
    asked = parser.parse_args()
    prepare_process()
    with tempfile.TemporaryDirectory() as folder:
        rounds, stack, config = run(Path(folder), WARM_UP + asked.rounds)
    seconds, timed = [sum(one.values()) for one in rounds], rounds[WARM_UP:]
    rows = [_row("a round", seconds[WARM_UP:], "s")]
    overhead = [100 * (1 - one["train"] / sum(one.values())) for one in timed]
    rows.append(_row("everything but training", overhead, "%", limit=MOST))
    for phase, words in PHASES.items():
        share = [100 * one.get(phase, 0.0) / sum(one.values()) for one in timed]
        rows.append(_row(words, share, "%", limit=MOST_GATE if phase == "gate" else None))
    rows += hashing(stack, config.num_nodes, [1e3 * one["hashing"] for one in timed])
    emit("overhead", rows, rounds=asked.rounds, nodes=config.num_nodes, local_steps=config.local_steps)


def run(folder: Path, count: int) -> tuple[list[dict[str, float]], Any, Any]:
    """Seconds by phase of each of `count` rounds, the last round's deltas, and the consensus section."""
    from capibara.core.config import ModularConfig
    from capibara.round import run_round
    from capibara.round_state import first_state
    from capibara.run.commit import commit
    from capibara.run.rounds import on_disk
    from capibara.training.session import open_session

    config = ModularConfig.preset("small").replace(training={"num_rounds": count})
    rounds, stack = [], None
    with open_session(config, run_dir=folder / "run") as session:
        plan, state = session.plan, first_state(session.plan, session.params)
        for _ in range(count):
            began, marks = time.perf_counter(), []
            state, record = run_round(
                plan, state, on_phase=lambda phase, marks=marks: marks.append((phase, time.perf_counter()))
            )
            voted = time.perf_counter()
            line = on_disk(plan, state, record, session.run.head, {})
            commit(session.run, line, plan.config.keep_checkpoints)
            ended = time.perf_counter()
            phases = dict(record.line["timing"]["phases_s"])
            phases |= {"between": voted - began - sum(phases.values()), "commit": ended - voted}
            wait = next(later - at for (name, at), (_, later) in pairwise(marks) if name == "digest")
            phases |= {"digest": phases["digest"] - wait, "hashing": wait}
            rounds.append(phases)
            stack = record.stack
            say(f"round {state.round} of {count}: {ended - began:.2f} s, training {phases['train']:.2f} s")
    return rounds, stack, plan.config


def hashing(stack: Any, num_nodes: int, left_ms: list[float]) -> list[dict[str, Any]]:
    """The time of the digests alone, and how much of it is still to wait for after the gate."""
    from capibara.consensus.certificate import digest_rows
    from capibara.tree import num_bytes

    alone = interleaved({"digests": lambda: digest_rows(stack, num_nodes)}, repeats=9)["digests"]
    size = num_bytes(stack) / 1e6
    left, whole = statistics.median(left_ms), 1e3 * alone.median
    return [
        row(f"hashing {size:.0f} MB of deltas alone", whole, "ms", spread=(1e3 * alone.low, 1e3 * alone.high)),
        row("of it not hidden behind validation and gate", left, "ms", spread=_ends(left_ms)),
    ]


def _row(measure: str, values: list[float], unit: str, *, limit: float | None = None) -> dict[str, Any]:
    middle = statistics.median(values)
    if limit is None:
        return row(measure, middle, unit, spread=_ends(values))
    return row(measure, middle, unit, spread=_ends(values), limit=f"≤ {limit} {unit}", met=middle <= limit)


def _ends(values: list[float]) -> tuple[float, float]:
    return float(np.min(values)), float(np.max(values))


if __name__ == "__main__":
    main()
