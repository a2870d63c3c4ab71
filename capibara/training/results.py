"""What a run gives back: `ConsensusResults` of a consensus, `TrainingResults` of one model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from capibara.consensus.gates import paired


@dataclass(frozen=True)
class Judgement:
    """A model on the test split: token-weighted mean loss, and the loss of every sequence for paired comparisons.

    Attributes:
      loss: Mean nats a token.
      sums: float64[count] summed loss of each sequence.
      tokens: float64[count] tokens of each sequence.
    """

    loss: float
    sums: np.ndarray
    tokens: np.ndarray

    def against(self, before: Judgement) -> tuple[float, float]:
        """Paired mean difference in nats a token, and its standard error, as the gates find them."""
        mean, se = paired((self.sums - before.sums)[None], self.tokens)
        return float(mean[0]), float(se[0])

    def told(self, before: Judgement) -> str:
        """The change since `before` in words, and whether it is more than two standard errors."""
        change, se = self.against(before)
        clear = "lower by" if change < -2 * se else "higher by" if change > 2 * se else "changed by no"
        return (
            f"{before.loss:.4f} → {self.loss:.4f} nats a token "
            f"(change {change:+.4f} ± {se:.4f}, paired, {len(self.sums)} sequences): "
            f"{clear} more than two standard errors"
        )


@dataclass(frozen=True)
class ConsensusResults:
    """The outcome of a consensus run.

    Attributes:
      consensus_model: The model after the last committed round.
      rounds: Rounds finished, committed or refused.
      history: One dict a round: `round, outcome, loss, test_loss, backing, reasons, strategies, seconds`.
      certificate_path: `rounds.jsonl`, one hash-chained certificate a line.
      run_path: The run directory.
      head: Hash of the last certificate; `capibara verify RUN --expect HASH` checks against it.
      before: The start judged on the test split, or None where the run had no test split to spare.
      after: The same for the consensus model.
      sample: A few generated lines, where asked for.
    """

    consensus_model: Any
    rounds: int
    history: list[dict[str, Any]]
    certificate_path: Path
    run_path: Path
    head: str
    before: Judgement | None = None
    after: Judgement | None = None
    sample: str | None = field(default=None, repr=False)

    def accused(self) -> dict[int, dict[str, int]]:
        """Node → reason → rounds, for every node that did not back every round."""
        found: dict[int, dict[str, int]] = {}
        for entry in self.history:
            for node, reason in enumerate(entry["reasons"]):
                if reason != "backed":
                    reasons = found.setdefault(node, {})
                    reasons[reason] = reasons.get(reason, 0) + 1
        return found

    def by_strategy(self) -> dict[str, tuple[int, int]]:
        """Strategy → node-rounds that backed, and all: a whole strategy can be outvoted for being different."""
        counts: dict[str, tuple[int, int]] = {}
        for entry in self.history:
            for name, reason in zip(entry["strategies"], entry["reasons"], strict=True):
                backed, total = counts.get(name, (0, 0))
                counts[name] = (backed + (reason == "backed"), total + 1)
        return counts

    def named(self) -> list[int]:
        """The nodes that were kept out in more than half of the rounds."""
        return [node for node, reasons in sorted(self.accused().items()) if 2 * sum(reasons.values()) > self.rounds]

    def summary(self) -> str:
        """A few plain lines: rounds, who was kept out, test loss, where the certificates are."""
        outcomes, accused = [entry["outcome"] for entry in self.history], self.accused()
        lines = [f"{self.rounds} rounds, {outcomes.count('committed')} committed, {outcomes.count('refused')} refused."]
        told = {
            node: ", ".join(f"{reason.replace('_', ' ')} in {count}" for reason, count in reasons.items())
            for node, reasons in sorted(accused.items())
        }
        if self.named():
            nodes = " and ".join(f"node {node} ({told[node]} of {self.rounds} rounds)" for node in self.named())
            lines.append(f"Named as lying or broken: {nodes}.")
        others = "; ".join(f"node {node} {why}" for node, why in told.items() if node not in self.named())
        if others:
            lines.append(f"Kept out now and then: {others} of {self.rounds} rounds.")
        if len(shares := self.by_strategy()) > 1:
            told_shares = ", ".join(f"{name} {backed} of {total}" for name, (backed, total) in sorted(shares.items()))
            lines.append(f"Node-rounds that backed, by strategy: {told_shares}.")
        if self.before is not None and self.after is not None:
            lines.append(f"test loss {self.after.told(self.before)}")
        lines.append(f"certificates: {self.certificate_path} (last hash {self.head[:16]}…)")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Everything but the model, as JSON types."""
        payload: dict[str, Any] = {
            "rounds": self.rounds,
            "history": self.history,
            "accused": {str(node): reasons for node, reasons in self.accused().items()},
            "named": self.named(),
            "by_strategy": {name: {"backed": b, "of": total} for name, (b, total) in self.by_strategy().items()},
            "run": str(self.run_path),
            "certificates": str(self.certificate_path),
            "head": self.head,
            "sample": self.sample,
        }
        if self.before is not None and self.after is not None:
            change, se = self.after.against(self.before)
            payload["test"] = {"before": self.before.loss, "after": self.after.loss, "change": change, "se": se}
        return payload

    def __repr__(self) -> str:
        return f"ConsensusResults({self.summary()})"


@dataclass(frozen=True)
class TrainingResults:
    """The outcome of training one model.

    Attributes:
      model: The trained model; the running average of its weights where `ema_decay` is set.
      steps: Steps finished.
      history: One dict a log line: `step, loss, tokens_per_s, skipped, learning_rate, …`, `eval_loss` where evaluated.
      run_path: The run directory.
      before: The evaluation at the start, or None where there was no text to evaluate on.
      after: The same for `model`.
    """

    model: Any
    steps: int
    history: list[dict[str, Any]]
    run_path: Path
    before: Judgement | None = None
    after: Judgement | None = None

    def summary(self) -> str:
        """A few plain lines: steps, loss, evaluation with the paired standard error, where everything is."""
        lines = [f"{self.steps} steps."]
        if self.history:
            last, skipped = self.history[-1], sum(entry["skipped"] for entry in self.history)
            lines = [f"{self.steps} steps, training loss {last['loss']:.4f}, {last['tokens_per_s']:,.0f} tokens/s."]
            if skipped:
                lines.append(f"{skipped} steps were skipped: their loss or gradient was not finite.")
        if self.before is not None and self.after is not None:
            lines.append(f"eval loss {self.after.told(self.before)}")
        return "\n".join([*lines, f"run: {self.run_path}"])

    def to_json(self) -> dict[str, Any]:
        """Everything but the model, as JSON types."""
        payload: dict[str, Any] = {"steps": self.steps, "history": self.history, "run": str(self.run_path)}
        if self.before is not None and self.after is not None:
            change, se = self.after.against(self.before)
            payload["eval"] = {"before": self.before.loss, "after": self.after.loss, "change": change, "se": se}
        return payload

    def __repr__(self) -> str:
        return f"TrainingResults({self.summary()})"
