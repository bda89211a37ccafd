"""Confusions: which class is taken for which, over all arms and by arm, with the questions behind the most frequent ones.

In: `Results` whose scored.parquet name classes as options (mined, annotated and FOCI sets), and their questions for families and pictures.
Out: a page per benchmark, `confusions/NAME.html`. Of large sets a picture shows every class, tables the classes most confused: what is
cut says so. A class can only be taken for one that was shown, so each count stands beside how often that option was shown.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from datasets_ray.rows import RowTable
from grid.report.markup import escape, link, marks_html, shell, table_html
from grid.report.pictures import Sheet
from grid.report.table import Cell, Column, Table, beside_page, number, plain, rows_page, slug
from grid.report.tables import marks_of, title_of
from grid.results import Arm, Results

LISTED = 30
"""Confusions listed over all arms; each arm's own list has FEW."""
FEW = 5
EXAMPLES = 3
LEGIBLE = 40
"""A matrix of at most so many classes is a table; of larger ones the SUBSET most confused classes are."""
SUBSET = 25
PICTURE = 480
"""Side of the picture of all classes, pixels; a cell has one at least."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SHARE = "share of the row's answers that name an option, %"
UNKNOWN = "only ever an option"


@dataclass(frozen=True)
class Confusions:
    """One benchmark. counts, shown: int[C, C], true class × option: how often it was taken and how often it stood there, over all arms."""

    benchmark: str
    classes: list[str]
    counts: np.ndarray
    shown: np.ndarray
    invalid: np.ndarray
    """int[C]: answers that named no option."""
    by_arm: dict[str, np.ndarray]
    """arm → its own counts."""
    ids: dict[str, list[str]]
    """arm → the questions' ids in the order of its rows."""
    wrong: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]
    """arm → (row number, true class, class taken) of its wrong answers that name an option."""

    @property
    def confused(self) -> np.ndarray:
        """int[C, C]: counts without the right answers."""
        return self.counts - np.diag(np.diag(self.counts))


def count(results: Results, benchmark: str) -> Confusions | None:
    """The benchmark's confusions; None where its options aren't its classes, or nobody answered it row by row."""
    read = {}
    for arm in results.arms:
        score = arm.scores.get(benchmark)
        if score is not None and score.path is not None and (known := _answers(score.path)) is not None:
            read[arm.name] = known
    if not read:
        return None
    names = sorted({name for _, labels, options, *_ in read.values() for name in (*labels, *options)})
    if len(names) < 2:
        return None
    codes, size = {name: code for code, name in enumerate(names)}, len(names)
    made = Confusions(benchmark, names, np.zeros((size, size), int), np.zeros((size, size), int), np.zeros(size, int), {}, {}, {})
    for arm_name, (ids, labels, options, owner, chosen) in read.items():
        true = np.array([codes[name] for name in labels])
        flat = np.array([codes[name] for name in options])
        np.add.at(made.shown, (true[owner], flat), 1)
        rows = np.flatnonzero(chosen >= 0)
        taken = flat[chosen[rows]]
        own = np.zeros((size, size), int)
        np.add.at(own, (true[rows], taken), 1)
        np.add.at(made.invalid, true[chosen < 0], 1)
        made.counts[...] += own
        wrong = taken != true[rows]
        made.by_arm[arm_name], made.ids[arm_name] = own, ids
        made.wrong[arm_name] = rows[wrong], true[rows][wrong], taken[wrong]
    return made


