"""Training steps: our model against the same model in PyTorch, eager and compiled, interleaved in one process.

Both are decoders with RMSNorm, rotary positions, grouped-query attention, SwiGLU, a tied head and AdamW behind a clip
by global norm, float32 parameters, on the same byte tokens. PyTorch has its fused attention
(`scaled_dot_product_attention`, causal), its fused AdamW and, in the rows of bfloat16, autocast. Ours is the plain
strategy as nodes run it: several steps in one program, with segment masks and the guard against losses that are not
finite. The losses of the first step, on equal weights, must agree, else there is no result.

All are held to one core and CPU seconds are counted: PyTorch with several threads waits at the end of every operation
for the slowest, so that on a machine with other work its elapsed time measures that work. The last rows, of two cores,
are of elapsed time, and mean something on a machine with nothing else to do. `--cores N` runs those alone.

Needs torch: `make peers`, then `.venv-peers/bin/python benchmarks/step_vs_torch.py`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from _common import emit, interleaved, machine, row, say
from _step import BETAS, CLIP, LARGER, LEARNING_RATE, SMALL, WEIGHT_DECAY, WIDE, Shape, training_steps

SECONDS = 8.0
"""Of timed runs of one candidate, about; at least `FEWEST` runs, at most `MOST`."""

FEWEST, MOST = 3, 7
LARGE_VOCABULARY = 50_304
LARGER_BF16, WIDE_BF16 = (shape._replace(dtype="bfloat16") for shape in (LARGER, WIDE))
AIMS = {
    LARGER: 1.7,
    LARGER_BF16: 1.5,
    LARGER._replace(vocab_size=LARGE_VOCABULARY): 1.7,
    LARGER_BF16._replace(vocab_size=LARGE_VOCABULARY): 1.35,
    WIDE: 1.6,
    WIDE_BF16: 1.25,
}
"""Shape to the speed aimed at, in those of the fastest PyTorch."""

SHAPES = (Shape("demo", "float32", 96, 3, 4, 4, 128, 8, 20), SMALL, *AIMS)
ON_TWO_CORES = (LARGER, LARGER_BF16)


def main() -> None:
    """Prints tokens per second of each, and ours against theirs, for each shape."""
    if importlib.util.find_spec("torch") is None:
        sys.exit(
            "This benchmark compares with PyTorch, which is not here; run `make peers` and use .venv-peers/bin/python."
        )
    parser = argparse.ArgumentParser(description="Training steps of our model against PyTorch.")
    parser.add_argument("--cores", type=int, help="cores that all may use, for the rows of two cores")
    asked = parser.parse_args().cores
    if asked:
        emit("step_vs_torch", measure(ON_TWO_CORES, asked), cores=asked)
        return
    where = machine()
    say(f"{where['cpu']} ({', '.join(where['instructions'])}), {where['cores']} cores")
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else set[int]()
    rows = measure(SHAPES, 1)
    if where["cores"] > 1:  # in a process of its own: XLA and PyTorch count their threads once
        if allowed:
            os.sched_setaffinity(0, allowed)
        done = subprocess.run([sys.executable, __file__, "--cores", "2"], check=True, stdout=subprocess.PIPE, text=True)
        rows += json.loads(done.stdout.strip().splitlines()[-1])["rows"]
    emit("step_vs_torch", rows, cpu=where)


def measure(shapes: Sequence[Shape], cores: int) -> list[dict[str, Any]]:
    """The rows of some shapes on so many cores."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-cores:])
    from capibara.runtime import tune_allocator

    tune_allocator()
    clock = time.process_time if cores == 1 else time.perf_counter
    rows = []
    for shape in shapes:
        runs = candidates(shape, cores)
        began = time.perf_counter()
        runs["torch"]()
        repeats = int(min(MOST, max(FEWEST, SECONDS / (time.perf_counter() - began))))
        timings = interleaved(runs, repeats=repeats, clock=clock)
        tokens, label = shape.tokens, shape.label if cores == 1 else f"{shape.label}, {cores} cores"
        for name, t in timings.items():
            speed, spread = round(tokens / t.median), (tokens / t.high, tokens / t.low)
            rows.append(row(f"{name}: {label}", speed, "tokens/s", spread=spread))
            say(f"{name:15} {label}: {speed:7} tokens/s ({t.median / shape.steps * 1e3:.1f} ms a step)")
        if "torch, compiled" not in timings:
            rows.append(row(f"torch, compiled: {label}", "not run: it cannot compile here"))
        best = min(t.median for name, t in timings.items() if name != "capibara")
        ratio, aim = best / timings["capibara"].median, AIMS.get(shape) if cores == 1 else None
        limits = {"limit": f"≥ {aim} ×", "met": ratio >= aim} if aim else {}
        rows.append(row(f"against the fastest PyTorch: {label}", round(ratio, 3), "×", **limits))
    return rows


def candidates(shape: Shape, cores: int) -> dict[str, Callable[[], Any]]:
    """A call of ours and of PyTorch's, each `shape.steps` training steps from where the last call ended."""
    mine = training_steps(shape)
    runs: dict[str, Callable[[], Any]] = {"capibara": mine.run}
    losses = {"capibara": mine.run()}
    for name, compiled in (("torch", False), ("torch, compiled", True)):
        run = torch_steps(mine.params, mine.config, mine.tokens, cores, compiled=compiled)
        try:
            losses[name] = run()
        except Exception as error:  # of the compiler: whatever it needs and does not find
            if not compiled:
                raise
            say(f"PyTorch cannot compile this here: {str(error).splitlines()[0][:200]}")
            continue
        runs[name] = run
    tolerance = 1e-4 if shape.dtype == "float32" else 2e-2
    for name, loss in losses.items():
        if not abs(losses["capibara"] - loss) < tolerance * loss:
            sys.exit(f"The first losses differ, {losses['capibara']} and {loss} ({name}): the models are not the same.")
    return runs


def torch_steps(
    params: dict[str, np.ndarray], config: Any, tokens: np.ndarray, cores: int, *, compiled: bool
) -> Callable[[], float]:
    """PyTorch: the same model from the same weights; a call trains on tokens [steps, B, T + 1]."""
    import torch
    from torch.nn import functional

    torch.set_num_threads(cores)
    weights = {name: torch.nn.Parameter(torch.from_numpy(leaf.copy())) for name, leaf in params.items()}
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

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=config.dtype == "bfloat16"):
            logits = logits_of(batch[:, :-1])
        return functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())

    evaluate = torch.compile(loss_of, dynamic=False) if compiled else loss_of

    def train() -> float:
        first = 0.0
        for number, batch in enumerate(batches):
            loss = evaluate(batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights.values(), CLIP)
            optimizer.step()
            first = loss.item() if number == 0 else first
        return first

    return train


if __name__ == "__main__":
    main()
