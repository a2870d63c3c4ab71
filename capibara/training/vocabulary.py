"""Where strings stop: each name of a configuration, resolved to the object it stands for.

Every place that takes a name also takes the object itself, which passes through.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax

from capibara.consensus import convex_shares, dropout, merging, model_stock, robust, spherical, task_vectors, voting
from capibara.consensus.aggregate import chain
from capibara.consensus.attacks import Attack, get_attack
from capibara.consensus.ballot import Aggregator, Merge, Rule
from capibara.consensus.config import ConsensusConfig
from capibara.core.config import TrainingConfig
from capibara.engines.base import Engine
from capibara.engines.inline import InlineEngine
from capibara.engines.stacked import StackedEngine
from capibara.errors import ConfigError, unknown_name
from capibara.strategies.outer import outer_learning_rate, outer_nesterov, outer_sgd
from capibara.strategies.plain import adamw, plain
from capibara.strategies.proximal_adam import proximal_adam
from capibara.strategies.schedules import schedule
from capibara.strategies.soup import averaged
from capibara.transforms.prox import ridge
from capibara.types import Objective, Strategy

ENGINES: dict[str, Callable[[], Engine]] = {"inline": InlineEngine, "stacked": StackedEngine}

VOTES: dict[str, Callable[[int, ConsensusConfig], Rule]] = {
    "byzantine_tolerant": lambda f, c: voting.byzantine_tolerant(
        f, outvote_at=c.outvote_at, merge_rows=c.merge_rows
    ),
    "majority": lambda f, c: voting.majority(),
    "unanimous": lambda f, c: voting.majority(),
    "geometric_median": lambda f, c: robust.geometric_median(f),
    "centered_clipping": lambda f, c: robust.centered_clipping(f),
    "krum": lambda f, c: robust.krum(f),
    "multi_krum": lambda f, c: robust.multi_krum(f),
    "trimmed_mean": lambda f, c: robust.coordinates("trimmed_mean", f),
    "median": lambda f, c: robust.coordinates("median", f),
    "bulyan": lambda f, c: robust.bulyan(f),
}

MERGES: dict[str, Callable[[int], Merge]] = {
    "weighted_average": lambda f: merging.weighted_average(),
    "uniform": lambda f: merging.uniform(),
    "trimmed_mean": lambda f: merging.trimmed_mean(f),
    "median": lambda f: merging.median(),
    "slerp": lambda f: spherical.slerp(),
    "karcher": lambda f: spherical.karcher(),
    "rda": lambda f: spherical.rda(),
    "task_arithmetic": lambda f: task_vectors.task_arithmetic(),
    "ties": lambda f: task_vectors.ties(),
    "ties_tensor": lambda f: task_vectors.ties_tensor(),
    "dare": lambda f: dropout.dare(),
    "dare_norm": lambda f: dropout.dare(norm_matched=True),
    "dare_ties": lambda f: dropout.dare(elect=True),
    "della": lambda f: dropout.della(),
    "breadcrumbs": lambda f: task_vectors.breadcrumbs(),
    "model_stock": lambda f: model_stock.model_stock(),
    "model_stock_whole": lambda f: model_stock.model_stock_whole(),
    "sce": lambda f: task_vectors.sce(),
    "convex_optimization": lambda f: convex_shares.convex_optimization(),
    "bulyan": lambda f: robust.bulyan_merge(f),
}


def aggregator(config: ConsensusConfig) -> Aggregator:
    """The vote and the merge of a configuration, chained."""
    f, vote, merge = config.num_tolerated, config.voting_strategy, config.merge_strategy
    if isinstance(vote, Aggregator):
        return vote
    if vote in ("trimmed_mean", "median", "bulyan"):
        merge = vote
    merge = MERGES[merge](f) if isinstance(merge, str) else merge
    rule = VOTES[vote](f, config) if isinstance(vote, str) else vote
    return chain(rule, merge=merge)


def engine(config: ConsensusConfig) -> Engine:
    """The engine of a configuration."""
    return ENGINES[config.engine]() if isinstance(config.engine, str) else config.engine


def outer(config: ConsensusConfig) -> optax.GradientTransformation:
    """The outer optimiser of a configuration."""
    if not isinstance(config.outer, str):
        return config.outer
    if config.outer == "sgd":
        return outer_sgd(config.outer_learning_rate or 1.0)
    rate = config.outer_learning_rate or outer_learning_rate(config.num_nodes, config.local_steps)
    return outer_nesterov(rate, 0.9 if config.outer_momentum is None else config.outer_momentum)


def attack(config: ConsensusConfig) -> Attack | None:
    """The simulated attack of a configuration.

    Raises:
      ConfigError: If it would control no node.
    """
    if config.attack is None:
        return None
    if not config.attack_ids:
        raise ConfigError(
            f"attack = {config.attack!r} controls no node, since f = 0; use at least 4 nodes or set attack_nodes."
        )
    return get_attack(config.attack)


def strategies(
    given: tuple[Any, ...], objective: Objective, training: TrainingConfig, total_steps: int, local_steps: int
) -> tuple[Strategy, ...]:
    """The strategies of a run, by name or as objects.

    Raises:
      ConfigError: For a name that is not there.
    """

    def one(name: str) -> Strategy:
        if name in OVER_A_ROUND:
            return OVER_A_ROUND[name](plain_strategy(objective, training, total_steps), local_steps)
        return STRATEGIES[_known(name)](objective, training, total_steps)

    return tuple(one(s) if isinstance(s, str) else s for s in given)


def learning_rate(training: TrainingConfig, total_steps: int) -> optax.Schedule:
    """The learning-rate schedule that `[training]` describes."""
    return schedule(
        training.schedule,
        training.learning_rate,
        total_steps,
        warmup_steps=training.warmup_steps,
        min_ratio=training.min_lr_ratio,
        decay_fraction=training.decay_fraction,
    )


def plain_strategy(objective: Objective, training: TrainingConfig, total_steps: int) -> Strategy:
    """The plain strategy as `[training]` describes it."""
    optimizer = adamw(
        learning_rate(training, total_steps),
        weight_decay=training.weight_decay,
        beta1=training.beta1,
        beta2=training.beta2,
        clip_norm=training.clip_norm,
    )
    return plain(
        objective, optimizer, accumulation_steps=training.accumulation_steps, ema_decay=training.ema_decay
    )


def convexity_strategy(objective: Objective, training: TrainingConfig, total_steps: int) -> Strategy:
    """Proximal Adam with a ridge term of 0.01: a node's step costs what a plain one does."""
    rate = learning_rate(training, total_steps)
    return proximal_adam(objective, ridge(0.01), rate, clip_norm=training.clip_norm, name="convexity")


STRATEGIES: dict[str, Callable[[Objective, TrainingConfig, int], Strategy]] = {
    "plain": plain_strategy,
    "convexity": convexity_strategy,
}

OVER_A_ROUND: dict[str, Callable[[Strategy, int], Strategy]] = {"incremental_soup": averaged}
"""What the plain strategy may be wrapped in; these know how many steps a round has."""


def _known(name: str) -> str:
    if name not in STRATEGIES:
        raise ConfigError(unknown_name("strategy", name, (*STRATEGIES, *OVER_A_ROUND)))
    return name
