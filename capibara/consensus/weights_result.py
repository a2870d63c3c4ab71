"""What a search for merge weights reports: weights, what bounds them, and what the merged network was measured to do.

    certificate        dual_gap is
    global_convex      value − dual_gap ≤ the surrogate's global optimum on this validation sample
    conditional        the same for a quadratic model of the merged network, which is the network only nearby
    stationarity       how much a step in weight space could still gain to first order; no distance to an optimum
    none               None
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from capibara.consensus.weight_space import ConvexityProbe

NO_GAIN = "no_gain"


class Interval(NamedTuple):
    """A mean difference with its 95 % interval, nats a token; NaN where one sequence allows none."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, mean: float, se: float) -> Interval:
        """Mean ± 1.96 standard errors."""
        return cls(mean, mean - 1.96 * se, mean + 1.96 * se)


class CrossFit(NamedTuple):
    """The procedure judged on sequences that it did not see: weights from each half, evaluated on the other.

    Attributes:
      loss: Of the merges, before any fallback.
      against_best: Paired difference to the input that was best on the half the weights came from; < 0 is better.
      against_uniform: Paired difference to the plain mean.
    """

    loss: float
    against_best: Interval
    against_uniform: Interval


@dataclass(frozen=True, eq=False)
class ConvexResult:
    """Merge weights; `np.asarray(result)`, `len`, iteration and indexing are those of `weights`.

    (i) The gap certifies the surrogate on this validation sample.
    (ii) It does not certify the merged network.
    (iii) The ensemble optimum is not a lower bound for the merge.

    Attributes:
      weights: float64[M], of the best of {inputs, uniform, candidate} by evaluation; what `merge` uses.
      objective: Name of the problem.
      value: What was minimised, at `candidate`, penalty included. Where another was chosen, value, gap and bound are
        still those of `candidate`: nothing bounds how far `weights` are from the surrogate's best.
      surrogate_loss: The same without the penalty.
      dual_gap: See the certificate.
      lower_bound: value − dual_gap; None where the gap is no bound.
      certificate: `global_convex`, `conditional`, `stationarity` or `none`.
      candidate: float64[M], the weights that the solver found.
      chosen: What `weights` is: `candidate`, `uniform` or `model i`.
      losses: float64[M] of the inputs; infinite where not finite.
      candidate_loss: Of the merge by `candidate`, evaluated.
      uniform_loss: Of the plain mean of the usable models, evaluated.
      merged_loss: Of the merge by `weights`: never above the loss of any usable input.
      transfer_gap: candidate_loss − surrogate_loss. Large: the models do not average, whatever the surrogate says.
      probe: Attempts to find a violation of convexity in weight space.
      crossfit: None where a domain has one sequence, or it was not asked for.
      excluded: Model → `not_finite`, `worse_than_chance` or `no_trust`; these have weight 0 by decision.
      domains: What each domain counts, for minimax.
      iterations: Of the solver.
      converged: Whether the solver reached its tolerance; where not, the gap says how far it got.
      seconds: All of it.
    """

    weights: np.ndarray
    objective: str
    value: float
    surrogate_loss: float
    dual_gap: float | None
    lower_bound: float | None
    certificate: str
    candidate: np.ndarray
    chosen: str
    losses: np.ndarray
    candidate_loss: float
    uniform_loss: float
    merged_loss: float
    transfer_gap: float
    probe: ConvexityProbe
    crossfit: CrossFit | None
    excluded: dict[int, str]
    domains: dict[str, float] | None
    iterations: int
    converged: bool
    seconds: float

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.weights, dtype or self.weights.dtype)

    def __len__(self) -> int:
        return len(self.weights)

    def __iter__(self) -> Iterator[float]:
        return iter(self.weights)

    def __getitem__(self, i: Any) -> Any:
        return self.weights[i]

    @property
    def left_out(self) -> dict[int, str]:
        """Every model of weight 0 and why; `no_gain` where the data are better explained without it."""
        return {i: self.excluded.get(i, NO_GAIN) for i in range(len(self)) if self.weights[i] == 0}

    def summary(self) -> str:
        """A few plain lines: what was chosen, the losses, the gap and what it is."""
        shares = ", ".join(f"{i}: {w:.3f}" for i, w in enumerate(self.weights) if w > 0)
        best = int(np.argmin(self.losses))
        lines = [
            f"{self.chosen} of {len(self)} models ({shares})",
            f"loss {self.merged_loss:.4f}; best input {self.losses[best]:.4f} (model {best}), "
            f"uniform {self.uniform_loss:.4f}, candidate {self.candidate_loss:.4f}",
        ]
        gap = "no gap" if self.dual_gap is None else f"gap {self.dual_gap:.2e}"
        state = "" if self.converged else ", not converged"
        if self.chosen != "candidate":
            shares = ", ".join(f"{i}: {w:.3f}" for i, w in enumerate(self.candidate) if w > 0)
            lines.append(f"value and gap are the candidate's ({shares}), which measured worse than what was chosen")
        lines.append(
            f"{self.objective}: value {self.value:.4f}, {gap} ({self.certificate}{state}, {self.iterations} "
            f"iterations); transfer gap {self.transfer_gap:+.4f}"
        )
        if self.crossfit is not None:
            mean, low, high = self.crossfit.against_best
            against = f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"
            lines.append(f"cross-fit {self.crossfit.loss:.4f}, against the best input {against}")
        lines += [f"model {i} does not count: {reason.replace('_', ' ')}" for i, reason in self.excluded.items()]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON types; what is not finite becomes None."""
        return {name: _plain(getattr(self, name)) for name in self.__dataclass_fields__}


def _plain(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        return {name: _plain(one) for name, one in value._asdict().items()}
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(one) for one in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value
