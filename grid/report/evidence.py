"""What the numbers rest on: questions, validity, chance, seeds (`baselines` has controls and the encoders' own scores).

In: `Results` of a run. Out: `Table`s, each None where the run has nothing of the kind.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from grid import stats
from grid.report.table import Cell, Column, Table, arm_page, benchmark_page, confusions_page, number, plain, rows_page, span
from grid.report.tables import marks_of, title_of
from grid.results import NOT_RUN, PER_CLASS, Arm, Results, Score

CLEAR = 15.0
"""Points above chance that an arm must reach to count as having learned (with an interval clear of chance)."""


@lru_cache(maxsize=4096)
def score_interval(score: Score) -> stats.Interval | None:
    """Points: Wilson for a share of right answers, else bootstrap (within classes or subtasks); None without answers."""
    answers, points = score.answers, score.points
    if answers is None or points is None or not len(answers):
        return None
    if score.metric == PER_CLASS or answers.share is not None:
        return stats.bootstrap([stats.sample(points.values, points.strata)], seed=0).scaled(100.0)
    return stats.wilson(int(answers.correct.sum()), len(answers)).scaled(100.0)


def group_chance(arm: Arm, names: tuple[str, ...]) -> float | None:
    known = [arm.scores[b].chance for b in names if b in arm.scores]
    values = [c for c in known if c is not None]
    return float(np.mean(values)) if len(values) == len(names) and values else None


def clear_of_chance(results: Results, margin: float = CLEAR) -> dict[str, list[str]]:
    """benchmark → arms that answer `margin` points or more above chance with the whole interval above it."""
    found: dict[str, list[str]] = {}
    for benchmark in results.benchmarks:
        found[benchmark] = []
        for arm in results.arms:
            score = arm.scores.get(benchmark)
            interval = score_interval(score) if score else None
            if score and score.chance is not None and interval and score.value >= score.chance + margin and interval.low > score.chance:
                found[benchmark].append(arm.name)
    return found


def benchmarks_table(results: Results) -> Table | None:
    """One row per benchmark: what is asked, how it is counted, and how many arms are clear of chance."""
    columns = [
        Column("benchmark", numeric=False),
        Column("average", numeric=False),
        Column("metric", numeric=False),
        Column("questions"),
        Column("classes"),
        Column("chance"),
        Column("answer rule", numeric=False),
        Column("least", "valid answers"),
        Column("mean", "valid answers"),
        Column("best arm", numeric=False),
        Column("best"),
        Column(f"arms ≥ {CLEAR:.0f} above chance"),
    ]
    table = Table(
        "benchmarks",
        "Benchmarks",
        columns,
        marks=marks_of(results),
        caption="valid: an answer could be read off the text; an invalid answer counts as wrong, never as a guess",
    )
    clear = clear_of_chance(results)
    for benchmark in results.benchmarks:
        scores = [(arm, arm.scores[benchmark]) for arm in results.arms if benchmark in arm.scores]
        if not scores and any(benchmark in arm.not_run for arm in results.arms):
            why = next(arm.missing[benchmark] for arm in results.arms if benchmark in arm.not_run)
            table.rows.append([Cell(title_of(benchmark)), Cell(NOT_RUN, reason=why), *(Cell("") for _ in columns[2:])])
        if not scores or scores[0][1].n is None:
            continue
        page = benchmark_page(benchmark)
        group = next((title_of(g) for g, members in results.groups.items() if benchmark in members), "none")
        first, valid = scores[0][1], [s.valid for _, s in scores if s.valid is not None]
        best, top = max(scores, key=lambda pair: pair[1].value)
        worst = rows_page(min(scores, key=lambda pair: 1.0 if pair[1].valid is None else pair[1].valid)[0].name, benchmark)
        counts = sorted({s.n for _, s in scores if s.n is not None})
        classes = len(np.unique(first.answers.labels)) if first.answers is not None else None
        table.rows.append([
            Cell(title_of(benchmark), href=confusions_page(benchmark)),
            Cell(group),
            Cell(first.metric.replace("_", " ")),
            Cell("–".join(str(c) for c in {counts[0]: 0, counts[-1]: 0}), href=page),
            Cell(str(classes), href=page) if classes and classes > 1 else Cell("–"),
            number(first.chance, href=page, reason=str(first.told.get("no_chance") or "")),
            Cell(first.read_by),
            number(100 * min(valid) if valid else None, "", worst, tone="warn" if valid and min(valid) < 0.95 else ""),
            number(100 * float(np.mean(valid)) if valid else None, href=page),
            Cell(best.name, href=rows_page(best.name, benchmark)),
            number(top.value, top.said, rows_page(best.name, benchmark)),
            Cell(f"{len(clear[benchmark])} of {len(scores)}", href=page),
        ])
        judge = first.told.get("judge")
        if judge:
            unread = sum((s.told.get("judge") or {}).get("unreadable", 0) for _, s in scores)
            asked = sum((s.told.get("judge") or {}).get("asked", 0) for _, s in scores)
            table.notes.append(
                f"{title_of(benchmark)}: judged by {judge['model']} with prompt {judge['prompt']} ({judge['version']}); "
                f"{unread} of its {asked} replies can't be read, their answers are invalid"
            )
        if benchmark in results.partial:
            table.notes.append(f"{title_of(benchmark)}: {results.partial[benchmark]}; not comparable with numbers over the whole set")
        invalid = [f"{arm.name} {plain(100 * s.valid)} %" for arm, s in scores if s.valid is not None and s.valid < 0.95]
        if invalid:
            table.notes.append(f"{title_of(benchmark)}: under 95 % valid answers: {', '.join(invalid)}; the rest can't be read")
    return table if table.rows else None


def detail_table(results: Results) -> Table | None:
    """Every score of every arm with n, interval, validity and distance from chance."""
    columns = [
        Column("arm", numeric=False),
        Column("benchmark", numeric=False),
        Column("value"),
        Column("± se"),
        Column("95 % interval"),
        Column("n"),
        Column("valid %"),
        Column("above chance"),
        Column("z"),
    ]
    table = Table(
        "detail",
        "Every score",
        columns,
        marks=marks_of(results),
        folded=True,
        caption="intervals: Wilson for accuracy, else bootstrap (within classes for mean-per-class, within subtasks for MME); "
        "z: right answers against chance, under chance's own error",
    )
    for arm in results.arms:
        for benchmark in results.benchmarks:
            score = arm.scores.get(benchmark)
            if score is None or score.answers is None:
                continue
            interval = score_interval(score)
            _, z = stats.z_against_chance(score.answers.correct, score.answers.guess)
            page = rows_page(arm.name, benchmark)
            why = str(score.told.get("no_chance") or "")
            table.rows.append([
                Cell(arm.name, href=arm_page(arm.name)),
                Cell(title_of(benchmark), href=benchmark_page(benchmark)),
                number(score.value, score.said, page),
                number(score.stderr, href=page),
                Cell(span(interval.low, interval.high) if interval else "–", href=page),
                Cell(str(score.n), href=page),
                number(None if score.valid is None else 100 * score.valid, href=page),
                number(None if score.chance is None else score.value - score.chance, "", page, why, signed=True),
                number(None if why else z, "", page, why, signed=True),
            ])
    return table if table.rows else None


def repeated(results: Results) -> list[list[Arm]]:
    """Arms of one recipe with several seeds."""
    recipes: dict[tuple[object, ...], list[Arm]] = {}
    for arm in results.arms:
        recipes.setdefault((arm.source, arm.init, *sorted(arm.axes.items())), []).append(arm)
    return [arms for arms in recipes.values() if len({arm.seed for arm in arms}) > 1]


def seeds_table(results: Results) -> Table | None:
    """Arms that repeat a recipe with other seeds: what the seed alone moves. None where no recipe is repeated."""
    names = list(results.groups) or results.benchmarks
    columns = [Column("arms", numeric=False), Column("seeds")]
    columns += [Column(title, title_of(name)) for name in names for title in ("mean", "± sd", "least", "most")]
    table = Table(
        "seeds", "Spread over training seeds", columns, marks=marks_of(results), caption="± sd: sample standard deviation between seeds"
    )
    for arms in repeated(results):
        page = f"#seeds-{len(table.rows) + 1}"
        cells = [Cell(", ".join(arm.name for arm in arms), href=page), Cell(str(len(arms)), href=page)]
        for name in names:
            values = [value for arm in arms if (value := arm.value(name, results.groups)) is not None]
            if values:
                spread = stats.seed_spread(values)
                cells.append(number(spread.mean, href=page))
                cells.append(number(spread.deviation, href=page, reason="one run"))
                cells += [number(spread.low, href=page), number(spread.high, href=page)]
            else:
                cells += [number(None, reason="no score")] * 4
        table.rows.append(cells)
    return table if table.rows else None
