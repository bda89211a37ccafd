"""HTML pieces that every page shares: the shell with its style, tables, escaping.

In: `Table`s and text. Out: HTML strings. Pages are self-contained (style inside, no request to anywhere) and read on light and
dark; numbers are set in tabular figures.
"""

from __future__ import annotations

import html
from functools import lru_cache
from pathlib import Path

from grid.report.table import Cell, Table


def escape(text: object) -> str:
    return html.escape(str(text), quote=True)


@lru_cache(maxsize=1)
def style() -> str:
    return (Path(__file__).parent / "style.css").read_text()


def shell(title: str, body: str, kind: str = "") -> str:
    """A whole page. kind: a class of its body."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(title)}</title><style>{style()}</style></head>'
        f'<body class="{kind}">{body}</body></html>\n'
    )


def marks_html(marks: object) -> str:
    return "".join(f'<span class="mark">{escape(mark)}</span>' for mark in (marks if isinstance(marks, (list, tuple)) else []))


def table_html(table: Table, up: str = "", known: set[str] | None = None, level: int = 2) -> str:
    """A titled table. up: what leads from this page to the report folder; known: pages that exist (others are not linked)."""
    parts = [f'<section class="table" id="{escape(table.id)}"><h{level}>{escape(table.title)} {marks_html(list(table.marks))}</h{level}>']
    if table.caption:
        parts.append(f'<p class="caption">{escape(table.caption)}</p>')
    if table.rows:
        parts.append('<div class="scroll"><table><thead>')
        if any(column.group for column in table.columns):
            parts.append(f'<tr class="groups">{_groups(table)}</tr>')
        starts = _starts(table)
        heads = "".join(
            f'<th scope="col" class="{_side(column.numeric)}{" first" if k in starts else ""}">{escape(column.title)}</th>'
            for k, column in enumerate(table.columns)
        )
        parts.append(f"<tr>{heads}</tr></thead><tbody>")
        for cells in table.rows:
            line = "".join(_cell(cell, table.columns[k].numeric, k in starts, up, known) for k, cell in enumerate(cells))
            parts.append(f"<tr>{line}</tr>")
        parts.append("</tbody></table></div>")
    notes = [*table.notes, *table.absences()]
    if notes:
        parts.append('<ul class="notes">' + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>")
    inner = "".join(parts) + "</section>"
    if not table.folded:
        return inner
    return f'<details class="folded"><summary>{escape(table.title)} ({len(table.rows)} rows)</summary>{inner}</details>'


def link(text: str, href: str, known: set[str] | None = None, up: str = "") -> str:
    """A link where its page exists, else the text. text is HTML already."""
    if not href or (known is not None and not href.startswith("#") and href not in known):
        return text
    return f'<a href="{escape(href if href.startswith("#") else up + href)}">{text}</a>'


def _cell(cell: Cell, numeric: bool, first: bool, up: str, known: set[str] | None) -> str:
    text = link(escape(cell.text), cell.href, known, up)
    detail = f" <small>{escape(cell.detail)}</small>" if cell.detail else ""
    names = " ".join(name for name in (_side(numeric), cell.tone, "first" if first else "") if name)
    why = f' title="{escape(cell.reason)}"' if cell.reason else ""
    return f'<td class="{names}"{why}>{text}{detail}</td>'


def _side(numeric: bool) -> str:
    return "number" if numeric else "text"


def _starts(table: Table) -> set[int]:
    """Columns that open a new group."""
    return {k for k, column in enumerate(table.columns) if column.group and k and table.columns[k - 1].group != column.group}


def _groups(table: Table) -> str:
    parts, k = [], 0
    while k < len(table.columns):
        end = k
        while end < len(table.columns) and table.columns[end].group == table.columns[k].group:
            end += 1
        name = table.columns[k].group
        parts.append(f'<th colspan="{end - k}" class="{"group" if name else ""}"{" scope=colgroup" if name else ""}>{escape(name)}</th>')
        k = end
    return "".join(parts)
