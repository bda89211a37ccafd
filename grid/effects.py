"""Effects: what one axis does, as the mean over matched pairs of arms that differ in that axis only.

In: `grid.results.Results` and contrasts (a study's `contrasts`, or a published effects table). Out: `Effect`s in percentage
points, with paired-bootstrap intervals over questions where answers are known row by row.

A contrast is {"name", "axis", "from", "to", "where"}. `from` and `to` are values of the axis, alternatives joined by `|`.
`where` narrows the arms: clauses joined by `;`, each `key=value`, `key=a|b` or `key!=value`, where key is an axis, `row`,
`source`, `init` or `name`:

    arch=llava;updating=connector;row!=2
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from datasets_ray.errors import UserError, nearest
from grid import stats
from grid.results import Arm, Results, places
from grid.where import Clause, parse_where

METHOD = "paired bootstrap over questions"


@dataclass(frozen=True)
class Contrast:
    """An effect's definition: arms whose `axis` is one of `start` against arms whose axis is one of `goal`."""

    name: str
    axis: str
    start: tuple[str, ...]
    goal: tuple[str, ...]
    where: tuple[Clause, ...] = ()
    where_text: str = ""
    printed: Mapping[str, float] = field(default_factory=dict)
    printed_pairs: int | None = None


@dataclass(frozen=True)
class Estimate:
    """One effect on one benchmark or group. low, high and p are None where there is no row-level data; mean is None with no pair."""

    mean: float | None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    pairs: int = 0
    questions: int = 0


@dataclass(frozen=True)
class Effect:
    contrast: Contrast
    pairs: tuple[tuple[Arm, Arm], ...]
    groups: dict[str, Estimate]
    benchmarks: dict[str, Estimate]
    notes: tuple[str, ...] = ()


def parse_contrast(given: Mapping[str, Any], axes: Sequence[str], at: str = "") -> Contrast:
    """A contrast from its mapping; raises UserError for an unknown axis, an empty side or an unreadable `where`."""
    name, axis = str(given["name"]), str(given["axis"])
    if axis not in axes:
        raise UserError(f"contrast {name!r} is over the axis {axis!r}", why="no arm has it", hint=nearest(axis, axes), where=at)
    sides = [tuple(v.strip() for v in str(given[side]).split("|") if v.strip()) for side in ("from", "to")]
    if not all(sides) or set(sides[0]) & set(sides[1]):
        raise UserError(
            f"contrast {name!r} goes from {given['from']!r} to {given['to']!r}",
            why="two different sides are needed",
            hint="for example from: none, to: llava|pixmo",
            where=at,
        )
    text = str(given.get("where") or "")
    pairs = given.get("printed_pairs")
    return Contrast(
        name,
        axis,
        sides[0],
        sides[1],
        parse_where(text, axes, at or f"contrast {name}"),
        text,
        dict(given.get("printed") or {}),
        None if pairs is None else int(pairs),
    )


def facts(arm: Arm) -> dict[str, str]:
    """What clauses look at, as text."""
    row = "" if arm.row is None else str(arm.row)
    return {**{k: str(v) for k, v in arm.axes.items()}, "row": row, "source": arm.source, "init": arm.init or "", "name": arm.name}


def matched_pairs(arms: Sequence[Arm], contrast: Contrast) -> list[tuple[Arm, Arm]]:
    """All (from, to) whose other axes, `init` and seed are equal, in the order of the arms.

    A released model has no known recipe: its init is not compared, and where a trained arm has the same axes it stands back
    (row 1 is the released twin of row 12; row 18 has no trained twin, so it forms a pair).
    """
    chosen = [arm for arm in arms if all(clause.holds(facts(arm)) for clause in contrast.where)]
    trained = {tuple(sorted(arm.axes.items())) for arm in chosen if arm.source != "released"}
    chosen = [arm for arm in chosen if arm.source != "released" or tuple(sorted(arm.axes.items())) not in trained]

    def rest(arm: Arm) -> dict[str, str]:
        return {axis: value for axis, value in arm.axes.items() if axis != contrast.axis}

    starts = [arm for arm in chosen if arm.axes.get(contrast.axis) in contrast.start]
    goals = [arm for arm in chosen if arm.axes.get(contrast.axis) in contrast.goal]
    return [
        (a, b)
        for a in starts
        for b in goals
        if rest(a) == rest(b) and ("released" in (a.source, b.source) or (a.init == b.init and a.seed == b.seed))
    ]


