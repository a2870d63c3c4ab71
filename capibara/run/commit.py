"""The commit of a round, in the order that makes it safe to die anywhere in it. No JAX.

    kept deltas → checkpoint → certificate line (the commit point) → prune

Until the line is on the medium, reopening the run discards what was written for it; from then on all of it is there. A
Ctrl-C waits until the commit is over.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from capibara.run.checkpoint import prune, save_checkpoint, save_deltas
from capibara.run.directory import Run
from capibara.runtime import interrupts_wait


class RoundOnDisk(NamedTuple):
    """What a round puts on disk, as named arrays.

    Attributes:
      line: The sealed certificate.
      number: Rounds finished with this one.
      sections: Of the checkpoint; None where this round has none.
      numbers: Kept beside the sections.
      rows: The deltas, leaves [n, ...]; None where they are not kept.
      merged: The merged delta.
    """

    line: dict[str, Any]
    number: int
    sections: dict[str, dict[str, Any]] | None
    numbers: dict[str, Any]
    rows: dict[str, Any] | None
    merged: dict[str, Any]


def commit(run: Run, done: RoundOnDisk, keep_checkpoints: int) -> None:
    """Puts a round on disk.

    Raises:
      RunError: If the disk is full or not writable; the run is then as it was before the round.
    """
    with interrupts_wait():
        if done.rows is not None:
            save_deltas(run, done.line["round"], done.rows, done.merged)
        if done.sections is not None:
            save_checkpoint(run, done.number, done.sections, {"head": done.line["hash"], **done.numbers})
        run.append(done.line)
        prune(run, keep_checkpoints)
