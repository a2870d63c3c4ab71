"""A tiny run of NumPy arrays, made by the real commit, for tests that need neither a model nor JAX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from capibara.consensus.certificate import digest_rows, digest_tree, seal
from capibara.files import Files
from capibara.run.commit import RoundOnDisk, commit
from capibara.run.directory import Run

NODES = 3
CONFIG = "[consensus]\nkeep_deltas = true\n"
SHAPES = {"block.0.up": (4, 3), "block.0.scale": (), "head": (5,)}


def parameters(round_: int) -> dict[str, np.ndarray]:
    """θ before round `round_`: the start, plus every merged delta."""
    generator = np.random.default_rng(99)
    params = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    for earlier in range(round_):
        merged = merge(rows(earlier))
        params = {name: params[name] + merged[name] for name in SHAPES}
    return params


def rows(round_: int) -> dict[str, np.ndarray]:
    """The deltas of a round, leaves [n, ...]."""
    generator = np.random.default_rng(round_)
    return {name: generator.standard_normal((NODES, *shape)).astype(np.float32) for name, shape in SHAPES.items()}


def merge(stack: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The mean of the first two rows; node 2 is outvoted."""
    return {name: np.asarray((leaf[0] + leaf[1]) / 2, np.float32) for name, leaf in stack.items()}


def finished(round_: int, previous: str, **changes: Any) -> RoundOnDisk:
    """A round as `capibara.run.rounds` hands it to `commit`; `changes` go into its line before it is sealed."""
    stack, params = rows(round_), parameters(round_ + 1)
    merged, coefficients = merge(stack), (0.5, 0.5, 0.0)
    nodes = [
        {"id": i, "reason": "backed" if v else "outvoted", "digest": digest, "coefficient": v}
        for i, (digest, v) in enumerate(zip(digest_rows(stack, NODES), coefficients, strict=True))
    ]
    line = {
        "format_version": 1,
        "round": round_,
        "outcome": "committed",
        "start_digest": digest_tree(parameters(round_))[0],
        "nodes": nodes,
        "coefficient_start": 0.0,
        "quorum": {"needed": 2, "backing": 2},
        "delta_digest": digest_tree(merged)[0],
        "merged_digest": digest_tree(params)[0],
        "extensions": {},
    }
    sections = {
        "params": params,
        "anchor": parameters(round_),
        "kept": {"0.step": np.int32([round_ + 1] * NODES), "0.inner.mu": stack["head"]},
        "outer": {},
        "merged": merged,
    }
    sealed = seal(line | changes | {"timing": {"train_s": 0.25}}, previous)
    return RoundOnDisk(sealed, round_ + 1, sections, {"round": round_ + 1, "refusals": 0}, stack, merged)


class Unsynced(Files):
    """Waits for no medium: a killed process loses nothing that it wrote, and tests take a tenth of the time."""

    def fsync(self, descriptor: int) -> None:
        """Does nothing."""


def make_run(path: Path, num_rounds: int, *, keep_checkpoints: int = 3, files: Files | None = None) -> Run:
    """An open run with `num_rounds` committed rounds."""
    run = Run.create(path, CONFIG, files=files or Unsynced())
    for round_ in range(num_rounds):
        commit(run, finished(round_, run.head), keep_checkpoints)
    return run


def replay(line: dict[str, Any], stack: dict[str, np.ndarray]):
    """The synthetic vote, repeated."""
    return ["backed", "backed", "outvoted"], np.array([0.5, 0.5, 0.0]), merge(stack)


def snapshot(path: Path) -> dict[str, bytes]:
    """Every visible file of a run and its bytes."""
    files = (file for file in sorted(path.rglob("*")) if file.is_file())
    named = ((file.relative_to(path).as_posix(), file) for file in files)
    return {name: file.read_bytes() for name, file in named if "/." not in f"/{name}"}
