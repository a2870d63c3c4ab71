"""What a run will need of memory and disk, said before it starts, and refused where it cannot fit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil

from capibara.errors import RunError


class Needs(NamedTuple):
    """Bytes."""

    memory: int
    disk: int

    def __str__(self) -> str:
        return f"about {_readable(self.memory)} of memory and {_readable(self.disk)} of disk"


def estimate(
    parameter_bytes: int,
    kept_bytes: int,
    activation_bytes: int,
    *,
    num_nodes: int,
    num_rounds: int,
    keep_deltas: bool,
    keep_checkpoints: int,
    all_at_once: bool,
) -> Needs:
    """The peak of a round and the size of the run directory.

    Memory: θ, anchor, last merge, candidate and a gate's trial (5 parameters), n deltas, what nodes keep twice (a
    refused round needs the old one), and one node's gradients and activations, or all nodes' where they run at once.

    Args:
      parameter_bytes: Of one model.
      kept_bytes: What all nodes keep between rounds.
      activation_bytes: Of one node's step.
      num_nodes: n.
      num_rounds: Of the whole run.
      keep_deltas: Whether every round's deltas stay on disk.
      keep_checkpoints: Checkpoints that stay.
      all_at_once: True where nodes run as one `vmap`.
    """
    working = (3 * parameter_bytes + activation_bytes) * (num_nodes if all_at_once else 1)
    memory = (5 + num_nodes) * parameter_bytes + 2 * kept_bytes + working
    one = 3 * parameter_bytes + kept_bytes
    disk = one * (min(keep_checkpoints, num_rounds) + 1) + parameter_bytes
    if keep_deltas:
        disk += (num_nodes + 1) * parameter_bytes * num_rounds
    return Needs(memory, disk)


def refuse_if_impossible(
    needs: Needs,
    path: Path,
    *,
    free_memory: Callable[[], int] = lambda: psutil.virtual_memory().available,
    free_disk: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free,
) -> None:
    """Raises RunError where the run cannot fit into what is free."""
    memory, disk = free_memory(), free_disk(path)
    if needs.memory > memory:
        raise RunError(
            f"The run needs about {_readable(needs.memory)} of memory; {_readable(memory)} is free. Use a smaller "
            "model, fewer nodes or a smaller batch."
        )
    if needs.disk > disk:
        raise RunError(
            f"The run needs about {_readable(needs.disk)} of disk in {path}; {_readable(disk)} is free. Make room, set "
            "keep_deltas = false, or keep fewer checkpoints."
        )


def _readable(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if size >= 10 or unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
