"""The attack that knows the rule: searches the strength of ALIE and IPM that moves this rule's outcome the most."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from capibara.consensus.attacks.base import Attack, AttackView, honest_deviation, honest_mean
from capibara.consensus.attacks.rows import reversed_mean, shifted, usual_shift
from capibara.errors import ConfigError, unknown_name
from capibara.types import PyTree

FAMILIES = ("alie", "ipm")

SHIFTS = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
"""Candidate z of ALIE, besides the one it takes by itself."""

REVERSALS = (0.1, 0.3, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
"""Candidate ε of IPM; 0.1 is its default."""


def optimised(strength: str | None = None) -> Attack:
    """Submits m − z·s or −ε·m, whichever z or ε leaves the rule's outcome furthest from m.

    Every candidate is put through the rule in use, so it is at least as damaging in that sense as `alie` and `ipm` at
    their defaults (the searched strengths of Allouah et al. 2023 and Shejwalkar & Houmansadr 2021). It does not know
    the gate: a candidate that the gate throws out is wasted on it.

    Needs: all honest deltas, and the rule.
    Beats: the mean and Krum; it is the worst case for most rules, the default vote included (docs/quality.md).
    Strength: `alie` or `ipm` to search that family only; both.

    Raises:
      ConfigError: For another family.
    """
    if strength not in (None, *FAMILIES):
        raise ConfigError(unknown_name("family of the attack 'optimised'", strength, FAMILIES))

    def forge(view: AttackView, state: PyTree, key: Any) -> tuple[PyTree, PyTree]:
        mean, worst, damage = honest_mean(view), view.stack, -1.0
        for candidate in candidates(view, mean, strength):
            moved = float(_distance(view.aggregate(candidate), mean))
            if moved > damage:
                worst, damage = candidate, moved
        return worst, state

    return Attack("optimised" if strength is None else f"optimised:{strength}", forge=forge)


def candidates(view: AttackView, mean: PyTree, family: str | None = None) -> Iterator[PyTree]:
    """The stacks among which the attack chooses; one is in memory at a time."""
    if family != "ipm":
        deviation = honest_deviation(view, mean)
        for z in (usual_shift(len(view.honest), len(view.hostile)), *SHIFTS):
            yield shifted(view, mean, deviation, z)
    if family != "alie":
        for strength in REVERSALS:
            yield reversed_mean(view, mean, strength)


@jax.jit
def _distance(a: PyTree, b: PyTree) -> jax.Array:
    return jnp.sqrt(sum(jax.tree.leaves(jax.tree.map(lambda x, y: jnp.vdot(x - y, x - y), a, b))))
