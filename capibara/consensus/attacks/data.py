"""Attacks on what a node trains on."""

from __future__ import annotations

import numpy as np

from capibara.consensus.attacks.base import Attack
from capibara.types import Batch


def label_flip(strength: float | None = None) -> Attack:
    """Trains honestly on targets V − 1 − y (Allen-Zhu et al. 2020, §5, for classes). Needs nothing. Beats Krum."""

    def poison(batch: Batch, vocab_size: int) -> Batch:
        return {**batch, "targets": (vocab_size - 1 - np.asarray(batch["targets"])).astype(np.int32)}

    return Attack("label_flip", poison=poison)
