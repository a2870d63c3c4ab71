"""Every way to merge that `merge_quality.py` compares: `Case → Merged`, chosen on validation data, judged on others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

LAMBDA = 0.01
"""Of the pull towards equal weights, the default of `ConvexityController`."""


class Case(NamedTuple):
    """What a method gets: models of one structure, their base, losses, validation and test data."""

    trees: Sequence[Any]
    base: Any
    objective: Any
    validation: Any
    test: Any
    chance: float
    seed: int


class Merged(NamedTuple):
    """What it gives: parameters, or for an ensemble the log-probabilities of the test targets; and what to report."""

    params: Any = None
    logs: Any = None
    notes: dict[str, Any] = {}  # noqa: RUF012 - never changed


class Method(NamedTuple):
    """How to merge, and about how many forward passes over the validation and the test data that takes for m models.

    A gradient counts as three passes, a Hessian-vector product as six.
    """

    run: Callable[[Case], Merged]
    passes: Callable[[int], tuple[int, int]] = lambda m: (0, 1)


def _best_single(case: Case) -> Merged:
    from capibara.consensus.evidence import gather

    losses = gather(case.trees, case.objective, case.validation, chance=case.chance).losses
    best = int(np.argmin(losses))
    return Merged(case.trees[best], notes={"model": best, "validation_losses": losses.round(5).tolist()})


def _uniform(case: Case) -> Merged:
    from capibara.consensus.soups import linear_soup

    return Merged(linear_soup(case.trees, np.ones(len(case.trees))).params)


def _greedy(case: Case, accept: str) -> Merged:
    from capibara.consensus.soup_metrics import perplexity
    from capibara.consensus.soups import greedy_soup

    soup = greedy_soup(case.trees, perplexity(case.objective, case.validation), accept=accept)
    return Merged(soup.params, notes={"weights": soup.weights.round(4).tolist()})


def _found(case: Case, problem: str) -> Merged:
    from capibara.consensus.combine import combine
    from capibara.training.convexity_controller import ConvexityController

    result = ConvexityController(LAMBDA, problem=problem).optimize(
        case.trees, case.validation.batches[0], objective=case.objective, chance=case.chance, crossfit=False,
        midpoints=0,
    )  # fmt: skip
    notes = result.to_json()
    told = ("dual_gap", "certificate", "chosen", "transfer_gap", "candidate_loss", "excluded", "converged")
    weights = {"weights": result.weights.round(4).tolist(), "candidate": result.candidate.round(4).tolist()}
    return Merged(combine(case.trees, result.weights), notes={name: notes[name] for name in told} | weights)


def _ensemble(case: Case, certified: bool) -> Merged:
    """The mixture of the models' probabilities; a model that cannot be used has no part in the certified one."""
    from capibara.consensus.evidence import read_logs

    logs = np.stack([read_logs(case.objective, tree, case.test)[0] for tree in case.trees], axis=1)
    weights = certified_weights(case) if certified else np.full(len(case.trees), 1 / len(case.trees))
    return Merged(logs=mixed(logs, weights), notes={"weights": weights.round(4).tolist()})


def certified_weights(case: Case) -> np.ndarray:
    """The mixture problem's solution, without evaluating any merge."""
    from capibara.consensus.evidence import gather

    evidence = gather(case.trees, case.objective, case.validation, chance=case.chance)
    return mixture_weights(evidence.logs, evidence.rows.tokens, evidence.usable)


