"""Training steps: our model against the same model in eager PyTorch, interleaved in one process.

Both are decoders with RMSNorm, rotary positions, grouped-query attention, SwiGLU, a tied head and AdamW behind a clip
by global norm, float32 parameters, on the same byte tokens. PyTorch has its fused attention
(`scaled_dot_product_attention`, causal), its fused AdamW and, in the rows of bfloat16, autocast. Ours is the plain
strategy as nodes run it: several steps in one program, with segment masks and the guard against losses that are not
finite. The losses of the first step, on equal weights, must agree, else there is no result.

Both are held to one core and CPU seconds are counted: PyTorch with several threads waits at the end of every operation
for the slowest, so that on a machine with other work its elapsed time measures that work. `--cores 2` takes so many
cores and elapsed time instead, for a machine with nothing else to do.

Needs torch: `make peers`, then `.venv-peers/bin/python benchmarks/step_vs_torch.py`.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from _common import emit, interleaved, machine, row, say

REPEATS = 7
LEARNING_RATE, WEIGHT_DECAY, BETAS, CLIP = 1e-3, 0.1, (0.9, 0.95), 1.0


class Shape(NamedTuple):
    """One model and batch: `steps` training steps are one timed run."""

    name: str
    dtype: str
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    T: int
    B: int
    steps: int


SHAPES = (
    Shape("demo", "float32", 96, 3, 4, 4, 128, 8, 20),
    Shape("small", "float32", 160, 4, 5, 5, 128, 8, 10),
    Shape("6 layers of 384", "float32", 384, 6, 6, 2, 256, 8, 1),
    Shape("6 layers of 384", "bfloat16", 384, 6, 6, 2, 256, 8, 1),
)
LEAST = 1.0


def main() -> None:
    """Prints tokens per second of both, and their ratio, for each shape."""
    if importlib.util.find_spec("torch") is None:
        sys.exit(
            "This benchmark compares with PyTorch, which is not here; run `make peers` and use .venv-peers/bin/python."
        )
    parser = argparse.ArgumentParser(description="Training steps of our model against eager PyTorch.")
    parser.add_argument("--cores", type=int, default=1, help="cores both may use; with 1, CPU seconds are counted")
    cores = parser.parse_args().cores
    where = machine()
    say(f"{where['cpu']} ({', '.join(where['instructions'])}), {where['cores']} cores of which {cores} are used")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-cores:])
    from capibara.runtime import tune_allocator

    tuned = tune_allocator()
    clock = time.process_time if cores == 1 else time.perf_counter
    rows = []
    for shape in SHAPES:
        ours, theirs = candidates(shape, cores)
        timings = interleaved({"capibara": ours, "torch": theirs}, repeats=REPEATS, clock=clock)
        tokens = shape.B * shape.T * shape.steps
        label = f"{shape.name}, T {shape.T}, B {shape.B}, {shape.dtype}"
        for name, t in timings.items():
            speed, spread = round(tokens / t.median), (tokens / t.high, tokens / t.low)
            rows.append(row(f"{name}: {label}", speed, "tokens/s", spread=spread))
            say(f"{name:9} {label}: {speed:7} tokens/s ({t.median / shape.steps * 1e3:.1f} ms a step)")
        ratio = timings["torch"].median / timings["capibara"].median
        rows.append(row(f"ratio: {label}", round(ratio, 3), "×", limit=f"≥ {LEAST} ×", met=ratio >= LEAST))
    emit("step_vs_torch", rows, allocator_tuned=tuned, cores=cores, clock=clock.__name__, cpu=where)


def candidates(shape: Shape, cores: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A call of ours and one of PyTorch's, each `shape.steps` training steps from where the last call ended."""
    import jax

    from capibara.core.config import ModelConfig
    from capibara.core.model import ModularCapibaraModel, objective, parameters
    from capibara.loop import local_steps
    from capibara.strategies.plain import adamw, plain

    config = ModelConfig(
        width=shape.width,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        max_length=shape.T,
        dtype=shape.dtype,  # pyright: ignore[reportArgumentType]
    )
    model = ModularCapibaraModel(config, seed=0)
    optimizer = adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY, beta1=BETAS[0], beta2=BETAS[1], clip_norm=CLIP)
    strategy = plain(objective(model), optimizer)
    tokens = np.random.default_rng(0).integers(0, 256, (shape.steps, shape.B, shape.T + 1), np.int32)
    batches = {
        "tokens": tokens[..., :-1],
        "targets": tokens[..., 1:],
        "segments": np.ones(tokens[..., 1:].shape, np.int32),
        "positions": np.broadcast_to(np.arange(shape.T, dtype=np.int32), tokens[..., 1:].shape),
        "mask": np.ones(tokens[..., 1:].shape, bool),
    }
    params = parameters(model)
    held = {"state": strategy.init(params)}
    program = jax.jit(lambda state, keys: local_steps(strategy.step, state, batches, keys), donate_argnums=0)
    step_keys = jax.random.split(jax.random.key(0), shape.steps)

    def ours() -> float:
        held["state"], infos = program(held["state"], step_keys)
        return float(infos["loss"][0])

    theirs = torch_steps({name: np.array(leaf) for name, leaf in params.items()}, config, tokens, cores)
    losses = ours(), theirs()
    tolerance = 1e-4 if shape.dtype == "float32" else 2e-2
    if not abs(losses[0] - losses[1]) < tolerance * losses[1]:
        sys.exit(f"The first losses differ, {losses[0]} and {losses[1]}: the models are not the same.")
    return ours, theirs


