"""The soup callback: every horizon against the mean of the states that a run went through."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from capibara.consensus.averages import decay_weights
from capibara.errors import ConfigError
from capibara.loop import fit
from capibara.run.soups import SoupCallback, exponential, latest, whole

HORIZONS = {
    "last three": latest(3),
    "last five": latest(5, "1-sqrt"),
    "all": whole(variance=True),
    "late": whole(since=12),
    "slow": exponential(0.8),
}


def batches(first: int, count: int):
    many = tiny.Points().batches(round=0, draw=0, node=0, steps=20, batch_size=8)
    return {name: leaf[first : first + count] for name, leaf in many.items()}


def train(*callbacks, chunk: int = 2):
    return fit(tiny.STRATEGY, tiny.STRATEGY.init(tiny.first_params()), batches, jax.random.key(0), 20, chunk=chunk,
               callbacks=callbacks)


def mean(rows, weights=None):
    return {name: np.average([row[name] for row in rows], axis=0, weights=weights) for name in rows[0]}


def close(ours, theirs):
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("on_disk", [False, True])
def test_every_horizon_is_the_mean_of_its_states(tmp_path: Path, on_disk: bool):
    soup, seen = SoupCallback(HORIZONS, 2, folder=tmp_path / "ring" if on_disk else None), []
    train(soup, lambda info: seen.append(jax.tree.map(np.array, info.state.params)))
    assert soup.count == len(seen) == 10
    close(soup.params("last three"), mean(seen[-3:]))
    close(soup.params("last five"), mean(seen[-5:], decay_weights(5, "1-sqrt")))
    close(soup.params("all"), mean(seen))
    close(soup.params("late"), mean(seen[6:]))
    slow = seen[0]
    for row in seen[1:]:
        slow = {name: 0.8 * slow[name] + 0.2 * row[name] for name in row}
    close(soup.params("slow"), slow)
    close(soup.variance("all"), {name: np.var([row[name] for row in seen], axis=0) for name in seen[0]})
    if on_disk:
        assert len(list((tmp_path / "ring").iterdir())) == 5


def test_training_is_not_changed():
    alone, beside = train(), train(SoupCallback(HORIZONS, 2))
    jax.tree.map(np.testing.assert_array_equal, alone.params, beside.params)


def test_snapshots_are_taken_every_few_steps_only():
    soup = SoupCallback({"all": whole()}, 6)
    train(soup)
    assert soup.count == 3


def test_fewer_snapshots_than_a_window_are_averaged_as_they_are():
    soup, params = SoupCallback(HORIZONS, 1), tiny.first_params()
    with pytest.raises(ConfigError, match="Nothing has been averaged yet"):
        soup.params("last three")
    soup.add(params, 1)
    close(soup.params("last five"), params)


def test_a_state_with_nan_is_left_out():
    soup, good = SoupCallback(HORIZONS, 1), {"w": jnp.arange(4.0), "b": jnp.ones(())}
    soup.add(good, 13)
    soup.add({**good, "w": good["w"].at[1].set(jnp.nan)}, 14)
    assert (soup.count, soup.left_out) == (1, 1)
    for name in HORIZONS:
        close(soup.params(name), good)


def test_what_is_averaged_lies_on_the_host():
    soup = SoupCallback(HORIZONS, 1)
    for k in range(4):
        soup.add({"w": jnp.full(4, float(k)), "b": jnp.ones(())}, 20 + k)
    held = [leaf for average in soup._running.values() for leaf in jax.tree.leaves(vars(average))]
    held += [leaf for read in soup._ring.kept for leaf in jax.tree.leaves(read())]
    assert not any(isinstance(leaf, jax.Array) for leaf in held)
    assert len(soup._ring.kept) == 4


def test_what_cannot_be_meant_is_refused():
    for make, says in (
        (lambda: SoupCallback({}, 1), "at least one horizon"),
        (lambda: SoupCallback(HORIZONS, 0), "every is a number of steps"),
        (lambda: latest(0), "at least 1 checkpoint"),
        (lambda: latest(3, "step"), "Unknown schedule"),
        (lambda: exponential(1.0), "below 1"),
        (lambda: SoupCallback(HORIZONS, 1).params("al"), "There is no horizon 'al'"),
        (lambda: SoupCallback(HORIZONS, 1).variance("last three"), "keeps no variance"),
    ):
        with pytest.raises(ConfigError, match=says):
            make()
