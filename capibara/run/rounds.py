"""Round after round in a run directory: train, commit, and go on where a run stopped.

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
from capibara.round import quorum_error, run_round
from capibara.round_state import RoundPlan, RoundRecord, RoundState, first_state
from capibara.run.checkpoint import newest_intact, prune, save_checkpoint
from capibara.run.commit import RoundOnDisk, commit
from capibara.run.directory import CERTIFICATES, Run
from capibara.tree import from_named_leaves, named_leaves
from capibara.types import PyTree

TREES = ("params", "anchor", "kept", "outer", "merged", "rule", "attack")
NUMBERS = ("round", "refusals", "anchor_age")

ANCHOR_ALARM = 50
"""Rounds without a better anchor after which a run says so: no gate sees an attack that only freezes progress."""


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
      on_note: Called with one sentence for anything a user should know (a damaged checkpoint, a repeated round, an
        anchor that has long not improved).

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
            if state.round % plan.config.checkpoint_every == 0:
                checkpoint(run, state, done["hash"])  # in the place of the damaged one
                prune(run, plan.config.keep_checkpoints)
            on_note(f"Round {done['round']} was run again from an older checkpoint and reproduced its certificate.")
            yield RoundEvent(state, record, done, repeated=True)
            continue
        done_now = on_disk(plan, state, record, run.head, environment or {})
        commit(run, done_now, plan.config.keep_checkpoints)
        line = done_now.line
        if line["outcome"] == "no_quorum":
            raise quorum_error(line)
        if state.anchor_age and state.anchor_age % ANCHOR_ALARM == 0:
            on_note(
                f"The held-out loss has not improved on the anchor's for {state.anchor_age} rounds: training has "
                f"converged, the learning rate is too high, or someone holds it back. {CERTIFICATES} has the drift."
            )
        yield RoundEvent(state, record, line, repeated=False)
        if state.refusals >= plan.config.max_refusals:
            final = line["final_gate"]
            against = " and ".join(f"{_nats(final[name])} against the {name}" for name in ("parent", "anchor"))
            raise RunError(
                f"{state.refusals} rounds in a row were refused by the final gate (last: {against}). The model of the "
                f"last committed round is intact. What the nodes sent is in {run.path / CERTIFICATES}; to try again: "
                f"capibara resume {run.path}"
            )


def on_disk(
    plan: RoundPlan, state: RoundState, record: RoundRecord, previous: str, environment: dict[str, Any]
) -> RoundOnDisk:
    """What a finished round puts on disk: the sealed line, and what the configuration wants kept."""
    line, config = seal(record.line | {"environment": environment}, previous), plan.config
    finished = line["outcome"] != "no_quorum"
    return RoundOnDisk(
        line,
        state.round,
        sections_of(state) if finished and state.round % config.checkpoint_every == 0 else None,
        {name: getattr(state, name) for name in NUMBERS},
        named_leaves(record.stack) if finished and config.keep_deltas else None,
        named_leaves(record.delta if record.delta is not None else ()),
    )


def sections_of(state: RoundState) -> dict[str, dict[str, Any]]:
    """The trees of a state as named arrays."""
    return {name: named_leaves(getattr(state, name)) for name in TREES}


def checkpoint(run: Run, state: RoundState, head: str) -> None:
    """Writes `state` as the checkpoint that belongs to the line with hash `head`."""
    save_checkpoint(run, state.round, sections_of(state), {"head": head, **{n: getattr(state, n) for n in NUMBERS}})


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


def _nats(judged: dict[str, Any]) -> str:
    mean = judged["mean"]
    return f"{mean:+.4f} nats" if isinstance(mean, float) else "a loss that is not finite"


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
