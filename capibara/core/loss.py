"""Cross-entropy on the tied head, in chunks: the [tokens, V] logits of a batch never exist all at once.

    loss = mean over counted targets of (logsumexp(hW) − (hW)[target]) + z · logsumexp(hW)²

The gradient is computed in the forward pass, chunk by chunk, and scaled in the backward pass, so that the logits of a
chunk are made once and dropped. References: Wijmans et al. 2024 (cut cross-entropy); z-loss, de Brébisson & Vincent
2016, as in PaLM.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from capibara.kernels.matmul import dot

AUTOMATIC_LIMIT = 2**23
"""Numbers of logits above which the loss goes by chunks: 32 MB in float32."""

CHUNK_LOGITS = 2**22


def head_losses(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Loss and log-partition of every token: hidden [M, D], head [V, D], targets int[M] → float32[M] each."""
    logits = _logits(hidden, head)
    partition = jax.nn.logsumexp(logits, axis=-1)
    return partition - jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0], partition


def head_loss(
    hidden: jax.Array, head: jax.Array, targets: jax.Array, mask: jax.Array, *, z_loss: float = 0.0, chunk: int = 0
) -> jax.Array:
    """Mean loss over the tokens that count.

    Args:
      hidden: [M, D], float32 or bfloat16.
      head: [V, D].
      targets: int32[M].
      mask: bool[M].
      z_loss: Coefficient of the squared log-partition.
      chunk: Tokens a chunk; 0 chooses: one chunk where all logits are few.
    """
    M, V = hidden.shape[0], head.shape[0]
    counted = mask.astype(jnp.float32)
    weights = counted / jnp.maximum(counted.sum(), 1.0)
    if chunk == 0 and M * V <= AUTOMATIC_LIMIT:
        losses, partition = head_losses(hidden, head, targets)
        return losses @ weights + z_loss * ((partition**2) @ weights)
    chunk = chunk or max(CHUNK_LOGITS // V, 64)
    padding = -M % chunk
    if padding:
        hidden = jnp.pad(hidden, ((0, padding), (0, 0)))
        targets, weights = jnp.pad(targets, (0, padding)), jnp.pad(weights, (0, padding))
    return _chunked(hidden, head, targets, weights, z_loss, chunk)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _chunked(hidden, head, targets, weights, z_loss, chunk):
    def add(total, part):
        h, t, w = part
        losses, partition = head_losses(h, head, t)
        return total + losses @ w + z_loss * ((partition**2) @ w), None

    return jax.lax.scan(add, jnp.zeros(()), _parts(chunk, hidden, targets, weights))[0]


def _chunked_forward(hidden, head, targets, weights, z_loss, chunk):
    def add(carry, part):
        total, to_head = carry
        h, t, w = part
        logits = _logits(h, head)
        partition = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, t[:, None], axis=-1)[:, 0]
        total = total + (partition - chosen) @ w + z_loss * ((partition**2) @ w)
        pull = w * (1 + 2 * z_loss * partition)
        grad = jnp.exp(logits - partition[:, None]) * pull[:, None]
        grad = grad.at[jnp.arange(len(t)), t].add(-w).astype(h.dtype)
        to_h = dot(grad, head.astype(h.dtype), (1,), (0,))
        to_head = to_head + dot(grad, h, (0,), (0,))
        return (total, to_head), to_h.astype(h.dtype)

    start = (jnp.zeros(()), jnp.zeros(head.shape, jnp.float32))
    (total, to_head), to_hidden = jax.lax.scan(add, start, _parts(chunk, hidden, targets, weights))
    return total, (to_hidden.reshape(hidden.shape), to_head.astype(head.dtype))


def _chunked_backward(z_loss, chunk, saved, grad):
    to_hidden, to_head = saved
    return to_hidden * grad.astype(to_hidden.dtype), to_head * grad.astype(to_head.dtype), None, None


_chunked.defvjp(_chunked_forward, _chunked_backward)


def _logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    return dot(hidden, head.astype(hidden.dtype), (1,), (1,))


def _parts(chunk: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(array.reshape(-1, chunk, *array.shape[1:]) for array in arrays)