def _answers(path: Path) -> tuple[list[str], list[str], list[str], np.ndarray, np.ndarray] | None:
    """(id and label of each row, options end to end, the row of each option int[M], where among them the option taken is int[N], or -1)"""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pq.ParquetFile(path).read(columns=["id", "label", "options", "answer", "letter"]).combine_chunks()
    if not table.num_rows or not pa.types.is_list(table.schema.field("options").type):
        return None
    labels = [label or "" for label in table.column("label").to_pylist()]
    listed = table.column("options").to_pylist()
    sizes = np.array([len(one or ()) for one in listed])
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    options = [text for one in listed for text in one or ()]

    def place(letters: Sequence[str | None]) -> np.ndarray:
        at = np.array([LETTERS.find(letter) if letter else -1 for letter in letters])
        return np.where((at >= 0) & (at < sizes), starts + at, -1)

    right = place(table.column("answer").to_pylist())
    if not all(at >= 0 and options[at] == label and label for at, label in zip(right.tolist(), labels)):
        return None  # the right option is no class: a general question
    ids, owner = table.column("id").to_pylist(), np.repeat(np.arange(len(labels)), sizes)
    return ids, labels, options, owner, place(table.column("letter").to_pylist())


def families(table: RowTable | None) -> dict[str, str]:
    """class → its family (else its category), where every class has one and there are several."""
    if table is None:
        return {}
    found: dict[str, str] = {}
    for label, meta in zip(table.column("label"), table.column("meta")):
        if label not in found:
            told = json.loads(meta or "{}")
            found[label] = str(told.get("family") or told.get("category") or "")
    kinds = set(found.values())
    return found if "" not in kinds and 1 < len(kinds) < len(found) else {}


def top(made: Confusions, counts: np.ndarray, most: int) -> list[tuple[int, int]]:
    """The most frequent (true class, class taken), ties by name."""
    true, taken = np.nonzero(counts)
    order = sorted(zip(true.tolist(), taken.tolist()), key=lambda pair: (-counts[pair], made.classes[pair[0]], made.classes[pair[1]]))
    return order[:most]


# ── the page ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def render(
    results: Results, made: Confusions, table: RowTable | None, sheet: Sheet | None, pages: set[str], per_page: int, home: str
) -> str:  # fmt: skip
    """The benchmark's page. pages: of rows that exist; per_page: questions on each; home: the report's own page."""
    arms = [arm for arm in results.arms if arm.name in made.by_arm]
    asked, right = int(made.counts.sum() + made.invalid.sum()), int(np.diag(made.counts).sum())
    facts = [
        f"{len(made.classes)} classes", f"{len(arms)} arms", f"{asked} answers", f"{plain(100 * right / asked)} % right",
        f"{plain(100 * (asked - right - int(made.invalid.sum())) / asked)} % another class",
        f"{plain(100 * int(made.invalid.sum()) / asked)} % no option",
    ]  # fmt: skip
    kinds = families(table)
    style = f"<style>.thumb{{background-image:url(../thumbs/{slug(made.benchmark)}.jpg)}}</style>" if sheet is not None else ""
    body = (
        f'<nav><a href="../{escape(home)}">report</a></nav><h1>Confusions on {escape(title_of(made.benchmark))} '
        f'{marks_html(marks_of(results))}</h1><p class="caption">{escape(" · ".join(facts))}</p>{style}'
        f"{_listed(results, made, sheet, arms, pages, per_page)}{_family_matrix(results, made, kinds)}"
        f"{_matrix(results, made, kinds)}{_by_arm(results, made, arms, pages)}"
    )
    return shell(f"Confusions on {title_of(made.benchmark)}", body, "confusions")


