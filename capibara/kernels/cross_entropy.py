"""Cross-entropy of a linear head: logits are made, used and dropped a chunk of tokens at a time.

    total = Σ weight · (log Σ exp(hW) − (hW)[target] + z · (log Σ exp(hW))²)

Gradients are computed with the value, while a chunk's logits are there. On a CPU the native kernel
(`src/cross_entropy.hpp`) does both in two passes over tiles of the vocabulary, adding to the head's gradient in place;
elsewhere plain JAX does, with a product for every step. Both sum in float32. Shapes: M tokens, D width, V vocabulary.
References: Wijmans et al. 2024 (cut cross-entropy); z-loss, de Brébisson & Vincent 2016, as in PaLM.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from capibara.kernels.library import instruction_set, native
from capibara.kernels.matmul import dot, widens

CHUNK = 256
"""Most tokens at once in the native kernel: the head's gradient is read and written once for each of them."""

LARGEST_TILE, SMALLEST_TILE = 96, 48
"""Rows of the head in a tile: its logits and both gradients are in the second-level cache together."""

SEGMENTS = 16
"""Most parts of the vocabulary that threads share out; each has its own sum of hidden gradients."""

FEW_LOGITS = 2**23
"""Above them plain JAX goes by chunks: 32 MB in float32."""

CHUNK_LOGITS = 2**22

FEWEST_TOKENS, SMALLEST_VOCABULARY = 16, 1024
"""Below them plain JAX is as fast: with 256 bytes, the three products are all there is to do."""


class Plan(NamedTuple):
    """How the kernel cuts its work; never by the number of threads, so that sums do not depend on it.

    Attributes:
      chunk: Tokens at once.
      tile: Rows of the head at once.
      segments: Of the vocabulary.
      forward: float32 numbers of scratch memory without gradients.
      backward: And with them.
    """

    chunk: int
    tile: int
    segments: int
    forward: int
    backward: int


def is_faster(dtype: Any, tokens: int, vocabulary: int) -> bool:
    """Whether the native kernel is to be preferred on a CPU to XLA's products, for hidden states of this dtype.

    Not for few tokens or a small vocabulary, where XLA is as fast; not where XLA multiplies bfloat16 in bfloat16; nor
    without AVX2, where the kernel is compiled for less than the processor that XLA compiles for.
    """
    if tokens < FEWEST_TOKENS or vocabulary < SMALLEST_VOCABULARY or not native() or instruction_set() == "baseline":
        return False
    return dtype == jnp.float32 or (dtype == jnp.bfloat16 and widens())


