"""The report as one HTML page: abstract, effects, the paper's tables and figures, what was asked, and what the numbers rest on.

In: a built `Report`, its figures and the pages of rows that exist. Out: HTML without any request to elsewhere. A benchmark's
number leads to its rows in one click, an average or an effect's name in two.
"""

from __future__ import annotations

from collections.abc import Sequence

from grid.effects import Effect
from grid.report import gallery
from grid.report.build import Report
from grid.report.evidence import repeated
from grid.report.figures import Figure
from grid.report.markup import escape, marks_html, shell, table_html
from grid.report.table import ABSENT, Cell, Column, Table, arm_page, number, plain, rows_page
from grid.report.tables import marks_of, title_of
from grid.results import Arm, Results

FIGURES_AFTER = {"effects": ("effects", "figure-5", "figure-7"), "table-1": ("figure-8",), "existing": ("figure-3",)}
"""Table id → figures that follow it; figures left over come at the end of the results."""
EVIDENCE = (
    "compared", "compared-benchmarks", "seeds", "benchmarks", "invalid", "zeroshot", "control", "detail", "lost", "subsets", "assumptions",
    "time", "versions",
)  # fmt: skip


OPENS = (
    "<script>addEventListener('hashchange',o);function o(){const e=document.getElementById(location.hash.slice(1));"
    "const d=e&&e.closest('details');if(d){d.open=true;e.scrollIntoView()}}o()</script>"
)
"""A link into a folded block opens it."""


def render(report: Report, figures: Sequence[Figure], pages: set[str]) -> str:
    """The page. pages: files beside it, relative to its folder."""
    results = report.results
    left = {figure.id: figure for figure in figures}
    found: list[str] = []
    rest: list[str] = []
    for table in report.tables:
        target = rest if table.id in EVIDENCE else found
        if table.id == "effects" and "effects" in left:
            target.append(figure_html(left.pop("effects")))
        target.append(table_html(table, known=pages))
        if table.id == "effects" and pages:
            target.append(_pairs(results, report.effects, pages))
        if table.id == "seeds" and pages:
            target.append(_seeds(results, pages))
        target += [figure_html(left.pop(id)) for id in FIGURES_AFTER.get(table.id, ()) if id in left]
    found += [figure_html(figure) for figure in left.values()]
    asked = gallery.render(results) if pages else ""
    notices = "".join(f"<li>{escape(notice)}</li>" for notice in results.notices)
    notices = f'<section id="notices"><h2>Notices</h2><ul class="notes">{notices}</ul></section>' if notices else ""
    contents = _contents(report, bool(asked), bool(notices))
    body = f"{_head(report)}{contents}<main>{''.join(found)}{asked}{''.join(rest)}{notices}</main>{_foot(results)}"
    return shell(f"{results.title}: report", body, "report")


def figure_html(figure: Figure) -> str:
    """A figure with its marks and caption."""
    return (
        f'<figure class="plot" id="plot-{escape(figure.id)}"><div class="scroll">{figure.svg}</div>'
        f"<figcaption><b>{escape(figure.title)}.</b> {escape(figure.caption)} {marks_html(list(figure.marks))}</figcaption></figure>"
    )


def _head(report: Report) -> str:
    results = report.results
    study = results.study
    facts = [f"study {results.title}" if results.directory is not None else results.title]
    if study.get("profile"):
        facts.append(f"profile {study['profile']}")
    facts.append(f"{len(results.arms)} arms, {len(results.benchmarks)} benchmarks")
    lines = "".join(f"<li>{escape(line)}</li>" for line in report.headline)
    return (
        f'<header><p class="kicker">finegrid report {marks_html(list(report.marks))}</p>'
        f"<h1>{escape(study.get('question') or results.title)}</h1>"
        f'<p class="caption">{escape(" · ".join(facts))}</p><ul class="abstract">{lines}</ul></header>'
    )