def _listed(results: Results, made: Confusions, sheet: Sheet | None, arms: Sequence[Arm], pages: set[str], per_page: int) -> str:
    """The most frequent confusions with examples that lead to their rows."""
    confused = made.confused
    pairs = top(made, confused, LISTED)
    if not pairs:
        return "<p>No class was taken for another.</p>"
    head = "".join(f"<th{kind}>{name}</th>" for name, kind in (
        ("true class", ""), ("taken for", ""), ("times", ' class="number"'), ("of times shown", ' class="number"'),
        ("arms", ' class="number"'), ("questions", ""),
    ))  # fmt: skip
    lines = []
    for pair in pairs:
        times, shown = int(confused[pair]), int(made.shown[pair])
        by = sum(1 for own in made.by_arm.values() if own[pair])
        told = (str(times), f"{plain(100 * times / shown)} % <small>{shown}</small>", str(by))
        numbers = "".join(f'<td class="number">{link(text, beside_page(made.benchmark), pages, "../")}</td>' for text in told)
        lines.append(
            f"<tr><td>{escape(made.classes[pair[0]])}</td><td>{escape(made.classes[pair[1]])}</td>{numbers}"
            f"<td>{_examples(made, pair, arms, sheet, pages, per_page)}</td></tr>"
        )
    every = int((confused > 0).sum())
    cut = f"The {len(pairs)} most frequent of {every} confusions." if every > len(pairs) else f"All {every} confusions."
    return (
        f'<section class="table"><h2>Taken for another {marks_html(marks_of(results))}</h2><p class="caption">{cut} Over all arms; times '
        f'shown: how often that option stood beside the true class.</p><div class="scroll"><table class="asked"><thead><tr>{head}</tr>'
        f"</thead><tbody>{''.join(lines)}</tbody></table></div></section>"
    )


