"""The rows behind every number: a page per arm and benchmark with each question, its options, the text answered and the letter read.

In: `Results`, their scored.parquet files and the questions. Out: files below the report folder (`rows/`, `arms/`, `thumbs/`);
returns the set of pages written, so that only existing pages are linked.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grid.report import confusions, pictures
from grid.report.curves import curves_html
from grid.report.markup import escape, marks_html, shell, table_html
from grid.report.table import Cell, Column, Table, arm_page, confusions_page, number, plain, rows_page, slug
from grid.report.tables import marks_of, title_of
from grid.results import Arm, Results, Score

PER_PAGE = 500
MOST = 2000
"""Questions listed per arm and benchmark; the Parquet file named on the page holds all."""
COLUMNS = ["id", "label", "options", "answer", "text", "letter", "valid", "correct"]


def write_pages(results: Results, folder: Path, home: str = "index.html") -> set[str]:
    """All pages; paths relative to folder. home: the report's own page, which they lead back to."""
    pages: set[str] = set()
    sheets = {benchmark: _sheet(results, benchmark, folder) for benchmark in results.benchmarks}
    asked = {benchmark: _asked(results, benchmark) for benchmark in results.benchmarks}
    counted = {benchmark: made for benchmark in results.benchmarks if (made := confusions.count(results, benchmark)) is not None}
    for arm in results.arms:
        for benchmark, score in arm.scores.items():
            if score.path is not None:
                told = benchmark in counted
                pages |= _rows(results, arm, benchmark, score, sheets.get(benchmark), asked.get(benchmark, {}), folder, home, told)
    for benchmark, made in counted.items():
        table = pictures.open_questions(results.questions[benchmark]) if benchmark in results.questions else None
        text = confusions.render(results, made, table, sheets.get(benchmark), pages, PER_PAGE, home)
        pages.add(_write(folder, confusions_page(benchmark), text))
    for arm in results.arms:
        pages.add(_write(folder, arm_page(arm.name), shell(f"{arm.name}, {results.title}", _arm(results, arm, pages, home), "arm")))
    return pages


def _asked(results: Results, benchmark: str) -> dict[str, tuple[str, str]]:
    """question id → (hint, question), where the questions are at hand."""
    table = pictures.open_questions(results.questions[benchmark]) if benchmark in results.questions else None
    if table is None:
        return {}
    columns = (table.column(name)[:MOST] for name in ("id", "hint", "question"))
    return {id: (hint, question) for id, hint, question in zip(*columns, strict=True)}


def _sheet(results: Results, benchmark: str, folder: Path) -> pictures.Sheet | None:
    """Thumbnails of a benchmark's first page of questions, written once for all arms."""
    table = pictures.open_questions(results.questions[benchmark]) if benchmark in results.questions else None
    if table is None:
        return None
    made = pictures.sheet([table[k] for k in range(min(PER_PAGE, len(table)))], table.root)
    if made is not None:
        path = folder / "thumbs" / f"{slug(benchmark)}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(made.data)
    return made


