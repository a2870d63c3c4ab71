"""Merge weights found on held-out data, with what is certain about them, and never a model worse than the inputs.

    evidence ► weights of a surrogate, with its gap ► the merged network, evaluated ► best of {inputs, uniform, it}

The chain that is provable for the mixture: f(w*) ≤ f(eᵢ) = Lᵢ for every model i, and f(w) ≤ Σ wᵢLᵢ for every w. What is
true of the merged network is found by evaluating it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from capibara.consensus.combine import checked_weights, combine
from capibara.consensus.evidence import NO_TRUST, HeldOut, gather, read_logs
from capibara.consensus.problems import Inputs, Problem
from capibara.consensus.simplex import Penalty
from capibara.consensus.weight_space import ConvexityProbe
from capibara.consensus.weights_result import ConvexResult, CrossFit, Interval
from capibara.errors import ConfigError
from capibara.types import Objective, PyTree


def find_weights(
    trees: Sequence[PyTree],
    objective: Objective,
    held: HeldOut,
    problem: Problem,
    penalty: Callable[[np.ndarray], Penalty],
    *,
    trust: Sequence[float] | np.ndarray | None = None,
    chance: float = np.inf,
    max_iterations: int = 100,
    crossfit: bool = True,
    midpoints: int = 3,
    clock: Callable[[], float] = lambda: 0.0,
) -> ConvexResult:
    """Weights for a merge of models of one structure.

    Tolerates: models with NaN, models worse than chance, models that come from other initialisations: the first two
      are excluded by name, the last show as a transfer gap, and the fallback returns the best input.
    Cost: M + 2 forward passes over the data, one for each midpoint, and for the cross-fit two half passes and two more
      solutions; problems other than the mixture add their own.
    Fails when: the validation data are not like what the model will be used on.

    Args:
      trees: Parameters; may be a lazy sequence, which is then read once for each merge that is evaluated.
      objective: Their losses.
      held: Validation sequences by domain.
      problem: What is minimised.
      penalty: `(trust weights) -> Ω`.
      trust: What each model is trusted before any data, ≥ 0, summing to 1; equal by default. 0 excludes a model.
      chance: Loss of a uniform guess.
      max_iterations: Of the solver; its gap is valid wherever it stops.
      crossfit: Also find weights on each half of the sequences and evaluate them on the other half.
      midpoints: Segments between the inputs, the uniform and the found merge whose middle is evaluated.
      clock: Seconds.

    Raises:
      ConfigError: If there is no model, they do not fit each other, none can be used, or trust is no distribution.
    """
    began = clock()
    trusted = None if trust is None else checked_weights(trust, len(trees), "trust")
    evidence = gather(trees, objective, held, chance=chance, worst=problem.worst)
    if trusted is not None:
        distrusted = {int(i): NO_TRUST for i in np.flatnonzero(trusted == 0)}
        evidence = evidence._replace(excluded=distrusted | evidence.excluded)
    usable, count = evidence.usable, len(trees)
    if not len(usable):
        raise ConfigError(f"No model is both trusted and usable: {evidence.excluded}. Trust another one.")
    prior = np.full(len(usable), 1.0) if trusted is None else trusted[usable]
    prior = prior / prior.sum()
    given = Inputs(
        _Chosen(trees, usable), objective, held, evidence.logs[:, usable], evidence.rows, penalty(prior), max_iterations
    )
    found = problem.solve(given)
    judge = _Judge(given, problem.worst)
    candidate, uniform = found.solution.weights, np.full(len(usable), 1 / len(usable))
    options = {"candidate": candidate, "uniform": uniform}
    options |= {f"model {i}": one for i, one in zip(usable, np.eye(len(usable)), strict=True)}
    losses = {name: judge.loss(w) for name, w in options.items()}
    chosen = min(losses, key=lambda name: losses[name])  # the first of equals
    certain = found.certificate in ("global_convex", "conditional")
    gap = None if found.certificate == "none" else found.solution.gap
    return ConvexResult(
        weights=_spread(options[chosen], usable, count),
        objective=problem.name,
        value=found.solution.value,
        surrogate_loss=found.solution.loss,
        dual_gap=gap,
        lower_bound=found.solution.value - gap if certain and gap is not None else None,
        certificate=found.certificate,
        candidate=_spread(candidate, usable, count),
        chosen=chosen,
        losses=evidence.losses,
        candidate_loss=losses["candidate"],
        uniform_loss=losses["uniform"],
        merged_loss=losses[chosen],
        transfer_gap=losses["candidate"] - found.solution.loss,
        probe=ConvexityProbe(*judge.midpoints(list(options.values()), midpoints), found.curvature),
        crossfit=_crossfit(given, problem, judge) if crossfit else None,
        excluded=evidence.excluded,
        domains=None if found.domains is None else dict(zip(held.names, found.domains.tolist(), strict=True)),
        iterations=found.solution.iterations,
        converged=found.solution.converged,
        seconds=clock() - began,
    )


class _Chosen(Sequence[Any]):
    """Some models of a sequence, without copying any."""

    def __init__(self, trees: Sequence[PyTree], which: np.ndarray):
        self.trees, self.which = trees, which

    def __len__(self) -> int:
        return len(self.which)

    def __getitem__(self, i: Any) -> Any:
        return self.trees[int(self.which[i])]


class _Judge:
    """Log-probabilities of merges, each evaluated once."""

    def __init__(self, given: Inputs, worst: bool):
        self.given, self.worst = given, worst
        self.known = {tuple(one): given.logs[:, i] for i, one in enumerate(np.eye(given.logs.shape[1]))}

    def logs(self, w: np.ndarray) -> np.ndarray:
        if tuple(w) not in self.known:
            merged = combine(self.given.trees, w)
            self.known[tuple(w)] = read_logs(self.given.objective, merged, self.given.held)[0]
        return self.known[tuple(w)]

    def loss(self, w: np.ndarray) -> float:
        return self.given.rows.loss(self.logs(w), worst=self.worst)

    def midpoints(self, points: list[np.ndarray], wanted: int) -> tuple[int, int]:
        """How many segments between different points were tried, and how many bend the wrong way."""
        rng, tried, wrong = np.random.default_rng(0), 0, 0
        pairs = [(0, 1), *((int(a), int(b)) for a, b in rng.integers(len(points), size=(4 * wanted, 2)))]
        for a, b in pairs:
            if tried == wanted:
                break
            if np.abs(points[a] - points[b]).max() < 1e-3:
                continue
            mean = (self.loss(points[a]) + self.loss(points[b])) / 2
            tried += 1
            wrong += not self.loss((points[a] + points[b]) / 2) <= mean + 1e-6 * max(1.0, abs(mean))
        return tried, wrong


def _crossfit(given: Inputs, problem: Problem, judge: _Judge) -> CrossFit | None:
    if min(given.held.counts) < 2:
        return None
    halves = [given.half(which) for which in (0, 1)]
    everything = len(np.unique(given.rows.domain))
    if any(len(np.unique(part.rows.domain)) < everything for part, _ in halves):
        return None
    count = given.logs.shape[1]
    found, best = np.empty(len(given.logs)), np.empty(len(given.logs))
    for (here, _), (there, other) in zip(halves, halves[::-1], strict=True):
        weights = problem.solve(here).solution.weights
        found[other] = read_logs(given.objective, combine(given.trees, weights), there.held)[0]
        alone = [here.rows.loss(here.logs[:, i], worst=problem.worst) for i in range(count)]
        best[other] = there.logs[:, int(np.argmin(alone))]
    uniform = judge.logs(np.full(count, 1 / count))
    return CrossFit(
        given.rows.loss(found, worst=problem.worst),
        Interval.of(*given.rows.paired(found, best)),
        Interval.of(*given.rows.paired(found, uniform)),
    )


def _spread(weights: np.ndarray, usable: np.ndarray, count: int) -> np.ndarray:
    full = np.zeros(count)
    full[usable] = weights
    return full
