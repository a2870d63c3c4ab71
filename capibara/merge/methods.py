"""The methods by name: what each needs to know of all inputs, and what it then does with every number.

    uniform · weighted · median · trimmed_mean                                         one pass
    slerp · karcher · rda · model_stock         products of each tensor, then          one pass
    the votes · task_arithmetic · model_stock_whole     of the whole models, then      one pass
    ties · dare · della · breadcrumbs · sce     whole tensors in memory                one to four passes

After the pass that takes products, everything but the middle is one n-vector of coefficients: a linear merge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from capibara.errors import ConfigError, unknown_name
from capibara.merge import kernels
from capibara.merge.plan import Job
from capibara.merge.recipe import Recipe

WHOLE, EACH = "whole", "each"


class Method(NamedTuple):
    """What a method needs.

    Attributes:
      about: One clause for the help and the card.
      gram: None, or whether products are taken over the `whole` models or over `each` tensor.
      reference: What the products are of the differences from: `base` for the base model, if there is one, `median`, or
        `first` for rules that the reference does not matter to.
      weights: Whether it takes weights.
      least: Fewest inputs.
      most: Most inputs; None for any number.
      per_fault: With f faulty inputs it needs `per_fault · f + least`; None where it knows no f.
      base: Whether it `must` have a base model, `may` have one, or has `no` use for one.
      options: Names of its own numbers.
      whole_tensors: Whether it holds the largest tensor of every input in memory.
    """

    about: str
    gram: str | None = None
    reference: str = "base"
    weights: bool = False
    least: int = 2
    most: int | None = None
    per_fault: int | None = None
    base: str = "no"
    options: tuple[str, ...] = ()
    whole_tensors: bool = False


def _vote(about: str, reference: str = "first", least: int = 1) -> Method:
    return Method(about, WHOLE, reference, least=least, per_fault=2)


def _sphere(about: str) -> Method:
    return Method(about, EACH, weights=True, base="may")


def _sparse(about: str, *options: str, weights: bool = True) -> Method:
    return Method(about, weights=weights, base="must", options=options, whole_tensors=True)


METHODS: dict[str, Method] = {
    "uniform": Method("the mean"),
    "weighted": Method("Σ wᵢθᵢ", weights=True),
    "median": Method("the middle of every number", least=1, per_fault=2),
    "trimmed_mean": Method("the mean without the f lowest and highest of every number", least=1, per_fault=2),
    "geometric_median": _vote("the point of least summed distance"),
    "byzantine_tolerant": _vote("the vote: neighbours mixed, far ones clipped, gross ones named", "median"),
    "centered_clipping": _vote("a mean that no input moves far", "median"),
    "krum": _vote("the input nearest to its neighbours", least=3),
    "multi_krum": _vote("the mean of the n − f best by Krum", least=3),
    "slerp": _sphere("the great circle between directions, tensor by tensor"),
    "karcher": _sphere("the mean direction, at the mean length, tensor by tensor"),
    "rda": _sphere("direction and length averaged apart, tensor by tensor"),
    "model_stock": Method("Model Stock, tensor by tensor", EACH, base="must"),
    "model_stock_whole": Method("Model Stock with one angle for the whole model", WHOLE, base="must"),
    "task_arithmetic": Method("the base and scale · Σ τᵢ", WHOLE, weights=True, base="must", options=("scale",)),
    "ties": _sparse("TIES, trimmed over the whole model", "density", "scale"),
    "ties_tensor": _sparse("TIES, trimmed within each tensor", "density", "scale"),
    "dare": _sparse("DARE, rescaled by 1/density", "density", "scale"),
    "dare_norm": _sparse("DARE, rescaled to the L1 norm", "density", "scale"),
    "dare_ties": _sparse("DARE, then the election of TIES", "density", "scale"),
    "della": _sparse("DELLA", "density", "epsilon", "scale"),
    "breadcrumbs": _sparse("Model Breadcrumbs", "density", "gamma", "scale"),
    "sce": _sparse("SCE", "density", "scale", weights=False),
}
"""Which algorithm each name is, and the paper, are in the docstrings of `capibara.consensus`."""


class Decision(NamedTuple):
    """What the pass over products decided.

    Attributes:
      kernel: The final pass.
      coefficients: Name of a tensor → c[n]; the same vector for all where the whole models were compared.
      middle: Share of the coordinate-wise median.
      reasons: One for each input, `backed` or why it does not count; empty where nobody is judged.
    """

    kernel: kernels.Kernel
    coefficients: dict[str, np.ndarray]
    middle: float
    reasons: list[str]


def method_of(recipe: Recipe) -> Method:
    """The method that a recipe names, checked against what the recipe gives it.

    Raises:
      ConfigError: If there is none, or it cannot do with these inputs, weights or f.
    """
    name, n = recipe.method, len(recipe.inputs)
    if name not in METHODS:
        raise ConfigError(unknown_name("method", name, METHODS))
    method = METHODS[name]
    if method.most is not None and n > method.most:
        raise ConfigError(f"{name} merges {method.most} checkpoints; got {n}. Use 'uniform' or 'weighted'.")
    if recipe.weights is not None and not method.weights:
        raise ConfigError(f"{name} takes no weights. Use 'weighted', or leave --weights out.")
    if name == "weighted" and recipe.weights is None:
        raise ConfigError("weighted needs --weights, one for each checkpoint, summing to 1. Or use 'uniform'.")
    if recipe.base is None and method.base == "must":
        raise ConfigError(f"{name} merges what fine-tuning changed: give the model that was fine-tuned as --base.")
    if recipe.base is not None and method.base == "no":
        raise ConfigError(f"{name} has no use for a base model. Leave --base out, or use 'task_arithmetic'.")
    for option in recipe.options:
        if option not in method.options:
            raise ConfigError(f"{name}: " + (unknown_name("option", option, method.options) if method.options else
                              f"it has no options; got {option!r}."))
    if recipe.faulty is not None:
        if method.per_fault is None:
            raise ConfigError(f"{name} knows no faulty inputs. Use 'byzantine_tolerant', or leave --faulty out.")
        if recipe.faulty < 0:
            raise ConfigError(f"--faulty is a number of inputs, 0 or more; got {recipe.faulty}.")
    f = faulty(recipe)
    if method.per_fault is not None and n < method.per_fault * f + method.least:
        raise ConfigError(f"{name} with f = {f} needs at least {method.per_fault * f + method.least} inputs; got {n}.")
    return method


def faulty(recipe: Recipe) -> int:
    """f: as the recipe says, or what n ≥ 3f + 1 allows."""
    return recipe.faulty if recipe.faulty is not None else (len(recipe.inputs) - 1) // 3


def one_pass(recipe: Recipe, jobs: Sequence[Job]) -> kernels.Kernel:
    """The kernel of a method that needs no products."""
    f = faulty(recipe)
    if METHODS[recipe.method].whole_tensors:
        from capibara.merge.named import whole_tensors

        return whole_tensors(recipe, jobs)
    makers: dict[str, Callable[[], kernels.Kernel]] = {
        "uniform": lambda: kernels.mean,
        "weighted": lambda: kernels.linear(lambda name: np.asarray(recipe.weights)),
        "median": lambda: kernels.median,
        "trimmed_mean": lambda: kernels.trimmed_mean(f),
    }
    return makers[recipe.method]()


def decide(recipe: Recipe, grams: dict[str, np.ndarray], finite: Sequence[bool]) -> Decision:
    """The final pass of a method that takes products.

    Args:
      recipe: With the method.
      grams: Name of a tensor → float64[n, n]; of the whole models under the empty name.
      finite: Which inputs hold only finite numbers; the products of others are 0.

    Raises:
      ConfigError: If too few inputs are finite.
      QuorumError: If too few are left by the vote.
    """
    if METHODS[recipe.method].reference == "base":
        from capibara.merge.named import combined

        each = {name: combined(recipe, gram) for name, gram in grams.items()}
        one = each.get("")
        return Decision(kernels.linear(lambda name: each[name] if one is None else one), each, 0.0, [])
    coefficients, reasons = _voted(recipe, grams[""], np.asarray(finite, bool))
    rest = 1.0 - float(coefficients.sum())
    middle = rest if abs(rest) > 1e-9 else 0.0
    keep = [i for i, good in enumerate(finite) if good]
    kernel = kernels.linear(lambda name: coefficients, middle, keep)
    return Decision(kernel, {"": coefficients}, middle, reasons)


def _voted(recipe: Recipe, gram: np.ndarray, finite: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Coefficients and reasons by the rule of that name in `capibara.consensus`."""
    from capibara.consensus import robust
    from capibara.consensus.models import vote_gram
    from capibara.consensus.voting import byzantine_tolerant

    f = faulty(recipe)
    rules: dict[str, Callable[[], Any]] = {
        "byzantine_tolerant": lambda: byzantine_tolerant(f, clip_norms=False),
        "geometric_median": lambda: robust.geometric_median(f),
        "centered_clipping": lambda: robust.centered_clipping(f),
        "krum": lambda: robust.krum(f),
        "multi_krum": lambda: robust.multi_krum(f),
    }
    return vote_gram(rules[recipe.method](), gram, finite, f)
