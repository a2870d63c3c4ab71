"""Do native kernels change training? 500 steps with and without them, from the same weights on the same text.

Runs differ by seed: initial weights and the order of the text. The curves, training losses averaged over windows of 50
steps, must lie closer to each other than seeds lie apart (the standard deviation between seeds, without kernels); both
in float32 and in bfloat16. The text is the demo's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
from _common import emit, row, say

STEPS, WINDOW, SEEDS = 500, 50, 3
B, T = 8, 128


def main() -> None:
    """Prints the largest distance of the curves, and that of seeds."""
    rows = []
    for dtype in ("float32", "bfloat16"):
        curves = {way: np.array([curve(dtype, seed, way) for seed in range(SEEDS)]) for way in ("", "0")}
        on, off = (curves[way].reshape(SEEDS, -1, WINDOW).mean(-1) for way in ("", "0"))
        spread, apart = off.std(0, ddof=1), np.abs(on.mean(0) - off.mean(0))
        worst = int(np.argmax(apart / spread))
        label = f"{SEEDS} seeds, {STEPS} steps, {dtype}"
        rows += [
            row(f"loss at the end, native kernels: {label}", float(on[:, -1].mean()), "nats"),
            row(f"loss at the end, plain JAX: {label}", float(off[:, -1].mean()), "nats"),
            row(f"distance of the mean curves / deviation between seeds, worst window: {label}",
                float(apart[worst] / spread[worst]), "×", limit="≤ 1", met=bool(apart[worst] <= spread[worst])),
            row(f"distance of one seed's curves, largest: {label}", float(np.abs(on - off).max()), "nats"),
        ]  # fmt: skip
        say(f"{dtype}: {rows[-2]['value']:.3f} of the deviation between seeds, one seed {rows[-1]['value']:.4f} nats")
    emit("kernel_curves", rows)


def curve(dtype: str, seed: int, kernels: str) -> list[float]:
    """Losses of all steps, from a process of its own."""
    variables = os.environ | ({"CAPIBARA_KERNELS": kernels} if kernels else {})
    done = subprocess.run(
        [sys.executable, __file__, dtype, str(seed)], env=variables, check=True, stdout=subprocess.PIPE, text=True
    )
    losses = json.loads(done.stdout.strip().splitlines()[-1])
    if not np.isfinite(losses).all() or len(losses) != STEPS:
        sys.exit(f"A run of {dtype}, seed {seed}, has {len(losses)} losses, not all finite.")
    return losses


def train(dtype: str, seed: int) -> list[float]:
    """Losses of `STEPS` steps of a small decoder."""
    import jax

    from capibara.core.config import ModelConfig
    from capibara.core.model import ModularCapibaraModel, objective, parameters
    from capibara.loop import local_steps
    from capibara.strategies.plain import adamw, plain

    config: dict[str, Any] = dict(width=96, num_layers=3, num_heads=4, num_kv_heads=2, max_length=T, dtype=dtype)
    model = ModularCapibaraModel(ModelConfig(**config), seed=seed)
    strategy = plain(objective(model), adamw(1e-3, weight_decay=0.1, beta1=0.9, beta2=0.95, clip_norm=1.0))
    program = jax.jit(lambda state, batches, keys: local_steps(strategy.step, state, batches, keys), donate_argnums=0)
    state, text, rng = strategy.init(parameters(model)), demo_bytes(), np.random.default_rng(seed)
    losses = []
    for keys in np.split(np.asarray(jax.random.key_data(jax.random.split(jax.random.key(seed), STEPS))), 10):
        starts = rng.integers(0, len(text) - T - 1, (len(keys), B))
        tokens = text[starts[..., None] + np.arange(T + 1)].astype(np.int32)
        ones = np.ones((*starts.shape, T), np.int32)
        batches = {"tokens": tokens[..., :-1], "targets": tokens[..., 1:], "segments": ones,
                   "positions": np.cumsum(ones, -1, np.int32) - 1, "mask": ones == 1}  # fmt: skip
        state, infos = program(state, batches, jax.random.wrap_key_data(keys))
        losses += np.asarray(infos["loss"], float).tolist()
    return losses


def demo_bytes() -> np.ndarray:
    """uint8: the speeches one after another."""
    from capibara.data.demo import demo_documents

    return np.frombuffer("\n".join(document.text for document in demo_documents()).encode(), np.uint8)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(train(sys.argv[1], int(sys.argv[2]))))
    else:
        main()