def _contents(report: Report, asked: bool, notices: bool) -> str:
    entries = [
        (table.id, table.title.split(".")[0] if table.title.startswith("Table") else table.title)
        for table in report.tables
        if not table.folded
    ]
    first = [entry for entry in entries if entry[0] not in EVIDENCE]
    second = [entry for entry in entries if entry[0] in EVIDENCE]
    entries = [*first, *([("gallery", "What was asked")] if asked else []), *second, *([("notices", "Notices")] if notices else [])]
    names = {
        "effects": "Effects",
        "zeroshot": "Encoders alone",
        "control": "Control",
        "lost": "Rows lost",
        "subsets": "Subsets",
        "time": "Time",
    }
    return (
        '<nav class="contents">'
        + "".join(f'<a href="#{escape(id)}">{escape(names.get(id, title))}</a>' for id, title in entries)
        + "</nav>"
    )


def _foot(results: Results) -> str:
    if results.directory is None:
        return "<footer>Numbers as published; effects computed by finegrid.</footer>"
    return "<footer>Written by finegrid from the run directory; the same numbers are in report.json, report.md and report.tex.</footer>"


def _pairs(results: Results, effects: Sequence[Effect], pages: set[str]) -> str:
    """Each effect's matched pairs, folded: every number leads to its rows."""
    parts = []
    for effect in effects:
        contrast = effect.contrast
        columns = [Column("from", numeric=False), Column("to", numeric=False)]
        columns += [Column(title, title_of(name)) for name in (*results.groups, *results.benchmarks) for title in ("from", "to", "Δ")]
        table = Table(f"effect-{contrast.name}", contrast.name.replace("_", " "), columns, marks=marks_of(results))
        table.caption = f"{contrast.axis}: {' | '.join(contrast.start)} → {' | '.join(contrast.goal)}" + (
            f", where {contrast.where_text}" if contrast.where_text else ""
        )
        for start, goal in effect.pairs:
            cells = [Cell(start.name, href=arm_page(start.name)), Cell(goal.name, href=arm_page(goal.name))]
            for name in (*results.groups, *results.benchmarks):
                before, after = start.value(name, results.groups), goal.value(name, results.groups)
                cells += [_linked(start, name, results, before), _linked(goal, name, results, after)]
                moved = None if before is None or after is None else after - before
                href = rows_page(goal.name, name) if name in goal.scores else arm_page(goal.name)
                cells.append(Cell(ABSENT) if moved is None else Cell(plain(moved, signed=True), "", href, tone="strong"))
            table.rows.append(cells)
        if table.rows:
            inner = table_html(table, known=pages, level=3)
            parts.append(f"<details><summary>{escape(contrast.name.replace('_', ' '))}: {len(table.rows)} pairs</summary>{inner}</details>")
    return f'<div class="pairs">{"".join(parts)}</div>{OPENS}' if parts else ""


def _seeds(results: Results, pages: set[str]) -> str:
    """The arms behind each row of the table of seeds, folded."""
    parts = []
    names = (*results.groups, *results.benchmarks)
    for number_, arms in enumerate(repeated(results), 1):
        columns = [Column("arm", numeric=False), *(Column(title_of(name)) for name in names)]
        table = Table(f"seeds-{number_}", ", ".join(arm.name for arm in arms), columns, marks=marks_of(results))
        for arm in arms:
            cells = [_linked(arm, name, results, arm.value(name, results.groups)) for name in names]
            table.rows.append([Cell(arm.name, href=arm_page(arm.name)), *cells])
        parts.append(f"<details><summary>{escape(table.title)}</summary>{table_html(table, known=pages, level=3)}</details>")
    return f'<div class="pairs">{"".join(parts)}</div>{OPENS}' if parts else ""


def _linked(arm: Arm, name: str, results: Results, value: float | None) -> Cell:
    target = rows_page(arm.name, name) if name in arm.scores else arm_page(arm.name)
    return number(value, href=target, reason=arm.reason(name, results.groups) if value is None else "")
