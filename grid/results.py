"""What a report is made of: arms, their scores and the answers behind each score.

In: nothing here reads files; `grid.report.load` fills these types from a run directory, `grid.report.published` from a
published table, so that the same engine runs over both. Percentage points 0-100 throughout; shares of answers are 0-1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

PER_CLASS = "mean_per_class"
NOT_RUN = "not run"
"""What a cell says where a benchmark wants a judge that the study doesn't name."""


def places(known: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """int[N]: positions of the wanted names among the known; every one must be there."""
    if np.array_equal(wanted, known):
        return np.arange(len(known))
    where = {name: at for at, name in enumerate(known.tolist())}
    return np.array([where[name] for name in wanted.tolist()], dtype=np.int64)


@dataclass(frozen=True)
class Points:
    """A score as a mean over what was drawn: questions, or groups of them that only count together (MME's images). Arrays have length U."""

    ids: np.ndarray
    values: np.ndarray
    """float[U], shares"""
    strata: np.ndarray | None
    """str[U]: the mean is taken within each and then over them; None: over all."""


@dataclass(frozen=True, eq=False)
class Answers:
    """Row-level outcome of one arm on one benchmark, in the order it was asked. All arrays have length N."""

    ids: np.ndarray
    labels: np.ndarray
    correct: np.ndarray
    """bool[N]"""
    valid: np.ndarray
    """bool[N]: an answer could be read off the text."""
    options: np.ndarray
    """int[N]: how many options the question showed."""
    letters: np.ndarray
    """str[N]: the letter read off the answer, empty where there is none."""
    guess: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """float[N]: how likely a guess is right: one over the options, the product over a group's rotations, 0 for open questions. Left out:
    one over the options."""
    share: np.ndarray | None = None
    """float[N] of a metric that is no plain share of right answers (datasets_ray.benchmark_metrics): what the question adds to the mean."""
    units: np.ndarray | None = None
    """str[N]: questions that count together, with one share."""
    strata: np.ndarray | None = None
    """str[N]"""

    def __post_init__(self) -> None:
        if len(self.guess) != len(self.ids):
            object.__setattr__(self, "guess", 1.0 / np.maximum(self.options, 1))

    def __len__(self) -> int:
        return len(self.ids)

    def at(self, ids: np.ndarray) -> np.ndarray:
        """Positions of these question ids; every one must be present."""
        return places(self.ids, ids)


@dataclass(frozen=True, eq=False)
class Score:
    """One number of one arm on one benchmark, with what it rests on. Without row-level data only `value` is known."""

    value: float
    metric: str = "accuracy"
    rule: str | None = None
    n: int | None = None
    valid: float | None = None
    stderr: float | None = None
    chance: float | None = None
    answers: Answers | None = None
    stage: str | None = None
    path: Path | None = None
    """The scored Parquet file."""
    method: str = "generate"
    listed: bool = True
    """Whether the prompt showed the options."""
    invalid: dict[str, Any] = field(default_factory=dict)
    """Why answers are invalid: {"counts": {reason: n}, "examples": {reason: {"text", "options"}}}."""
    told: dict[str, Any] = field(default_factory=dict)
    """All of scores.json."""

    @property
    def points(self) -> Points | None:
        """What the value is a mean of; None without row-level data."""
        answers = self.answers
        if answers is None:
            return None
        if answers.share is None:
            return Points(answers.ids, answers.correct.astype(np.float64), answers.labels if self.metric == PER_CLASS else None)
        ids, values, strata = answers.ids, answers.share, answers.strata
        if answers.units is not None:
            first = np.sort(np.unique(answers.units, return_index=True)[1])
            ids, values, strata = answers.units[first], values[first], None if strata is None else strata[first]
        return Points(ids, values, strata)

    @property
    def said(self) -> str:
        """What a cell must say besides the number: MME's `1482.3 of 2800`, `F1`; nothing where it is a share of right answers."""
        judge = (self.told.get("judge") or {}).get("model")
        return ", ".join(part for part in (str(self.told.get("said") or ""), f"judged by {judge}" if judge else "") if part)

    @property
    def read_by(self) -> str:
        """How an answer came about, for a table: the rule that read a text, or what was compared instead."""
        how = "likelihood of the options' texts" if self.method == "likelihood" else self.rule or ""
        return how if self.listed else f"{how}, options not shown"


@dataclass
class Arm:
    """One configuration of the grid and everything measured on it."""

    name: str
    axes: dict[str, str]
    source: str = "trained"
    row: int | None = None
    init: str | None = None
    """How it starts and what else its recipe changes beyond the axes; compared when arms are matched."""
    stands_in: bool = False
    """A released model that this profile replaces by one of its own."""
    seed: int | None = None
    """Arms that repeat a recipe differ here; compared when arms are matched."""
    scores: dict[str, Score] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    """benchmark → why there is no score."""
    not_run: set[str] = field(default_factory=set)
    """Those of `missing` that were left out on purpose, for want of a judge."""
    averages: dict[str, float] = field(default_factory=dict)
    """group → the average as printed, where a table gives it; otherwise it is computed from the scores."""
    controls: dict[str, Score] = field(default_factory=dict)
    zeroshot: dict[str, dict[str, Any]] = field(default_factory=dict)
    stages: list[str] = field(default_factory=list)

    def value(self, name: str, groups: dict[str, tuple[str, ...]]) -> float | None:
        """A benchmark's value or a group's average; None when anything that it needs is missing (never an average over fewer)."""
        if name not in groups:
            return self.scores[name].value if name in self.scores else None
        if name in self.averages:
            return self.averages[name]
        members = groups[name]
        if not members or any(b not in self.scores for b in members):
            return None
        return float(np.mean([self.scores[b].value for b in members]))

    def reason(self, name: str, groups: dict[str, tuple[str, ...]]) -> str:
        """Why `value` is None."""
        if name in groups:
            why: dict[str, list[str]] = {}
            for benchmark in groups[name]:
                if benchmark not in self.scores:
                    why.setdefault(self.missing.get(benchmark, "not run"), []).append(benchmark)
            return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in why.items()) or "no benchmarks in this group"
        return self.missing.get(name, "not run")


