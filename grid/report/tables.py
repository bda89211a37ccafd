"""The paper's tables redrawn: cumulative steps, averages, both families of benchmarks, and the effects.

In: `Results` (a run with its published twin, or a published table alone) and its effects. Out: `Table`s; published numbers
stand beside ours, an absent number is `–` with its reason, and no average is taken over fewer benchmarks than its name says.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from grid import stats
from grid.effects import METHOD, Effect, Estimate
from grid.plantext import scale
from grid.report.table import ABSENT, Cell, Column, Table, arm_page, number, plain, probability, rows_page, span
from grid.results import NOT_RUN, Arm, Results, Score

TITLES = {
    "fine_grained": "Fine-grained",
    "general_vqa": "General VQA",
    "imagenet": "ImageNet",
    "flowers": "Flowers",
    "pets": "Pets",
    "food": "Food",
    "mmbench": "MMBench",
    "mmmu": "MMMU",
    "mmstar": "MMStar",
}
INTERVAL = f"95 % intervals: {METHOD} (percentile, each question drawn once for all arms; within its class for mean-per-class accuracy)"


def title_of(name: str) -> str:
    return TITLES.get(name, name.replace("_", " "))


def ours(results: Results) -> str:
    """Heading of the results' own columns."""
    return "this run" if results.directory is not None else "published"


def marks_of(results: Results) -> list[str]:
    """What every table must say about the numbers in it."""
    marks = []
    if results.study.get("miniature"):
        marks.append("miniature")
    if (factor := results.study.get("batch_scale", 1.0)) != 1:
        marks.append(f"batches × {scale(factor)}")
    if allowed := results.study.get("allow_subset"):
        marks.append("subsets allowed" + _smaller(results.study.get("subsets") or {}, len(allowed)))
    twin = results.published
    rows = {arm.row for arm in results.arms if arm.row is not None}
    if twin is not None and rows and len(rows) < len(twin.arms):
        marks.append(f"subset: {len(rows)} of {len(twin.arms)} rows")
    elif results.study.get("subset"):
        marks.append(f"subset: {results.study['subset']}" if isinstance(results.study["subset"], str) else "subset")
    if results.partial:
        short = ", ".join(map(title_of, results.partial)) if len(results.partial) <= 3 else f"{len(results.partial)} benchmarks"
        marks.append(f"subset: not all questions of {short}")
    left_out = [b for b in results.benchmarks if any(b in arm.not_run for arm in results.arms)]
    if left_out:
        marks.append(f"{NOT_RUN}: {', '.join(map(title_of, left_out))}")
    waiting = sum(1 for arm in results.arms if waits(arm))
    if results.directory is not None and waiting:
        marks.append(f"incomplete: scores missing for {waiting} of {len(results.arms)} arms")
    return marks


def waits(arm: Arm) -> bool:
    """Whether a score that was planned for the arm, and not left out on purpose, isn't there."""
    return any(why != "not planned for this arm" and name not in arm.not_run for name, why in arm.missing.items())


def _smaller(subsets: dict[str, dict[str, int]], allowed: int) -> str:
    """Which data sets are smaller than published, or how many where they are many."""
    if len(subsets) > 3:
        return f": {len(subsets)} of {allowed} data sets are smaller than published"
    told = [f"{name} {size['found']:,} of {size['expected']:,} records" for name, size in subsets.items()]
    return f": {', '.join(told)}" if told else ""


def average_interval(arm: Arm, names: Sequence[str]) -> stats.Interval | None:
    """Bootstrap interval of an arm's average over benchmarks, in points; None without row-level data for every one."""
    scores = [arm.scores.get(name) for name in names]
    known = tuple(score for score in scores if score is not None and score.answers is not None)
    return _average(known) if known and len(known) == len(scores) else None


@lru_cache(maxsize=4096)
def _average(scores: tuple[Score, ...]) -> stats.Interval:
    samples = [stats.sample(points.values, points.strata) for score in scores if (points := score.points) is not None]
    return stats.bootstrap(samples, seed=0).scaled(100.0)


def cell_of(arm: Arm, name: str, results: Results, detail: str = "") -> Cell:
    """A benchmark's cell links to its rows, a group's to the arm's page, which links to the rows of each benchmark."""
    value = arm.value(name, results.groups)
    if value is None:
        reason = arm.reason(name, results.groups)
        return Cell(NOT_RUN, reason=reason) if name in arm.not_run else number(None, reason=reason)
    linked = results.directory is not None
    score = arm.scores.get(name)
    if score is not None and not detail:
        detail = ", ".join(part for part in (f"± {plain(score.stderr)}" if score.stderr is not None else "", score.said) if part)
    href = rows_page(arm.name, name) if score is not None and score.path is not None else arm_page(arm.name) if linked else ""
    return number(value, detail, href)


