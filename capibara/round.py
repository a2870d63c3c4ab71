"""One consensus round: what happens between a start θ and the next one.

    assign → train → validate → digest → gate → vote → quorum → merge → leash → final gate

`run_round` takes a plan and a state (`capibara.round_state`) and returns the next state with the round's record. It
touches no disk: committing is `capibara.run.commit`. Reference: docs/protocol.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from capibara.consensus.attacks.base import AttackView
from capibara.consensus.ballot import Verdict, open_ballot
from capibara.consensus.certificate import digest_rows, digest_tree
from capibara.consensus.convex_shares import NAME, SCORE, mixture_shares
from capibara.consensus.gates import FinalVerdict, GateVerdict, final_gate, gate_differences, judge
from capibara.consensus.record import LINE_VERSION, node_entries, number, rule_entry, strictest
from capibara.consensus.row_algebra import cosine, gram_matrix
from capibara.consensus.validate import duplicate_groups, finite_rows
from capibara.engines.base import Assignment, Returned, join, node_key, renew
from capibara.errors import QuorumError
from capibara.round_state import RoundPlan, RoundRecord, RoundState
from capibara.types import Batch, PyTree


class Attempt(NamedTuple):
    """One attempt's rows after validation, gate and vote; `delta` and `verdict` are None where too few entered."""

    returned: Returned
    reasons: list[str]
    digests: dict[int, str]
    norms: np.ndarray
    quality: GateVerdict | None
    delta: PyTree | None
    verdict: Verdict | None
    rule: PyTree
    attack: PyTree
    extensions: dict[str, Any]

    @property
    def backing(self) -> int:
        """How many nodes back a commit."""
        return self.reasons.count("backed")


class Stopwatch:
    """Seconds per phase; announces each phase as it begins."""

    def __init__(self, clock: Callable[[], float], on_phase: Callable[[str], None]):
        self.clock, self.on_phase, self.seconds = clock, on_phase, {}

    @contextmanager
    def __call__(self, phase: str):
        self.on_phase(phase)
        began = self.clock()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + self.clock() - began


def run_round(
    plan: RoundPlan,
    state: RoundState,
    *,
    first_draw: int = 0,
    past_digests: Mapping[int, Mapping[str, int]] | None = None,
    on_phase: Callable[[str], None] = lambda phase: None,
) -> tuple[RoundState, RoundRecord]:
    """Runs one round from `state`.

    Args:
      plan: What does not change.
      state: Where the round begins. It is not modified; a refused or failed round leaves θ and the optimiser states
        as they were.
      first_draw: The draw of batches to begin with; above 0 when this round has failed before.
      past_digests: node → digest of a delta it sent in an earlier round → that round; for the reason `stale`.
      on_phase: Called with the name of each phase as it begins.

    Returns:
      The next state and the record, whose `line["outcome"]` is `committed`, `refused` or `no_quorum`. With
      `no_quorum` the state is the one that came in, and `quorum_error(line)` is what a caller may raise.
    """
    watch = Stopwatch(plan.clock, on_phase)
    config, everyone = plan.config, tuple(range(plan.config.num_nodes))
    draw, number_of, ask, held = first_draw, 0, everyone, None
    while True:
        with watch("train"):
            returned = _train(plan, state, draw, number_of, ask)
        held = returned if held is None else join(plan.cohorts, held, returned, ask)
        attempt = _attempt(plan, state, held, draw, past_digests or {}, watch)
        if attempt.backing >= plan.needed or number_of >= config.max_retries:
            break
        number_of += 1
        missing = tuple(node for node in everyone if held.reasons.get(node) in UNDELIVERED)
        if missing and attempt.backing + len(missing) >= plan.needed:
            ask = missing
        else:
            draw, ask, held = draw + 1, everyone, None

    line = {
        "format_version": LINE_VERSION,
        "round": state.round,
        "draw": draw,
        "attempt": number_of,
        "config_digest": plan.config_digest,
        "start_digest": digest_tree(state.params)[0],
        "rule": rule_entry(config),
        "nodes": node_entries(
            _strategy_names(plan), attempt.reasons, attempt.digests, attempt.norms, attempt.quality, attempt.verdict
        ),
        "duplicates": duplicate_groups(attempt.digests, attempt.norms),
        "quorum": {"needed": plan.needed, "backing": attempt.backing},
        "extensions": attempt.extensions,
    } | dict.fromkeys(MERGE_FIELDS)
    next_state = state
    if attempt.backing < plan.needed:
        line["outcome"] = "no_quorum"
    else:
        next_state = _decide(plan, state, attempt, draw, line, watch)
    line["timing"] = {"phases_s": watch.seconds, "node_s": [number(s) for s in held.seconds]}
    return next_state, RoundRecord(line, attempt.returned.stack, attempt.delta, held.losses)


