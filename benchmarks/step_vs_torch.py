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
from typing import Any

import numpy as np
from _common import emit, interleaved, machine, row, say
from _step import BETAS, CLIP, LARGER, LEARNING_RATE, SMALL, WEIGHT_DECAY, Shape, training_steps

REPEATS = 7
SHAPES = (
    Shape("demo", "float32", 96, 3, 4, 4, 128, 8, 20),
    SMALL,
    LARGER,
    LARGER._replace(dtype="bfloat16"),
)


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
        tokens, label = shape.tokens, shape.label
        for name, t in timings.items():
            speed, spread = round(tokens / t.median), (tokens / t.high, tokens / t.low)
            rows.append(row(f"{name}: {label}", speed, "tokens/s", spread=spread))
            say(f"{name:9} {label}: {speed:7} tokens/s ({t.median / shape.steps * 1e3:.1f} ms a step)")
        ratio = timings["torch"].median / timings["capibara"].median
        rows.append(row(f"ratio: {label}", round(ratio, 3), "×"))
    emit("step_vs_torch", rows, allocator_tuned=tuned, cores=cores, clock=clock.__name__, cpu=where)


def candidates(shape: Shape, cores: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A call of ours and one of PyTorch's, each `shape.steps` training steps from where the last call ended."""
    mine = training_steps(shape)
    theirs = torch_steps(mine.params, mine.config, mine.tokens, cores)
    losses = mine.run(), theirs()
    tolerance = 1e-4 if shape.dtype == "float32" else 2e-2
    if not abs(losses[0] - losses[1]) < tolerance * losses[1]:
        sys.exit(f"The first losses differ, {losses[0]} and {losses[1]}: the models are not the same.")
    return mine.run, theirs


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
