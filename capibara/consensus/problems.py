"""What may be minimised over merge weights: six problems of one shape, `Inputs → Found`, and what each one's gap is.

    problem        minimises                                    certificate
    mixture        −log of the mixture's likelihood             global_convex
    log_pool       loss of the averaged logits                  global_convex
    minimax        mixture loss of the worst domain             global_convex
    quadratic      second-order model of the merged network     conditional, or none where it is not convex
    weight_space   the merged network, from the mixture on      stationarity
    black_box      the merged network by any metric             none
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from capibara.consensus import black_box
from capibara.consensus.combine import combine
from capibara.consensus.convex import mixture
from capibara.consensus.evidence import HeldOut, Rows, read_logs
from capibara.consensus.minimax import minimax
from capibara.consensus.opinion_pool import model_pieces, opinion_pool
from capibara.consensus.simplex import Penalty, Solution
from capibara.consensus.weight_space import quadratic, refine, weight_space
from capibara.types import Objective, PyTree


class Inputs(NamedTuple):
    """What a problem is made of: usable models only, so that all M columns are finite.

    Attributes:
      trees: M parameters.
      objective: Their losses.
      held: The data.
      logs: float[rows, M].
      rows: What each row is.
      penalty: Ω around the trust weights.
      max_iterations: Of the solver.
    """

    trees: Sequence[PyTree]
    objective: Objective
    held: HeldOut
    logs: np.ndarray
    rows: Rows
    penalty: Penalty
    max_iterations: int

    def half(self, which: int) -> tuple[Inputs, np.ndarray]:
        """The problem of every other sequence, and which rows are its own."""
        own = self.rows.place % 2 == which
        return self._replace(held=self.held.half(which), logs=self.logs[own], rows=self.rows.part(own)), own


class Found(NamedTuple):
    """What a problem gives.

    Attributes:
      solution: Weights, value, gap.
      certificate: What the gap is: `global_convex`, `conditional`, `stationarity` or `none`.
      curvature: λmin of the Hessian in weight space, where it was computed.
      domains: What each domain counts, where domains were told apart.
    """

    solution: Solution
    certificate: str
    curvature: tuple[float, ...] = ()
    domains: np.ndarray | None = None


class Problem(NamedTuple):
    """Attributes:
    name: Of the objective.
    solve: `(Inputs) -> Found`.
    worst: Losses are those of the worst domain.
    """

    name: str
    solve: Callable[[Inputs], Found]
    worst: bool = False


def mixture_problem() -> Problem:
    """P1, `capibara.consensus.convex.mixture`: the default."""
    return Problem("mixture", lambda given: Found(_mixture(given), "global_convex"))


def pool_problem() -> Problem:
    """P2, `capibara.consensus.opinion_pool`: needs logits."""

    def solve(given: Inputs) -> Found:
        read = model_pieces(given.trees, given.objective, given.held)
        return Found(opinion_pool(read, given.penalty, max_iterations=given.max_iterations), "global_convex")

    return Problem("log_pool", solve)


def refined_problem(steps: int = 10) -> Problem:
    """P3: the mixture's weights, then at most ten gradient steps of the merged network's own loss."""

    def solve(given: Inputs) -> Found:
        space, start = weight_space(given.trees, given.objective, given.held), _mixture(given).weights
        return Found(refine(space, given.penalty, start, steps=min(steps, given.max_iterations)), "stationarity")

    return Problem("weight_space", solve)


def quadratic_problem() -> Problem:
    """P4: the second-order model at the trust weights; `none` where its Hessian had to be shifted."""

    def solve(given: Inputs) -> Found:
        space = weight_space(given.trees, given.objective, given.held)
        solution, least = quadratic(space, given.penalty, max_iterations=given.max_iterations)
        return Found(solution, "conditional" if least >= 0 else "none", (least,))

    return Problem("quadratic", solve)


def minimax_problem() -> Problem:
    """The mixture whose worst domain is best, `capibara.consensus.minimax`."""

    def solve(given: Inputs) -> Found:
        rows = given.rows
        saddle = minimax(given.logs, rows.tokens, rows.domain, given.penalty, max_iterations=given.max_iterations)
        return Found(saddle.solution, "global_convex", domains=saddle.domains)

    return Problem("minimax", solve, worst=True)


def black_box_problem() -> Problem:
    """P6: the merged network's loss, whatever it is, by line searches; `max_iterations` counts evaluations."""

    def solve(given: Inputs) -> Found:
        def loss(w: np.ndarray) -> float:
            return given.rows.loss(read_logs(given.objective, combine(given.trees, w), given.held)[0])

        found = black_box.search(loss, given.penalty.prior, max_evaluations=given.max_iterations)
        ran_out = found.evaluations >= given.max_iterations
        nothing = float("nan")
        return Found(
            Solution(found.weights, found.value, found.value, nothing, found.evaluations, not ran_out), "none"
        )

    return Problem("black_box", solve)


def _mixture(given: Inputs) -> Solution:
    return mixture(given.logs, given.rows.tokens, given.penalty, max_iterations=given.max_iterations)
