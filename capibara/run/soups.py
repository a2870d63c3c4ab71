"""Soups while a run goes on: a callback of `capibara.loop.fit` that keeps several averages of the parameters at once.

    every `every` steps:   params ─► host, once ─► latest(5) · latest(20, "1-sqrt") · whole() · exponential(0.99)

What has been averaged lives in host memory, in float32, or the last ones on disk: the device holds no second copy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from capibara.consensus.averages import Average, decay_weights, is_finite
from capibara.errors import ConfigError
from capibara.files import Files, read_tensors, tensors_to_bytes
from capibara.loop import StepInfo
from capibara.run.callbacks import reaches
from capibara.tree import from_named_leaves, named_leaves
from capibara.types import PyTree


class Horizon(NamedTuple):
    """What an average reaches back over; made by `latest`, `whole` and `exponential`."""

    last: int | None = None
    schedule: str = "linear"
    decay: float | None = None
    since: int = 0
    variance: bool = False


def latest(count: int, schedule: str = "linear") -> Horizon:
    """The last `count` snapshots (LAWA, Kaddour 2022, arXiv 2209.14981), or weighted like a decay (`1-sqrt`, `cosine`).

    Raises:
      ConfigError: If there is nothing to average, or no such schedule.
    """
    decay_weights(count, schedule)
    return Horizon(count, schedule)


def whole(since: int = 0, *, variance: bool = False) -> Horizon:
    """The plain mean of every snapshot after step `since`, and on request the variance of every number."""
    return Horizon(since=since, variance=variance)


def exponential(decay: float) -> Horizon:
    """m ← decay·m + (1 − decay)·x from the first snapshot on.

    Raises:
      ConfigError: If the decay is not within 0 and 1.
    """
    if not 0 <= decay < 1:
        raise ConfigError(f"exponential: decay is from 0 to below 1; got {decay}.")
    return Horizon(decay=decay)


class SoupCallback:
    """Keeps an average for every horizon; call it with a `StepInfo`, read it at any time.

    Tolerates: snapshots with NaN: they are left out and counted.
    Cost: the parameters to the host once every `every` steps, 4 bytes a parameter for each `whole` and `exponential`,
      and for all `latest` together the snapshots of the longest: in memory, or in a folder.
    Fails when: a window reaches back over a steep part of training: its mean lags behind.

    Args:
      horizons: Name → horizon.
      every: Steps between snapshots. They are taken where a chunk ends, so `chunk` of `fit` should divide it.
      folder: Where the snapshots of `latest` lie; None keeps them in memory. Must not hold others'.

    Attributes:
      count: Snapshots taken.
      left_out: Snapshots that were not finite.

    Example:
      >>> soup = SoupCallback({"last five": latest(5), "all": whole()}, every=10)
      >>> # fit(strategy, state, batches, key, 1000, callbacks=(soup,)); soup.params("last five")
    """

    def __init__(self, horizons: Mapping[str, Horizon], every: int, *, folder: Path | None = None):
        if not horizons:
            raise ConfigError("A soup needs at least one horizon, as {'last five': latest(5)}.")
        if every < 1:
            raise ConfigError(f"every is a number of steps, 1 or more; got {every}.")
        self.horizons, self.every = dict(horizons), every
        self.count = self.left_out = 0
        self._running = {
            name: Average(variance=horizon.variance) for name, horizon in horizons.items() if horizon.last is None
        }
        self._ring = _Ring(max((horizon.last or 0 for horizon in horizons.values()), default=0), folder)

    def __call__(self, info: StepInfo) -> None:
        """Takes a snapshot where one is due."""
        if reaches(info, self.every):
            self.add(info.state.params, info.step)

    def add(self, params: PyTree, step: int) -> None:
        """Takes one snapshot, of step `step`."""
        tree = jax.tree.map(np.asarray, params)
        if not is_finite(tree):
            self.left_out += 1
            return
        self.count += 1
        for name, average in self._running.items():
            horizon = self.horizons[name]
            if horizon.decay is not None and average.count:
                average.move(tree, 1 - horizon.decay)
            elif step > horizon.since:
                average.add(tree)
        self._ring.add(tree)

    def params(self, name: str) -> PyTree:
        """The average of a horizon: over fewer snapshots while there are not yet as many.

        Raises:
          ConfigError: If there is no such horizon, or no snapshot yet.
        """
        horizon = self._known(name)
        if horizon.last is None:
            return self._running[name].mean()
        average, trees = Average(), self._ring.last(horizon.last)
        for read, weight in zip(trees, decay_weights(max(len(trees), 1), horizon.schedule), strict=False):
            average.add(read(), weight)
        return average.mean()

    def variance(self, name: str) -> PyTree:
        """The variance of every number over the snapshots of `whole(variance=True)`.

        Raises:
          ConfigError: If that was not asked for, or there is no snapshot yet.
        """
        if self._known(name).last is not None:
            raise ConfigError(f"{name!r} keeps no variance; use whole(variance=True).")
        return self._running[name].variance()

    def _known(self, name: str) -> Horizon:
        if name not in self.horizons:
            raise ConfigError(f"There is no horizon {name!r}; there are {', '.join(map(repr, self.horizons))}.")
        return self.horizons[name]


class _Ring:
    """The newest snapshots, as functions that give them."""

    def __init__(self, size: int, folder: Path | None):
        self.size, self.folder, self.taken = size, folder, 0
        self.kept: deque = deque(maxlen=size)

    def add(self, tree: PyTree) -> None:
        if not self.size:
            return
        if self.folder is None:
            copy = jax.tree.map(np.array, tree)  # on CPU the array may be a view of what the next step overwrites
            self.kept.append(lambda: copy)
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{self.taken % self.size}.safetensors"
            Files().write_atomic(path, tensors_to_bytes(named_leaves(tree)))
            shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
            self.kept.append(lambda: from_named_leaves(shapes, read_tensors(path)))
        self.taken += 1

    def last(self, count: int) -> list:
        return list(self.kept)[-count:]
