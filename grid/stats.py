"""Uncertainty of means over questions: intervals, standard errors, paired tests, corrections. Pure numpy.

In: one number per question (right = 1, wrong = 0, or a difference between arms) and, for mean-per-class metrics, the
question's class. Out: intervals and p values in the unit of the numbers given. Everything random takes a seed.

The resampling unit is the question: a contrast's arms answered the same questions, so a question is drawn once for all of
them (their difference is formed first, then resampled). Intervals therefore cover which questions were asked, not which
training seed was drawn; `seed_spread` is for the latter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from datasets_ray.errors import UserError

LEVEL = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A point estimate and its bounds, in one unit."""

    mean: float
    low: float
    high: float

    def scaled(self, factor: float) -> Interval:
        return Interval(self.mean * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True)
class Sample:
    """One benchmark's questions: values float[N] and weights float[N] that sum to 1; strata int[N] or None (no classes)."""

    values: np.ndarray
    weights: np.ndarray
    strata: np.ndarray | None = None

    @property
    def mean(self) -> float:
        return float(self.values @ self.weights)


def sample(values: Sequence[float] | np.ndarray, labels: Sequence[str] | np.ndarray | None = None) -> Sample:
    """values float[N] as a plain mean, or with labels [N] as the mean over classes of each class's mean."""
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise UserError("a mean over no questions", why="n = 0", hint="run the benchmark, or leave it out of the study")
    if labels is None:
        return Sample(array, np.full(array.size, 1.0 / array.size))
    _, codes, counts = np.unique(np.asarray(labels), return_inverse=True, return_counts=True)
    assert codes.shape == array.shape, "one label per question"
    return Sample(array, 1.0 / (counts.size * counts[codes]), codes)


def standard_error(drawn: Sample) -> float | None:
    """Standard error of the mean: over questions, or within classes where there are classes. None: one question can't tell."""
    products = drawn.values * drawn.weights
    variance = 0.0
    for members in _strata(drawn):
        if members.size < 2:
            return None
        variance += members.size * float(np.var(products[members], ddof=1))
    return math.sqrt(variance)


def wilson(right: int, n: int, level: float = LEVEL) -> Interval:
    """Wilson's score interval of a share: unlike the bootstrap it doesn't collapse when every answer is right (or wrong)."""
    if n == 0:
        raise UserError("a share of no questions", why="n = 0", hint="run the benchmark, or leave it out of the study")
    z, p = _normal_quantile(0.5 + level / 2), right / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Interval(p, max(0.0, centre - half), min(1.0, centre + half))


