"""How attention is differentiated, and which program runs where: the native kernel on a CPU, others elsewhere.

Two nested rules: the first derivative is the kernel's own, the second that of the plain formula. `Arrays` and `Sight`
are those of `plain_attention`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from capibara.kernels.elsewhere import merged, platforms, programs
from capibara.kernels.library import native
from capibara.kernels.plain_attention import Arrays, Sight, plain_attention


def attended(arrays: Arrays, sight: Sight) -> jax.Array:
    """[B, T, N, H]; differentiable with respect to q, k, v and bias."""
    if native() or platforms():
        return _attention(arrays, sight)[0]
    return plain_attention(arrays, sight)


def _attended(arrays: Arrays, sight: Sight) -> Any:
    """Output [B, T, N, H] and log-partition float32[B, N, T]; nothing may be derived from the second."""
    out, partition = _results(arrays, sight)

    def kernel(arrays: Arrays) -> Any:
        return tuple(_call("capibara_attention_forward", (out, partition), sight)(*_filled(arrays)))

    def plain(arrays: Arrays) -> Any:
        return plain_attention(arrays, sight), jnp.zeros(partition.shape, partition.dtype)

    def on(program: Any, arrays: Arrays) -> Any:
        return program(arrays), jnp.zeros(partition.shape, partition.dtype)

    others = {name: partial(on, program) for name, program in programs(arrays, sight).items()}
    return jax.lax.platform_dependent(arrays, cpu=kernel if native() else plain, **others, default=plain)


def _attention_forward(arrays: Any, sight: Sight):
    """A bias that nobody differentiates, a mask say, gets no gradient, whose numbers would be as many as the scores."""
    given = jax.tree.map(lambda leaf: leaf.value, arrays, is_leaf=lambda x: hasattr(x, "perturbed"))
    wanted = (None,) if arrays.bias is not None and arrays.bias.perturbed else ()  # a tuple without leaves: static
    out, partition = _attention(given, sight)
    return (out, partition), (given, out, partition, wanted)


def _attention_backward(sight: Sight, saved: Any, grads: Any):
    given, out, partition, wanted = saved
    grad = jnp.zeros_like(out) if isinstance(grads[0], SymbolicZero) else grads[0]
    return (_gradients(given, out, partition, grad, sight, bool(wanted)),)


_attention: Any = jax.custom_vjp(_attended, nondiff_argnums=(1,))
_attention.defvjp(_attention_forward, _attention_backward, symbolic_zeros=True)


def _pulled_back(arrays: Arrays, out, partition, grad, sight: Sight, with_bias: bool) -> Arrays:
    """Gradients of q, k, v and, where it is wanted, bias; None for the others."""
    wanted = arrays._replace(q_segments=None, k_segments=None, cos=None, sin=None)
    wanted = wanted if with_bias else wanted._replace(bias=None)

    def kernel(arrays: Arrays, out, partition, grad) -> Arrays:
        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in _filled(wanted)[:3]]
        bias = jax.ShapeDtypeStruct((0,) if wanted.bias is None else wanted.bias.shape, jnp.float32)
        call = _call("capibara_attention_backward", (*shapes, bias), sight)
        dq, dk, dv, dbias = call(*_filled(arrays), out, partition, grad)
        if wanted.k is None:
            dk = dv = None
        return Arrays(dq, dk, dv, bias=None if wanted.bias is None else dbias.astype(wanted.bias.dtype))

    def plain(arrays: Arrays, out, partition, grad) -> Arrays:
        return _plain_gradients(arrays, wanted, grad, sight)

    def on(program: Any, arrays: Arrays, out, partition, grad) -> Arrays:
        """Its own gradient, after its forward again: what it keeps is its own."""
        return jax.vjp(lambda floats: program(merged(arrays, floats)), wanted)[1](grad)[0]

    cpu = kernel if native() else plain
    others = {name: partial(on, program) for name, program in programs(arrays, sight).items()}
    return jax.lax.platform_dependent(arrays, out, partition, grad, cpu=cpu, **others, default=plain)


def _gradients_forward(arrays, out, partition, grad, sight, with_bias):
    return _gradients(arrays, out, partition, grad, sight, with_bias), (arrays, grad)


def _gradients_backward(sight, with_bias, saved, pull):
    """`out` and `partition` are functions of the arrays; what flows through them is counted there."""
    arrays, grad = saved

    def first(floats: Arrays, grad) -> Arrays:
        wanted = floats if with_bias else floats._replace(bias=None)
        return _plain_gradients(merged(arrays, floats), wanted, grad, sight)

    floats = arrays._replace(q_segments=None, k_segments=None, cos=None, sin=None)
    to_floats, to_grad = jax.vjp(first, floats, grad)[1](pull)
    return to_floats, None, None, to_grad


_gradients: Any = jax.custom_vjp(_pulled_back, nondiff_argnums=(4, 5))
_gradients.defvjp(_gradients_forward, _gradients_backward)


def _plain_gradients(arrays: Arrays, wanted: Arrays, grad: jax.Array, sight: Sight) -> Arrays:
    return jax.vjp(lambda floats: plain_attention(merged(arrays, floats), sight), wanted)[1](grad)[0]


def _results(arrays: Arrays, sight: Sight) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    B, T, heads, H = arrays.q.shape
    N = heads if arrays.k is not None else heads - 2 * sight.kv_heads
    return jax.ShapeDtypeStruct((B, T, N, H), arrays.q.dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32)


def _filled(arrays: Arrays) -> list[jax.Array]:
    """Empty arrays in place of None: the handlers take a fixed number."""
    dtypes = (*(arrays.q.dtype,) * 3, jnp.int32, jnp.int32, jnp.float32, jnp.float32, jnp.float32)
    return [jnp.zeros(0, dtype) if x is None else x for x, dtype in zip(arrays, dtypes, strict=True)]


def _call(name: str, shapes: Any, sight: Sight) -> Any:
    """`expand_dims`: what a vmap does not map over is not copied; the handlers read it again for each."""
    call = jax.ffi.ffi_call(name, shapes, vmap_method="expand_dims")
    return partial(
        call,
        causal=np.bool_(sight.causal),
        window=np.int64(sight.window),
        scale=np.float32(sight.scale),
        kv_heads=np.int64(sight.kv_heads),
    )
