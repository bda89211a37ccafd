"""Numbers over scored questions: columns of right/wrong, labels and option counts in, shares with their standard errors out.

All values here are shares in [0, 1]; the score stage turns them into percentage points. An empty set is an error, never a zero.
A benchmark says `metric: NAME` with a name of `NAMES`: a share of right answers (`METRICS`), one over groups of questions (`GROUPED`), or
a benchmark's own (`SETS`, defined in `benchmark_metrics`). The report shows whichever the benchmark's score stage names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from datasets_ray.benchmark_metrics import SETS, yes_no
from datasets_ray.errors import UserError, nearest


@dataclass(frozen=True)
class Metric:
    """How a column of right/wrong becomes one number."""

    value: Callable[[np.ndarray, np.ndarray], float]
    """(correct bool[N], class int[N]) → share."""
    error: Callable[[np.ndarray, np.ndarray], float | None]
    """(correct bool[N], class int[N]) → standard error of that share; None where the sample can't tell (n = 1)."""
    of: Callable[[np.ndarray, np.ndarray], float]
    """(any float[N], class int[N]) → the same averaging over another column; chance is its value over 1 / options."""


def _some(values: Sequence[object] | np.ndarray) -> None:
    if len(values) == 0:
        raise UserError("no questions to score", why="a metric over nothing is not zero", hint="look at the dataset stage's dropped rows")


def classes_of(labels: Sequence[str]) -> np.ndarray:
    """int[N]: each label's class number, classes numbered in sorted order of those present."""
    _some(labels)
    return np.unique(np.asarray(labels, dtype=object).astype(str), return_inverse=True)[1]


def _micro(values: np.ndarray, classes: np.ndarray) -> float:
    _some(values)
    return float(np.mean(values))


def _micro_error(correct: np.ndarray, classes: np.ndarray) -> float | None:
    """sqrt(p (1 - p) / (n - 1)): the sample standard deviation over sqrt(n)."""
    _some(correct)
    n, p = len(correct), float(np.mean(correct))
    return math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None


def _macro(values: np.ndarray, classes: np.ndarray) -> float:
    """Mean over the classes present of the mean within each (`balanced_accuracy_score` of scikit-learn)."""
    _some(values)
    counts = np.bincount(classes)
    return float(np.mean(np.bincount(classes, weights=np.asarray(values, dtype=np.float64))[counts > 0] / counts[counts > 0]))


def _macro_error(correct: np.ndarray, classes: np.ndarray) -> float | None:
    """Strata are independent: sqrt(sum_c s_c^2 / n_c) / C, s_c^2 the class's sample variance.

    A class with one question has no variance of its own; it takes the mean of the others', and the pooled one where no class has two.
    """
    _some(correct)
    counts = np.bincount(classes)
    sums = np.bincount(classes, weights=np.asarray(correct, dtype=np.float64))[counts > 0]
    counts = counts[counts > 0]
    share = sums / counts
    several = counts > 1
    if several.any():
        own = np.where(several, share * (1 - share) * counts / np.maximum(counts - 1, 1), 0.0)
        variance = np.where(several, own, own[several].mean())
    elif len(correct) > 1:
        pooled = float(np.mean(correct))
        variance = np.full(len(counts), pooled * (1 - pooled) * len(correct) / (len(correct) - 1))
    else:
        return None
    return float(math.sqrt(np.sum(variance / counts)) / len(counts))


METRICS: dict[str, Metric] = {
    "accuracy": Metric(_micro, _micro_error, _micro),
    "mean_per_class": Metric(_macro, _macro_error, _macro),
}

GROUPED = {"circular": "accuracy"}
"""Metric over groups of questions → the averaging over those groups. A group is right when all its questions are: MMBench's rotations."""


NAMES = (*METRICS, *GROUPED, *SETS)
"""Every metric that a benchmark may name."""


def known(name: str) -> None:
    """UserError for a name that is no metric's."""
    if name not in NAMES:
        raise UserError(f"unknown metric {name!r}", hint=nearest(name, NAMES))


def metric_named(name: str) -> Metric:
    """A share of right answers by name; UserError for another."""
    if name not in METRICS:
        raise UserError(f"unknown metric {name!r}", hint=nearest(name, METRICS))
    return METRICS[name]


def accuracy(correct: Sequence[bool] | np.ndarray) -> float:
    """Share of all questions answered right (micro)."""
    return _micro(np.asarray(correct, dtype=bool), np.zeros(0, dtype=int))


def mean_per_class(correct: Sequence[bool] | np.ndarray, labels: Sequence[str]) -> float:
    """Mean over the classes present of each class's accuracy (macro)."""
    return _macro(np.asarray(correct, dtype=bool), classes_of(labels))


@dataclass(frozen=True)
class Groups:
    """Questions by group, in the order of first appearance: members[g] int[k], and what all of them give together."""

    members: list[np.ndarray]

    @classmethod
    def of(cls, names: Sequence[str]) -> Groups:
        """names: each question's group."""
        found: dict[str, list[int]] = {}
        for at, name in enumerate(names):
            found.setdefault(name, []).append(at)
        return cls([np.array(members, dtype=np.int64) for members in found.values()])

    def all(self, values: np.ndarray) -> np.ndarray:
        """bool[G]: whether all of a group's values are true."""
        return np.array([bool(values[members].all()) for members in self.members], dtype=bool)

    def product(self, values: np.ndarray) -> np.ndarray:
        """float[G]: the product of a group's values, such as the chance of guessing all of them."""
        return np.array([float(np.prod(values[members])) for members in self.members], dtype=np.float64)


def validity(letters: Sequence[str | None], options: Sequence[Sequence[str]]) -> float:
    """Share of answers read as a letter of an option shown. A refusal (`Z`) and an unreadable answer are invalid."""
    _some(letters)
    return sum(letter is not None and 0 <= ord(letter) - ord("A") < len(shown) for letter, shown in zip(letters, options)) / len(letters)


def standard_error(metric: str, correct: Sequence[bool] | np.ndarray, labels: Sequence[str]) -> float | None:
    """Standard error of `metric`'s value, as a share; None where one question can't tell."""
    return metric_named(metric).error(np.asarray(correct, dtype=bool), classes_of(labels))


def chance(metric: str, option_counts: Sequence[int] | np.ndarray, labels: Sequence[str]) -> float:
    """What guessing uniformly among the options shown gets by `metric`, as a share."""
    counts = np.asarray(option_counts, dtype=np.float64)
    _some(counts)
    if not (counts > 0).all():
        raise UserError(f"{int((counts <= 0).sum())} questions have no options", why="there is nothing to guess among")
    return metric_named(metric).of(1.0 / counts, classes_of(labels))


__all__ = [
    "GROUPED", "METRICS", "NAMES", "SETS", "Groups", "Metric", "accuracy", "chance", "classes_of", "known", "mean_per_class",
    "metric_named", "standard_error", "validity", "yes_no",
]  # fmt: skip