@dataclass
class Results:
    """A run or a published table."""

    title: str
    groups: dict[str, tuple[str, ...]]
    """group → its benchmarks, e.g. fine_grained → imagenet, flowers, pets, food."""
    arms: list[Arm]
    extra: tuple[str, ...] = ()
    """Benchmarks that belong to no group."""
    contrasts: list[dict[str, Any]] = field(default_factory=list)
    """{"name", "axis", "from", "to", "where"} and, in a published table, the printed effect per group under "printed"."""
    steps: list[dict[str, Any]] = field(default_factory=list)
    """Cumulative steps of a summary table: {"label", "row", "from_row", "note", "printed": {group: value}}."""
    study: dict[str, Any] = field(default_factory=dict)
    published: Results | None = None
    directory: Path | None = None
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    """stage id → the planned stage with "done" (its DONE.json) or None."""
    notices: list[str] = field(default_factory=list)
    store: Path | None = None
    questions: dict[str, Path] = field(default_factory=dict)
    """benchmark → the rows artefact that was asked."""
    partial: dict[str, str] = field(default_factory=dict)
    """benchmark → how much of it was asked, where that is not all of it."""
    run: dict[str, Any] = field(default_factory=dict)
    """Who ran it, when and with which versions; where time went."""

    @property
    def benchmarks(self) -> list[str]:
        return list(dict.fromkeys([*(b for members in self.groups.values() for b in members), *self.extra]))

    @property
    def axes(self) -> list[str]:
        return list(dict.fromkeys(axis for arm in self.arms for axis in arm.axes))

    def by_row(self, row: int | None) -> Arm | None:
        return next((arm for arm in self.arms if row is not None and arm.row == row), None)

    def named(self, name: str) -> Arm | None:
        return next((arm for arm in self.arms if arm.name == name), None)
