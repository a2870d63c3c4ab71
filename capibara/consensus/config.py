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

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from capibara.consensus.vocabulary import (
    ENGINES,
    INNER_STATES,
    MERGE_ROWS,
    MERGES,
    OUTERS,
    STRATEGIES,
    VOTES,
)
from capibara.errors import ConfigError, nearest, unknown_name


class Section(BaseModel):
    """A frozen group of settings; an unknown key or a bad value is a `ConfigError` in one sentence."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, validate_default=True)

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise _as_config_error(error, type(self)) from None


class ConsensusConfig(Section):
    """One consensus round's configuration. Every field that takes a name also takes the object itself."""

    num_nodes: int = Field(4, ge=1, le=1024, description="replicas that train and vote (n)")
    voting_strategy: Any = Field("byzantine_tolerant", description="how rows are weighed or clipped")
    merge_strategy: Any = Field("weighted_average", description="how rows become one model")
    quality_threshold: float = Field(0.85, gt=0, le=1, description="least held-out likelihood ratio after a damped step")
    consensus_threshold: float | None = Field(None, gt=0, le=1, description="share of nodes that must back a commit")
    num_faulty: int | None = Field(None, ge=0, description="nodes that may be arbitrarily wrong (f)")
    verification_rounds: int = Field(3, ge=1, description="held-out shards a gate (K)")
    gate_sequences: int = Field(6, ge=1, description="sequences a shard (S)")
    gate_step: float | None = Field(None, gt=0, le=1, description="share of a delta the gate tries; min(1/2, 2/n) if unset")
    local_steps: int = Field(30, ge=1, description="steps between two votes (H)")
    consensus_timeout: float | None = Field(600.0, gt=0, description="seconds a node may take, without compilation")
    max_retries: int = Field(3, ge=0, description="further attempts of a round without quorum")
    max_refusals: int = Field(5, ge=1, description="refused rounds in a row that stop the run")
    inner_state: str = Field("keep", description="optimiser state between rounds: keep or reset")
    merge_rows: str = Field("mixed", description="rows the default vote merges: mixed or own")
    outvote_at: float = Field(3.0, gt=1, description="distance, in (m−f)-th smallest ones, at which a node is outvoted")
    outer: Any = Field("sgd", description="outer optimiser: sgd, nesterov or an optax transformation")
    outer_learning_rate: float | None = Field(None, gt=0, description="1.0 for sgd, by the η(n, H) table for nesterov")
    outer_momentum: float | None = Field(None, ge=0, lt=1, description="0.9 for nesterov")
    engine: Any = Field("stacked", description="where the nodes run: stacked or inline")
    strategies: tuple[Any, ...] = Field(("plain",), min_length=1, description="dealt to the nodes round-robin")
    attack: Any = Field(None, description="a simulated attack, name or name:strength")
    attack_nodes: tuple[int, ...] | None = Field(None, description="nodes that attack; the last f if unset")
    split: str = Field("iid", description="how text is dealt: iid, by_field or dirichlet:GAMMA")
    seed: int = Field(0, ge=0, description="seed of data, keys and gates")
    keep_deltas: bool = Field(False, description="keep every node's delta, so that votes can be replayed")
    checkpoint_every: int = Field(1, ge=1, description="rounds between checkpoints")
    keep_checkpoints: int = Field(3, ge=1, description="checkpoints kept")

    @model_validator(mode="after")
    def _check(self) -> ConsensusConfig:
        for field, known in _VOCABULARIES.items():
            value = getattr(self, field)
            if isinstance(value, str) and value not in known:
                raise ValueError(unknown_name(field, value, known))
        for strategy in self.strategies:
            if isinstance(strategy, str) and strategy not in STRATEGIES:
                raise ValueError(unknown_name("strategy", strategy, STRATEGIES))
        self._check_faults()
        self._check_rule()
        self._check_split()
        if self.verification_rounds * self.gate_sequences < 16 and self.num_nodes > 1:
            raise ValueError(
                f"verification_rounds · gate_sequences = {self.verification_rounds * self.gate_sequences}; the gate needs "
                f"at least 16 sequences. Set gate_sequences = {math.ceil(16 / self.verification_rounds)}."
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
            raise ValueError(
                f"num_faulty = {self.num_faulty} does not fit consensus_threshold = {self.consensus_threshold}, which "
                f"leaves room for {most} of {n} nodes. Set consensus_threshold = "
                f"{round((n - self.num_faulty) / n - 5e-4, 3)} or less, or num_faulty = {most}."
            )
        for node in self.attack_nodes or ():
            if not 0 <= node < n:
                raise ValueError(f"attack_nodes names node {node}; the nodes are 0 to {n - 1}.")

    def _check_rule(self) -> None:
        if not isinstance(self.voting_strategy, str):
            return
        vote, f = VOTES[self.voting_strategy], self.num_tolerated
        if self.num_nodes < vote.least(f):
            instead = f" Use {vote.instead}, which needs {VOTES[vote.instead].least(f)}." if vote.instead else ""
            raise ValueError(
                f"{self.voting_strategy} with f = {f} needs at least {vote.least(f)} nodes; got {self.num_nodes}.{instead}"
            )
        if vote.is_merge and self.merge_strategy not in ("weighted_average", self.voting_strategy):
            raise ValueError(
                f"voting_strategy = {self.voting_strategy!r} sees coordinates and is the merge itself; got merge_strategy "
                f"= {self.merge_strategy!r} beside it. Leave merge_strategy out, or vote by 'byzantine_tolerant'."
            )

    def _check_split(self) -> None:
        name, _, gamma = self.split.partition(":")
        if name not in ("iid", "by_field", "dirichlet"):
            raise ValueError(unknown_name("split", self.split, ("iid", "by_field", "dirichlet:GAMMA")))
        if name == "dirichlet":
            try:
                good = float(gamma) > 0
            except ValueError:
                good = False
            if not good:
                raise ValueError(f"split = {self.split!r} needs a positive number, e.g. 'dirichlet:0.33'.")

    @property
    def needed(self) -> int:
        """Nodes that must back a commit; exact, without floating-point surprises (0.75 of 8 is 6)."""
        if self.voting_strategy == "unanimous":
            return self.num_nodes
        if self.consensus_threshold is None:
            return self.num_nodes - self.num_tolerated
        return math.ceil(Fraction(str(self.consensus_threshold)) * self.num_nodes)

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
        needed = math.ceil(Fraction(str(self.consensus_threshold)) * self.num_nodes)
        return min(third, self.num_nodes - needed, (needed - 1) // 2)

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

    def warn_when_defenceless(self) -> None:
        """Says once that no lie is tolerated, with the threshold that lets the others go on."""
        if self.num_nodes > 1 and self.num_tolerated == 0 and self.voting_strategy != "unanimous":
            rest = self.num_nodes - 1
            threshold = math.floor(1000 * rest / self.num_nodes) / 1000
            advice = (
                f" One crash stops a round; consensus_threshold = {threshold} lets {rest} of {self.num_nodes} go on."
                if self.needed == self.num_nodes
                else ""
            )
            warnings.warn(
                f"{self.num_nodes} nodes tolerate f = 0 lies; n = 4 is the least for f = 1.{advice}", stacklevel=3
            )


def name_of(part: Any) -> str:
    """The name of a part given by name or as an object."""
    return part if isinstance(part, str) else str(getattr(part, "name", type(part).__name__))


def _as_config_error(error: ValidationError, model: type[BaseModel]) -> ConfigError:
    """Pydantic's findings as one `ConfigError`; its `details` are (keys, sentence) pairs: what, got, needed."""
    details: list[tuple[tuple[str, ...], str]] = []
    for found in error.errors():
        keys = tuple(part for part in found["loc"] if isinstance(part, str))
        inner = found.get("ctx", {}).get("error")
        if isinstance(inner, ConfigError) and inner.details:
            details += [((*keys, *more), sentence) for more, sentence in inner.details]
        elif found["type"] == "extra_forbidden":
            known = field_names(model, found["loc"][:-1])
            guess = nearest(keys[-1], known)
            hint = f" Did you mean {guess!r}?" if guess else ""
            details.append((keys, f"Unknown key {'.'.join(keys)!r}.{hint} Known: {', '.join(sorted(known))}."))
        elif found["type"] == "value_error":
            details.append((keys, str(inner)))
        else:
            message = found["msg"][0].lower() + found["msg"][1:]
            details.append((keys, f"{'.'.join(keys) or model.__name__}: {message}; got {found['input']!r}."))
    raised = ConfigError("\n".join(sentence for _, sentence in details))
    raised.details = details
    return raised


def field_names(model: type[BaseModel], path: tuple[Any, ...] = ()) -> list[str]:
    """The keys that a section of a configuration knows."""
    for part in path:
        inner = model.model_fields[str(part)].annotation if str(part) in model.model_fields else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        model = inner
    return list(model.model_fields)


_VOCABULARIES = {
    "voting_strategy": tuple(VOTES),
    "merge_strategy": MERGES,
    "inner_state": INNER_STATES,
    "merge_rows": MERGE_ROWS,
    "outer": OUTERS,
    "engine": ENGINES,
}