def scores_table(results: Results, id: str, title: str, names: Sequence[str], caption: str = "") -> Table:
    """One row per arm: its axes, and each name's value with the published one beside it."""
    axes = [axis for axis in results.axes if len({arm.axes.get(axis) for arm in results.arms}) > 1]
    twin = results.published
    shown = {name: twin is not None and any(arm.value(name, twin.groups) is not None for arm in twin.arms) for name in names}
    columns = [Column("arm", numeric=False), *(Column(axis, numeric=False) for axis in axes)]
    for name in names:
        columns.append(Column(ours(results) if shown[name] else "", title_of(name)))
        if shown[name]:
            columns.append(Column("paper", title_of(name)))
    table = Table(id, title, columns, marks=marks_of(results), caption=caption)
    best = {name: max((v for arm in results.arms if (v := arm.value(name, results.groups)) is not None), default=None) for name in names}
    for arm in results.arms:
        label = Cell(arm.name, _kind(arm), arm_page(arm.name) if results.directory is not None else "")
        cells = [label, *(Cell(arm.axes.get(axis, "")) for axis in axes)]
        for name in names:
            interval = (
                average_interval(arm, results.groups[name])
                if name in results.groups and arm.value(name, results.groups) is not None
                else None
            )
            cell = cell_of(arm, name, results, span(interval.low, interval.high) if interval else "")
            if arm.value(name, results.groups) is not None and arm.value(name, results.groups) == best[name]:
                cell = Cell(cell.text, cell.detail, cell.href, cell.reason, "strong")
            cells.append(cell)
            if shown[name]:
                cells.append(_printed(twin, arm.row, name))
        table.rows.append(cells)
    fixed = [
        f"{axis} {next(iter(values))}"
        for axis in results.axes
        if axis not in axes and (values := {arm.axes.get(axis) for arm in results.arms}) and len(results.arms) > 1
    ]
    if fixed:
        table.notes.append("the same for all arms: " + ", ".join(fixed))
    if results.directory is not None:
        table.notes.append("± standard error over questions; brackets: " + INTERVAL)
    return table


def _kind(arm: Arm) -> str:
    """What sets an arm apart beyond its axes: released, replaced by a stand-in, or started from other weights."""
    if arm.source == "released":
        return "released, stand-in" if arm.stands_in else "released"
    return f"from {arm.init}" if arm.init not in (None, "fresh") else ""


def titled(results: Results, number: str, title: str) -> str:
    """`Table 2. ...` where the study has a paper whose numbering it can carry, else the title alone."""
    return f"{number}. {title}" if results.published is not None or results.directory is None else title


def paper_tables(results: Results) -> list[Table]:
    """Tables 2, 3 and 4 of the paper for the groups that this study has; further benchmarks in a table of their own."""
    tables = []
    if results.groups:
        means = "; ".join(f"{title_of(g)}: mean of {', '.join(map(title_of, members))}" for g, members in results.groups.items())
        tables.append(scores_table(results, "table-2", titled(results, "Table 2", "Averages of all arms"), list(results.groups), means))
    for place, group in ((3, "general_vqa"), (4, "fine_grained")):
        if group in results.groups:
            title = titled(results, f"Table {place}", f"{title_of(group)} benchmarks")
            tables.append(scores_table(results, f"table-{place}", title, results.groups[group]))
    for group, members in results.groups.items():
        if group not in ("general_vqa", "fine_grained"):
            tables.append(scores_table(results, f"table-{group}", f"{title_of(group)} benchmarks", members))
    if results.extra:
        tables.append(scores_table(results, "table-extra", "Further benchmarks", results.extra, "in no average"))
    return tables


