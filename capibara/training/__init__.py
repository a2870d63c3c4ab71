"""The specification's names. Each façade validates, resolves names to objects and delegates; importing loads no JAX."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from capibara.consensus.config import ConsensusConfig
    from capibara.training.convexity_training_strategy import ConvexityTrainingStrategy
    from capibara.training.incremental_soup_strategy import IncrementalSoupStrategy
    from capibara.training.meta_consensus_system import MetaConsensusSystem
    from capibara.training.unified_trainer import UnifiedTrainer

__all__ = [
    "ConsensusConfig",
    "ConvexityTrainingStrategy",
    "IncrementalSoupStrategy",
    "MetaConsensusSystem",
    "UnifiedTrainer",
]

_HOMES = {
    "ConsensusConfig": "capibara.consensus.config",
    "ConvexityTrainingStrategy": "capibara.training.convexity_training_strategy",
    "IncrementalSoupStrategy": "capibara.training.incremental_soup_strategy",
    "MetaConsensusSystem": "capibara.training.meta_consensus_system",
    "UnifiedTrainer": "capibara.training.unified_trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it exports {', '.join(sorted(_HOMES))}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(_HOMES)
