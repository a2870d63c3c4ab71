"""Attacks on what a node trains on."""

from __future__ import annotations

import numpy as np

from capibara.consensus.attacks.base import Attack
from capibara.errors import ConfigError
from capibara.types import Batch


def label_flip() -> Attack:
    """Trains honestly on the targets V − 1 − y, for a vocabulary of V.

    The 9 − y of Allen-Zhu et al. (2021, Byzantine-resilient non-convex SGD), for any V.

    Needs: nothing but its own data.
    Beats: Krum on unequal data; the trimmed mean once f/n reaches .4.
    Strength: none.

    Raises:
      ConfigError: From `poison`, for batches that hold no `targets`.
    """

    def poison(batch: Batch, vocab_size: int) -> Batch:
        if "targets" not in batch:
            raise ConfigError(
                f"The attack 'label_flip' flips batch['targets']; these batches hold {', '.join(sorted(batch))}. Use "
                "an attack on deltas, e.g. sign_flip."
            )
        return {**batch, "targets": (vocab_size - 1 - np.asarray(batch["targets"])).astype(np.int32)}

    return Attack("label_flip", poison=poison)
