"""The attack that knows the rule: searches the strength of ALIE and IPM that moves this rule's outcome the most."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from capibara.consensus.attacks.base import Attack, AttackView, honest_mean
from capibara.consensus.attacks.rows import _against_mean, _shift_by_deviation, usual_shift
from capibara.types import PyTree

SHIFTS = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
"""Candidate z of ALIE, besides its own; byz_fed's range."""

REVERSALS = (0.1, 0.3, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
"""Candidate ε of IPM; 0.1 is its default."""


def optimised(strength: str | None = None) -> Attack:
    """Submits the candidate m − z·s or −ε·m after which the rule's outcome is furthest from m.

    Every candidate is put through the rule in use (Allouah et al. 2023, §6: the strength is searched). Needs all honest
    deltas and the rule. Beats most rules; see docs/quality.md.

    Args:
      strength: `alie` or `ipm` searches that family only; None searches both.
    """

    def forge(view: AttackView, state: PyTree, key: Any) -> tuple[PyTree, PyTree]:
        mean, worst, damage = honest_mean(view), view.stack, -1.0
        for candidate in candidates(view, strength):
            moved = float(_distance(view.aggregate(candidate), mean))
            if moved > damage:
                worst, damage = candidate, moved
        return worst, state

    return Attack("optimised" if strength is None else f"optimised:{strength}", forge=forge)


def candidates(view: AttackView, family: str | None = None):
    """The stacks among which the attack chooses."""
    if family in (None, "alie"):
        for z in (usual_shift(len(view.honest), len(view.hostile)), *SHIFTS):
            yield _shift_by_deviation(view, z)
    if family in (None, "ipm"):
        for strength in REVERSALS:
            yield _against_mean(view, np.float32(strength))


@jax.jit
def _distance(a: PyTree, b: PyTree) -> jax.Array:
    return jnp.sqrt(sum(jax.tree.leaves(jax.tree.map(lambda x, y: jnp.vdot(x - y, x - y), a, b))))
