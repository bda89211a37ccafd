"""Everything a report says, before it is written in any format.

In: `Results`. Out: `Report`: effects, headline sentences, tables in reading order, and the JSON of `grid.report --json`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from grid import stats
from grid.effects import METHOD, Effect, Estimate, compute
from grid.report import baselines, compared, evidence, invalid, provenance
from grid.report.existing import existing_table
from grid.report.table import Table, plain, span
from grid.report.tables import (
    average_interval,
    effects_table,
    is_clear,
    marks_of,
    paper_tables,
    printed_effects,
    steps_table,
    title_of,
    waits,
)  # fmt: skip
from grid.results import Results

EVIDENCE = (
    compared.compared_table,
    compared.benchmarks_compared,
    evidence.seeds_table,
    evidence.benchmarks_table,
    invalid.invalid_table,
    baselines.zeroshot_table,
    baselines.control_table,
    evidence.detail_table,
    provenance.lost_table,
    provenance.subsets_table,
    provenance.assumptions_table,
    provenance.time_table,
    provenance.versions_table,
)
"""What a run's numbers rest on, in reading order; each gives None where the run has nothing of the kind."""


@dataclass
class Report:
    results: Results
    effects: list[Effect]
    headline: list[str]
    tables: list[Table]
    marks: Sequence[str] = field(default_factory=list)

    def table(self, id: str) -> Table | None:
        return next((table for table in self.tables if table.id == id), None)


def build(results: Results) -> Report:
    """The whole report of a run or of a published table."""
    effects = compute(results)
    tables: list[Table | None] = [effects_table(results, effects) if effects else None, steps_table(results), *paper_tables(results)]
    tables.append(existing_table(results))
    if results.directory is not None:
        tables += [make(results) for make in EVIDENCE]
    return Report(results, effects, headline(results, effects), [table for table in tables if table is not None], marks_of(results))


def headline(results: Results, effects: Sequence[Effect]) -> list[str]:
    """What a reader should know first, in sentences."""
    lines = []
    if results.study.get("miniature"):
        lines.append(
            "A miniature: tiny models and small sets. It shows the machinery at work and how effects are read, not the paper's scale."
        )
    for group in results.groups:
        known = [(arm, value) for arm in results.arms if (value := arm.value(group, results.groups)) is not None]
        if known:
            best, top = max(known, key=lambda pair: pair[1])
            worst, low = min(known, key=lambda pair: pair[1])
            ends = f"from {plain(low)} ({worst.name}) to {plain(top)} ({best.name})"
            lines.append(f"{title_of(group)}: {ends} over {len(known)} of {len(results.arms)} arms.")
    for group in results.groups:
        clear = [effect for effect in effects if is_clear(effect.groups[group])]
        if clear:
            strongest = max(clear, key=lambda effect: abs(effect.groups[group].mean or 0.0))
            found = strongest.groups[group]
            text = f"{plain(found.mean or 0.0, signed=True)} points {span(found.low, found.high, True)}"
            lines.append(f"Largest effect on {title_of(group)}: {strongest.contrast.name.replace('_', ' ')}, {text}.")
    if results.directory is not None:
        lines += _checks(results)
    return lines


def _checks(results: Results) -> list[str]:
    lines = []
    clear = evidence.clear_of_chance(results)
    arms = {name for names in clear.values() for name in names}
    on, of = sum(len(names) for names in clear.values()), sum(len(arm.scores) for arm in results.arms)
    lines.append(
        f"{len(arms)} of {len(results.arms)} arms answer at least one benchmark {evidence.CLEAR:.0f} points or more above chance "
        f"with an interval clear of it ({on} of {of} scores)."
    )
    asked = [score for arm in results.arms for score in arm.scores.values() if score.valid is not None and score.n]
    if asked:
        share = sum((s.valid or 0.0) * (s.n or 0) for s in asked) / sum(s.n or 0 for s in asked)
        lines.append(f"{plain(100 * share)} % of all {sum(s.n or 0 for s in asked)} answers are valid{invalid.because(results)}.")
    controls = [score.answers for arm in results.arms for score in arm.controls.values() if score.answers is not None]
    if any(a.valid.any() for a in controls):
        valid = np.concatenate([a.valid for a in controls])
        correct = np.concatenate([a.correct.astype(float) for a in controls])[valid]
        options = np.concatenate([a.guess for a in controls])[valid]
        error, z = stats.z_against_chance(correct, options)
        inside = "within" if abs(z) <= 2 else "NOT within"
        lines.append(
            f"Images permuted among questions: {plain(100 * correct.mean())} % of the valid answers are right "
            f"where chance is {plain(100 * options.mean())} %, {inside} two standard errors "
            f"(z = {plain(z, signed=True, digits=2)}, {correct.size} of {valid.size} answers)."
        )
    missing = [arm.name for arm in results.arms if waits(arm)]
    for name in (b for b in results.benchmarks if any(b in arm.not_run for arm in results.arms)):
        why = next(arm.missing[name] for arm in results.arms if name in arm.not_run)
        lines.append(f"{title_of(name)} is {why}; no average that it belongs to is taken.")
    if missing:
        lines.append(f"Scores are missing for {', '.join(missing)}; no average is taken over fewer benchmarks than its name says.")
    return lines