def quorum_error(line: Mapping[str, Any]) -> QuorumError:
    """The error for a round without quorum: who did not back it, why, and what to do."""
    reasons = {node["id"]: node["reason"] for node in line["nodes"]}
    named = ", ".join(f"node {i}: {reason}" for i, reason in reasons.items() if reason != "backed") or "none"
    quorum = line["quorum"]
    return QuorumError(
        f"Round {line['round']} found no quorum in {line['attempt'] + 1} attempts: {quorum['backing']} of "
        f"{len(reasons)} nodes back a commit and {quorum['needed']} are needed ({named}). The model is as it was "
        "before the round; mend the nodes or lower consensus_threshold, then resume the run.",
        reasons,
    )


UNDELIVERED = ("late", "crashed")
"""Reasons after which a node is asked again with the same batches; the others would only repeat themselves."""

MERGE_FIELDS = ("coefficient_start", "tau", "leash", "delta_digest", "merged_digest", "final_gate", "drift")


def _train(plan: RoundPlan, state: RoundState, draw: int, attempt: int, ask: tuple[int, ...]) -> Returned:
    steps = plan.config.local_steps

    def batches(node: int) -> Batch:
        batch = plan.source.batches(
            round=state.round, draw=draw, node=node, steps=steps, batch_size=plan.batch_size
        )
        if plan.attack and plan.attack.poison and node in plan.hostile:
            batch = plan.attack.poison(batch, plan.vocab_size)
        return batch

    deadline_s = plan.config.consensus_timeout
    work = Assignment(
        state.params, state.kept, batches, plan.key, state.round, draw, attempt, steps, ask, deadline_s
    )
    return jax.block_until_ready(plan.engine.map(plan.cohorts, work))


def _attempt(
    plan: RoundPlan,
    state: RoundState,
    returned: Returned,
    draw: int,
    past_digests: Mapping[int, Mapping[str, int]],
    watch: Stopwatch,
) -> Attempt:
    """What the nodes returned, through validation, digests, gate and vote."""
    num_nodes = plan.config.num_nodes
    key = node_key(plan.key, state.round, draw, num_nodes)
    attack = state.attack
    if plan.attack and plan.attack.forge:
        with watch("attack"):
            stack, attack = plan.attack.forge(_attack_view(plan, state, returned.stack, key), attack, key)
            returned = returned._replace(stack=stack)
    undelivered = {
        reason: np.array([returned.reasons.get(i) == reason for i in range(num_nodes)])
        for reason in set(returned.reasons.values())
    }
    flags = list(undelivered.items())
    quality = None
    with ThreadPoolExecutor(1) as pool:
        hashing = pool.submit(digest_rows, returned.stack, num_nodes)
        with watch("validate"):
            finite = np.asarray(finite_rows(returned.stack))
            flags.append(("not_finite", ~finite))
        if num_nodes > 1:
            with watch("gate"):
                quality = _gate(plan, state, returned.stack, draw)
                flags.append(("low_quality", ~np.asarray(quality.passed)))
        with watch("digest"):
            digests = {i: d for i, d in enumerate(hashing.result()) if i not in returned.reasons}
    with watch("vote"):
        measured = finite & np.array([i in digests for i in range(num_nodes)])
        gram = gram_matrix(returned.stack, measured)
        norms = np.where(measured, np.sqrt(np.diagonal(gram)), np.nan)
        stale = [digests.get(i) in past_digests.get(i, {}) and norms[i] != 0 for i in range(num_nodes)]
        flags.append(("stale", np.array(stale)))
        reasons = strictest(flags, num_nodes)
        ballot = open_ballot(returned.stack, [reason == "backed" for reason in reasons], gram=gram)
        delta, verdict, rule, extensions = None, None, state.rule, {}
        if reasons.count("backed") >= plan.needed:
            delta, verdict, rule = plan.aggregator.apply(ballot, state.rule, key)
            if plan.aggregator.score is not None:
                found = _shares(plan, state, returned.stack, np.asarray(verdict.backing), draw)
                if found is not None:
                    ballot = ballot._replace(scores={SCORE: found[0]})
                    delta, verdict, rule = plan.aggregator.apply(ballot, state.rule, key)
                    extensions = {NAME: found[1]}
            flags.append(("outvoted", ~np.asarray(verdict.backing)))
            reasons = strictest(flags, num_nodes)
            jax.block_until_ready(delta)
    return Attempt(returned, reasons, digests, norms, quality, delta, verdict, rule, attack, extensions)


