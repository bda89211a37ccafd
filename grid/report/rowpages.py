"""The rows behind every number: a page per arm and benchmark with each question, its options, the text answered and the letter read.

In: `Results`, their scored.parquet files and the questions. Out: files below the report folder (`rows/`, `control/`, `encoders/`,
`answers/`, `benchmarks/`, `confusions/`, `arms/`, `thumbs/`); returns the set of pages written, so that only existing pages are linked.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from grid.report import benchmarkpages, confusions, pictures
from grid.report.beside import write_beside
from grid.report.curves import curves_html
from grid.report.markup import escape, marks_html, shell, table_html
from grid.report.rowlist import COLUMNS, MOST, PER_PAGE, Asked, asked_of, write_list, write_page
from grid.report.table import (
    Cell,
    Column,
    Table,
    arm_page,
    benchmark_page,
    beside_page,
    confusions_page,
    control_page,
    encoder_page,
    number,
    plain,
    rows_page,
    slug,
)  # fmt: skip
from grid.report.tables import marks_of, title_of
from grid.results import Arm, Results, Score


def write_pages(results: Results, folder: Path, home: str = "index.html") -> set[str]:
    """All pages; paths relative to folder. home: the report's own page, which they lead back to."""
    pages: set[str] = set()
    counted = {benchmark: made for benchmark in results.benchmarks if (made := confusions.count(results, benchmark)) is not None}
    for benchmark in results.benchmarks:
        asked = asked_of(results.questions.get(benchmark), slug(benchmark), folder)
        for arm in results.arms:
            if (score := arm.scores.get(benchmark)) is not None and score.path is not None:
                pages |= _rows(results, arm, benchmark, score, asked, folder, home, benchmark in counted)
        pages |= _controls(results, benchmark, folder, home) | _encoders(results, benchmark, asked, folder, home)
        pages |= write_beside(results, benchmark, asked, folder, home)
        if benchmark in counted:
            table = pictures.open_questions(results.questions[benchmark]) if benchmark in results.questions else None
            text = confusions.render(results, counted[benchmark], table, asked.sheet(1), pages, PER_PAGE, home)
            pages.add(write_page(folder, confusions_page(benchmark), text))
    pages |= {arm_page(arm.name) for arm in results.arms} | {benchmark_page(benchmark) for benchmark in results.benchmarks}
    for benchmark in results.benchmarks:
        write_page(folder, benchmark_page(benchmark), benchmarkpages.render(results, benchmark, pages, home))
    for arm in results.arms:
        write_page(folder, arm_page(arm.name), shell(f"{arm.name}, {results.title}", _arm(results, arm, pages, home), "arm"))
    return pages


def _listed(path: Path, most: int | None = None) -> tuple[list[dict[str, Any]], int]:
    """(the first rows, how many there are)"""
    import pyarrow.parquet as pq

    table = pq.ParquetFile(path).read(columns=COLUMNS)  # absent ones are left out
    return table.slice(0, most).to_pylist(), table.num_rows


def _rows(
    results: Results, arm: Arm, benchmark: str, score: Score, asked: Asked, folder: Path, home: str, told: bool
) -> set[str]:  # fmt: skip
    """Pages of one arm's rows. told: its benchmark has a page of confusions."""
    assert score.path is not None
    listed, n = _listed(score.path, MOST)
    ways = [(arm.name, arm_page(arm.name)), (title_of(benchmark), benchmark_page(benchmark))]
    ways += [("confusions", confusions_page(benchmark))] if told else []
    title, facts = f"{arm.name} on {title_of(benchmark)}", _facts(score, n)
    going_on = f"The first {len(listed):,} of {n:,} questions" if n > len(listed) else ""
    head = partial(_head, results, home, title, ways, facts, _axes(arm), asked, going_on, beside_page(benchmark))
    return write_list(folder, partial(rows_page, arm.name, benchmark), title, head, listed, asked)


def _controls(results: Results, benchmark: str, folder: Path, home: str) -> set[str]:
    """Pages of the rows that arms answered with images permuted; thumbnails show what they saw."""
    pages: set[str] = set()
    known: dict[str, Asked] = {}
    for arm in results.arms:
        score = arm.controls.get(benchmark)
        if score is None or score.path is None:
            continue
        predicted = results.stages.get(score.stage or "", {}).get("spec", {}).get("predictions", "")
        stage = results.stages.get(predicted, {}).get("spec", {}).get("questions", "")
        if stage not in known:
            path = results.store / stage if results.store is not None and stage else None
            known[stage] = asked_of(path, f"control/{slug(benchmark)}", folder)
        listed, n = _listed(score.path)
        title = f"{arm.name} on {title_of(benchmark)}, images permuted"
        ways = [(arm.name, arm_page(arm.name)), (title_of(benchmark), benchmark_page(benchmark))]
        head = partial(_head, results, home, title, ways, _facts(score, n), _axes(arm), known[stage], "", "")
        pages |= write_list(folder, partial(control_page, arm.name, benchmark), title, head, listed, known[stage])
    return pages


