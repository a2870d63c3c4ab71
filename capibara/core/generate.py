"""Generation with a cache of keys and values: one program reads the prompt, one program makes all new tokens."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from capibara.core.layers import rms_norm
from capibara.core.tokenizer import byte_tokenizer
from capibara.errors import ConfigError, unknown_name
from capibara.kernels.few_rows import Matrix, product
from capibara.kernels.int8 import quantize

WEIGHTS = ("int8",)


def generate(
    model: Any,
    prompt: str | Any,
    max_new_tokens: int = 100,
    *,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    weights: str | None = None,
) -> Any:
    """Goes on from a prompt.

    Args:
      model: A `ModularCapibaraModel`.
      prompt: Text, or token ids int[T] or int[B, T].
      max_new_tokens: Tokens to make; the sequence must fit the model's `max_length`.
      temperature: 0 takes the most likely token.
      top_k: Draws among the k most likely tokens only.
      top_p: Draws among the fewest tokens whose probabilities sum to at least p (Holtzman et al. 2020).
      seed: Of the draws.
      weights: `int8` reads every matrix of the layers and the head in int8, with a scale for each column: fewer bytes
        a token, and a slightly worse model (docs/kernels.md). The int8 copy is kept while the model's parameters live,
        that of one model at a time. By default weights are read in the model's dtype.

    Returns:
      Text (up to the end of the document) for text; int32[max_new_tokens] or int32[B, max_new_tokens] for ids.

    Raises:
      ConfigError: If the prompt is empty, an id is outside the vocabulary, the sequence would be too long, or
        the weights are unknown.
    """
    if weights not in (None, *WEIGHTS):
        raise ConfigError(unknown_name("weights", str(weights), WEIGHTS))
    tokenizer = getattr(model, "tokenizer", None) or byte_tokenizer()
    as_text = isinstance(prompt, str)
    ids = np.asarray(tokenizer.encode(prompt) if as_text else prompt, np.int32)
    single = ids.ndim == 1
    ids = np.atleast_2d(ids)
    limit = model.config.max_length
    if ids.shape[1] == 0:
        raise ConfigError("The prompt is empty; give at least one token, for instance a newline.")
    if ids.min() < 0 or ids.max() >= model.config.vocab_size:
        strange = ids.min() if ids.min() < 0 else ids.max()
        raise ConfigError(f"The prompt has token {strange}; the model knows 0 to {model.config.vocab_size - 1}.")
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is 1 or more; got {max_new_tokens}.")
    if ids.shape[1] + max_new_tokens > limit:
        raise ConfigError(
            f"{ids.shape[1]} prompt tokens and {max_new_tokens} new ones are more than max_length = {limit}. "
            "Shorten one."
        )
    if temperature < 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ConfigError(
            f"temperature is 0 or more, top_k 1 or more, top_p in (0, 1]; got {temperature}, {top_k} and {top_p}."
        )
    graph, state = nnx.split(model)
    size = -(-(ids.shape[1] + max_new_tokens) // 64) * 64
    padded = np.zeros((ids.shape[0], -(-ids.shape[1] // 16) * 16), np.int32)
    padded[:, : ids.shape[1]] = ids
    out = _generate(
        state, _int8_of(graph, state) if weights else None, jnp.asarray(padded), ids.shape[1], jax.random.key(seed),
        np.float32(temperature), np.float32(1.0 if top_p is None else top_p),
        graph=graph, count=max_new_tokens, size=min(size, limit),
        top_k=top_k or 0, whole=top_k is None and top_p in (None, 1), greedy=temperature == 0,
    )  # fmt: skip
    new = np.asarray(out)
    if not as_text:
        return new[0] if single else new
    ends = np.flatnonzero(new[0] == tokenizer.eos)
    return tokenizer.decode(new[0][: ends[0]] if len(ends) else new[0])


@partial(jax.jit, static_argnames=("graph", "count", "size", "top_k", "whole", "greedy"))
def _generate(state, matrices, prompt, length, key, temperature, top_p, *, graph, count, size, top_k, whole, greedy):
    config = nnx.merge(graph, state).config
    # once, not at every token: the layers would cast their matrices where they use them
    state = jax.tree.map(lambda leaf: leaf.astype(config.dtype) if leaf.ndim > 1 else leaf, state)
    model = nnx.merge(graph, state)
    blocks, head = matrices or _matrices(model, Matrix)
    for block, named in zip(model.blocks, blocks, strict=True):
        for name, matrix in named.items():
            setattr(block, name, nnx.Param(matrix))
    B, T = prompt.shape
    size = max(size, T)
    empty = jnp.zeros((B, size, config.kv_heads, config.head_size), config.dtype)
    slots = jnp.arange(size)

    def read(tokens, positions, caches):
        x = model.embedding[...].astype(config.dtype)[tokens]
        allowed = jnp.broadcast_to(slots <= positions[..., None], (B, tokens.shape[1], size))
        after = []
        for block, cache in zip(model.blocks, caches, strict=True):
            x, cache = block(x, positions, allowed, cache)
            after.append(cache)
        return rms_norm(x, model.norm[...], config.norm_eps), after

    def logits_of(x):
        return product(x, head)

    caches = [(empty, empty, 0) for _ in model.blocks]
    x, caches = read(prompt, jnp.broadcast_to(jnp.arange(T), (B, T)), caches)
    logits = logits_of(jax.lax.dynamic_index_in_dim(x, length - 1, 1, keepdims=False))
    caches = [(keys, values, length) for keys, values, _ in caches]

    def step(carry, step_key):
        logits, caches = carry
        if greedy:
            token = logits.argmax(-1)
        elif whole:
            token = jax.random.categorical(step_key, logits / temperature)
        else:
            token = _draw(logits / temperature, step_key, top_k, top_p)
        x, caches = read(token[:, None], jnp.broadcast_to(caches[0][2], (B, 1)), caches)
        return (logits_of(x[:, 0]), caches), token

    return jax.lax.scan(step, (logits, caches), jax.random.split(key, count))[1].T


def _matrices(model, made: Callable[..., Matrix]) -> tuple[list[dict[str, Matrix]], Matrix]:
    """Those of each block, by name, and the head."""
    blocks = [
        {name: made(getattr(block, name)[...]) for name in getattr(block, "matrices", ())} for block in model.blocks
    ]
    return blocks, made(model._head(), by_columns=True)


@partial(jax.jit, static_argnames="graph")
def _quantized(state, *, graph):
    return _matrices(nnx.merge(graph, state), quantize)


def _int8_of(graph, state) -> Any:
    """Made at a model's first call, and forgotten with one of its parameters or at another model's call."""
    leaves = jax.tree.leaves(state)
    kept = next(iter(_KEPT), None)
    if kept and kept[0] == graph and len(kept[1]) == len(leaves):
        if all(ref() is leaf for ref, leaf in zip(kept[1], leaves, strict=True)):
            return kept[2]
    made = _quantized(state, graph=graph)
    _KEPT.clear()
    if all(isinstance(leaf, jax.Array) for leaf in leaves):  # NumPy's may be written over
        _KEPT.append((graph, [weakref.ref(leaf, lambda _: _KEPT.clear()) for leaf in leaves], made))
    return made


_KEPT: list[tuple[Any, list[weakref.ref], Any]] = []


def _draw(logits, key, top_k, top_p):
    ordered = jnp.sort(logits, axis=-1, descending=True)
    if top_k:
        edge = ordered[:, min(top_k, logits.shape[-1]) - 1, None]
        logits, ordered = (jnp.where(values < edge, -jnp.inf, values) for values in (logits, ordered))
    shares = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(shares, axis=-1) - shares
    least = jnp.where(before < top_p, ordered, jnp.inf).min(-1, keepdims=True)
    return jax.random.categorical(key, jnp.where(logits < least, -jnp.inf, logits))
