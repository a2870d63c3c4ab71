"""A node that returns the mean of its last states instead of the last one: LAWA inside a round.

    θ ─► θ₁ ─► … ─► θ_H        returned: (θ_{H−K+1} + … + θ_H) / K

The mean of the end of a trajectory lies nearer to the valley's floor than its last point (Izmailov et al. 2018, Kaddour
2022), so that what nodes vote on differs less by the noise of their last batches.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from capibara.errors import ConfigError
from capibara.types import Batch, PyTree, Strategy, TrainState


class Inner(NamedTuple):
    """The strategy's own inner state, and the running mean of the last states of this round, float32."""

    inner: PyTree
    mean: PyTree


def averaged(
    strategy: Strategy, local_steps: int, last: int | None = None, *, name: str = "incremental_soup"
) -> Strategy:
    """A strategy whose parameters become, with every `local_steps`-th step, the mean of the last `last` states.

    Within a round it trains as the strategy it is built on. Steps count from the start of the run, and every round has
    `local_steps` of them; used outside of rounds, training goes on from the mean.

    Tolerates: what the strategy does; a skipped step counts its unchanged parameters once more.
    Cost: one more copy of the parameters a node, and one pass over them in each of the last steps.
    Fails when: K steps reach back over most of the round's progress: the mean then lags behind the last state.

    Args:
      strategy: What trains.
      local_steps: H of a round.
      last: K, from 1 (the strategy itself) to H; half of H by default.
      name: For records.

    Raises:
      ConfigError: If H or K is out of range.
    """
    if local_steps < 1:
        raise ConfigError(f"A round has at least 1 local step; got {local_steps}.")
    count = max(1, local_steps // 2) if last is None else last
    if not 1 <= count <= local_steps:
        raise ConfigError(f"A node averages its last 1 to {local_steps} states (local_steps); got last = {count}.")

    def init(params: PyTree) -> TrainState:
        state = strategy.init(params)
        return state._replace(inner=Inner(state.inner, jax.tree.map(jnp.zeros_like, state.params)))

    def step(state: TrainState, batch: Batch, key: Any) -> tuple[TrainState, dict[str, Any]]:
        new, info = strategy.step(state._replace(inner=state.inner.inner), batch, key)
        position = state.step % local_steps + 1  # of the state that this step made, 1 to H
        taken = position - (local_steps - count)  # states in the mean with it; not yet any where < 1
        share = 1.0 / jnp.maximum(taken, 1)
        mean = jax.tree.map(
            lambda m, p: jnp.where(taken < 1, m, jnp.where(taken == 1, p, m + share * (p - m))),
            state.inner.mean,
            new.params,
        )
        ends = position == local_steps
        params = jax.tree.map(lambda p, m: jnp.where(ends, m, p), new.params, mean)
        return TrainState(new.step, params, Inner(new.inner, mean)), info

    return Strategy(name, init, step)
