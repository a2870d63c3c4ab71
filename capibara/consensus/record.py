"""From a round's verdicts to the fields of its certificate line. Fields and order of reasons: docs/protocol.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from capibara.consensus.config import ConsensusConfig
from capibara.consensus.validate import REASONS

LINE_VERSION = 1


def strictest(flags: Sequence[tuple[str, np.ndarray]], num_nodes: int) -> list[str]:
    """For every node the first reason, in order of precedence, whose mask names it; `backed` where none does."""
    order = sorted(flags, key=lambda flag: REASONS.index(flag[0]))
    return [next((reason for reason, mask in order if mask[node]), "backed") for node in range(num_nodes)]


def rule_entry(config: ConsensusConfig) -> dict[str, Any]:
    """The `rule` field: by it and the kept deltas anyone can repeat the vote; with the text, the gate too."""
    name = config.voting_strategy if isinstance(config.voting_strategy, str) else config.voting_strategy.name
    merge = config.merge_strategy if isinstance(config.merge_strategy, str) else config.merge_strategy.name
    parameters = {
        "merge_strategy": merge,
        "merge_rows": config.merge_rows,
        "outvote_at": float(config.outvote_at),
        "quality_threshold": float(config.quality_threshold),
        "gate_step": float(config.gate_alpha),
        "gate_sequences": config.gate_sequences,
        "verification_rounds": config.verification_rounds,
    }
    return {"name": name, "f": config.num_tolerated, "parameters": parameters}


def node_entries(
    strategies: Sequence[str],
    reasons: Sequence[str],
    digests: Mapping[int, str],
    norms: np.ndarray,
    quality: Any,
    verdict: Any,
) -> list[dict[str, Any]]:
    """One entry per node; what was not measured is null.

    Args:
      strategies: Name of each node's strategy.
      reasons: Reason per node.
      digests: Of the deltas that arrived.
      norms: float64[n] lengths of the deltas; NaN where there is none.
      quality: A `GateVerdict`, or None where there was no gate.
      verdict: A `Verdict`, or None where there was no vote.
    """
    entries = []
    for node, reason in enumerate(reasons):
        entry: dict[str, Any] = {
            "id": node,
            "strategy": strategies[node],
            "reason": reason,
            "digest": digests.get(node),
            "norm": number(norms[node]),
            "quality": None,
        }
        if quality is not None:
            entry["quality"] = {
                "score": number(quality.quality[node]),
                "mean": number(quality.mean[node]),
                "se": number(quality.se[node]),
                "shards": [number(x) for x in quality.shard_means[node]],
            }
        for field, name in _PER_NODE.items():
            values = getattr(verdict, name, None)
            entry[field] = None if values is None else number(values[node])
        entries.append(entry)
    return entries


def number(value: Any) -> float | None:
    """A float that JSON can carry: NaN and infinities become null."""
    value = float(value)
    return value if np.isfinite(value) else None


_PER_NODE = {"distance": "distance", "clipped": "clipped", "coefficient": "coefficients", "cosine": "cosine"}