def _rows(
    results: Results,
    arm: Arm,
    benchmark: str,
    score: Score,
    sheet: pictures.Sheet | None,
    asked: dict[str, tuple[str, str]],
    folder: Path,
    home: str,
    told: bool,
) -> set[str]:
    """Pages of one arm's rows. told: its benchmark has a page of confusions."""
    import pyarrow.parquet as pq

    assert score.path is not None
    table = pq.ParquetFile(score.path).read(columns=COLUMNS)
    listed = table.slice(0, MOST).to_pylist()
    count = max(1, -(-len(listed) // PER_PAGE))
    common = set(asked.values())
    said = next(iter(common)) if len(common) == 1 else None
    pages = set()
    for page in range(1, count + 1):
        rows = listed[(page - 1) * PER_PAGE : page * PER_PAGE]
        body = f'<nav><a href="../../{escape(home)}">report</a> › <a href="../../{escape(arm_page(arm.name))}">{escape(arm.name)}</a>'
        body += f' · <a href="../../{escape(confusions_page(benchmark))}">confusions</a></nav>' if told else "</nav>"
        body += _head(results, arm, benchmark, score, table.num_rows, len(listed), said)
        style = f".thumb{{background-image:url(../../thumbs/{slug(benchmark)}.jpg)}}"
        body += f"<style>{style}</style>" if sheet is not None else ""
        body += _list(rows, sheet, {} if said else asked, (page - 1) * PER_PAGE)
        body += _pager(arm.name, benchmark, page, count)
        pages.add(_write(folder, rows_page(arm.name, benchmark, page), shell(f"{arm.name} on {title_of(benchmark)}", body, "rows")))
    return pages


def _head(results: Results, arm: Arm, benchmark: str, score: Score, n: int, listed: int, said: tuple[str, str] | None) -> str:
    facts = [f"{plain(score.value)} % {score.metric.replace('_', ' ')}", f"{n} questions"]
    if score.stderr is not None:
        facts.insert(1, f"± {plain(score.stderr)}")
    if score.valid is not None:
        facts.append(f"{plain(100 * score.valid)} % valid")
    if score.chance is not None:
        facts.append(f"chance {plain(score.chance)} %")
    facts.append(f"read by {score.read_by}")
    shown = f"<p>The first {listed} of {n} questions; all of them: <code>{escape(score.path)}</code></p>" if listed < n else ""
    question = f'<p class="question">{escape(" ".join(part for part in said if part))}</p>' if said else ""
    kinds = ("all", "wrong", "invalid")
    radios = "".join(
        f'<label><input type="radio" name="show" id="show-{kind}"{" checked" if kind == "all" else ""}> {kind}</label>' for kind in kinds
    )
    return (
        f"<h1>{escape(arm.name)} on {escape(title_of(benchmark))} {marks_html(marks_of(results))}</h1>"
        f'<p class="caption">{escape(" · ".join(facts))}</p><p class="axes">{_axes(arm)}</p>{question}{shown}'
        f'<form class="filter">{radios}</form>'
    )


def _axes(arm: Arm) -> str:
    return " ".join(f"<span><small>{escape(axis)}</small> {escape(value)}</span>" for axis, value in arm.axes.items())


def _list(rows: Sequence[dict[str, Any]], sheet: pictures.Sheet | None, asked: dict[str, tuple[str, str]], first: int) -> str:
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
        hint, question = asked.get(row["id"], ("", ""))
        said = f"{escape(hint)} {escape(question)}".strip()
        parts.append(f"<td>{said}{'<br>' if said else ''}<small>{escape(row['id'])} {escape(row['label'] or '')}</small></td><td>")
        for letter, option in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", row["options"] or [], strict=False):
            text = f"{letter}. {escape(option)}"
            text = f"<b>{text}</b>" if letter == row["answer"] else text
            parts.append(f'<span class="given">{text}</span>' if letter == row["letter"] else f"<span>{text}</span>")
        outcome = "✓" if row["correct"] else "✗" if row["valid"] else "invalid"
        parts.append(f"</td><td><code>{escape(row['text'])}</code></td><td>{escape(row['letter'] or '–')}</td><td>{outcome}</td></tr>")
    parts.append("</tbody></table></div>")
    return "".join(parts)


def _pager(arm: str, benchmark: str, page: int, count: int) -> str:
    if count == 1:
        return ""
    names = [Path(rows_page(arm, benchmark, k)).name for k in range(1, count + 1)]
    links = [f"<b>{k}</b>" if k == page else f'<a href="{escape(name)}">{k}</a>' for k, name in enumerate(names, 1)]
    return f'<nav class="pager">page {" ".join(links)}</nav>'


def _arm(results: Results, arm: Arm, pages: set[str], home: str) -> str:
    """An arm's own page: axes, scores with links to rows, training curves, stages."""
    columns = [Column("benchmark", numeric=False), *map(Column, ("value", "± se", "n", "valid %", "chance", "control"))]
    scores = Table("scores", "Scores", columns, marks=marks_of(results))
    for benchmark in results.benchmarks:
        score, control = arm.scores.get(benchmark), arm.controls.get(benchmark)
        cells = [Cell(title_of(benchmark), href=rows_page(arm.name, benchmark))]
        if score is None:
            cells += [number(None, reason=arm.missing.get(benchmark, "not run")), *(Cell("") for _ in range(5))]
        else:
            valid = None if score.valid is None else 100 * score.valid
            cells += [
                number(score.value, href=rows_page(arm.name, benchmark)),
                number(score.stderr),
                Cell(str(score.n or "")),
                number(valid),
            ]
            cells += [number(score.chance), number(None if control is None else control.value, reason="no control for this arm")]
        scores.rows.append(cells)
    for group in results.groups:
        mean = number(arm.value(group, results.groups), reason=arm.reason(group, results.groups))
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


def _write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return name
