"""Eight nodes in one program against eight single runs one after another: tokens per second.

The engine `stacked` trains all nodes of a round in one compiled program, over them by `lax.map` (one node at a time) or
by `vmap` (all at once). A single run is the ordinary training loop, `capibara.loop.fit`, with the same strategy, steps
and batches; eight of them one after another are what a user without the engine would do. Before anything is timed, the
losses of all three are compared. Which of the two a backend gets is `engines.stacked.suited`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from _common import emit, interleaved, row, say

from capibara.runtime import prepare_process

NODES, REPEATS = 8, 5
AIM = 0.95
PRESETS = {"tiny-cpu": 4, "small": 2}
"""Preset to the steps of a timed run."""

TOLERANCE = 2e-5
"""Largest relative difference of the losses of the first step; `vmap` sums in another order."""


def main() -> None:
    """Prints tokens per second of the three ways, and their ratios, for each preset."""
    prepare_process()
    import jax

    from capibara.engines.stacked import suited

    backend, rows = jax.default_backend(), []
    for preset, steps in PRESETS.items():
        ways, tokens, numbers = candidates(preset, steps)
        times = interleaved(ways, repeats=REPEATS)
        label = f"{preset}, {numbers / 1e6:.1f} M parameters"
        for way, t in times.items():
            spread = (tokens / t.high, tokens / t.low)
            rows.append(row(f"{way}: {label}", round(tokens / t.median), "tokens/s", spread=spread))
            say(f"{way}: {label}: {tokens / t.median:.0f} tokens/s")
        single = times[f"{NODES} single runs"].median
        for way in ("stacked, lax.map", "stacked, vmap"):
            ratio = single / times[way].median
            aim = {"limit": f"≥ {AIM} ×", "met": ratio >= AIM} if way.endswith(suited(backend)) else {}
            rows.append(row(f"{way} / {NODES} single runs: {label}", round(ratio, 3), "×", **aim))
    rows += [row(f"{one} gets", suited(one)) for one in dict.fromkeys((backend, "cpu", "gpu", "tpu"))]
    emit("stacked", rows, backend=backend, nodes=NODES)


def candidates(preset: str, steps: int) -> tuple[dict[str, Callable[[], Any]], int, int]:
    """The three ways to train eight nodes `steps` steps each; tokens of a run; parameters of the model."""
    import jax

    from capibara.core.config import ModularConfig
    from capibara.core.model import ModularCapibaraModel, objective, parameters
    from capibara.engines.base import Assignment, deal, first_kept
    from capibara.engines.stacked import StackedEngine
    from capibara.loop import fit
    from capibara.training.vocabulary import plain_strategy
    from capibara.tree import num_parameters

    config = ModularConfig.preset(preset)
    model = ModularCapibaraModel(config)
    strategy, params = plain_strategy(objective(model), config.training, 1000), parameters(model)
    B, T = config.training.batch_size, config.data.sequence_length
    tokens = np.random.default_rng(0).integers(0, 256, (NODES, steps, B, T + 1), np.int32)

    def batch(node: int) -> dict[str, np.ndarray]:
        ones = np.ones((steps, B, T), np.int32)
        pairs = {"tokens": tokens[node, ..., :-1], "targets": tokens[node, ..., 1:]}
        return pairs | {"segments": ones, "positions": np.cumsum(ones, -1, np.int32) - 1, "mask": ones == 1}

    cohorts, key = deal((strategy,), NODES), jax.random.key(0)
    work = Assignment(params, first_kept(cohorts, params), batch, key, 0, 0, 0, steps, tuple(range(NODES)), None)

    def stacked(over: Any) -> np.ndarray:
        return jax.block_until_ready(StackedEngine(over).map(cohorts, work)).losses[:, 0]

    def single() -> np.ndarray:
        firsts = []
        for node in range(NODES):
            note = (lambda info: firsts.append(info.losses[0]),)
            state = fit(strategy, strategy.init(params), lambda first, count, node=node: batch(node), key, steps,
                        chunk=steps, callbacks=note)  # fmt: skip
            jax.block_until_ready(state.params)
        return np.array(firsts)

    ways = {
        f"{NODES} single runs": single,
        "stacked, lax.map": lambda: stacked("map"),
        "stacked, vmap": lambda: stacked("vmap"),
    }
    losses = [way() for way in ways.values()]
    for other in losses[1:]:
        np.testing.assert_allclose(other, losses[0], rtol=TOLERANCE)
    return ways, NODES * steps * B * T, num_parameters(params)


if __name__ == "__main__":
    main()
