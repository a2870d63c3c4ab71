"""Merges that weigh by data: each model's Fisher information, or the inputs that its linear layers saw.

    Fisher    θ = Σ wᵢFᵢθᵢ / Σ wᵢFᵢ, coordinate by coordinate
    RegMean   W = (Σ wᵢGᵢ)⁻¹ Σ wᵢGᵢWᵢ, Gᵢ = XᵢᵀXᵢ, for kernels W of y = x·W

They take models and statistics of each model on its own data, so they have no place in a round, where the nodes' data
stay with the nodes. `input_products` finds the G by following a function's own program (its jaxpr): no hooks, no names
of layers, any model written in JAX.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from capibara.errors import ConfigError
from capibara.types import Batch, Objective, PyTree

INLINED = ("jit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "remat2")
"""Calls whose programs are followed; loops and branches are run as they are, unseen."""

SAME_VALUE = ("convert_element_type", "copy", "optimization_barrier")

SINGULAR = 1e-10
"""Directions of Σ wᵢGᵢ with less than this share of its largest eigenvalue were never seen; there the mean stays."""


def fisher(rows: jax.Array, information: jax.Array, weights: Any = None) -> jax.Array:
    """Fisher merging of one tensor, diagonal; Matena & Raffel 2022 (arXiv 2111.09832, §3).

    The mode of the product of Gaussians N(θᵢ, Fᵢ⁻¹), with the model weights as exponents. Where no model has any
    information, the weighted mean.

    Tolerates: nothing: a model that claims a large F owns the merge; statistics must come from a trusted side.
    Cost: one pass over rows and information, in blocks of any length.
    Fails when: the models are in different basins, or information of different scale (more data, other losses) is
      compared: scale it, or put that into the weights.

    Args:
      rows: float32[m, ...], the models' own weights.
      information: float32[m, ...], ≥ 0, as `empirical_fisher` gives it.
      weights: m numbers ≥ 0; equal ones by default.
    """
    shares = np.full(len(rows), 1.0) if weights is None else np.asarray(weights, np.float64)
    return _fisher(rows, information, jnp.asarray((shares / shares.sum()).astype(np.float32)))


def empirical_fisher(objective: Objective, params: PyTree, batch: Batch) -> PyTree:
    """The diagonal of the empirical Fisher information: the mean over sequences of (∇ log p(sequence))².

    Empirical: the targets are those of the data. The paper's own F draws them from the model, which costs as many
    more gradients as draws and differs where the model fits badly. Cost: one gradient a sequence.

    Args:
      objective: Its `sequence_losses` are summed losses, −log p.
      params: A float32 tree.
      batch: Leaves [B, ...].
    """
    return _empirical_fisher(params, dict(batch), losses=objective.sequence_losses)


def regmean(
    kernels: Sequence[np.ndarray], products: Sequence[np.ndarray], weights: Any = None, *, off_diagonal: float = 0.9
) -> np.ndarray:
    """RegMean of one linear layer's kernels [D, E]; Jin et al. 2023 (arXiv 2212.09849, §3).

    The W with the least Σ wᵢ‖XᵢW − XᵢWᵢ‖², in closed form, after off-diagonal entries of each G were multiplied by
    `off_diagonal` (the paper's α, 0.9). Input directions that no model saw keep the mean of the kernels. Tensors that
    are no kernels are averaged plainly; so are kernels in the paper's embeddings and heads.

    Tolerates: nothing: a model that claims a large G owns the merge.
    Cost: one D×D eigenvalue problem in float64 a layer; whole tensors.
    Fails when: layers change what later layers see: each is solved as if alone (RegMean++ mends that).

    Args:
      kernels: One [D, E] of each model.
      products: One [D, D] of each model, as `input_products` gives it.
      weights: m numbers ≥ 0; equal ones by default.
      off_diagonal: α in [0, 1].

    Returns:
      float64[D, E].

    Raises:
      ConfigError: If α is outside [0, 1] or shapes do not fit.
    """
    if not 0 <= off_diagonal <= 1:
        raise ConfigError(f"regmean: off_diagonal must lie in [0, 1]; got {off_diagonal}.")
    wide, seen = [np.asarray(kernel, np.float64) for kernel in kernels], [np.asarray(g, np.float64) for g in products]
    depth = wide[0].shape[0]
    for i, (kernel, product) in enumerate(zip(wide, seen, strict=True)):
        if kernel.shape != wide[0].shape or product.shape != (depth, depth):
            raise ConfigError(
                f"regmean: model {i} has a kernel {kernel.shape} and products {product.shape}; "
                f"needed are {wide[0].shape} and {(depth, depth)}."
            )
    shares = np.full(len(wide), 1.0) if weights is None else np.asarray(weights, np.float64)
    shares = shares / shares.sum()
    kept = off_diagonal + (1 - off_diagonal) * np.eye(depth)
    damped = [w * kept * g for w, g in zip(shares, seen, strict=True)]
    middle = sum((w * kernel for w, kernel in zip(shares, wide, strict=True)), np.zeros_like(wide[0]))
    pull = sum((g @ (kernel - middle) for g, kernel in zip(damped, wide, strict=True)), np.zeros_like(middle))
    values, vectors = np.linalg.eigh(sum(damped, np.zeros((depth, depth))))
    inverse = np.divide(1.0, values, out=np.zeros_like(values), where=values > SINGULAR * max(values[-1], 0.0))
    return middle + vectors @ (inverse[:, None] * (vectors.T @ pull))


def input_products(function: Callable[[Any, Any], Any], params: Mapping[str, jax.Array], batch: Any) -> dict[str, Any]:
    """float32[D, D] for every kernel of a model: Σ xxᵀ over the inputs x of y = x·W in one call of `function`.

    A kernel is a matrix [D, E] that the program uses only as the right factor of products over its first axis. Others
    (embeddings, tied heads, norms, kernels inside loops) are left out. Every position counts, padding too: give packed
    sequences. Sums of several batches add up.

    Args:
      function: `(params, batch) -> anything`, traceable by JAX.
      params: Flat, by name.
      batch: Its other argument.
    """
    leaves, structure = jax.tree.flatten(batch)
    names = sorted(params)

    def flat(*arguments: Any) -> Any:
        given = dict(zip(names, arguments[: len(names)], strict=True))
        return function(given, jax.tree.unflatten(structure, list(arguments[len(names) :])))

    arguments = [*(params[name] for name in names), *leaves]
    program = jax.make_jaxpr(flat)(*arguments)

    @jax.jit
    def collect(arguments: list[Any]) -> dict[str, Any]:
        found: dict[str, list[Any]] = {}
        origins = [name if np.ndim(params[name]) == 2 else None for name in names] + [None] * len(leaves)
        spoilt: set[str] = set()
        _follow(program.jaxpr, program.consts, arguments, origins, found, spoilt)
        return {name: sum(parts[1:], parts[0]) for name, parts in found.items() if name not in spoilt}

    return collect(arguments)


def _follow(
    program: Any, consts: Any, arguments: Any, origins: Any, found: dict[str, list[Any]], spoilt: set[str]
) -> tuple[list[Any], list[Any]]:
    """Runs a program and notes the left factors of products with what came from a kernel; values and their origins."""
    values: dict[Any, Any] = dict(zip([*program.constvars, *program.invars], [*consts, *arguments], strict=True))
    origin: dict[Any, Any] = dict(zip(program.invars, origins, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values[atom]

    def whence(atom: Any) -> Any:
        return None if isinstance(atom, core.Literal) else origin.get(atom)

    for equation in program.eqns:
        name, inputs = equation.primitive.name, [read(atom) for atom in equation.invars]
        sources = [whence(atom) for atom in equation.invars]
        inner = next(_programs(equation.params), None) if name in INLINED else None
        if equation.params.get("branches_platforms"):  # not a branch of the program: one for each kind of machine
            inner, inputs, sources = _here(equation.params), inputs[1:], sources[1:]
        after: list[Any] = [None] * len(equation.outvars)
        if inner is not None:
            results, after = _follow(inner.jaxpr, inner.consts, inputs, sources, found, spoilt)
        else:
            if name in SAME_VALUE:
                after = sources[: len(after)]
            elif name == "dot_general" and _is_linear(equation.params["dimension_numbers"], inputs, sources):
                x = inputs[0].reshape(-1, inputs[0].shape[-1])
                product = jax.lax.dot_general(x, x, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
                found.setdefault(sources[1], []).append(product)
            else:
                spoilt.update(source for source in sources if source is not None)
            results = equation.primitive.bind(*inputs, **equation.primitive.get_bind_params(equation.params))
            results = results if equation.primitive.multiple_results else [results]
        for atom, value, source in zip(equation.outvars, results, after, strict=True):
            values[atom], origin[atom] = value, source
    return [read(atom) for atom in program.outvars], [whence(atom) for atom in program.outvars]


def _programs(parameters: Mapping[str, Any]) -> Iterator[Any]:
    for key in ("call_jaxpr", "jaxpr"):
        inner = parameters.get(key)
        if inner is not None:
            yield inner if isinstance(inner, core.ClosedJaxpr) else core.ClosedJaxpr(inner, ())


def _here(parameters: Mapping[str, Any]) -> Any:
    """Of the branches for different platforms, that of the default backend; None names all others."""
    platforms = parameters["branches_platforms"]
    return next(
        branch
        for branch, names in zip(parameters["branches"], platforms, strict=True)
        if names is None or jax.default_backend() in names
    )


def _is_linear(dimensions: Any, inputs: list[Any], sources: list[Any]) -> bool:
    """Whether a product is x[..., D] · W[D, E] with a kernel on the right only."""
    (left, right), batched = dimensions
    plain = tuple(left) == (inputs[0].ndim - 1,) and tuple(right) == (0,) and not any(batched)
    return plain and sources[0] is None and sources[1] is not None


@jax.jit
def _fisher(rows: jax.Array, information: jax.Array, shares: jax.Array) -> jax.Array:
    w = shares.reshape(-1, *[1] * (rows.ndim - 1))
    largest = information.max(axis=0)
    scaled = w * jnp.where(largest > 0, information / jnp.where(largest > 0, largest, 1), 1)
    total = scaled.sum(axis=0)
    chosen = jnp.where(total > 0, scaled, w)
    return (chosen * rows).sum(axis=0) / jnp.where(total > 0, total, 1)


def _empirical_fisher_of(params: PyTree, batch: Any, losses: Callable[[PyTree, Any], tuple[Any, Any]]) -> PyTree:
    def loss(params: PyTree, sequence: Any) -> jax.Array:
        return losses(params, jax.tree.map(lambda leaf: leaf[None], sequence))[0].sum()

    def add(total: PyTree, sequence: Any) -> tuple[PyTree, None]:
        gradient = jax.grad(loss)(params, sequence)
        return jax.tree.map(lambda a, g: a + jnp.square(g), total, gradient), None

    count = len(jax.tree.leaves(batch)[0])
    total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), batch)
    return jax.tree.map(lambda a: a / np.float32(count), total)


_empirical_fisher = jax.jit(_empirical_fisher_of, static_argnames="losses")
