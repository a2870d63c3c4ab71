"""`ConsensusConfig`: how many nodes, how they vote, and how many of them may be wrong.

    needed = ceil(consensus_threshold · n), or n − f without a threshold
    f      = min(⌊(n−1)/3⌋, n − needed, ⌊(needed−1)/2⌋), or num_faulty, or ⌊(n−1)/3⌋

Agreement and each rule's breakdown are two bounds; both are checked when the configuration is built.
"""

from __future__ import annotations

import math
import warnings
from fractions import Fraction
from typing import Any

from pydantic import field_validator, model_validator

from capibara.consensus.section import Section, check_part, name_of, setting
from capibara.consensus.vocabulary import (
    A_NUMBER,
    ATTACKS,
    ENGINES,
    INNER_STATES,
    MERGE_ROWS,
    MERGES,
    OUTERS,
    SPLITS,
    STRATEGIES,
    VOTES,
)
from capibara.errors import unknown_name


class ConsensusConfig(Section):
    """One consensus round's configuration. Every field that takes a name also takes the object itself."""

    num_nodes: int = setting(4, "replicas that train and vote (n)", ge=1, le=1024)
    voting_strategy: Any = setting("byzantine_tolerant", "how rows are weighed or clipped")
    merge_strategy: Any = setting("weighted_average", "how rows become one model")
    quality_threshold: float = setting(0.85, "least held-out likelihood ratio of a damped step", gt=0, le=1)
    consensus_threshold: float | None = setting(None, "share of nodes that must back a commit", gt=0, le=1)
    num_faulty: int | None = setting(None, "nodes that may be arbitrarily wrong (f)", ge=0)
    verification_rounds: int = setting(3, "held-out shards a gate (K)", ge=1)
    gate_sequences: int = setting(6, "sequences a shard (S)", ge=1)
    gate_step: float | None = setting(None, "share of a delta the gate tries; min(1/2, 2/n)", gt=0, le=1)
    local_steps: int = setting(30, "steps between two votes (H)", ge=1)
    consensus_timeout: float | None = setting(600.0, "seconds a node may take, without compilation", gt=0)
    max_retries: int = setting(3, "further attempts of a round without quorum", ge=0)
    max_refusals: int = setting(5, "refused rounds in a row that stop the run", ge=1)
    inner_state: str = setting("keep", "optimiser state between rounds: keep or reset")
    merge_rows: str = setting("own", "rows the default vote merges: mixed or own")
    outvote_at: float = setting(3.0, "distance, in (m−f)-th smallest ones, at which a node is outvoted", gt=1)
    outer: Any = setting("sgd", "outer optimiser: sgd, nesterov or an optax transformation")
    outer_learning_rate: float | None = setting(None, "1.0 for sgd, by the η(n, H) table for nesterov", gt=0)
    outer_momentum: float | None = setting(None, "0.9 for nesterov", ge=0, lt=1)
    engine: Any = setting("stacked", "where the nodes run: stacked or inline")
    strategies: tuple[Any, ...] = setting(("plain",), "dealt to the nodes round-robin", min_length=1)
    attack: Any = setting(None, "a simulated attack, name or name:strength")
    attack_nodes: tuple[int, ...] | None = setting(None, "nodes that attack; the last f if unset")
    split: str = setting("iid", "how text is dealt: iid, by_field or dirichlet:GAMMA")
    seed: int = setting(0, "seed of data, keys and gates", ge=0)
    keep_deltas: bool = setting(False, "keep every node's delta, so that votes can be replayed")
    checkpoint_every: int = setting(1, "rounds between checkpoints", ge=1)
    keep_checkpoints: int = setting(3, "checkpoints kept", ge=1)

    @field_validator("strategies")
    @classmethod
    def _known_strategies(cls, strategies: tuple[Any, ...]) -> tuple[Any, ...]:
        for strategy in strategies:
            check_part("strategy", strategy, STRATEGIES)
        return strategies

    @model_validator(mode="after")
    def _check(self) -> ConsensusConfig:
        for field, known in _VOCABULARIES.items():
            check_part(field, getattr(self, field), known)
        self._check_attack()
        self._check_faults()
        self._check_rule()
        self._check_split()
        if self.held_out_count < 16 and self.num_nodes > 1:
            raise ValueError(
                f"verification_rounds · gate_sequences = {self.held_out_count}; the gate "
                f"needs at least 16 sequences. Set gate_sequences = {math.ceil(16 / self.verification_rounds)}."
            )
        return self

    def _check_faults(self) -> None:
        n, most = self.num_nodes, self._most_faulty
        if self.num_faulty is not None and self.num_faulty > most:
            if self.num_faulty > (n - 1) // 3:
                raise ValueError(
                    f"num_faulty = {self.num_faulty} needs at least {3 * self.num_faulty + 1} nodes (agreement needs "
                    f"n ≥ 3f + 1); got num_nodes = {n}, which tolerates {(n - 1) // 3}."
                )
            if self.voting_strategy == "unanimous":
                raise ValueError(
                    f"num_faulty = {self.num_faulty} does not fit voting_strategy = 'unanimous', where all {n} nodes "
                    "must back a commit. Set num_faulty = 0, or vote by 'majority'."
                )
            f = self.num_faulty
            few = _needed(self.consensus_threshold, n) <= 2 * f
            fits = f"{_share(2 * f + 1, n)} or more" if few else f"{_share(n - f, n)} or less"
            raise ValueError(
                f"num_faulty = {f} does not fit consensus_threshold = {self.consensus_threshold}, which leaves room "
                f"for {most} of {n} nodes. Set consensus_threshold = {fits}, or num_faulty = {most}."
            )

    def _check_attack(self) -> None:
        n = self.num_nodes
        name, colon, strength = str(self.attack).partition(":")
        if self.attack is not None:
            check_part("attack", name if isinstance(self.attack, str) else self.attack, tuple(ATTACKS))
        if colon and isinstance(self.attack, str):
            needed = ATTACKS[name]
            if not needed:
                raise ValueError(f"attack = {self.attack!r}: {name!r} takes no strength. Write {name!r}.")
            if not (_is_finite(strength) if needed == A_NUMBER else strength in needed.split(" or ")):
                example = f"{name}:2" if needed == A_NUMBER else f"{name}:{needed.split()[0]}"
                raise ValueError(f"attack = {self.attack!r} needs {needed} after the colon, e.g. {example!r}.")
        for node in self.attack_nodes or ():
            if not 0 <= node < n:
                raise ValueError(f"attack_nodes names node {node}; the nodes are 0 to {n - 1}.")
        if len(set(self.attack_nodes or ())) == n:
            raise ValueError(f"attack_nodes names all {n} nodes; an attack needs at least one honest node to look at.")

    def _check_rule(self) -> None:
        if not isinstance(self.voting_strategy, str):
            return
        vote, f = VOTES[self.voting_strategy], self.num_tolerated
        if self.num_nodes < vote.least(f):
            instead = f" Use {vote.instead!r}, which needs {VOTES[vote.instead].least(f)}." if vote.instead else ""
            raise ValueError(
                f"voting_strategy = {self.voting_strategy!r} with f = {f} needs at least {vote.least(f)} nodes; got "
                f"num_nodes = {self.num_nodes}.{instead}"
            )
        if vote.is_merge and self.merge_strategy not in ("weighted_average", self.voting_strategy):
            raise ValueError(
                f"voting_strategy = {self.voting_strategy!r} sees coordinates and is the merge itself; got "
                f"merge_strategy = {self.merge_strategy!r} beside it. Leave it out, or vote by 'byzantine_tolerant'."
            )

    def _check_split(self) -> None:
        name, colon, gamma = self.split.partition(":")
        if name not in SPLITS or (colon and name != "dirichlet"):
            raise ValueError(unknown_name("split", self.split, ("iid", "by_field", "dirichlet:GAMMA")))
        if name == "dirichlet" and not (_is_finite(gamma) and float(gamma) > 0):
            raise ValueError(f"split = {self.split!r} needs a positive number, e.g. 'dirichlet:0.33'.")

    @property
    def needed(self) -> int:
        """Nodes that must back a commit; exact, without floating-point surprises (0.75 of 8 is 6)."""
        if self.voting_strategy == "unanimous":
            return self.num_nodes
        if self.consensus_threshold is None:
            return self.num_nodes - self.num_tolerated
        return _needed(self.consensus_threshold, self.num_nodes)

    @property
    def num_tolerated(self) -> int:
        """f: how many nodes may be hostile, broken, crashed or late without harm."""
        return self._most_faulty if self.num_faulty is None else self.num_faulty

    @property
    def _most_faulty(self) -> int:
        third = (self.num_nodes - 1) // 3
        if self.voting_strategy == "unanimous":
            return 0
        if self.consensus_threshold is None:
            return third
        needed = _needed(self.consensus_threshold, self.num_nodes)
        return min(third, self.num_nodes - needed, (needed - 1) // 2)

    @property
    def held_out_count(self) -> int:
        """K·S, the held-out sequences that a gate looks at."""
        return self.verification_rounds * self.gate_sequences

    @property
    def gate_alpha(self) -> float:
        """α, the share of a delta that the gate tries."""
        return min(0.5, 2 / self.num_nodes) if self.gate_step is None else self.gate_step

    @property
    def gate_limit(self) -> float:
        """−ln(quality_threshold): the rise of held-out loss, in nats a token, that the gates take for harm."""
        return -math.log(self.quality_threshold)

    @property
    def attack_ids(self) -> tuple[int, ...]:
        """The nodes that a simulated attack controls: `attack_nodes`, or the last f."""
        if self.attack is None:
            return ()
        if self.attack_nodes is not None:
            return tuple(self.attack_nodes)
        return tuple(range(self.num_nodes - self.num_tolerated, self.num_nodes))

    def describe(self) -> str:
        """One line: nodes, quorum, tolerated faults, vote and merge."""
        return (
            f"{self.num_nodes} nodes, {self.needed} must back a commit, {self.num_tolerated} may be arbitrarily wrong; "
            f"vote {name_of(self.voting_strategy)}, merge {name_of(self.merge_strategy)}."
        )

    def note_on_strategies(self) -> str | None:
        """A sentence where so few nodes have a strategy that all of them can be outvoted for being different."""
        kinds, f = len(self.strategies), self.num_tolerated
        if kinds == 1 or self.num_nodes // kinds > f:
            return None
        return (
            f"{kinds} strategies share {self.num_nodes} nodes: some have {self.num_nodes // kinds}, no more than the "
            f"f = {f} that a vote may take for wrong. A whole strategy can be outvoted for being different; use "
            f"{kinds * (f + 1)} nodes or fewer strategies."
        )

    def warn_when_defenceless(self) -> None:
        """Says once that no lie is tolerated, with the threshold that lets the others go on."""
        n = self.num_nodes
        if n == 1 or self.num_tolerated or self.num_faulty == 0 or self.voting_strategy == "unanimous":
            return
        why = f" at consensus_threshold = {self.consensus_threshold}; without it f = {(n - 1) // 3}"
        if n < 4:
            why = "; n = 4 is the least for f = 1"
        crash = f" One crash stops a round; consensus_threshold = {_share(n - 1, n)} lets {n - 1} of {n} go on."
        warnings.warn(
            f"{n} nodes tolerate f = 0 lies{why}.{crash if self.needed == n else ''}", stacklevel=3
        )


def _needed(threshold: float | None, num_nodes: int) -> int:
    """⌈threshold · n⌉ of the decimal number that was written, so that 0.7 of 10 is 7."""
    return math.ceil(Fraction(str(threshold)) * num_nodes)


def _share(needed: int, num_nodes: int) -> float:
    """The largest threshold of four digits that asks for `needed` nodes."""
    return needed * 10_000 // num_nodes / 10_000


def _is_finite(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


_VOCABULARIES = {
    "voting_strategy": tuple(VOTES),
    "merge_strategy": MERGES,
    "inner_state": INNER_STATES,
    "merge_rows": MERGE_ROWS,
    "outer": OUTERS,
    "engine": ENGINES,
}
