"""The only training loop: one scan for H steps, a generator over chunks of them, and `fit`, which drains it.

`step` counts the steps that are finished: the state with step 7 has seen batches 0 to 6.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from capibara.errors import ConfigError, RunError
from capibara.types import Batch, PyTree, Strategy, TrainState


class StepInfo(NamedTuple):
    """What `steps` yields after each chunk.

    Attributes:
      state: After the chunk.
      step: Steps finished.
      losses: float32[chunk] training losses in nats.
      info: Last values of everything else that the strategy reports.
      skipped: Steps of the chunk that the NaN guard skipped.
      skipped_in_a_row: Skipped steps that the chunk ends with; more than `losses` has where the chunk before did too.
      tokens_per_s: Of this chunk; the first one includes compilation.
    """

    state: TrainState
    step: int
    losses: np.ndarray
    info: dict[str, float]
    skipped: int
    skipped_in_a_row: int
    tokens_per_s: float


def local_steps(step: Any, state: TrainState, batches: Batch, keys: Any) -> tuple[TrainState, dict[str, Any]]:
    """One scan over the leading axis H of `batches` and `keys`; infos come back with leaves [H]."""

    def body(carry: TrainState, item: tuple[Batch, Any]) -> tuple[TrainState, dict[str, Any]]:
        batch, key = item
        return step(carry, batch, key)

    return jax.lax.scan(body, state, (batches, keys))


def steps(
    strategy: Strategy,
    state: TrainState,
    batches: Callable[[int, int], Batch],
    key: Any,
    num_steps: int,
    *,
    chunk: int = 10,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[StepInfo]:
    """Trains from `state` until `num_steps` steps are finished, yielding after every `chunk` of them.

    Args:
      strategy: How to step.
      state: Where to begin; its `step` says which batch comes next.
      batches: `(first_step, count) -> batch` with leaves [count, B, ...]; a pure function of its arguments.
      key: Step k trains with `fold_in(key, k)`, so that resuming repeats nothing and skips nothing.
      num_steps: Steps of the whole training.
      chunk: Steps compiled into one program and run without looking.
      clock: Seconds, monotonic.

    Raises:
      ConfigError: If `chunk` is not positive.
    """
    if chunk < 1:
        raise ConfigError(f"log_every must be at least 1 step; got {chunk}.")
    done, in_a_row = int(state.step), 0
    while done < num_steps:
        count = min(chunk - done % chunk, num_steps - done)
        batch = batches(done, count)
        began = clock()
        state, infos = _chunk(state, batch, key, step=strategy.step)
        losses = np.asarray(infos.pop("loss"))
        seconds = max(clock() - began, 1e-9)
        done += count
        skipped = np.asarray(infos.pop("skipped", np.zeros(count)), bool)
        good = np.flatnonzero(~skipped)
        in_a_row = int(count - 1 - good[-1]) if good.size else in_a_row + count
        last = {name: float(np.asarray(values)[-1]) for name, values in infos.items()}
        yield StepInfo(state, done, losses, last, int(skipped.sum()), in_a_row, count_tokens(batch) / seconds)


def fit(
    strategy: Strategy,
    state: TrainState,
    batches: Callable[[int, int], Batch],
    key: Any,
    num_steps: int,
    *,
    chunk: int = 10,
    callbacks: tuple[Callable[[StepInfo], None], ...] = (),
    max_skipped: int = 100,
    clock: Callable[[], float] = time.monotonic,
) -> TrainState:
    """Drains `steps`, calling each callback after every chunk; a callback may raise `StopIteration` to end early.

    Raises:
      RunError: If `max_skipped` steps in a row had a loss or gradient that is not finite.
    """
    for info in steps(strategy, state, batches, key, num_steps, chunk=chunk, clock=clock):
        state = info.state
        if info.skipped_in_a_row >= max_skipped:
            raise RunError(
                f"{info.skipped_in_a_row} steps in a row up to step {info.step} had a loss or gradient that is not "
                "finite; the parameters are those before the first of them. Lower the learning rate, check the data."
            )
        try:
            for callback in callbacks:
                callback(info)
        except StopIteration:
            break
    return state


def count_tokens(batch: Batch) -> int:
    """Targets that count in a batch; examples, where the batch has no mask."""
    if "mask" in batch:
        return int(np.asarray(batch["mask"]).sum())
    leaf = jax.tree.leaves(batch)[0]
    return int(np.prod(leaf.shape[:2]))


@partial(jax.jit, static_argnames="step")
def _chunk(state: TrainState, batch: PyTree, key: Any, *, step: Any) -> tuple[TrainState, dict[str, Any]]:
    count = jax.tree.leaves(batch)[0].shape[0]
    numbers = state.step + jax.numpy.arange(count)
    return local_steps(step, state, batch, jax.vmap(lambda k: jax.random.fold_in(key, k))(numbers))
