"""Megabytes a second of certificates: digests of a round's deltas, a checkpoint written, a checkpoint checked.

A round of 8 nodes with 2.5 million parameters each (80 MB of deltas) is digested in one thread and in as many as there
are cores, against reading the same memory once; a checkpoint of 40 MB is written and fsynced, and read with every
digest checked, against writing and reading the bare bytes.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
from _common import Timing, emit, interleaved, row

from capibara.consensus.certificate import GENESIS, digest_rows
from capibara.files import Files, tensors_to_bytes
from capibara.run.checkpoint import load_checkpoint, save_checkpoint
from capibara.run.directory import Run

NODES, LEAVES, LEAF = 8, 10, 250_000
REPEATS = 7


def main() -> None:
    """Times everything in turn and prints the rates."""
    generator = np.random.default_rng(0)
    stack = {f"blocks.{i}": generator.standard_normal((NODES, LEAF), np.float32) for i in range(LEAVES)}
    sections = {name: {leaf: rows[k] for leaf, rows in stack.items()} for k, name in enumerate(("params", "anchor"))}
    sections |= {"kept": {leaf: rows[2:4] for leaf, rows in stack.items()}}
    size = sum(leaf.nbytes for leaf in stack.values())
    saved = sum(leaf.nbytes for tensors in sections.values() for leaf in tensors.values())
    with tempfile.TemporaryDirectory() as folder, Run.create(Path(folder) / "run", "") as run:
        bare = Path(folder) / "bare"
        data = b"".join(tensors_to_bytes(tensors) for tensors in sections.values())
        checkpoint = save_checkpoint(run, 1, sections, {"head": GENESIS})
        timings = interleaved(
            {
                "memory": lambda: [int(leaf.view(np.uint64).max()) for leaf in stack.values()],
                "one thread": lambda: digest_rows(stack, NODES, threads=1),
                "all cores": lambda: digest_rows(stack, NODES),
                "bare write": lambda: Files().write(bare, data),
                "write": lambda: save_checkpoint(run, 1, sections, {"head": GENESIS}),
                "bare read": bare.read_bytes,
                "read": lambda: load_checkpoint(checkpoint),
            },
            repeats=REPEATS,
        )
    measures = {
        "memory": (f"reading {size // 10**6} MB of deltas once (the floor)", size),
        "one thread": ("digests of the same deltas, one thread", size),
        "all cores": (f"digests of the same deltas, {os.cpu_count()} cores", size),
        "bare write": (f"writing and fsyncing {saved // 10**6} MB of bare bytes", saved),
        "write": ("a checkpoint of as much, with digests, fsyncs and rename", saved),
        "bare read": ("reading as much, bare", saved),
        "read": ("loading the checkpoint, every digest checked", saved),
    }
    emit("certificates", [_rate(what, size, timings[name]) for name, (what, size) in measures.items()])


def _rate(what: str, size: int, timing: Timing) -> dict:
    rates = [size / seconds / 1e6 for seconds in timing]
    return row(what, round(rates[0]), "MB/s", spread=(round(rates[2]), round(rates[1])))


if __name__ == "__main__":
    main()
