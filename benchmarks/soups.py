"""What a greedy soup of 16 checkpoints costs beyond evaluating models, and a uniform soup beyond reading them once.

Sixteen checkpoints of a decoder of millions of parameters lie on disk as safetensors; the soup is found on 32 sequences
of 128 tokens. Overhead is what one and the same run spends outside of its evaluations: reading and checking the files,
candidate means, intervals.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from _common import Timing, emit, interleaved, row

from capibara.consensus.averages import Average
from capibara.consensus.evidence import held_out
from capibara.consensus.soup_metrics import Metric, Score, perplexity
from capibara.consensus.soups import greedy_soup, linear_soup
from capibara.core.config import ModelConfig
from capibara.core.model import ModularCapibaraModel, objective, parameters
from capibara.files import read_tensors, tensors_to_bytes
from capibara.runtime import prepare_process
from capibara.training.ingredients import Ingredients, ingredient

MODELS, SEQUENCES, LENGTH = 16, 32, 128
SHAPE: dict[str, Any] = dict(vocab_size=4096, width=192, num_layers=4, num_heads=4, num_kv_heads=2, hidden=512)
REPEATS = 3


def main() -> None:
    """Times everything in turn and prints the shares; malloc is set as our command sets it."""
    prepare_process()
    model = ModularCapibaraModel(ModelConfig(**SHAPE))
    losses, start = objective(model), {name: np.asarray(leaf) for name, leaf in parameters(model).items()}
    metric = perplexity(losses, held_out(_data()))
    rng = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i}.safetensors" for i in range(MODELS)]
        for path in paths:
            noisy = {k: v + 2e-3 * rng.normal(size=v.shape).astype(np.float32) for k, v in start.items()}
            path.write_bytes(tensors_to_bytes(noisy))
        trees = Ingredients([ingredient(path, i) for i, path in enumerate(paths)])
        size = sum(leaf.nbytes for leaf in start.values())
        found = {name: _greedy(trees, metric, name == "by arrival") for name in ("sorted", "by arrival")}
        timings = interleaved(
            {
                "uniform": lambda: linear_soup(trees, np.ones(MODELS)),
                "read": lambda: [read_tensors(path) for path in paths],
                "mean": lambda: _mean(start),
            },
            repeats=REPEATS,
        )
    parts = sum(np.prod(leaf.shape) for leaf in start.values())
    what = f"{MODELS} checkpoints of {parts / 1e6:.1f} M parameters, {SEQUENCES} × {LENGTH} tokens"
    total = MODELS * size
    emit(
        "soups",
        [
            *(_overhead(f"greedy soup {name} ({what}): time beyond its evaluations", found[name]) for name in found),
            _rate(f"uniform soup of the same {total / 1e6:.0f} MB of files", timings["uniform"], total),
            _rate("reading the same files (the floor)", timings["read"], total),
            _rate("running mean alone, models in memory", timings["mean"], total),
        ],
    )


def _greedy(trees: Ingredients, metric: Metric, by_arrival: bool) -> list[float]:
    """Per cent of the time in evaluations that each repeat spends outside of them."""
    shares = []
    metric.score(trees[0])
    for _ in range(REPEATS):
        inside = 0.0

        def score(params: Any) -> Score:
            nonlocal inside
            began = time.perf_counter()
            judged = metric.score(params)
            inside += time.perf_counter() - began
            return judged

        began = time.perf_counter()
        greedy_soup(trees, metric._replace(score=score), by_arrival=by_arrival, fallback=False)
        shares.append(100 * ((time.perf_counter() - began) / inside - 1))
    return shares


def _data() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, SHAPE["vocab_size"], (SEQUENCES, LENGTH + 1)).astype(np.int32)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (SEQUENCES, LENGTH))
    ones = np.ones((SEQUENCES, LENGTH), np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segments": ones,
        "positions": positions,
        "mask": ones > 0,
    }


def _mean(tree: Any) -> Any:
    average = Average()
    for _ in range(MODELS):
        average.add(tree)
    return jax.tree.leaves(average.mean())


def _overhead(measure: str, shares: list[float]) -> dict[str, Any]:
    middle = statistics.median(shares)
    return row(measure, round(middle, 2), "%", spread=(min(shares), max(shares)), limit="≤ 5 %", met=middle <= 5)


def _rate(measure: str, timing: Timing, size: int) -> dict[str, Any]:
    rates = [size / seconds / 1e6 for seconds in timing]
    return row(measure, round(rates[0]), "MB/s", spread=(round(rates[2]), round(rates[1])))


if __name__ == "__main__":
    main()