def _gate(plan: RoundPlan, state: RoundState, stack: PyTree, draw: int) -> GateVerdict:
    config = plan.config
    batch = plan.source.held_out("gate", round=state.round, draw=draw, count=config.held_out_count)
    differences, tokens = gate_differences(plan.objective, state.params, stack, batch, config.gate_alpha)
    return judge(differences, tokens, config.verification_rounds, config.gate_limit)


def _shares(
    plan: RoundPlan, state: RoundState, stack: PyTree, backing: np.ndarray, draw: int
) -> tuple[np.ndarray, dict[str, Any]] | None:
    """Shares of the rows that back the vote, found on a split that no gate uses."""
    batch = plan.source.held_out("merge", round=state.round, draw=draw, count=plan.config.held_out_count)
    return mixture_shares(plan.objective, state.params, stack, backing, batch)


def _decide(
    plan: RoundPlan, state: RoundState, attempt: Attempt, draw: int, line: dict[str, Any], watch: Stopwatch
) -> RoundState:
    """Merged Δ → θ' → final gate; fills in the line and returns the next state."""
    config, verdict, kept = plan.config, attempt.verdict, attempt.returned.kept
    assert verdict is not None
    with watch("merge"):
        if attempt.returned.params is not None:
            candidate, outer = attempt.returned.params, state.outer
        else:
            updates, outer = plan.outer.update(jax.tree.map(jnp.negative, attempt.delta), state.outer, state.params)
            candidate = jax.block_until_ready(optax.apply_updates(state.params, updates))
    final = None
    if config.num_nodes > 1:
        with watch("final_gate"):
            batch = plan.source.held_out("final_gate", round=state.round, draw=draw, count=config.held_out_count)
            final = final_gate(plan.objective, state.params, state.anchor, candidate, batch, config.gate_limit)
    with watch("digest"):
        line |= {
            "coefficient_start": None if verdict.coefficient_start is None else number(verdict.coefficient_start),
            "tau": None if verdict.tau is None else number(verdict.tau),
            "leash": None if verdict.leash is None else number(verdict.leash),
            "delta_digest": digest_tree(attempt.delta)[0],
            "merged_digest": digest_tree(candidate)[0],
            "final_gate": None if final is None else _final_entry(final),
            "drift": number(cosine(attempt.delta, state.merged)),
        }
    if final is not None and not final.passed:
        line["outcome"] = "refused"
        return state._replace(
            round=state.round + 1,
            attack=attempt.attack,
            refusals=state.refusals + 1,
            anchor_age=state.anchor_age + 1,
        )
    line["outcome"] = "committed"
    broken = {i for i, reason in enumerate(attempt.reasons) if reason == "not_finite"}
    renewed = set(range(config.num_nodes)) if config.inner_state == "reset" else broken
    improved = final is None or final.anchor_mean < 0
    return RoundState(
        round=state.round + 1,
        params=candidate,
        anchor=candidate if improved else state.anchor,
        kept=renew(plan.cohorts, kept, renewed, candidate),
        outer=outer,
        merged=attempt.delta,
        rule=attempt.rule,
        attack=attempt.attack,
        refusals=0,
        anchor_age=0 if improved else state.anchor_age + 1,
    )


def _attack_view(plan: RoundPlan, state: RoundState, stack: PyTree, key: Any) -> AttackView:
    everyone = range(plan.config.num_nodes)

    def aggregate(rows: PyTree) -> PyTree:
        ballot = open_ballot(rows, np.ones(plan.config.num_nodes, np.float32))
        return plan.aggregator.apply(ballot, state.rule, key)[0]

    honest = tuple(i for i in everyone if i not in plan.hostile)
    return AttackView(stack, plan.hostile, honest, plan.config.num_tolerated, state.round, aggregate, state.params)


def _strategy_names(plan: RoundPlan) -> list[str]:
    names = {node: cohort.strategy.name for cohort in plan.cohorts for node in cohort.nodes}
    return [names[node] for node in range(plan.config.num_nodes)]


def _final_entry(final: FinalVerdict) -> dict[str, Any]:
    return {
        "parent": {"mean": number(final.parent_mean), "se": number(final.parent_se)},
        "anchor": {"mean": number(final.anchor_mean), "se": number(final.anchor_se)},
    }
