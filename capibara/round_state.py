"""What a round takes and leaves: the plan, which never changes, the state, which is all that does, and the record.

    run_round(RoundPlan, RoundState) → RoundState, RoundRecord
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from capibara.consensus.attacks.base import Attack
from capibara.consensus.ballot import Aggregator
from capibara.consensus.config import ConsensusConfig
from capibara.engines.base import Cohort, Engine, Kept, deal, first_kept
from capibara.types import Objective, PyTree, Source, Strategy


class RoundPlan(NamedTuple):
    """What every round of a run shares; built once from the configuration.

    Attributes:
      config: The consensus section.
      objective: Losses for training and for the gates.
      strategies: Dealt to the nodes round-robin.
      engine: Where the nodes run.
      aggregator: Vote, merge and leash as one `init, apply` pair.
      outer: The outer optimiser, applied to −Δ.
      source: Training batches and held-out sequences.
      batch_size: Sequences a step.
      key: The run's typed PRNG key.
      config_digest: Goes into every certificate.
      attack: A simulated attack, or None.
      vocab_size: For attacks on the data.
      clock: Seconds, monotonic; only for `timing`.
    """

    config: ConsensusConfig
    objective: Objective
    strategies: tuple[Strategy, ...]
    engine: Engine
    aggregator: Aggregator
    outer: optax.GradientTransformation
    source: Source
    batch_size: int
    key: Any
    config_digest: str
    attack: Attack | None
    vocab_size: int
    clock: Callable[[], float]

    @property
    def cohorts(self) -> tuple[Cohort, ...]:
        """The nodes by strategy."""
        return deal(self.strategies, self.config.num_nodes)

    @property
    def needed(self) -> int:
        """Nodes that must back a commit: the configuration's quorum, or more where the vote needs more rows."""
        return max(self.config.needed, self.aggregator.least)

    @property
    def hostile(self) -> tuple[int, ...]:
        """The nodes that the simulated attack controls."""
        return self.config.attack_ids if self.attack else ()


class RoundState(NamedTuple):
    """Everything that changes from round to round; checkpointed whole.

    Attributes:
      round: Rounds finished, committed or refused.
      params: θ.
      anchor: The best certified parameters so far; θ₀ at first.
      kept: What the nodes keep, one entry per cohort.
      outer: State of the outer optimiser.
      merged: The last merged Δ, zeros at first.
      rule: State of the aggregator.
      attack: State of the simulated attack.
      refusals: Refused rounds in a row.
      anchor_age: Rounds since the anchor last improved.
    """

    round: int
    params: PyTree
    anchor: PyTree
    kept: tuple[Kept, ...]
    outer: PyTree
    merged: PyTree
    rule: PyTree
    attack: PyTree
    refusals: int
    anchor_age: int


class RoundRecord(NamedTuple):
    """What a round leaves besides its state.

    Attributes:
      line: The certificate line without `previous` and `hash`, `timing` and `environment` included.
      stack: The deltas as they entered validation, leaves [n, ...].
      delta: The merged delta; None where there was no quorum.
      losses: float32[n, H] training losses.
    """

    line: dict[str, Any]
    stack: PyTree
    delta: PyTree | None
    losses: np.ndarray


def first_state(plan: RoundPlan, params: PyTree) -> RoundState:
    """The state before the first round: θ₀ is start and anchor, nothing has been merged."""
    zeros = jax.tree.map(jnp.zeros_like, params)
    attack = plan.attack.init(zeros, plan.hostile) if plan.attack and plan.attack.init else ()
    kept = first_kept(plan.cohorts, params)
    outer, rule = plan.outer.init(params), plan.aggregator.init(params)
    return RoundState(0, params, params, kept, outer, zeros, rule, attack, refusals=0, anchor_age=0)
