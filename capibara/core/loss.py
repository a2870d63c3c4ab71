"""Loss of the tied head: the [tokens, V] logits of a batch never exist all at once, unless they are few.

    loss = mean over counted targets of (logsumexp(hW) − (hW)[target]) + z · logsumexp(hW)²

`capibara.kernels.cross_entropy` computes it in chunks, with its gradients; this module says when and how.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from capibara.kernels.cross_entropy import FEW_LOGITS, cross_entropy, is_faster, plain_losses, token_losses


def head_losses(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Loss and log-partition of every token: hidden [M, D], head [V, D], targets int[M] → float32[M] each."""
    if is_faster(hidden.dtype, len(hidden), len(head)):
        return token_losses(hidden, head, targets)
    return plain_losses(hidden, head, targets)


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
      chunk: Tokens a chunk; 0 chooses: in plain JAX one chunk where all logits are few.
    """
    M, V = hidden.shape[0], head.shape[0]
    counted = mask.astype(jnp.float32)
    weights = counted / jnp.maximum(counted.sum(), 1.0)
    kernel = is_faster(hidden.dtype, M, V)
    if not kernel and chunk == 0 and M * V <= FEW_LOGITS:
        losses, partition = plain_losses(hidden, head, targets)
        return losses @ weights + z_loss * ((partition**2) @ weights)
    return cross_entropy(hidden, head, targets, weights, z_loss=z_loss, chunk=chunk, kernel=kernel)