def mixture_weights(logs: np.ndarray, tokens: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """float64[M], 0 for a model that is not usable."""
    from capibara.consensus.convex import mixture
    from capibara.consensus.simplex import kl_penalty

    weights = np.zeros(logs.shape[1])
    prior = np.full(len(usable), 1 / len(usable))
    weights[usable] = mixture(logs[:, usable], tokens, kl_penalty(LAMBDA, prior)).weights
    return weights


def mixed(logs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """log Σ wᵢ pᵢ of every target."""
    used = np.flatnonzero(weights)
    parts = np.asarray(logs[:, used], np.float64) + np.log(weights[used])
    most = parts.max(axis=1, keepdims=True)
    return (most + np.log(np.exp(parts - most).sum(axis=1, keepdims=True)))[:, 0]


def _named(case: Case, merges: Sequence[Callable[[], Any]]) -> Merged:
    """Base + a merge of the task vectors; of several the one that is best on the validation data."""
    import jax

    from capibara.consensus.aggregate import merge_ballot
    from capibara.consensus.ballot import open_ballot
    from capibara.consensus.soup_metrics import perplexity
    from capibara.tree import tree_add

    stack = {name: np.stack([tree[name] - leaf for tree in case.trees]) for name, leaf in case.base.items()}
    ballot = open_ballot(jax.tree.map(jax.numpy.asarray, stack), np.ones(len(case.trees)))
    key = jax.random.key(case.seed)
    found = [tree_add(case.base, merge_ballot(ballot, merge(), None, None, key)[0]) for merge in merges]
    if len(found) == 1:
        return Merged(found[0])
    metric = perplexity(case.objective, case.validation)
    best = int(np.argmin([metric.score(tree).mean for tree in found]))
    return Merged(found[best], notes={"choice": best})


def _by_name(name: str) -> Callable[[Case], Merged]:
    def merge() -> Any:
        from capibara.training.vocabulary import MERGES

        return MERGES[name](0)

    return partial(_named, merges=(merge,))


def _scaled(name: str, scales: tuple[float, ...], over_models: bool) -> Callable[[Case], Merged]:
    def run(case: Case) -> Merged:
        from capibara.consensus import task_vectors

        build = getattr(task_vectors, name)
        by = len(case.trees) if over_models else 1
        merged = _named(case, [partial(build, scale=scale / by) for scale in scales])
        return merged._replace(notes={"scale": round(scales[merged.notes["choice"]] / by, 4)})

    return run


SCALES = (0.5, 1.0, 1.5, 2.0, 3.0)
BEST, UNIFORM = "best single", "uniform"
MAIN: dict[str, Method] = {
    BEST: Method(_best_single, lambda m: (m, 1)),
    UNIFORM: Method(_uniform),
    "certified weights": Method(partial(_found, problem="mixture"), lambda m: (m + 2, 1)),
    "greedy, sorted": Method(partial(_greedy, accept="interval"), lambda m: (2 * m - 1, 1)),
    "ensemble, uniform": Method(partial(_ensemble, certified=False), lambda m: (0, m + 1)),
    "ensemble, certified weights": Method(partial(_ensemble, certified=True), lambda m: (m, m + 1)),
    "quadratic": Method(partial(_found, problem="quadratic"), lambda m: (7 * m + 2, 1)),
    "direct, in weight space": Method(partial(_found, problem="weight_space"), lambda m: (m + 44, 1)),
    "greedy, any gain": Method(partial(_greedy, accept="better"), lambda m: (2 * m - 1, 1)),
}
"""The soup table, most important first; the first two are what the others are compared with."""

SLOW = ("quadratic", "direct, in weight space")
"""Of these, the ones that need gradients; they are computed last."""

REFERENCE: dict[str, Method] = {
    "task arithmetic, scale 0.4": Method(_by_name("task_arithmetic")),
    "task arithmetic, scale chosen": Method(_scaled("task_arithmetic", SCALES, True), lambda m: (len(SCALES), 1)),
    "TIES": Method(_by_name("ties")),
    "TIES, scale chosen": Method(_scaled("ties", SCALES, False), lambda m: (len(SCALES), 1)),
    "DARE": Method(_by_name("dare")),
    "DARE + TIES": Method(_by_name("dare_ties")),
    "model stock": Method(_by_name("model_stock")),
    "coordinate median": Method(_by_name("median")),
}
"""Merges by rule, of the task vectors: fine-tunes of one base only."""