def as_json(report: Report) -> dict[str, Any]:
    """The document of `grid.report --json`: percentage points 0-100; low and high are null without row-level data."""
    results = report.results
    printed = printed_effects(results)
    return {
        "study": results.study.get("name", results.title),
        "profile": results.study.get("profile"),
        "miniature": bool(results.study.get("miniature")),
        "batch_scale": results.study.get("batch_scale", 1.0),
        "allow_subset": list(results.study.get("allow_subset") or []),
        "subsets": results.study.get("subsets") or {},
        "marks": list(report.marks),
        "groups": {group: list(members) for group, members in results.groups.items()},
        "interval": {"method": f"{METHOD}, percentile", "level": stats.LEVEL, "resamples": stats.RESAMPLES, "seed": 0},
        "arms": [_arm(results, arm) for arm in results.arms],
        "effects": [_effect(effect, printed.get(effect.contrast.name, {})) for effect in report.effects],
        "headline": report.headline,
        "notices": results.notices,
    }


def _arm(results: Results, arm: Any) -> dict[str, Any]:
    names = [*results.groups, *results.benchmarks]
    detail: dict[str, Any] = {}
    for group, members in results.groups.items():
        interval = average_interval(arm, members)
        if interval is not None:
            detail[group] = {"low": _round(interval.low), "high": _round(interval.high)}
    for benchmark, score in arm.scores.items():
        interval = evidence.score_interval(score)
        if score.n is not None:
            detail[benchmark] = {
                "low": _round(interval.low if interval else None), "high": _round(interval.high if interval else None),
                "stderr": _round(score.stderr), "n": score.n, "valid": score.valid, "chance": _round(score.chance), "metric": score.metric,
                "rule": score.rule, "method": score.method, "options_shown": score.listed,
            }  # fmt: skip
    known = results.published
    twin = known.by_row(arm.row) if known is not None else None
    published = {name: twin.value(name, known.groups) for name in names} if known is not None and twin is not None else None
    return {
        "name": arm.name, "row": arm.row, "source": arm.source, "axes": arm.axes,
        "metrics": {name: _round(arm.value(name, results.groups)) for name in names},
        "detail": detail, "missing": arm.missing, "published": published,
    }  # fmt: skip


def _effect(effect: Effect, printed: dict[str, Any]) -> dict[str, Any]:
    contrast = effect.contrast
    return {
        "name": contrast.name, "axis": contrast.axis, "from": "|".join(contrast.start), "to": "|".join(contrast.goal),
        "where": contrast.where_text, "pairs": len(effect.pairs),
        **{group: _estimate(estimate) for group, estimate in effect.groups.items()},
        "benchmarks": {name: _estimate(estimate) for name, estimate in effect.benchmarks.items()},
        "matched": [[a.name, b.name] for a, b in effect.pairs], "published": printed or None, "notes": list(effect.notes),
    }  # fmt: skip


def _estimate(estimate: Estimate) -> dict[str, Any]:
    return {
        "mean": _round(estimate.mean), "low": _round(estimate.low), "high": _round(estimate.high), "pairs": estimate.pairs,
        "p": estimate.p, "p_holm": estimate.p_holm, "questions": estimate.questions or None,
    }  # fmt: skip


def _round(value: float | None) -> float | None:
    """Four decimals of a percentage point: more is noise of the arithmetic."""
    return None if value is None or value != value else round(float(value), 4)