def steps_table(results: Results) -> Table | None:
    """Table 1: what each change adds, one on top of the other; None where the study has no such steps."""
    if not results.steps or (results.directory is not None and not any(results.by_row(s["row"]) for s in results.steps)):
        return None
    groups = list(results.groups)
    both = results.directory is not None
    columns = [Column("model or change", numeric=False), Column("row", numeric=False)]
    for group in groups:
        columns += [Column(ours(results), title_of(group)), *([Column("paper", title_of(group))] if both else [])]
    table = Table(
        "table-1",
        "Table 1. Closing the gap step by step",
        columns,
        marks=marks_of(results),
        caption="in parentheses: the change from the step named before it",
    )
    printed = {step["row"]: step["printed"] for step in results.steps if step["row"] is not None}
    for step in results.steps:
        arm, before = results.by_row(step["row"]), results.by_row(step["from_row"])
        starts = "" if step["from_row"] is None else f"from row {step['from_row']}"
        cells = [Cell(step["label"], starts), Cell("" if step["row"] is None else str(step["row"]))]
        for group in groups:
            paper = _change(step["printed"].get(group), printed.get(step["from_row"], {}).get(group), tone="published" if both else "")
            if arm is None:
                absent = "published numbers only" if step["row"] is None else "this row is not in the run"
                own = paper if not both and step["row"] is None else number(None, reason=absent)
            else:
                own = _change(
                    arm.value(group, results.groups),
                    None if before is None else before.value(group, results.groups),
                    arm_page(arm.name) if both else "",
                    arm.reason(group, results.groups),
                )
            cells += [own, paper] if both else [own]
        table.rows.append(cells)
    table.notes += [f"{step['label']}: {step['note']}" for step in results.steps if step["note"]]
    return table


def effects_table(results: Results, effects: Sequence[Effect]) -> Table:
    """Each contrast: matched pairs, the mean difference with its interval, and the paper's beside it."""
    printed, run = printed_effects(results), results.directory is not None
    columns = [Column("effect", numeric=False), Column("pairs")]
    for group in results.groups:
        titles = ["this run", "95 % interval", "p (Holm)"] if run else ["computed"]
        columns += [Column(title, title_of(group)) for title in (*titles, *(["paper"] if printed else []))]
    table = Table("effects", "Effects: one axis changed, all else equal", columns, marks=marks_of(results))
    table.caption = "percentage points, mean over matched pairs of arms that differ in one axis only"
    for effect in effects:
        contrast, known = effect.contrast, printed.get(effect.contrast.name, {})
        why = effect.notes[0] if effect.notes else "no score"
        change = f"{contrast.axis}: {' or '.join(contrast.start)} → {' or '.join(contrast.goal)}"
        href = f"#effect-{contrast.name}" if run and effect.pairs else ""
        theirs = "" if known.get("pairs") is None or (run and known["pairs"] == len(effect.pairs)) else f"(paper {known['pairs']})"
        cells = [Cell(contrast.name.replace("_", " "), change, href), Cell(str(len(effect.pairs)), theirs, href)]
        for group, estimate in effect.groups.items():
            shrunk = f"{estimate.pairs} of {len(effect.pairs)} pairs" if 0 < estimate.pairs < len(effect.pairs) else ""
            cells.append(number(estimate.mean, shrunk, href, why, "strong" if is_clear(estimate) else "", signed=True))
            if run:
                none = why if estimate.mean is None else "not every arm has its answers row by row"
                cells.append(Cell(span(estimate.low, estimate.high, True) or ABSENT, "", href, "" if estimate.low is not None else none))
                cells.append(Cell(probability(estimate.p_holm) or ABSENT, href=href))
            if printed:
                cells.append(number(known.get(group), tone="published", signed=True, reason="no published effect"))
        table.rows.append(cells)
    if run:
        table.notes.append(INTERVAL + "; they cover which questions were asked, not the training seed")
        table.notes.append(
            "p: questions' differences with signs flipped at random (two-sided), Holm's correction over the effects of the column"
        )
    table.notes += [f"{e.contrast.name}: {note}" for e in effects for note in e.notes]
    return table


def is_clear(estimate: Estimate) -> bool:
    """Whether the whole interval lies on one side of zero."""
    return estimate.low is not None and estimate.high is not None and (estimate.low > 0 or estimate.high < 0)


def printed_effects(results: Results) -> dict[str, dict[str, Any]]:
    """contrast name → printed effect per group and "pairs"."""
    source = results.published or results
    return {c["name"]: {**c.get("printed", {}), "pairs": c.get("printed_pairs")} for c in source.contrasts if c.get("printed")}


def _printed(twin: Results | None, row: int | None, name: str) -> Cell:
    arm = twin.by_row(row) if twin is not None else None
    value = arm.value(name, twin.groups) if twin is not None and arm is not None else None
    return number(value, tone="published", reason="not published")


def _change(value: float | None, before: float | None, href: str = "", reason: str = "", tone: str = "") -> Cell:
    moved = "" if value is None or before is None else f"({plain(value - before, signed=True)})"
    return number(value, moved, href, reason, tone)