def torch_steps(params: dict[str, np.ndarray], config: Any, tokens: np.ndarray, cores: int) -> Callable[[], float]:
    """Eager PyTorch: the same model from the same weights; a call trains on tokens [steps, B, T + 1]."""
    import torch
    from torch.nn import functional

    torch.set_num_threads(cores)
    weights = {name: torch.nn.Parameter(torch.from_numpy(leaf)) for name, leaf in params.items()}
    groups = [
        {"params": [w for w in weights.values() if w.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [w for w in weights.values() if w.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=1e-8, fused=True)
    batches = torch.from_numpy(tokens.astype(np.int64))
    T, H = tokens.shape[-1] - 1, config.head_size
    angle = torch.arange(T)[:, None] * config.rope_theta ** (-torch.arange(H // 2) / (H // 2))
    cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([-angle.sin(), angle.sin()], -1)

    def rotary(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, dim=-1)
        return x * cos.to(x.dtype) + torch.cat([b, a], -1) * sin.to(x.dtype)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.rms_norm(x, (config.width,), weights[name], config.norm_eps)

    def logits_of(ids: torch.Tensor) -> torch.Tensor:
        x = functional.embedding(ids, weights["embedding"])
        B = ids.shape[0]
        for i in range(config.num_layers):
            at = f"blocks.{i}."

            def linear(y: torch.Tensor, name: str, at: str = at) -> torch.Tensor:
                return functional.linear(y, weights[at + name].mT)

            y = norm(x, at + "norm_attention")
            query = rotary(linear(y, "query").view(B, T, config.num_heads, H).transpose(1, 2))
            key = rotary(linear(y, "key").view(B, T, config.kv_heads, H).transpose(1, 2))
            value = linear(y, "value").view(B, T, config.kv_heads, H).transpose(1, 2)
            grouped = config.num_heads != config.kv_heads
            mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
            x = x + linear(mixed.transpose(1, 2).reshape(B, T, -1), "out")
            y = norm(x, at + "norm_mlp")
            x = x + linear(functional.silu(linear(y, "gate")) * linear(y, "up"), "down")
        return functional.linear(norm(x, "norm"), weights["embedding"])

    def train() -> float:
        first = 0.0
        for number, batch in enumerate(batches):
            with torch.autocast("cpu", torch.bfloat16, enabled=config.dtype == "bfloat16"):
                logits = logits_of(batch[:, :-1])
            loss = functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights.values(), CLIP)
            optimizer.step()
            first = loss.item() if number == 0 else first
        return first

    return train


if __name__ == "__main__":
    main()
