"""Every question of a benchmark with the answers of all arms side by side: what makes large sets complete and still light.

In: `Results` with answers row by row. Out: pages `answers/NAME.html`, `answers/NAME-2.html` ... of PER_PAGE questions. A question's options
stand there once for all arms, an arm's answer is a letter: 25,250 questions × 24 arms are about 25 MB in 101 pages, where a page of its
own for each arm's every question would be ten times that.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grid.report.markup import escape, marks_html, shell
from grid.report.rowlist import LETTERS, Asked, pager, write_page
from grid.report.table import benchmark_page, beside_page, rows_page
from grid.report.tables import marks_of, title_of
from grid.results import Arm, Results

PER_PAGE = 250
SHORT = 24
"""Characters of an answer that is no letter."""


def write_beside(results: Results, benchmark: str, asked: Asked, folder: Path, home: str) -> set[str]:
    """The benchmark's pages; none where no arm has answers row by row."""
    arms = [arm for arm in results.arms if benchmark in arm.scores and arm.scores[benchmark].path is not None]
    if not arms:
        return set()
    questions, given = _gathered(arms, benchmark)
    count, pages = -(-len(questions) // PER_PAGE), set()

    def name_of(page: int) -> str:
        return beside_page(benchmark, page)

    for page in range(1, count + 1):
        start = (page - 1) * PER_PAGE
        name = name_of(page)
        up = "../" * name.count("/")
        shown = f"questions {start + 1:,}–{min(start + PER_PAGE, len(questions)):,} of {len(questions):,}"
        body = (
            f'<nav><a href="{up}{escape(home)}">report</a> › <a href="{up}{escape(benchmark_page(benchmark))}">'
            f"{escape(title_of(benchmark))}</a></nav><h1>{escape(title_of(benchmark))}, all arms {marks_html(marks_of(results))}</h1>"
            f'<p class="caption">{shown}; the right option is bold; – is an invalid answer</p>{pager(name_of, page, count)}'
            f"{_table(questions[start : start + PER_PAGE], given[:, start : start + PER_PAGE], arms, benchmark, asked, up)}"
            f"{pager(name_of, page, count)}"
        )
        pages.add(write_page(folder, name, shell(f"{title_of(benchmark)}, all arms", body, "beside")))
    return pages


def _gathered(arms: Sequence[Arm], benchmark: str) -> tuple[list[dict[str, Any]], np.ndarray]:
    """(id, label, options, answer of each question that any arm answered; the arms' cells str[A, N] as HTML, empty where not asked)"""
    import pyarrow.parquet as pq

    questions: list[dict[str, Any]] = []
    place: dict[str, int] = {}
    cells: list[dict[int, str]] = []
    for arm in arms:
        score = arm.scores[benchmark]
        assert score.path is not None
        file = pq.ParquetFile(score.path)
        names = ["id", "text", "letter", "valid", "correct"]
        columns = {name: file.read(columns=[name]).column(name).to_pylist() for name in names}
        if any(id not in place for id in columns["id"]):
            for row in file.read(columns=["id", "label", "options", "answer"]).to_pylist():
                if row["id"] not in place:
                    place[row["id"]] = len(questions)
                    questions.append(row)
        cells.append({place[id]: _cell(*rest) for id, *rest in zip(*(columns[name] for name in names))})
    given = np.full((len(arms), len(questions)), "<td></td>", dtype=object)
    for at, own in enumerate(cells):
        for number, cell in own.items():
            given[at, number] = cell
    return questions, given


def _cell(text: str, letter: str | None, valid: bool, correct: bool) -> str:
    said = escape((letter or text.strip())[:SHORT]) if valid else "–"
    kind = "r" if correct else "w" if valid else "i"
    full = f' title="{escape(text[:200])}"' if text.strip() not in ("", letter) else ""
    return f'<td class="{kind}"{full}>{said}</td>'


def _table(questions: Sequence[dict[str, Any]], given: np.ndarray, arms: Sequence[Arm], benchmark: str, asked: Asked, up: str) -> str:
    heads = "".join(f'<th><a href="{up}{escape(rows_page(arm.name, benchmark))}">{escape(arm.name)}</a></th>' for arm in arms)
    lines = []
    for at, row in enumerate(questions):
        hint, words = ("", "") if asked.common else asked.words.get(row["id"], ("", ""))
        options = " · ".join(
            f"<b>{letter}. {escape(option)}</b>" if letter == row["answer"] else f"{letter}. {escape(option)}"
            for letter, option in zip(LETTERS, row["options"] or [], strict=False)
        )
        said = " ".join(part for part in (escape(hint), escape(words), options or f"<b>{escape(row['answer'] or '')}</b>") if part)
        lines.append(f"<tr><td>{said} <small>{escape(row['id'])}</small></td>{''.join(given[:, at])}</tr>")
    return (
        f'<div class="scroll"><table class="beside"><thead><tr><th>question</th>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )
