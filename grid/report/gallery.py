"""The gallery: asked questions with their images and what the arms answered, from the hardest to the easiest.

In: `Results` whose questions are still in the store. Out: HTML. Questions are picked at even steps of how many arms got them
right, so that the gallery shows the benchmark's whole range and not its best side.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from datasets_ray.rows import RowTable
from grid.report.markup import escape, marks_html
from grid.report.pictures import open_questions, thumbnail
from grid.report.tables import marks_of, title_of
from grid.results import Arm, Results

EACH = 8
"""Questions shown per benchmark."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def render(results: Results) -> str:
    """A section per benchmark whose questions are at hand; empty where there is none."""
    parts = []
    for benchmark in results.benchmarks:
        arms = [arm for arm in results.arms if benchmark in arm.scores and arm.scores[benchmark].answers is not None]
        table = open_questions(results.questions[benchmark]) if benchmark in results.questions else None
        if table is None or not len(table) or not arms:
            continue
        cards = "".join(_card(table, index, arms, benchmark) for index in pick(table.column("id"), arms, benchmark))
        parts.append(f'<h3 id="gallery-{escape(benchmark)}">{escape(title_of(benchmark))}</h3><div class="gallery">{cards}</div>')
    if not parts:
        return ""
    lead = "From questions that the fewest arms got right to those that most did. Bars: how many arms gave the option; ✓: the right one."
    marks = marks_html(marks_of(results))
    return f'<section id="gallery"><h2>What was asked {marks}</h2><p class="caption">{lead}</p>{"".join(parts)}</section>'


def pick(ids: Sequence[str], arms: Sequence[Arm], benchmark: str, each: int = EACH) -> list[int]:
    """Row numbers at even steps of the share of arms that are right (ties by row number)."""
    right: Counter[str] = Counter()
    for arm in arms:
        answers = arm.scores[benchmark].answers
        if answers is not None:
            right.update(answers.ids[answers.correct].tolist())
    order = sorted(range(len(ids)), key=lambda k: (right[ids[k]], k))
    steps = np.unique(np.linspace(0, len(order) - 1, min(each, len(order))).round().astype(int))
    return [order[k] for k in steps]


def _card(table: RowTable, index: int, arms: Sequence[Arm], benchmark: str) -> str:
    row = table[index]
    given: Counter[str] = Counter()
    right_arms = invalid = 0
    for arm in arms:
        answers = arm.scores[benchmark].answers
        if answers is not None:
            at = np.flatnonzero(answers.ids == row["id"])
            if at.size:
                given[str(answers.letters[at[0]])] += 1
                right_arms += bool(answers.correct[at[0]])
                invalid += not answers.valid[at[0]]
    total = max(1, sum(given.values()))
    picture = thumbnail(row, table.root)
    if picture is None:
        image = '<div class="noimage">no readable image</div>' if row["images"] else '<div class="noimage">asked without an image</div>'
    else:
        uri, width, height, small = picture
        hard = " class=hard" if small else ""
        image = f'<img src="{uri}" width="{width}" height="{height}" alt="{escape(row["label"] or row["question"])}"{hard}>'
    options = []
    for letter, option in zip(LETTERS, row["options"], strict=False):
        share = given[letter] / total
        right = letter == row["answer"]
        options.append(
            f'<li class="{"right" if right else ""}" style="--share:{100 * share:.0f}%" title="{given[letter]} of {total} arms">'
            f"<b>{letter}</b> {escape(option)}{' ✓' if right else ''}<i>{given[letter] or ''}</i></li>"
        )
    if not row["options"]:
        bar = f'style="--share:{100 * right_arms / total:.0f}%" title="{right_arms} of {total} arms"'
        options.append(f'<li class="right" {bar}>{escape(row["answer"] or "")} ✓<i>{right_arms or ""}</i></li>')
    note = f"<small>{invalid} of {total} answers invalid</small>" if invalid else ""
    extra = "" if len(row["images"]) < 2 else f"<small>first of {len(row['images'])} images</small>"
    hint = f'<p class="hint">{escape(row["hint"])}</p>' if row["hint"] else ""
    return (
        f'<figure class="card">{image}{extra}<figcaption>{hint}<p>{escape(row["question"])}</p><ol class="options">{"".join(options)}</ol>'
        f'{note}<small class="id">{escape(row["id"])}</small></figcaption></figure>'
    )
