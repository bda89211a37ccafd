"""A list of asked questions as pages: image, words, options, what was answered and what was read of it.

In: rows of a scored.parquet and what the questions say. Out: files below the report folder and their names. A set larger than MOST goes on
in the pages that show all arms side by side (`beside`), which every page here leads to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets_ray.rows import RowTable
from grid.report import pictures
from grid.report.markup import escape, shell

PER_PAGE = 500
MOST = 1000
"""Questions listed per arm and benchmark with images and words; all of them stand side by side with the other arms'."""
COLUMNS = ["id", "label", "options", "answer", "text", "letter", "valid", "correct", "credit", "judged", "members"]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Asked:
    """What the report knows of a benchmark's questions beyond a scored.parquet."""

    words: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """id → (hint, question) of the first MOST."""
    sheets: Sequence[pictures.Sheet | None] = ()
    """Thumbnails of each page of PER_PAGE."""
    name: str = ""
    """File stem of the thumbnails, below thumbs/."""

    @property
    def common(self) -> tuple[str, str] | None:
        """The words, where all questions have the same."""
        every = set(self.words.values())
        return next(iter(every)) if len(every) == 1 else None

    def sheet(self, page: int) -> pictures.Sheet | None:
        return self.sheets[page - 1] if page <= len(self.sheets) else None

    def thumbs(self, page: int) -> str:
        return f"thumbs/{self.name}{'' if page == 1 else f'-{page}'}.jpg"


def asked_of(path: Path | None, name: str, folder: Path) -> Asked:
    """The questions at `path`; their thumbnails are written to thumbs/. Nothing where the questions are gone."""
    table = pictures.open_questions(path) if path is not None else None
    if table is None:
        return Asked()
    columns = (table.column(column)[:MOST] for column in ("id", "hint", "question"))
    words = {id: (hint, question) for id, hint, question in zip(*columns, strict=True)}
    made = Asked(words, [_sheet(table, at) for at in range(0, min(MOST, len(table)), PER_PAGE)], name)
    for page, sheet in enumerate(made.sheets, 1):
        if sheet is not None:
            file = folder / made.thumbs(page)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(sheet.data)
    return made


def _sheet(table: RowTable, start: int) -> pictures.Sheet | None:
    return pictures.sheet([table[k] for k in range(start, min(start + PER_PAGE, len(table)))], table.root)


def write_list(
    folder: Path, name_of: Callable[[int], str], title: str, head: Callable[[str], str], rows: Sequence[Mapping[str, Any]], asked: Asked
) -> set[str]:
    """Pages of at most PER_PAGE rows. name_of: number → file; head: what leads to the report folder → HTML above the list."""
    count, pages = max(1, -(-len(rows) // PER_PAGE)), set()
    for page in range(1, count + 1):
        name = name_of(page)
        up, sheet = "../" * name.count("/"), asked.sheet(page)
        style = f"<style>.thumb{{background-image:url({up}{asked.thumbs(page)})}}</style>" if sheet is not None else ""
        first = (page - 1) * PER_PAGE
        shown = list_html(rows[first : first + PER_PAGE], sheet, {} if asked.common else asked.words, first)
        pages.add(write_page(folder, name, shell(title, head(up) + filters() + style + shown + pager(name_of, page, count), "rows")))
    return pages


def filters() -> str:
    kinds = ("all", "wrong", "invalid")
    radios = "".join(
        f'<label><input type="radio" name="show" id="show-{kind}"{" checked" if kind == "all" else ""}> {kind}</label>' for kind in kinds
    )
    return f'<form class="filter">{radios}</form>'


def list_html(
    rows: Sequence[Mapping[str, Any]], sheet: pictures.Sheet | None, words: Mapping[str, tuple[str, str]], first: int
) -> str:  # fmt: skip
    """The table of questions; first: the number of its first row, which others link to."""
    parts = ['<div class="scroll"><table class="asked"><thead><tr>']
    heads = [*(["image"] if sheet else []), "question", "options", "answered", "letter", ""]
    parts += [f"<th>{head}</th>" for head in heads]
    parts.append("</tr></thead><tbody>")
    for at, row in enumerate(rows, first):
        state = "right" if row["correct"] else "wrong" if row["valid"] else "wrong invalid"
        parts.append(f'<tr class="{state}" id="r{at}">')
        if sheet is not None:
            place = sheet.places.get(row["id"])
            tile = f'<div class="thumb" style="background-position:-{place[0]}px -{place[1]}px"></div>' if place else ""
            parts.append(f"<td>{tile}</td>")
        hint, question = words.get(row["id"], ("", ""))
        said = f"{escape(hint)} {escape(question)}".strip()
        parts.append(f"<td>{said}{'<br>' if said else ''}<small>{escape(row['id'])} {escape(row['label'] or '')}</small></td>")
        parts.append(f"<td>{_options(row)}</td><td><code>{escape(row['text'])}</code>{_beside(row)}</td>")
        parts.append(f"<td>{escape(row['letter'] or '–')}</td><td>{_outcome(row)}</td></tr>")
    parts.append("</tbody></table></div>")
    return "".join(parts)


def _options(row: Mapping[str, Any]) -> str:
    """The options, the right one bold and the one given underlined; without options the right answer."""
    if not row["options"]:
        return f"<span><b>{escape(row['answer'] or '')}</b></span>"
    parts = []
    for letter, option in zip(LETTERS, row["options"], strict=False):
        text = f"{letter}. {escape(option)}"
        text = f"<b>{text}</b>" if letter == row["answer"] else text
        parts.append(f'<span class="given">{text}</span>' if letter == row["letter"] else f"<span>{text}</span>")
    return "".join(parts)


def _beside(row: Mapping[str, Any]) -> str:
    """A judge's reply, or the answers to all rotations of the question."""
    told = []
    if row.get("judged") is not None:
        told.append(f"judge: {escape(row['judged'])}")
    if row.get("members"):
        given = " ".join(f"{escape(one['letter'] or '–')}{'✓' if one['correct'] else '✗'}" for one in row["members"])
        told.append(f"rotations: {given}")
    return "".join(f"<br><small>{one}</small>" for one in told)


def _outcome(row: Mapping[str, Any]) -> str:
    if not row["valid"]:
        return "invalid"
    credit = row.get("credit")
    return f"{credit:.2f}" if credit is not None and 0 < credit < 1 else "✓" if row["correct"] else "✗"


def pager(name_of: Callable[[int], str], page: int, count: int) -> str:
    """Links to all pages of a list, from one of them."""
    if count == 1:
        return ""
    names = [Path(name_of(k)).name for k in range(1, count + 1)]
    links = [f"<b>{k}</b>" if k == page else f'<a href="{escape(name)}">{k}</a>' for k, name in enumerate(names, 1)]
    return f'<nav class="pager">page {" ".join(links)}</nav>'


def write_page(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return name
