"""A benchmark's own page: every arm's score with links to its rows, the parts that the score is made of, and the way to all answers.

In: `Results`. Out: HTML for `benchmarks/NAME.html`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grid.report.markup import escape, link, marks_html, shell, table_html
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
    rows_page,
)
from grid.report.tables import marks_of, title_of
from grid.results import NOT_RUN, Arm, Results, Score

MOST_PARTS = 60
SCORE = ("value", "± se", "n", "valid %", "chance", "images permuted")
"""What a page tells of a score, a column each."""


def render(results: Results, benchmark: str, pages: set[str], home: str) -> str:
    """pages: of rows that exist."""
    up = "../" * benchmark_page(benchmark).count("/")
    near = (("confusions", confusions_page(benchmark)), ("all arms side by side", beside_page(benchmark)))
    ways = [link(escape(text), page, pages, up) for text, page in near if page in pages]
    tables = [_arms(results, benchmark), _parts(results, benchmark), _encoders(results, benchmark)]
    nav = " · ".join([f'<a href="{up}{escape(home)}">report</a>', *ways])
    body = (
        f"<nav>{nav}</nav>"
        f"<h1>{escape(title_of(benchmark))} {marks_html(marks_of(results))}</h1>"
        f"{''.join(table_html(table, up, pages) for table in tables if table is not None)}"
    )
    return shell(f"{title_of(benchmark)}, {results.title}", body, "benchmark")


def _arms(results: Results, benchmark: str) -> Table:
    table = Table("arms", "Every arm", [Column("arm", numeric=False), *map(Column, SCORE)], marks=marks_of(results))
    for arm in results.arms:
        table.rows.append([Cell(arm.name, href=arm_page(arm.name)), *score_cells(arm, benchmark)])
    return table


def score_cells(arm: Arm, benchmark: str) -> list[Cell]:
    """An arm's score under the titles of `SCORE`, with links to its rows; why there is none in the first cell."""
    score, control, page = arm.scores.get(benchmark), arm.controls.get(benchmark), rows_page(arm.name, benchmark)
    if score is None:
        reason = arm.missing.get(benchmark, NOT_RUN)
        absent = Cell(NOT_RUN, reason=reason) if benchmark in arm.not_run else number(None, reason=reason)
        return [absent, *(Cell("") for _ in SCORE[1:])]
    return [
        number(score.value, score.said, page), number(score.stderr, href=page), Cell(str(score.n or ""), href=page),
        number(None if score.valid is None else 100 * score.valid, href=page),
        number(score.chance, href=page, reason=str(score.told.get("no_chance") or "")),
        number(None if control is None else control.value, href=control_page(arm.name, benchmark), reason="no control for this arm"),
    ]  # fmt: skip


def _parts(results: Results, benchmark: str) -> Table | None:
    """Categories, subtasks or accuracies over groups, a row each; None where it has no two."""
    found = {arm.name: parts for arm in results.arms if benchmark in arm.scores and (parts := parts_of(arm.scores[benchmark]))}
    names = list(dict.fromkeys(name for parts in found.values() for name in parts))
    if len(names) < 2:
        return None  # one part is the whole
    columns = [Column("part", numeric=False), *(Column(name) for name in found)]
    table = Table("parts", "By part", columns, marks=marks_of(results), caption="percentage points, or what the part says it is")
    for name in names[:MOST_PARTS]:
        row = [Cell(name)]
        row += [number(parts.get(name), href=rows_page(arm, benchmark), reason="not asked") for arm, parts in found.items()]
        table.rows.append(row)
    if len(names) > MOST_PARTS:
        table.notes.append(f"the first {MOST_PARTS} of {len(names)} parts; all of them: scores.json of the score stages")
    return table


def parts_of(score: Score) -> dict[str, float]:
    """Part → its number, from scores.json."""
    told = score.told
    if "mme" in told:
        parts = {f"{name}, points": part["points"] for name, part in told["mme"]["subtasks"].items()}
        return parts | {f"{name}, points of {told['mme'][name]['of']}": told["mme"][name]["points"] for name in ("perception", "cognition")}
    if "ocrbench" in told:
        return {f"{name}, right of {part['of']}": float(part["right"]) for name, part in told["ocrbench"]["categories"].items()}
    if "hallusion" in told:
        return {name: 100 * part["accuracy"] for name, part in told["hallusion"].items()}
    if "f1" in told:
        own = {name: 100 * told["f1"][name] for name in ("accuracy", "precision", "recall", "yes_share")}
        each: Mapping[str, Any] = told["f1"].get("by_category") or {}
        return own | {f"F1, {name}": 100 * part["f1"] for name, part in each.items()}
    if "by_ability" in told:
        return {name: 100 * part["mean"] for name, part in told["by_ability"].items()}
    return {name: 100 * part["accuracy"] for name, part in (told.get("by_category") or {}).items()}


def _encoders(results: Results, benchmark: str) -> Table | None:
    """The arms' encoders by themselves, each once."""
    table = Table("encoders", "Encoders alone", [Column("encoder", numeric=False), Column("all classes"), Column("among the options")])
    seen: set[str] = set()
    for arm in results.arms:
        found = arm.zeroshot.get(benchmark)
        if found is None or found["stage"] in seen:
            continue
        seen.add(found["stage"])
        shares = [None if found.get(name) is None else 100 * found[name] for name in ("top1", "among_choices")]
        cells = [number(share, href=encoder_page(found["stage"]), reason="not asked") for share in shares]
        table.rows.append([Cell(arm.axes.get("encoder", arm.name), href=encoder_page(found["stage"])), *cells])
    table.marks = marks_of(results)
    return table if table.rows else None
