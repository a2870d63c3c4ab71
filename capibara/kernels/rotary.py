"""RoPE: queries and keys are turned by their positions, so that a score depends on how far apart they stand.

The two halves of a head are the pairs (a, b), in the order of Llama:

    (a, b) → (a · cos − b · sin, b · cos + a · sin),   angle = position · θ^(−2i / H) for pair i of H / 2

Reference: Su et al. 2021 (RoFormer).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rotary_angles(positions: jax.Array, size: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, float32[..., T, size / 2] each, of int positions [..., T]; `size` is that of a head, even."""
    half = size // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns [B, T, N, H] by angles [B or 1, T, H / 2], in float32; rounds once, to the dtype of x."""
    half = x.shape[-1] // 2
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