def _examples(
    made: Confusions, pair: tuple[int, int], arms: Sequence[Arm], sheet: Sheet | None, pages: set[str], per_page: int
) -> str:  # fmt: skip
    """Different questions where arms made this confusion, each a link to the arm's row; pictures where the sheet has them."""
    found: dict[str, tuple[int, str]] = {}
    for arm in arms:
        rows, true, taken = made.wrong[arm.name]
        for row in rows[(true == pair[0]) & (taken == pair[1])].tolist():
            if rows_page(arm.name, made.benchmark, row // per_page + 1) in pages:
                found.setdefault(made.ids[arm.name][row], (row, arm.name))
    parts = []
    for id, (row, arm_name) in sorted(found.items(), key=lambda item: item[1])[:EXAMPLES]:
        href = f"../{rows_page(arm_name, made.benchmark, row // per_page + 1)}#r{row}"
        place = sheet.places.get(id) if sheet is not None else None
        tile = f'<i class="thumb" style="background-position:-{place[0]}px -{place[1]}px"></i>' if place else ""
        parts.append(f'<a class="example" href="{escape(href)}" title="{escape(arm_name)}">{tile}row {row + 1}</a>')
    return " ".join(parts)


def _family_matrix(results: Results, made: Confusions, kinds: Mapping[str, str]) -> str:
    """Families of the classes asked about; a class that is only ever an option may have none that is known."""
    down = sorted(set(kinds.values()))
    if not kinds or len(down) > LEGIBLE:
        return ""
    across = [*down, *([UNKNOWN] if any(name not in kinds for name in made.classes) else [])]
    owner = np.array([across.index(kinds.get(name, UNKNOWN)) for name in made.classes])
    joined = np.zeros((len(across), len(across)), int)
    np.add.at(joined, (owner[:, None], owner[None, :]), made.counts)
    same = owner[:, None] == owner[None, :]
    inside, every = int(made.confused[same].sum()), max(1, int(made.confused.sum()))
    caption = f"{SHARE}; {plain(100 * inside / every)} % of all confusions stay inside a family"
    shown = [at for at, name in enumerate(across) if name in down or joined[:, at].any()]
    return _grid(results, "families", "By family", caption, down, [across[at] for at in shown], joined[: len(down), shown])


def _matrix(results: Results, made: Confusions, kinds: Mapping[str, str]) -> str:
    """Classes asked about × classes taken, families side by side: a table where it is legible, else a picture and the most confused."""
    order = sorted(range(len(made.classes)), key=lambda k: (kinds.get(made.classes[k], "~"), made.classes[k]))
    down = [k for k in order if made.shown[k].any()]
    across = [k for k in order if made.shown[k].any() or made.counts[:, k].any()]
    sorted_by = "by family and name" if kinds else "by name"
    if len(across) <= LEGIBLE:
        names, taken = [made.classes[k] for k in down], [made.classes[k] for k in across]
        return _grid(results, "classes", "By class", f"{SHARE}; {sorted_by}", names, taken, made.counts[np.ix_(down, across)])
    weight = made.confused.sum(0) + made.confused.sum(1)
    chosen = set(sorted(range(len(order)), key=lambda k: (-int(weight[k]), k))[:SUBSET])
    few, rows = [k for k in order if k in chosen], [k for k in down if k in chosen]
    caption = f"the {len(few)} of {len(order)} classes in the most confusions; {SHARE}"
    uri, side = _picture(made.counts[np.ix_(order, order)])
    said = f"All {len(order)} classes, true class down, class taken across, {sorted_by}"
    image = f'<figure class="matrix"><img src="{uri}" width="{side}" height="{side}" alt="{said}"><figcaption>{said}.</figcaption></figure>'
    names, taken = [made.classes[k] for k in rows], [made.classes[k] for k in few]
    totals = made.counts[rows].sum(1)
    return _grid(results, "classes", "By class", caption, names, taken, made.counts[np.ix_(rows, few)], totals, image)


def _grid(
    results: Results, id: str, title: str, caption: str, down: Sequence[str], across: Sequence[str], counts: np.ndarray,
    totals: np.ndarray | None = None, below: str = "",
) -> str:  # fmt: skip
    """counts int[len(down), len(across)] as shares of each row. totals: of rows that hold more than is shown."""
    totals = counts.sum(1) if totals is None else totals
    head = "".join(f"<th><span>{escape(name)}</span></th>" for name in across)
    lines = []
    for at, name in enumerate(down):
        cells = []
        for to, times in enumerate(counts[at].tolist()):
            share = 100 * times / max(1, int(totals[at]))
            if not times:
                cells.append("<td></td>")
                continue
            tone = "good" if name == across[to] else "warn"
            mix = f"background:color-mix(in srgb,var(--{tone}) {min(75.0, 6 + 0.69 * share):.0f}%,transparent)"
            cells.append(f'<td style="{mix}" title="{escape(name)} → {escape(across[to])}: {times}">{share:.0f}</td>')
        lines.append(f"<tr><th>{escape(name)}</th>{''.join(cells)}</tr>")
    return (
        f'<section class="table" id="{id}"><h2>{title} {marks_html(marks_of(results))}</h2><p class="caption">{escape(caption)}</p>'
        f'<div class="scroll"><table class="grid"><thead><tr><th>true ↓ taken →</th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>{below}</section>"
    )


def _picture(counts: np.ndarray) -> tuple[str, int]:
    """(data URI of a PNG, its side in pixels): a cell a square, darker for a larger share of its row."""
    from PIL import Image

    share = counts / np.maximum(1, counts.sum(1, keepdims=True))
    cell = max(1, PICTURE // len(counts))
    pixels = (255 * (1 - np.sqrt(share))).astype(np.uint8).repeat(cell, 0).repeat(cell, 1)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}", len(pixels)


def _by_arm(results: Results, made: Confusions, arms: Sequence[Arm], pages: set[str]) -> str:
    columns: list[Any] = [Column("arm", numeric=False), Column("another class, %"), Column("no option, %")]
    columns.append(Column(f"its {FEW} most frequent confusions", numeric=False))
    table = Table("by-arm", "By arm", columns, marks=marks_of(results))
    for arm in arms:
        own, page = made.by_arm[arm.name], rows_page(arm.name, made.benchmark)
        asked = len(arm.scores[made.benchmark].answers or ()) or int(own.sum())
        wrong = own - np.diag(np.diag(own))
        said = ", ".join(f"{made.classes[a]} → {made.classes[b]} ({wrong[a, b]})" for a, b in top(made, wrong, FEW))
        table.rows.append([
            Cell(arm.name, href=page), number(100 * int(wrong.sum()) / asked, href=page),
            number(100 * (asked - int(own.sum())) / asked, href=page), Cell(said or "none"),
        ])  # fmt: skip
    return table_html(table, "../", pages)