def _encoders(results: Results, benchmark: str, asked: Asked, folder: Path, home: str) -> set[str]:
    """Pages of the images that encoders classified by themselves: answered is the most similar class of all, letter that of the options."""
    pages: set[str] = set()
    for arm in results.arms:
        found = arm.zeroshot.get(benchmark)
        path = results.store / found["stage"] / "scored.parquet" if found is not None and results.store is not None else None
        if found is None or path is None or not path.is_file() or encoder_page(found["stage"]) in pages:
            continue
        listed, n = _listed(path)
        title = f"{arm.axes.get('encoder', arm.name)} alone on {title_of(benchmark)}"
        facts = [f"{plain(100 * found['top1'])} % right among all classes", f"{n} images"]
        if found.get("among_choices") is not None:
            facts.insert(1, f"{plain(100 * found['among_choices'])} % among the options")
        facts.append("✓: the most similar of all classes is right; letter: the most similar option")
        ways = [(title_of(benchmark), benchmark_page(benchmark))]
        head = partial(_head, results, home, title, ways, facts, "", asked, "", "")
        pages |= write_list(folder, partial(encoder_page, found["stage"]), title, head, listed, asked)
    return pages


def _facts(score: Score, n: int) -> list[str]:
    facts = [f"{plain(score.value)} % {score.metric.replace('_', ' ')}", f"{n} questions"]
    if score.stderr is not None:
        facts.insert(1, f"± {plain(score.stderr)}")
    if score.said:
        facts.insert(1, score.said)
    if score.valid is not None:
        facts.append(f"{plain(100 * score.valid)} % valid")
    if score.chance is not None:
        facts.append(f"chance {plain(score.chance)} %")
    return [*facts, f"read by {score.read_by}"]


def _head(
    results: Results, home: str, title: str, ways: list[tuple[str, str]], facts: list[str], axes: str, asked: Asked, listed: str,
    more: str, up: str,
) -> str:  # fmt: skip
    """What stands above a list. listed: how much of it is here, where that isn't all; more: the page with the rest."""
    links = " · ".join(f'<a href="{up}{escape(page)}">{escape(name)}</a>' for name, page in ways)
    rest = f'<a href="{up}{escape(more)}">all questions with the answers of all arms</a>'
    shown = f"<p>{escape(listed)}; {rest}</p>" if listed else ""
    question = f'<p class="question">{escape(" ".join(part for part in asked.common if part))}</p>' if asked.common else ""
    recipe = f'<p class="axes">{axes}</p>' if axes else ""
    return (
        f'<nav><a href="{up}{escape(home)}">report</a> › {links}</nav><h1>{escape(title)} {marks_html(marks_of(results))}</h1>'
        f'<p class="caption">{escape(" · ".join(facts))}</p>{recipe}{question}{shown}'
    )


def _axes(arm: Arm) -> str:
    return " ".join(f"<span><small>{escape(axis)}</small> {escape(value)}</span>" for axis, value in arm.axes.items())


def _arm(results: Results, arm: Arm, pages: set[str], home: str) -> str:
    """An arm's own page: axes, scores with links to rows, training curves, stages."""
    columns = [Column("benchmark", numeric=False), *map(Column, benchmarkpages.SCORE)]
    scores = Table("scores", "Scores", columns, marks=marks_of(results))
    for benchmark in results.benchmarks:
        asked = Cell(title_of(benchmark), href=rows_page(arm.name, benchmark))
        scores.rows.append([asked, *benchmarkpages.score_cells(arm, benchmark)])
    for group in results.groups:
        mean = number(arm.value(group, results.groups), "", "#scores", arm.reason(group, results.groups))
        scores.rows.append([Cell(f"mean: {title_of(group)}"), mean, *(Cell("") for _ in range(5))])
    named = [Column(title, numeric=False) for title in ("stage", "kind", "identity")]
    stages = Table("stages", "Stages", [*named, Column("seconds")])
    for id in arm.stages:
        stage = results.stages.get(id, {})
        done = stage.get("done")
        seconds = number(None if done is None else done.get("seconds"), reason="not finished")
        stages.rows.append([Cell(stage.get("name", id)), Cell(stage.get("kind", "")), Cell(id), seconds])
    kind = arm.source + (" (a stand-in in this profile)" if arm.stands_in else "")
    start = f" · starts from {arm.init}" if arm.init not in (None, "fresh") else ""
    return (
        f'<nav><a href="../{escape(home)}">report</a></nav><h1>{escape(arm.name)} {marks_html(marks_of(results))}</h1>'
        f'<p class="caption">{escape(kind + start)}</p><p class="axes">{_axes(arm)}</p>'
        f"{table_html(scores, '../', pages)}{curves_html(results, arm)}{table_html(stages, '../', pages)}"
    )
