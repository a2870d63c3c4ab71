"""The names a configuration may use for the parts of a round, and what each vote needs. No function is bound here:
`capibara.training.vocabulary` resolves the names."""

from __future__ import annotations

from typing import NamedTuple


class Vote(NamedTuple):
    """What a voting strategy needs.

    Attributes:
      per_fault: The least n is `per_fault · f + base`.
      base: See above.
      is_merge: The rule sees coordinates and is the merge itself; no other merge may stand beside it.
      instead: A rule that does with fewer nodes, for the error; None where there is none.
    """

    per_fault: int = 1
    base: int = 1
    is_merge: bool = False
    instead: str | None = None

    def least(self, num_faulty: int) -> int:
        """The least number of rows that tolerates `num_faulty` arbitrary ones."""
        return self.per_fault * num_faulty + self.base


VOTES: dict[str, Vote] = {
    "byzantine_tolerant": Vote(2, 1),
    "majority": Vote(),
    "unanimous": Vote(),
    "geometric_median": Vote(2, 1),
    "centered_clipping": Vote(2, 1),
    "krum": Vote(2, 3, instead="byzantine_tolerant"),
    "multi_krum": Vote(2, 3, instead="byzantine_tolerant"),
    "trimmed_mean": Vote(2, 1, is_merge=True),
    "median": Vote(2, 1, is_merge=True),
    "bulyan": Vote(4, 3, is_merge=True, instead="trimmed_mean"),
}

MERGES = (
    "weighted_average", "uniform", "trimmed_mean", "median", "slerp", "karcher", "rda", "task_arithmetic", "ties",
    "ties_tensor", "dare", "dare_norm", "dare_ties", "della", "breadcrumbs", "model_stock", "model_stock_whole", "sce",
    "convex_optimization",
)  # fmt: skip
INNER_STATES = ("keep", "reset")
MERGE_ROWS = ("mixed", "own")
OUTERS = ("sgd", "nesterov")
ENGINES = ("stacked", "inline")
STRATEGIES = ("plain", "convexity", "incremental_soup")
SPLITS = ("iid", "by_field", "dirichlet")

A_NUMBER, NOTHING = "a number", ""
ATTACKS = {
    "alie": A_NUMBER,
    "copy": NOTHING,
    "gaussian": A_NUMBER,
    "ipm": A_NUMBER,
    "label_flip": NOTHING,
    "mimic": A_NUMBER,
    "min_max": A_NUMBER,
    "nan": NOTHING,
    "optimised": "alie or ipm",
    "scale": A_NUMBER,
    "sign_flip": A_NUMBER,
    "stale": NOTHING,
}
"""Name to what may follow it after a colon, as in `scale:-10`."""
