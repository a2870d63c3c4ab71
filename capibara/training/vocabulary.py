"""Where strings stop: each name of a configuration, resolved to the object it stands for.

Every place that takes a name also takes the object itself, which passes through unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax

from capibara.consensus import merging, robust, voting
from capibara.consensus.attacks import get_attack
from capibara.consensus.attacks.base import Attack
from capibara.consensus.ballot import Aggregator, Merge, Rule, chain
from capibara.consensus.config import ConsensusConfig
from capibara.core.config import TrainingConfig
from capibara.engines.base import Engine
from capibara.engines.inline import InlineEngine
from capibara.engines.stacked import StackedEngine
from capibara.errors import ConfigError, unknown_name
from capibara.strategies.outer import outer_nesterov, outer_sgd
from capibara.strategies.plain import plain
from capibara.types import Objective, Strategy

ENGINES: dict[str, Callable[[], Engine]] = {"inline": InlineEngine, "stacked": StackedEngine}

VOTES: dict[str, Callable[[ConsensusConfig], Rule]] = {
    "byzantine_tolerant": lambda c: voting.byzantine_tolerant(
        c.num_tolerated, outvote_at=c.outvote_at, merge_rows=c.merge_rows
    ),
    "majority": lambda c: voting.majority(),
    "unanimous": lambda c: voting.majority(),
    "geometric_median": lambda c: robust.geometric_median(c.num_tolerated),
    "centered_clipping": lambda c: robust.centered_clipping(c.num_tolerated),
    "krum": lambda c: robust.krum(c.num_tolerated),
    "multi_krum": lambda c: robust.multi_krum(c.num_tolerated),
    "trimmed_mean": lambda c: robust.trimmed_mean(c.num_tolerated),
    "median": lambda c: robust.median(c.num_tolerated),
    "bulyan": lambda c: robust.bulyan(c.num_tolerated),
}

MERGES: dict[str, Callable[[ConsensusConfig], Merge]] = {
    "weighted_average": lambda c: merging.weighted_average(),
    "uniform": lambda c: merging.uniform(),
    "trimmed_mean": lambda c: merging.trimmed_mean(c.num_tolerated),
    "median": lambda c: merging.median(),
}

STRATEGIES: dict[str, Callable[[Objective, TrainingConfig, int], Strategy]] = {}
