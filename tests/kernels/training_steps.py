"""Run by `test_training.py` in processes of their own: training with or without kernels, and gradients in float64.

    training_steps.py train DTYPE OUT         the states of some steps, from the first weights
    training_steps.py gradients DTYPE IN OUT  loss and gradient at each of those states
    training_steps.py exact IN OUT            the same by the formulas, in float64
"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np

from capibara.core.config import ModelConfig
from capibara.core.model import ModularCapibaraModel, objective, parameters

STEPS, KEPT = 25, 5
B, T = 2, 48
SHAPE = dict(vocab_size=97, width=64, num_layers=2, num_heads=4, num_kv_heads=2, hidden=96, max_length=T, z_loss=1e-3)


def batch() -> dict[str, np.ndarray]:
    """Two documents a row and padding behind them."""
    tokens = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (B, T + 1)).astype(np.int32)
    segments = np.repeat([[1] * 20 + [2] * 24 + [0] * 4], B, 0).astype(np.int32)
    positions = np.repeat([[*range(20), *range(24), *range(4)]], B, 0).astype(np.int32)
    pairs = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    return pairs | {"segments": segments, "positions": positions, "mask": segments > 0}


def losses_of(dtype: str):
    """Loss and gradient of the model's own objective."""
    model = ModularCapibaraModel(ModelConfig(**SHAPE, dtype=dtype), seed=0)
    loss = objective(model).loss
    return jax.jit(jax.value_and_grad(lambda p: loss(p, batch(), jax.random.key(0))[0])), parameters(model)


def train(dtype: str) -> list[dict[str, jax.Array]]:
    """States of sign descent: every step moves every weight, so that small gradients matter as well."""
    slope, params = losses_of(dtype)
    states = []
    for step in range(STEPS):
        if step % (STEPS // KEPT) == 0:
            states.append(params)
        _, grad = slope(params)
        params = jax.tree.map(lambda p, g: p - 3e-3 * jnp.sign(g), params, grad)
    return states


def exact(params: dict[str, jax.Array]) -> jax.Array:
    """The loss of a decoder, written once more from its formulas."""
    config, data = ModelConfig(**SHAPE), batch()
    H, half = config.head_size, config.head_size // 2
    angle = data["positions"][..., None] * config.rope_theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angle)[:, :, None], np.sin(angle)[:, :, None]
    sees = np.tril(np.ones((T, T), bool)) & (data["segments"][:, :, None] == data["segments"][:, None, :])

    def norm(x, scale):
        return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps) * scale

    def turned(x):
        a, b = x[..., :half], x[..., half:]
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    x = params["embedding"][data["tokens"]]
    for i in range(config.num_layers):
        w = {name.split(".")[-1]: leaf for name, leaf in params.items() if name.startswith(f"blocks.{i}.")}
        y = norm(x, w["norm_attention"])
        q, k, v = ((y @ w[name]).reshape(B, T, -1, H) for name in ("query", "key", "value"))
        k, v = (jnp.repeat(part, config.num_heads // config.kv_heads, 2) for part in (turned(k), v))
        scores = jnp.einsum("btnh,bsnh->bnts", turned(q), k) / H**0.5
        shares = jax.nn.softmax(jnp.where(sees[:, None], scores, -jnp.inf), -1)
        x = x + jnp.einsum("bnts,bsnh->btnh", shares, v).reshape(B, T, -1) @ w["out"]
        y = norm(x, w["norm_mlp"])
        gate = y @ w["gate"]
        x = x + (gate / (1 + jnp.exp(-gate)) * (y @ w["up"])) @ w["down"]
    logits = norm(x, params["norm"]) @ params["embedding"].T
    partition = jax.nn.logsumexp(logits, -1)
    chosen = jnp.take_along_axis(logits, data["targets"][..., None], -1)[..., 0]
    each = partition - chosen + config.z_loss * partition**2
    return (each * data["mask"]).sum() / data["mask"].sum()


def save(path: str, states: list[dict[str, jax.Array]], losses: list[float] | None = None) -> None:
    leaves = {f"{i}/{name}": np.asarray(leaf) for i, state in enumerate(states) for name, leaf in state.items()}
    np.savez(path, losses=np.array(losses or []), **leaves)


def load(path: str) -> list[dict[str, np.ndarray]]:
    with np.load(path) as file:
        names = [name.partition("/") for name in file.files if "/" in name]
        return [{name: file[f"{i}/{name}"] for at, _, name in names if at == str(i)} for i in range(KEPT)]


def main(what: str, *rest: str) -> None:
    if what == "train":
        save(rest[1], train(rest[0]))
        return
    if what == "exact":
        jax.config.update("jax_enable_x64", True)
        slope = jax.jit(jax.value_and_grad(exact))
        states = [{name: leaf.astype(np.float64) for name, leaf in state.items()} for state in load(rest[0])]
    else:
        slope, states = losses_of(rest[0])[0], load(rest[1])
    found = [slope(state) for state in states]
    save(rest[-1], [grad for _, grad in found], [float(loss) for loss, _ in found])


if __name__ == "__main__":
    main(*sys.argv[1:])
