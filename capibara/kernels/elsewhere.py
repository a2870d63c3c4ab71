"""Attention on other backends than CPU: cuDNN's on NVIDIA GPUs, Pallas' splash attention on TPUs, where they take it.

Both are asked first, with shapes only, whether they take the arguments; otherwise plain JAX runs. They get T = S and no
bias, so that a query sees at least its own key. These programs were lowered for their platforms and never run there: no
such device was at hand. A hidden NaN may spread there. References: Dao et al. 2022; `jax.nn.dot_product_attention`;
`jax.experimental.pallas.ops.tpu.splash_attention`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from capibara.kernels.plain_attention import Arrays, Sight, turned, unpacked

BLOCK = 128
"""Of splash attention: lengths are its multiples."""


def platforms() -> tuple[str, ...]:
    """What programs of this process may run on beside CPUs. XLA cannot cut a Pallas kernel in parts: one TPU only."""
    backend = jax.default_backend()
    if backend == "tpu" and jax.device_count() > 1:
        return ()
    return {"gpu": ("cuda",), "tpu": ("tpu",)}.get(backend, ())


def programs(arrays: Arrays, sight: Sight) -> dict[str, Callable[[Arrays], jax.Array]]:
    """Differentiable functions that give [B, T, N, H], by platform; those that take these arguments."""
    apart = jax.eval_shape(partial(unpacked, sight=sight), arrays)
    own_segments = arrays.q_segments is None or sight.self_segments
    if arrays.bias is not None or apart.q.shape[1] != apart.k.shape[1] or not own_segments:
        return {}
    known = {"cuda": partial(cudnn, sight=sight), "tpu": partial(splash, sight=sight)}
    return {name: known[name] for name in platforms() if _takes(known[name], arrays)}


def cudnn(arrays: Arrays, sight: Sight) -> jax.Array:
    """cuDNN's flash attention, in bfloat16. Segments become a mask [B, 1, T, T], which it reads as a bias."""
    q, k, v = turned(unpacked(arrays, sight))
    mask = None
    if sight.window and not sight.causal:
        raise ValueError("cuDNN has a window behind the query only")
    if arrays.q_segments is not None and arrays.k_segments is not None:
        mask = (arrays.q_segments[:, :, None] == arrays.k_segments[:, None, :])[:, None]
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, scale=sight.scale, is_causal=sight.causal, implementation="cudnn",
        local_window_size=(sight.window - 1, 0) if sight.window else None,
    )  # fmt: skip


def splash(arrays: Arrays, sight: Sight) -> jax.Array:
    """Splash attention, which skips hidden blocks by position and compares segments in the others."""
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas

    q, k, v = (x.swapaxes(1, 2) for x in turned(unpacked(arrays, sight)))
    shape = (q.shape[2], k.shape[2])
    if shape[0] % BLOCK:
        raise ValueError(f"{shape[0]} is not a multiple of {BLOCK}")
    if sight.window:
        mask = pallas.LocalMask(shape, (sight.window - 1, 0 if sight.causal else None), 0)
    else:
        mask = pallas.CausalMask(shape) if sight.causal else pallas.FullMask(shape)
    kernel: Any = pallas.make_splash_mha_single_device(pallas.MultiHeadMask([mask] * q.shape[1]))
    scaled = (q.astype(jnp.float32) * sight.scale).astype(q.dtype)
    if arrays.q_segments is None or arrays.k_segments is None:
        mixed = jax.vmap(kernel)(scaled, k, v)
    else:
        mixed = jax.vmap(kernel)(scaled, k, v, pallas.SegmentIds(arrays.q_segments, arrays.k_segments))
    return mixed.swapaxes(1, 2)


def _takes(program: Callable[[Arrays], jax.Array], arrays: Arrays) -> bool:
    """Whether the program and its gradient can be traced; what a library does not support it says by an error."""

    def both(arrays: Arrays) -> Any:
        floats = arrays._replace(q_segments=None, k_segments=None, cos=None, sin=None)
        out, back = jax.vjp(lambda floats: program(merged(arrays, floats)), floats)
        return back(out)

    try:
        jax.eval_shape(both, arrays)
    except (ImportError, NotImplementedError, RuntimeError, ValueError):
        return False
    return True


def merged(arrays: Arrays, floats: Arrays) -> Arrays:
    """`arrays` with what `floats` gives in its place."""
    return arrays._replace(**{name: x for name, x in floats._asdict().items() if x is not None})