def plan(tokens: int, width: int, vocabulary: int, chunk: int = 0) -> Plan:
    """The plan for a problem of this size; `chunk` 0 chooses equal ones of at most CHUNK tokens."""
    chunk = min(chunk or _equal(tokens), tokens)
    tile = min(LARGEST_TILE, _whole(-(-vocabulary // SEGMENTS), SMALLEST_TILE))
    tiles, room, wide = -(-vocabulary // tile), _whole(chunk, 16), _whole(width, 16)
    segments = min(tiles, SEGMENTS, max(SEGMENTS // 2, vocabulary // (8 * wide)))
    common = width * room + room * wide + 2 * room + 2 * _whole(tiles * room, 16)
    return Plan(chunk, tile, segments, common + segments * tile * room, common + (vocabulary + segments * wide) * room)


class Way(NamedTuple):
    """What is fixed when a program is traced; hashable.

    Attributes:
      z_loss: Coefficient.
      chunk: Tokens at once, or 0.
      kernel: Whether a CPU runs the native kernel.
    """

    z_loss: float
    chunk: int
    kernel: bool


def cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    z_loss: float = 0.0,
    chunk: int = 0,
    kernel: bool = True,
) -> jax.Array:
    """The total above, float32; differentiable in `hidden` and `head`, twice by plain JAX.

    Cost: 6 · M · V · D operations with gradients, 2 · M · V · D without. Memory with gradients: chunk · V numbers.
    A token of weight 0 adds nothing, unless its own loss is NaN.

    Args:
      hidden: [M, D], float32 or bfloat16.
      head: [V, D]; rounded to the dtype of `hidden`.
      targets: int[M]; the loss of one outside of the vocabulary is NaN.
      weights: [M]; constants.
      z_loss: Coefficient of the squared log-partition.
      chunk: Tokens at once; 0 chooses: equal chunks of at most CHUNK in the kernel, in plain JAX all at once where the
        logits are few.
      kernel: Whether a CPU runs the native kernel, where there is one.
    """
    targets, weights = targets.astype(jnp.int32), weights.astype(jnp.float32)
    return _total(hidden, head, targets, weights, Way(float(z_loss), chunk, kernel and _fits(hidden, head)))


def token_losses(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Loss and log-partition float32[M] of every token; with gradients plain JAX, which keeps all logits."""
    return _losses(hidden, head, targets.astype(jnp.int32))


def plain_losses(hidden: jax.Array, head: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same with all logits in one array."""
    logits = _logits(hidden, head)
    partition = jax.nn.logsumexp(logits, axis=-1)
    return partition - jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0], partition


def _losses_primal(hidden, head, targets):
    if not _fits(hidden, head):
        return plain_losses(hidden, head, targets)
    return jax.lax.platform_dependent(hidden, head, targets, cpu=_kernel_losses, default=plain_losses)


def _kernel_losses(hidden, head, targets):
    cut = plan(len(hidden), hidden.shape[1], len(head))
    rows = jax.ShapeDtypeStruct((len(hidden),), jnp.float32)
    call = _call("capibara_cross_entropy_losses", (rows, rows, _scratch(cut.forward)), cut)
    return tuple(call(hidden, head, targets)[:2])


def _losses_forward(hidden, head, targets):
    found, back = jax.vjp(lambda h, w: plain_losses(h, w, targets), hidden, head)
    return found, back


_losses: Any = jax.custom_vjp(_losses_primal)
_losses.defvjp(_losses_forward, lambda back, grads: (*back(grads), None))


def _weighed(losses, partition, weights, z_loss):
    return losses @ weights + z_loss * ((partition**2) @ weights)


def _total_primal(hidden, head, targets, weights, way):
    plain = partial(_plain_total, way=way)
    if not way.kernel:
        return plain(hidden, head, targets, weights)

    def kernel(hidden, head, targets, weights):
        losses, partition = _kernel_losses(hidden, head, targets)
        return _weighed(losses, partition, weights, way.z_loss)

    return jax.lax.platform_dependent(hidden, head, targets, weights, cpu=kernel, default=plain)


def _total_forward(hidden, head, targets, weights, way):
    total, to_hidden, to_head = _both(hidden, head, targets, weights, way)
    return total, (to_hidden, to_head)


def _total_backward(way, saved, grad):
    to_hidden, to_head = ((slope.astype(grad.dtype) * grad).astype(slope.dtype) for slope in saved)
    return to_hidden, to_head, None, None


_total: Any = jax.custom_vjp(_total_primal, nondiff_argnums=(4,))
_total.defvjp(_total_forward, _total_backward)


def _both_primal(hidden, head, targets, weights, way):
    """Total, and its gradients to `hidden` and `head`."""
    plain = partial(_plain_both, way=way)
    if not way.kernel:
        return plain(hidden, head, targets, weights)

    def kernel(hidden, head, targets, weights):
        cut = plan(len(hidden), hidden.shape[1], len(head), way.chunk)
        rows = jax.ShapeDtypeStruct((len(hidden),), jnp.float32)
        slopes = (jax.ShapeDtypeStruct(hidden.shape, hidden.dtype), jax.ShapeDtypeStruct(head.shape, jnp.float32))
        call = _call("capibara_cross_entropy_gradients", (rows, rows, *slopes, _scratch(cut.backward)), cut)
        losses, partition, to_hidden, to_head, _ = call(hidden, head, targets, weights, z_loss=np.float32(way.z_loss))
        return _weighed(losses, partition, weights, way.z_loss), to_hidden, to_head.astype(head.dtype)

    return jax.lax.platform_dependent(hidden, head, targets, weights, cpu=kernel, default=plain)


def _both_forward(hidden, head, targets, weights, way):
    return _both(hidden, head, targets, weights, way), (hidden, head, targets, weights)


def _both_backward(way, saved, pulls):
    hidden, head, targets, weights = saved
    plain = partial(_plain_both, targets=targets, weights=weights, way=way)
    return (*jax.vjp(plain, hidden, head)[1](pulls), None, None)


_both: Any = jax.custom_vjp(_both_primal, nondiff_argnums=(4,))
_both.defvjp(_both_forward, _both_backward)


def _plain_total(hidden, head, targets, weights, way):
    def add(total, part):
        h, t, w = part
        return total + _weighed(*plain_losses(h, head, t), w, way.z_loss), None

    return jax.lax.scan(add, jnp.zeros(()), _parts(way.chunk, len(head), hidden, targets, weights))[0]


def _plain_both(hidden, head, targets, weights, way):
    def add(carry, part):
        total, to_head = carry
        h, t, w = part
        logits = _logits(h, head)
        partition = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, t[:, None], axis=-1)[:, 0]
        total = total + _weighed(partition - chosen, partition, w, way.z_loss)
        pull = w * (1 + 2 * way.z_loss * partition)
        grad = jnp.exp(logits - partition[:, None]) * pull[:, None]
        grad = grad.at[jnp.arange(len(t)), t].add(-w).astype(h.dtype)
        to_h = dot(grad, head.astype(h.dtype), (1,), (0,))
        to_head = to_head + dot(grad, h, (0,), (0,))
        return (total, to_head), to_h.astype(h.dtype)

    start = (jnp.zeros(()), jnp.zeros(head.shape, jnp.float32))
    (total, to_head), to_hidden = jax.lax.scan(add, start, _parts(way.chunk, len(head), hidden, targets, weights))
    return total, to_hidden.reshape(-1, hidden.shape[1])[: len(hidden)], to_head.astype(head.dtype)


def _parts(chunk: int, vocabulary: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """In chunks, the last filled with zeros: its weights are 0."""
    tokens = max(1, len(arrays[0]))
    chunk = chunk or (tokens if tokens * vocabulary <= FEW_LOGITS else max(CHUNK_LOGITS // vocabulary, 64))
    filled = (jnp.pad(a, ((0, -len(a) % chunk), *((0, 0),) * (a.ndim - 1))) for a in arrays)
    return tuple(a.reshape(-1, chunk, *a.shape[1:]) for a in filled)


def _logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    return dot(hidden, head.astype(hidden.dtype), (1,), (1,))


def _fits(hidden: jax.Array, head: jax.Array) -> bool:
    """Whether the native kernel takes these."""
    known = (jnp.float32, jnp.bfloat16)
    return hidden.size > 0 and head.size > 0 and hidden.dtype in known and head.dtype in known and native()


def _call(name: str, shapes: Any, cut: Plan) -> Any:
    call = jax.ffi.ffi_call(name, shapes, vmap_method="sequential")
    return partial(call, chunk=np.int64(cut.chunk), tile=np.int64(cut.tile), segments=np.int64(cut.segments))


def _scratch(count: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((count,), jnp.float32)


def _equal(tokens: int) -> int:
    return max(1, -(-tokens // max(1, -(-tokens // CHUNK))))


def _whole(count: int, of: int) -> int:
    return -(-count // of) * of
