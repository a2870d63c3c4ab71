"""Merges: what is left of the rows after the vote becomes one delta. Each may stand behind any vote that allows one."""

from __future__ import annotations

from capibara.consensus import networks
from capibara.consensus.ballot import Merge, capped


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
