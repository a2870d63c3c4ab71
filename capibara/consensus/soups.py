"""Soups: averages of checkpoints of one run or of one start, and which of them to take.

    linear    Σ wᵢθᵢ, one pass                        uniform, given weights, the last K, decay weights
    greedy    m ← m + (x − m)/(k + 1)  where that is better, else x is left out       sorted, or by arrival

Wortsman et al. 2022 (arXiv 2203.05482), algorithm 1. There any rise of the metric is taken; here, unless asked for,
only one whose paired interval over sequences clears zero: a soup that takes whatever helps by chance fits the noise of
the validation data. Trees may be a lazy sequence; two of them, the mean and a candidate are in memory.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any, NamedTuple

import numpy as np

from capibara.consensus.averages import Average, check_fits, is_finite, shapes_of
from capibara.consensus.soup_metrics import Metric, Score, improves
from capibara.errors import ConfigError
from capibara.types import PyTree

USED, NOT_FINITE, NO_GAIN, NO_WEIGHT = "used", "not_finite", "no_gain", "no_weight"
ACCEPT = ("interval", "better")


class Trial(NamedTuple):
    """One ingredient that a greedy soup tried.

    Attributes:
      ingredient: Its number.
      value: Of the soup with it, as the metric is shown.
      difference: In the metric's mean (lower is better), the soup with it minus the soup without.
      se: Standard error of that over sequences; infinite where there is one only.
      accepted: Whether it is in.
    """

    ingredient: int
    value: float
    difference: float
    se: float
    accepted: bool


class Soup(NamedTuple):
    """What came of it.

    Attributes:
      params: The soup, or the best ingredient where `fallback` says so.
      weights: float64[M], shares of the ingredients in `params`; NaN where it is no weighted mean (a median).
      reasons: One an ingredient: `used`, or why it is not in.
      value: The metric of `params` as people know it (a perplexity, an accuracy); NaN where nothing was evaluated.
      values: Of each ingredient alone; NaN where it was not evaluated.
      trials: Of a greedy soup, in order.
      evaluations: How many models were evaluated.
      fallback: The ingredient that was better than the soup and stands in its place.
      variance: Of every number over the ingredients, where it was asked for.
    """

    params: PyTree
    weights: np.ndarray
    reasons: tuple[str, ...]
    value: float = math.nan
    values: tuple[float, ...] = ()
    trials: tuple[Trial, ...] = ()
    evaluations: int = 0
    fallback: int | None = None
    variance: PyTree = None


def linear_soup(
    trees: Sequence[PyTree],
    weights: Sequence[float] | np.ndarray,
    *,
    metric: Metric | None = None,
    fallback: bool = True,
    variance: bool = False,
) -> Soup:
    """Σ wᵢθᵢ / Σ wᵢ over the ingredients that are finite.

    Tolerates: ingredients with NaN: they are left out by name, the others' weights rescaled.
    Cost: one pass, one tree and the mean in memory; with a metric, M + 1 evaluations (1 without the fallback).
    Fails when: the ingredients do not lie in one basin, as models of different initialisations: the mean of such is
      no model. The fallback then returns the best ingredient.

    Args:
      trees: Of one structure.
      weights: ≥ 0; need not sum to 1. What has weight 0 is not read, without a metric.
      metric: Judges the soup and, for the fallback, every ingredient.
      fallback: Whether an ingredient that is better than the soup is returned in its place.
      variance: Whether to keep the variance of every number.

    Raises:
      ConfigError: If there is no ingredient, none is finite, or they do not fit each other.
    """
    w = np.asarray(weights, np.float64)
    average, table = Average(variance=variance), _Table(len(trees), metric)
    for i, tree, finite in _admitted(trees, table, skip=() if metric and fallback else np.flatnonzero(w == 0)):
        if not finite:
            table.reasons[i] = NOT_FINITE
            continue
        if metric and fallback:
            table.judge(i, tree)
        average.add(tree, float(w[i]))
        table.reasons[i] = USED if w[i] else NO_WEIGHT
    _some(average.count, table)
    used = np.array([reason == USED for reason in table.reasons])
    shares = np.where(used, w, 0.0)
    soup = Soup(average.mean(), shares / shares.sum(), tuple(table.reasons))
    if variance:
        soup = soup._replace(variance=average.variance())
    return finished(soup, trees, metric, table.scores, table.evaluations)


def greedy_soup(
    trees: Sequence[PyTree],
    metric: Metric,
    *,
    by_arrival: bool = False,
    accept: str = "interval",
    fallback: bool = True,
    variance: bool = False,
) -> Soup:
    """The ingredients that make the soup better, tried one after another.

    Sorted, the best ingredient alone comes first, then the others from best to worst: never worse than the best on the
    validation data. By arrival, they are tried as they come, each read once: what a run in progress can do; the promise
    is then against the first one, and against all with the fallback.

    Tolerates: ingredients with NaN, or worthless ones: they are left out.
    Cost: sorted, every tree is read twice, M + (M − 1) evaluations; by arrival once, M evaluations, and with the
      fallback 2M − 1.
    Fails when: there are so few sequences that nothing clears zero: then it is the best ingredient alone.

    Args:
      trees: Of one structure.
      metric: Judges.
      by_arrival: Whether to try them as they come.
      accept: `interval`, where d + 2·SE < 0, or `better`, where d < 0.
      fallback: By arrival, whether every ingredient is evaluated alone, and one that is better than the soup returned.
      variance: Whether to keep the variance of every number over what is in.

    Raises:
      ConfigError: If there is no ingredient, none gives a finite score, or they do not fit each other.
    """
    if accept not in ACCEPT:
        raise ConfigError(f"accept is 'interval' or 'better'; got {accept!r}.")
    table, trials = _Table(len(trees), metric), list[Trial]()
    average, now = Average(variance=variance), None

    def offer(i: int, tree: PyTree, alone: Score | None) -> None:
        nonlocal now
        if now is None:
            now = alone or table.evaluate(tree)
            table.scores[i] = now
            if math.isfinite(now.mean):
                average.add(tree)
                table.reasons[i] = USED
            else:
                table.reasons[i], now = NOT_FINITE, None
            return
        score = table.evaluate(average.with_one_more(tree))
        if accept == "interval" and len(score.sums) == 1 and metric.objective is None:
            raise ConfigError(
                "The metric returned one number, which has no interval. Return one a sequence, or use accept='better'."
            )
        good, mean, se = improves(score, now, accept)
        trials.append(Trial(i, metric.shown(score.mean), mean, se, good))
        table.reasons[i] = USED if good else NO_GAIN
        if good:
            average.add(tree)
            now = score

    for i, tree, finite in _admitted(trees, table):
        if not finite:
            table.reasons[i] = NOT_FINITE
            continue
        if fallback or not by_arrival:
            table.judge(i, tree)
        if by_arrival:
            offer(i, tree, table.scores[i])
    if not by_arrival:
        order = sorted(table.finite(), key=lambda i: table.mean(i))
        for i in order:
            offer(i, trees[i], table.scores[i])
    _some(average.count, table)
    used = np.array([reason == USED for reason in table.reasons], np.float64)
    soup = Soup(average.mean(), used / used.sum(), tuple(table.reasons), trials=tuple(trials))
    if variance:
        soup = soup._replace(variance=average.variance())
    return finished(soup, trees, metric, table.scores, table.evaluations, now)


def finished(
    soup: Soup,
    trees: Sequence[PyTree],
    metric: Metric | None,
    scores: Sequence[Score | None],
    evaluations: int,
    score: Score | None = None,
) -> Soup:
    """The soup with its value, or the best ingredient where that is better.

    Args:
      soup: With `params`, `weights` and `reasons`.
      trees: The ingredients.
      metric: Judges; None leaves the soup as it is.
      scores: Of the ingredients; None for one that was not evaluated, and all of them where there is no fallback.
      evaluations: So far.
      score: Of the soup, where it is known.
    """
    if metric is None:
        return soup
    if score is None:
        score, evaluations = metric.score(soup.params), evaluations + 1
    values = tuple(math.nan if one is None else metric.shown(one.mean) for one in scores)
    soup = soup._replace(value=metric.shown(score.mean), values=values, evaluations=evaluations)
    known = [(one.mean, i) for i, one in enumerate(scores) if one is not None]
    if not known or min(known)[0] >= score.mean:
        return soup
    best, i = min(known)
    weights = np.eye(len(trees))[i]
    return soup._replace(params=trees[i], weights=weights, value=metric.shown(best), fallback=i)


class _Table:
    """Reasons and scores of the ingredients, how many models have been evaluated, and whether one is being."""

    def __init__(self, count: int, metric: Metric | None):
        self.reasons, self.scores = [NO_WEIGHT] * count, list[Score | None]([None] * count)
        self.metric, self.evaluations = metric, 0
        self.evaluates = Event()

    def evaluate(self, tree: PyTree) -> Score:
        assert self.metric is not None
        self.evaluations += 1
        self.evaluates.set()
        return self.metric.score(tree)

    def judge(self, i: int, tree: PyTree) -> None:
        self.scores[i] = self.evaluate(tree)

    def mean(self, i: int) -> float:
        score = self.scores[i]
        return math.inf if score is None else score.mean

    def finite(self) -> list[int]:
        for i, score in enumerate(self.scores):
            if score is not None and not math.isfinite(score.mean):
                self.reasons[i] = NOT_FINITE
        return [i for i in range(len(self.scores)) if math.isfinite(self.mean(i))]


def _admitted(trees: Sequence[PyTree], table: _Table, skip: Any = ()) -> Iterator[tuple[int, PyTree, bool]]:
    """The trees with their numbers, each checked against the first of them, and whether all its numbers are finite.

    The next one is read while its predecessor is evaluated: two are in memory at a time.
    """
    if not len(trees):
        raise ConfigError("There are no checkpoints to average; add at least one.")
    left_out, like = {int(i) for i in skip}, None

    def read(i: int) -> tuple[int, PyTree, bool]:
        table.evaluates.wait()
        tree = trees[i]
        return i, tree, is_finite(tree)

    wanted = [i for i in range(len(trees)) if i not in left_out]
    with ThreadPoolExecutor(1) as pool:
        ahead = deque(pool.submit(read, i) for i in wanted[:1])
        try:
            for after in range(1, len(wanted) + 1):
                table.evaluates.set()
                i, tree, finite = ahead.popleft().result()
                table.evaluates.clear()
                ahead.extend(pool.submit(read, following) for following in wanted[after : after + 1])
                if like is None:
                    like = shapes_of(tree)
                check_fits(tree, like, f"Checkpoint {i}")
                yield i, tree, finite
                del tree
        finally:
            table.evaluates.set()


def _some(count: int, table: _Table) -> None:
    if not count:
        named = ", ".join(f"checkpoint {i}: {reason}" for i, reason in enumerate(table.reasons[:5]))
        raise ConfigError(f"None of the {len(table.reasons)} checkpoints can be averaged ({named}).")
