"""Round after round in a run directory: train, commit, and go on where a run stopped.

    kept deltas → checkpoint → certificate line (the commit point) → prune

A checkpoint without its line is discarded on resume. Where the newest intact checkpoint is older than the last line,
the rounds between are run again and must reproduce their lines.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from capibara.consensus.certificate import line_hash, seal
from capibara.errors import RunError
from capibara.round import RoundPlan, RoundRecord, RoundState, first_state, quorum_error, run_round
from capibara.run.checkpoint import newest_intact, prune, save_checkpoint, save_deltas
from capibara.run.directory import Run
from capibara.tree import from_named_leaves, named_leaves
from capibara.types import PyTree

TREES = ("params", "anchor", "kept", "outer", "merged", "rule", "attack")
NUMBERS = ("round", "refusals", "anchor_age")


class RoundEvent(NamedTuple):
    """What `rounds` yields after every round that is on disk."""

    state: RoundState
    record: RoundRecord
    line: dict[str, Any]
    repeated: bool


def rounds(
    plan: RoundPlan,
    params: PyTree,
    run: Run,
    num_rounds: int,
    *,
    environment: dict[str, Any] | None = None,
    on_phase: Callable[[str], None] = lambda phase: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> Iterator[RoundEvent]:
    """Runs and commits rounds until `num_rounds` are finished, beginning where the run directory stands.

    Args:
      plan: What every round shares.
      params: θ₀; used only where the run has no intact checkpoint.
      run: An open run directory.
      num_rounds: Rounds of the whole run, those already on disk included.
      environment: Machine and versions for each line, outside the hash.
      on_phase: Called with each phase's name.
      on_note: Called with one sentence for anything a user should know (a damaged checkpoint, a repeated round).

    Yields:
      One event per round, after its line is on disk. Rounds repeated from an older checkpoint come with `repeated`.

    Raises:
      QuorumError: If a round found no quorum; its line is on disk, the incumbent is intact.
      RunError: If `max_refusals` rounds in a row were refused, or a repeated round came out differently.
    """
    state = resume_state(plan, params, run, on_note)
    while state.round < num_rounds:
        listed = [line for line in run.lines if line["round"] == state.round]
        failed, done = [line for line in listed if line["outcome"] == "no_quorum"], None
        if listed and listed[-1]["outcome"] != "no_quorum":
            done = listed[-1]
        first_draw = failed[-1]["draw"] + 1 if failed else 0
        seen = _past_digests(run.lines, state.round)
        state, record = run_round(plan, state, first_draw=first_draw, past_digests=seen, on_phase=on_phase)
        if done is not None:
            _must_repeat(done, record)
            on_note(f"Round {done['round']} was run again from an older checkpoint and reproduced its certificate.")
            yield RoundEvent(state, record, done, repeated=True)
            continue
        line = commit(plan, run, state, record, environment or {})
        if line["outcome"] == "no_quorum":
            raise quorum_error(line)
        yield RoundEvent(state, record, line, repeated=False)
        if state.refusals >= plan.config.max_refusals:
            final = line["final_gate"]
            raise RunError(
                f"{state.refusals} rounds in a row were refused by the final gate (last: {final['parent']['mean']} nats "
                f"against the parent, {final['anchor']['mean']} against the anchor). The model of the last committed "
                f"round is intact; look at {run.path / 'rounds.jsonl'} for what the nodes sent, then resume."
            )


def commit(
    plan: RoundPlan, run: Run, state: RoundState, record: RoundRecord, environment: dict[str, Any]
) -> dict[str, Any]:
    """Puts a round on disk; the certificate line is appended last and is what makes the round count."""
    line = seal(record.line | {"environment": environment}, run.head)
    config = plan.config
    if line["outcome"] != "no_quorum":
        if config.keep_deltas:
            save_deltas(run, line["round"], named_leaves(record.stack), named_leaves(state.merged))
        if state.round % config.checkpoint_every == 0:
            checkpoint(run, state, line["hash"])
    run.append(line)
    prune(run, config.keep_checkpoints)
    return line


def checkpoint(run: Run, state: RoundState, head: str) -> None:
    """Writes `state` as the checkpoint that belongs to the line with hash `head`."""
    sections = {name: named_leaves(getattr(state, name)) for name in TREES}
    numbers = {name: getattr(state, name) for name in NUMBERS}
    save_checkpoint(run, state.round, sections, {"head": head, **numbers})


def resume_state(
    plan: RoundPlan, params: PyTree, run: Run, on_note: Callable[[str], None] = lambda note: None
) -> RoundState:
    """The state of the newest intact checkpoint, or the first state where there is none."""
    found = newest_intact(run)
    for note in found.notes:
        on_note(note)
    if found.sections is None:
        return first_state(plan, params)
    template = jax.eval_shape(lambda p: first_state(plan, p), params)
    trees = {
        name: jax.tree.map(jnp.asarray, from_named_leaves(getattr(template, name), found.sections[name]))
        for name in TREES
    }
    return RoundState(**trees, **{name: found.meta[name] for name in NUMBERS})


def _past_digests(lines: list[dict[str, Any]], before: int) -> dict[int, dict[str, int]]:
    seen: dict[int, dict[str, int]] = defaultdict(dict)
    for line in lines:
        if line["round"] < before:
            for node in line["nodes"]:
                if node["digest"]:
                    seen[node["id"]].setdefault(node["digest"], line["round"])
    return seen


def _must_repeat(done: dict[str, Any], record: RoundRecord) -> None:
    again = seal(record.line, done["previous"])
    if again["hash"] != done["hash"]:
        different = sorted(k for k in done if k not in ("timing", "environment", "hash") and done[k] != again.get(k))
        raise RunError(
            f"Round {done['round']} was run again from an older checkpoint and came out differently in "
            f"{', '.join(different)}; its certificate says {done['hash']}, now {line_hash(again)}. The machine, the "
            "versions or the data have changed since: resume where the run was made, or start a new run."
        )
