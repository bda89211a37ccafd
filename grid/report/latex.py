"""A report's tables as LaTeX (booktabs), ready for \\input in a paper.

In: a built `Report`. Out: a standalone document; each table can be cut out on its own. Marks (miniature, subset) are part of
every caption, so that a number can't be copied without them.
"""

from __future__ import annotations

from grid.report.build import Report
from grid.report.table import ABSENT, Cell, Table

LEFT_OUT = ("versions", "time", "detail", "lost")
SPECIAL = {"&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\^{}",
           "\\": r"\textbackslash{}", "<": r"\textless{}", ">": r"\textgreater{}", "−": r"$-$", "±": r"$\pm$", "→": r"$\to$",
           "≥": r"$\ge$", "–": "--", "“": "``", "”": "''", "|": r"\textbar{}"}  # fmt: skip


FIT = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"  # noqa: RUF027
"""Wide tables shrink to the line, others stay as they are."""
BEGIN, END = r"\begin{table}[p]\centering", r"\end{table}"  # noqa: RUF027
BOTTOM = [r"\bottomrule", r"\end{tabular}}"]  # noqa: RUF027


def render(report: Report) -> str:
    """The whole document."""
    head = [
        r"\documentclass{article}", r"\usepackage[utf8]{inputenc}", r"\usepackage[T1]{fontenc}",
        r"\usepackage{booktabs,graphicx}", r"\usepackage[a4paper,landscape,margin=1.5cm]{geometry}", r"\begin{document}",
        rf"\section*{{{escape(report.results.study.get('question') or report.results.title)}}}",
    ]  # fmt: skip
    head += [escape(line) + r"\par" for line in report.headline]
    tables = [render_table(table) for table in report.tables if table.rows and table.id not in LEFT_OUT]
    return "\n".join([*head, "", *tables, r"\end{document}", ""])


def render_table(table: Table) -> str:
    """One table environment."""
    spec = "".join("r" if column.numeric else "l" for column in table.columns)
    marks = "".join(rf" \emph{{({escape(mark)})}}" for mark in table.marks)
    caption = rf"\caption{{{escape(table.title)}.{marks}{' ' + escape(table.caption) + '.' if table.caption else ''}}}"
    lines = [BEGIN, caption, rf"\label{{tab:{table.id}}}", FIT]
    lines += [rf"\begin{{tabular}}{{{spec}}}", r"\toprule"]
    groups = _groups(table)
    if any(name for name, _ in groups):
        lines.append(" & ".join(rf"\multicolumn{{{n}}}{{c}}{{{escape(name)}}}" for name, n in groups) + r" \\")
        at = 1
        for name, n in groups:
            if name:
                lines.append(rf"\cmidrule(lr){{{at}-{at + n - 1}}}")
            at += n
    lines.append(" & ".join(escape(column.title) for column in table.columns) + r" \\ \midrule")
    lines += [" & ".join(_cell(cell) for cell in cells) + r" \\" for cells in table.rows]
    lines += BOTTOM
    lines += [rf"\par\footnotesize {escape(note)}" for note in (*table.notes, *table.absences())]
    return "\n".join([*lines, END, ""])


def escape(text: str) -> str:
    return "".join(SPECIAL.get(character, character) for character in text)


def _cell(cell: Cell) -> str:
    text = "--" if cell.text == ABSENT else escape(cell.text)
    if cell.tone == "strong":
        text = rf"\textbf{{{text}}}"
    elif cell.tone == "published":
        text = rf"\textit{{{text}}}"
    return text + (rf" {{\scriptsize {escape(cell.detail)}}}" if cell.detail else "")


def _groups(table: Table) -> list[tuple[str, int]]:
    """(heading, columns it spans) in order."""
    spans: list[tuple[str, int]] = []
    for column in table.columns:
        if spans and spans[-1][0] == column.group:
            spans[-1] = (column.group, spans[-1][1] + 1)
        else:
            spans.append((column.group, 1))
    return spans
