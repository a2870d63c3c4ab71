"""`capibara verify`: the check of a run with the votes repeated from the deltas that it kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from capibara.consensus.ballot import open_ballot
from capibara.consensus.convex_shares import recorded_shares
from capibara.consensus.record import rule_entry
from capibara.core.config import ModularConfig
from capibara.engines.base import node_key
from capibara.errors import CertificateError, ConfigError
from capibara.run.verify import Replay, Report, verify
from capibara.training.vocabulary import aggregator


def verify_run(path: Path | str, *, expect: str | None = None, replay: bool = True) -> Report:
    """Checks a run; see `capibara.run.verify.verify`.

    Args:
      path: The run directory.
      expect: The hash that the last certificate must have.
      replay: Repeat every vote whose deltas were kept.

    Raises:
      RunError: If `path` is no run directory.
    """
    path = Path(path)
    return verify(path, expect=expect, replay=vote_again(path) if replay else None)


def vote_again(path: Path) -> Replay:
    """Repeats votes under the rule that the run's configuration names, which must be the one in the certificate.

    A run that was made with rule objects cannot be replayed from its directory alone; each of its votes reports so.
    """

    def replay(line: dict[str, Any], stack: dict[str, np.ndarray]):
        try:
            config = ModularConfig.from_toml(path / "config.toml", environment={}).consensus
        except ConfigError as error:
            raise CertificateError(f"cannot be replayed: config.toml is not usable ({error})") from None
        if rule_entry(config) != line["rule"]:
            raise CertificateError("cannot be replayed: config.toml names another rule than the certificate")
        vote = aggregator(config)
        entered = np.array([node["reason"] in ("backed", "outvoted") for node in line["nodes"]])
        key = node_key(jax.random.key(config.seed), line["round"], line["draw"], config.num_nodes)  # as in run_round
        try:
            scores = recorded_shares(line)
        except ConfigError as error:
            raise CertificateError(f"cannot be replayed: {error}") from None
        ballot = open_ballot(stack, entered.astype(np.float64), scores)
        delta, verdict, _ = vote.apply(ballot, vote.init(None), key)
        reasons = [
            ("backed" if back else "outvoted") if counted else node["reason"]
            for node, counted, back in zip(line["nodes"], entered, verdict.backing, strict=True)
        ]
        return reasons, verdict.coefficients, {name: np.asarray(leaf) for name, leaf in delta.items()}

    return replay
