"""Means: what is left of the rows after the vote becomes one delta. Each may stand behind any vote that allows one.

Merges with a shape of their own are in `spherical`, `task_vectors`, `dropout` and `model_stock`; those that weigh by
data, in `fisher`. docs/merging.md has them all in one table.
"""

from __future__ import annotations

import jax

from capibara.consensus import networks
from capibara.consensus.aggregate import capped
from capibara.consensus.ballot import Merge
from capibara.errors import ConfigError
from capibara.types import PyTree


def weighted_average() -> Merge:
    """Σ wᵢ rowᵢ, w the ballot's weights (sample counts), normalised; no row more than 2/m of the whole."""
    return Merge("weighted_average", weights=capped, mean=True)


def uniform() -> Merge:
    """The plain mean of the rows that count."""
    return Merge("uniform", weights=lambda w: (w > 0) / max((w > 0).sum(), 1), mean=True)


def trimmed_mean(f: int) -> Merge:
    """Per coordinate the mean without the f lowest and f highest rows; Yin et al. 2018, §4. Ignores weights above 0.

    Where so few rows are left after the vote that 2f would take them all, as many are trimmed as leave one: the vote
    has checked its bound with the rows that entered, and the leash holds whatever remains.
    """
    return Merge("trimmed_mean", leaf=lambda rows: networks.trimmed_mean(rows, min(f, (rows.shape[0] - 1) // 2)))


def median() -> Merge:
    """Per coordinate the middle row, or the mean of the two middle ones. Ignores weights above 0."""
    return Merge("median", leaf=networks.median)


def wise(base: PyTree, tuned: PyTree, alpha: float) -> PyTree:
    """(1 − α)θ₀ + αθ₁, a point of the WiSE-FT line; Wortsman et al. 2022 (arXiv 2109.01903, §3).

    The paper's line is α from 0 to 1; choose on held-out data of both distributions. α > 1 extrapolates. Both ends are
    exact.

    Tolerates: nothing: it is the two models.
    Cost: one pass, in blocks of any length.
    Fails when: the tuned model has left the base's basin: the middle of the line is then worse than both ends.

    Raises:
      ConfigError: If α is negative or not finite.
    """
    if not 0 <= alpha < float("inf"):
        raise ConfigError(f"wise: alpha is a finite number of at least 0; got {alpha}.")
    return jax.tree.map(lambda a, b: (1 - alpha) * a + alpha * b, base, tuned)
