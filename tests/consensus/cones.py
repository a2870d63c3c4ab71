"""The merge-weight problems as cone programs, solved by Clarabel: an interior point, nothing in common with ours.

    (x, y, z) in the exponential cone:  y exp(x/y) ≤ z, y > 0     log m ≥ s:  (s, 1, m)     w log(w/u) ≤ r:  (−r, w, u)
"""

from __future__ import annotations

import clarabel
import numpy as np
from scipy import sparse

ACCURACY = 1e-7
"""Of the optimal values that the solver returns, with its tolerances at 1e-10."""


class Program:
    """min ½ xᵀPx + qᵀx over named variables, row by row."""

    def __init__(self) -> None:
        self.count = 0
        self.linear: dict[int, float] = {}
        self.squares: dict[int, float] = {}
        self.blocks: dict[str, list[tuple[dict[int, float], float]]] = {"zero": [], "positive": [], "cone": []}

    def variables(self, count: int) -> np.ndarray:
        """Numbers of new variables."""
        self.count += count
        return np.arange(self.count - count, self.count)

    def add(self, kind: str, entries: dict[int, float], constant: float = 0.0) -> None:
        """Σ entries·x + constant is 0, at least 0, or the next of three numbers in an exponential cone."""
        self.blocks[kind].append((entries, constant))

    def solve(self) -> tuple[float, np.ndarray]:
        """The optimal value and the variables."""
        rows = [*self.blocks["zero"], *self.blocks["positive"], *self.blocks["cone"]]
        a = sparse.lil_matrix((len(rows), self.count))
        for number, (entries, _) in enumerate(rows):
            for column, value in entries.items():
                a[number, column] = -value
        b = np.array([constant for _, constant in rows])
        q, p = np.zeros(self.count), np.zeros(self.count)
        q[list(self.linear)], p[list(self.squares)] = list(self.linear.values()), list(self.squares.values())
        cones = [
            clarabel.ZeroConeT(len(self.blocks["zero"])),
            clarabel.NonnegativeConeT(len(self.blocks["positive"])),
            *[clarabel.ExponentialConeT()] * (len(self.blocks["cone"]) // 3),
        ]
        settings = clarabel.DefaultSettings()
        settings.verbose = False
        settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-10
        found = clarabel.DefaultSolver(sparse.diags(p).tocsc(), q, a.tocsc(), b, cones, settings).solve()
        assert str(found.status) in ("Solved", "AlmostSolved"), found.status
        return found.obj_val, np.array(found.x)


def simplex(program: Program, count: int) -> np.ndarray:
    """Variables ≥ 0 that sum to 1."""
    w = program.variables(count)
    program.add("zero", dict.fromkeys(w, 1.0), -1.0)
    for i in w:
        program.add("positive", {i: 1.0})
    return w


def log_mixtures(program: Program, w: np.ndarray, logs: np.ndarray) -> np.ndarray:
    """Variables s_t ≤ log Σ wᵢ exp(logs_ti)."""
    s = program.variables(len(logs))
    for t, row in enumerate(np.exp(logs.astype(np.float64))):
        program.add("cone", {s[t]: 1.0})
        program.add("cone", {}, 1.0)
        program.add("cone", dict(zip(w, row, strict=True)))
    return s


def penalise(program: Program, w: np.ndarray, kind: str, strength: float, prior: np.ndarray) -> float:
    """Adds λ·KL(w‖u) or λ/2·‖w − u‖²; returns the constant that is missing from the objective."""
    if kind == "kl":
        r = program.variables(len(w))
        for i, u in enumerate(prior):
            program.linear[r[i]] = strength
            program.add("cone", {r[i]: -1.0})
            program.add("cone", {w[i]: 1.0})
            program.add("cone", {}, float(u))
    if kind == "l2":
        for i, u in enumerate(prior):
            program.squares[w[i]] = strength
            program.linear[w[i]] = -strength * u
        return 0.5 * strength * float(prior @ prior)
    return 0.0


def best_mixture(logs: np.ndarray, kind: str, strength: float, prior: np.ndarray) -> float:
    """The optimal value of the mixture problem."""
    program = Program()
    w = simplex(program, logs.shape[1])
    s = log_mixtures(program, w, logs)
    program.linear |= dict.fromkeys(s, -1.0 / len(s))
    constant = penalise(program, w, kind, strength, prior)
    return program.solve()[0] + constant


def best_minimax(logs: np.ndarray, domain: np.ndarray, kind: str, strength: float, prior: np.ndarray) -> float:
    """The optimal value of the worst domain."""
    program = Program()
    w = simplex(program, logs.shape[1])
    s, (top,) = log_mixtures(program, w, logs), program.variables(1)
    program.linear[top] = 1.0
    for d in np.unique(domain):
        own = s[domain == d]
        program.add("positive", {top: 1.0} | dict.fromkeys(own, 1.0 / len(own)))
    constant = penalise(program, w, kind, strength, prior)
    return program.solve()[0] + constant


def best_pool(z: np.ndarray, targets: np.ndarray, kind: str, strength: float, prior: np.ndarray) -> float:
    """The optimal value of the log-opinion pool: Σ_v exp(Σ wᵢz_tiv − l_t) ≤ 1 says that l_t is above the log-sum."""
    program = Program()
    w = simplex(program, z.shape[2])
    for row, y in zip(z, targets, strict=True):
        (level,) = program.variables(1)
        parts = program.variables(len(row))
        program.linear[level] = 1 / len(z)
        program.add("positive", dict.fromkeys(parts, -1.0), 1.0)
        for v, one in zip(parts, row, strict=True):
            program.add("cone", dict(zip(w, one, strict=True)) | {level: -1.0})
            program.add("cone", {}, 1.0)
            program.add("cone", {v: 1.0})
        for i, value in zip(w, row[y], strict=True):
            program.linear[i] = program.linear.get(i, 0.0) - value / len(z)
    constant = 0.0
    if kind == "l2":  # the linear part of the penalty adds to what is there
        for i, u in zip(w, prior, strict=True):
            program.squares[i] = strength
            program.linear[i] -= strength * u
        constant = 0.5 * strength * float(prior @ prior)
    else:
        penalise(program, w, kind, strength, prior)
    return program.solve()[0] + constant
