"""A report as Markdown: what a terminal, a pull request and a README show.

In: a built `Report` and its figures' file names. Out: text; links are relative to the report folder, and left out of numbers, which the
page links: a table should read as text.
"""

from __future__ import annotations

from collections.abc import Sequence

from grid.report.build import Report
from grid.report.figures import Figure
from grid.report.table import Cell, Table

FIGURES = (
    ("effects", "effects"), ("effects", "figure-5"), ("effects", "figure-7"), ("table-1", "figure-8"), ("existing", "figure-3"),
)  # fmt: skip
"""(table, a figure that follows it)"""


def render(report: Report, figures: Sequence[Figure] = (), links: bool = True) -> str:
    """The whole report. links: False leaves out what only a folder of pages has."""
    results = report.results
    parts = [f"# {results.study.get('question') or results.title}", ""]
    about = [results.title, *(f"profile {p}" for p in [results.study.get("profile")] if p), *report.marks]
    parts += [" · ".join(about), "", *(f"- {line}" for line in report.headline), ""]
    pictures = {figure.id: figure for figure in figures}
    for table in report.tables:
        if table.folded:
            continue
        parts += [f"## {table.title}", "", *render_table(table, links), ""]
        for after, id in FIGURES:
            if table.id == after and id in pictures:
                figure = pictures.pop(id)
                marks = "".join(f" ({mark})" for mark in figure.marks)
                parts += [f"![{figure.title}](figures/{figure.id}.png)", "", f"*{figure.title}{marks}. {figure.caption}*", ""]
    if results.notices:
        parts += ["## Notices", "", *(f"- {notice}" for notice in results.notices), ""]
    return "\n".join(parts)


def render_table(table: Table, links: bool = True) -> list[str]:
    """Lines of one table: marks, caption, pipes, then its notes and the reasons behind every `–`."""
    lines = []
    said = [*(f"**{mark}**" for mark in table.marks), *([table.caption] if table.caption else [])]
    if said:
        lines += [" · ".join(said), ""]
    if table.rows:
        heads = [" ".join(part for part in (c.group, c.title) if part) for c in table.columns]
        lines.append("| " + " | ".join(map(_escape, heads)) + " |")
        lines.append("|" + "|".join("---:" if c.numeric else "---" for c in table.columns) + "|")
        for cells in table.rows:
            lines.append("| " + " | ".join(_cell(cell, links and not c.numeric) for c, cell in zip(table.columns, cells)) + " |")
    notes = [*table.notes, *table.absences()]
    if notes:
        lines += ["", *(f"- {_escape(note)}" for note in notes)]
    return lines


def _cell(cell: Cell, links: bool) -> str:
    text = _escape(cell.text)
    if cell.tone == "strong":
        text = f"**{text}**"
    if links and cell.href and not cell.href.startswith("#"):
        text = f"[{text}]({cell.href})"
    return f"{text} {_escape(cell.detail)}".strip()


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