def replicates(drawn: Sample, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """float[resamples] bootstrap means: questions drawn with replacement, within their class where there are classes.

    Drawing n questions and averaging depends only on how often each distinct value was drawn, so the counts are drawn from
    the multinomial directly (25,000 questions cost what 7 values cost). Small classes shrink a plain stratified bootstrap's
    spread by (n_c - 1) / n_c; deviations are rescaled for it (Rao & Wu 1988, "Resampling inference with complex survey
    data"), and classes of one question are drawn together. Mirrored input gives the mirrored output.
    """
    products = drawn.values * drawn.weights
    sign = -1.0 if _leads_negative(products) else 1.0
    products = sign * products
    rng = np.random.default_rng(seed)
    total = np.full(resamples, products.sum())
    tables = []
    for members in _strata(drawn):
        values, counts = np.unique(np.round(products[members], 15), return_counts=True)
        if values.size > 1:
            tables.append((values, counts))
    widest = max((values.size for values, _ in tables), default=0)
    if tables:
        sizes = np.array([counts.sum() for _, counts in tables])
        shares = np.zeros((len(tables), widest))
        points = np.zeros((len(tables), widest))
        for row, (values, counts) in enumerate(tables):
            shares[row, : values.size] = counts / counts.sum()
            points[row, : values.size] = values
        rescale = np.sqrt(sizes / np.maximum(sizes - 1, 1))
        centres = sizes * (shares * points).sum(axis=1)
        chunk = max(1, 4_000_000 // (len(tables) * widest))
        for start in range(0, resamples, chunk):
            stop = min(resamples, start + chunk)
            draws = rng.multinomial(sizes, shares, size=(stop - start, len(tables)))
            sums = np.einsum("rsu,su->rs", draws, points)
            total[start:stop] += ((sums - centres) * rescale).sum(axis=1)
    return sign * total


def bootstrap(samples: Sequence[Sample], seed: int, level: float = LEVEL, resamples: int = RESAMPLES) -> Interval:
    """Percentile interval of the average over benchmarks; each benchmark's questions are drawn on their own."""
    if not samples:
        raise UserError("an average over no benchmarks", why="none was given")
    drawn = sum(replicates(one, seed + k, resamples) for k, one in enumerate(samples)) / len(samples)
    low, high = np.quantile(drawn, [0.5 - level / 2, 0.5 + level / 2])
    return Interval(float(np.mean([one.mean for one in samples])), float(low), float(high))


def sign_flip_test(samples: Sequence[Sample], seed: int, resamples: int = 10_000) -> float:
    """Two-sided p of "the two sides are exchangeable on every question": each question's difference keeps or swaps its sign.

    samples: differences per question, one Sample per benchmark; the statistic is their average over benchmarks.
    """
    if not samples:
        raise UserError("a test over no benchmarks", why="none was given")
    products = np.concatenate([one.values * one.weights for one in samples]) / len(samples)
    sizes, counts = np.unique(np.round(np.abs(products), 15), return_counts=True)
    rng = np.random.default_rng(seed)
    flips = rng.binomial(counts, 0.5, size=(resamples, counts.size))
    null = (2 * flips - counts) @ sizes
    reached = np.count_nonzero(np.abs(null) >= abs(products.sum()) - 1e-12)
    return (1 + reached) / (1 + resamples)


def mcnemar(first: np.ndarray, second: np.ndarray) -> tuple[int, int, float]:
    """(questions only the first got right, only the second, exact two-sided p) of two models' answers, bool[N] each, question by question.

    McNemar's test without its normal approximation: where just one is right, either is as likely under no difference (a binomial of one
    half). Exact at every N, in whole numbers.
    """
    one, other = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    assert one.shape == other.shape, "the same questions"
    if one.size == 0:
        raise UserError("a paired test over no questions", why="n = 0", hint="run the benchmark, or leave it out of the study")
    only_first, only_second = int(np.sum(one & ~other)), int(np.sum(other & ~one))
    apart, tail, term = only_first + only_second, 0, 1
    for k in range(min(only_first, only_second) + 1):
        tail += term
        term = term * (apart - k) // (k + 1)
    return only_first, only_second, min(1.0, 2 * tail / 2**apart)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjustment (1979): family-wise, no assumption on dependence."""
    ordered = sorted(p_values.items(), key=lambda item: item[1])
    adjusted: dict[str, float] = {}
    running = 0.0
    for rank, (name, p) in enumerate(ordered):
        running = max(running, min(1.0, (len(ordered) - rank) * p))
        adjusted[name] = running
    return {name: adjusted[name] for name in p_values}


@dataclass(frozen=True)
class Spread:
    """Repeated runs that differ in their seed only; `deviation` is the sample standard deviation, None for one run."""

    n: int
    mean: float
    deviation: float | None
    low: float
    high: float


def seed_spread(values: Sequence[float]) -> Spread:
    """What the seed alone moves, over runs that share everything else."""
    if not values:
        raise UserError("the spread of no runs", why="n = 0", hint="give at least one run's value")
    array = np.asarray(values, dtype=np.float64)
    deviation = float(array.std(ddof=1)) if array.size > 1 else None
    return Spread(array.size, float(array.mean()), deviation, float(array.min()), float(array.max()))


def z_against_chance(correct: np.ndarray, chance: np.ndarray) -> tuple[float, float]:
    """(standard error of the share right under chance, z). correct float[N] in 0-1, chance float[N]: 1 / number of options."""
    if len(correct) == 0:
        raise UserError("a z value of no questions", why="n = 0")
    error = math.sqrt(float(np.sum(chance * (1 - chance)))) / len(correct)
    gap = float(np.mean(correct) - np.mean(chance))
    return error, gap / error if error > 0 else math.nan


def _strata(drawn: Sample) -> list[np.ndarray]:
    """Question indices by stratum; classes of one question form a stratum together (joined by the smallest class if alone)."""
    if drawn.strata is None:
        return [np.arange(drawn.values.size)]
    order = np.argsort(drawn.strata, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(drawn.strata[order])) + 1)
    lone = [group for group in groups if group.size == 1]
    rest = sorted((group for group in groups if group.size > 1), key=len)
    if len(lone) == 1 and rest:
        lone.append(rest.pop(0))
    return [*rest, np.concatenate(lone)] if lone else rest


def _leads_negative(products: np.ndarray) -> bool:
    """The canonical side of a difference, so that swapping the arms mirrors the draws exactly."""
    total = products.sum()
    if abs(total) > 1e-15:
        return bool(total < 0)
    moved = products[products != 0]
    return bool(moved.size and moved[0] < 0)


def _normal_quantile(p: float) -> float:
    return NormalDist().inv_cdf(p)