def compute(results: Results, seed: int = 0, resamples: int = stats.RESAMPLES) -> list[Effect]:
    """Every contrast of the results, with Holm's correction over the contrasts within each group and each benchmark."""
    effects = [_effect(results, parse_contrast(given, results.axes), seed, resamples) for given in results.contrasts]
    for kind, names in (("groups", list(results.groups)), ("benchmarks", results.benchmarks)):
        for name in names:
            known = {e.contrast.name: getattr(e, kind)[name].p for e in effects}
            adjusted = stats.holm({key: p for key, p in known.items() if p is not None})
            for effect in effects:
                table = getattr(effect, kind)
                if effect.contrast.name in adjusted:
                    table[name] = replace(table[name], p_holm=adjusted[effect.contrast.name])
    return effects


def _effect(results: Results, contrast: Contrast, seed: int, resamples: int) -> Effect:
    pairs = matched_pairs(results.arms, contrast)
    notes = [] if pairs else ["no matched pair of arms in this run"]
    estimate = partial(_estimate, results, pairs, seed=seed, resamples=resamples, notes=notes)
    benchmarks = {name: estimate(name, (name,)) for name in results.benchmarks}
    groups = {name: estimate(name, members) for name, members in results.groups.items()}
    short = {name: found.pairs for name, found in groups.items() if found.pairs < len(pairs)}
    if short:
        notes.append("; ".join(f"{name}: {count} of {len(pairs)} pairs have both values" for name, count in short.items()))
    return Effect(contrast, tuple(pairs), groups, benchmarks, tuple(dict.fromkeys(notes)))


def _estimate(
    results: Results, pairs: Sequence[tuple[Arm, Arm]], name: str, members: tuple[str, ...], seed: int, resamples: int, notes: list[str]
) -> Estimate:
    """The effect on a benchmark or a group of them (`members`), over the pairs that have it on both sides."""
    used, gaps = [], []
    for start, goal in pairs:
        before, after = start.value(name, results.groups), goal.value(name, results.groups)
        if before is not None and after is not None:
            used.append((start, goal))
            gaps.append(after - before)
    if not gaps:
        return Estimate(None)
    mean = float(np.mean(gaps))
    drawn = [difference(used, member, notes) for member in members]
    samples = [one for one in drawn if one is not None]
    if len(samples) < len(drawn):
        return Estimate(mean, pairs=len(gaps))
    fixed = zlib.crc32(f"{seed}:{name}".encode())
    interval = stats.bootstrap(samples, fixed, resamples=resamples).scaled(100.0)
    p = stats.sign_flip_test(samples, fixed)
    shift = mean - interval.mean  # not zero only where some questions are not shared by all arms
    return Estimate(mean, interval.low + shift, interval.high + shift, p, None, len(gaps), sum(one.values.size for one in samples))


def difference(pairs: Sequence[tuple[Arm, Arm]], benchmark: str, notes: list[str]) -> stats.Sample | None:
    """Per question, the mean over pairs of (right in `to`) - (right in `from`): float[N] in -1..1. None without row-level data.

    Forming it before resampling draws a question once for all arms, so pairs that share an arm need no independence.
    """
    scores = {arm.name: arm.scores.get(benchmark) for pair in pairs for arm in pair}
    points = {name: known for name, score in scores.items() if score is not None and (known := score.points) is not None}
    if len(points) < len(scores):
        return None
    first = next(iter(points.values()))
    ids = first.ids
    if any(not np.array_equal(other.ids, ids) for other in points.values()):
        shared = set.intersection(*(set(other.ids.tolist()) for other in points.values()))
        keep = np.array([name in shared for name in ids.tolist()], dtype=bool)
        notes.append(f"{benchmark}: {keep.sum()} questions are shared by all arms of the contrast; the interval rests on these")
        ids = ids[keep]
        if not ids.size:
            return None
    right = {name: given.values[places(given.ids, ids)] for name, given in points.items()}
    gap = np.mean([right[goal.name] - right[start.name] for start, goal in pairs], axis=0)
    strata = next((given.strata[places(given.ids, ids)] for given in points.values() if given.strata is not None), None)
    return stats.sample(gap, strata)
