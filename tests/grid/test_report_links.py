"""From any number of a report to the rows behind it in two clicks: the pages' HTML is parsed and their links are followed."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grid import report
from grid.report import beside, rowlist, rowpages
from grid.report.build import as_json, build
from grid.report.load import load_run
from tests.grid.synthetic_run import make_run, small_plan
from trainers.score import score, write

ELSEWHERE = {"lost", "subsets", "assumptions", "time", "versions", "stages"}
"""Tables whose numbers are no arm's on a benchmark."""
ROWS = ("rows/", "control/", "encoders/", "answers/")
"""Folders of pages that list rows."""
VOID = {"meta", "img", "br", "input", "link", "hr"}


@dataclass
class Found:
    """A number cell of a page."""

    table: str
    text: str
    link: str
    published: bool


@dataclass
class Parsed(HTMLParser):
    """Number cells, all links, and the links within each element that has an id."""

    cells: list[Found] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    inside: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.cell: Found | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag in VOID:
            return
        self.open.append((tag, given.get("id", "")))
        if given.get("id"):
            self.inside.setdefault(given["id"], [])
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
            for _, id in self.open:
                if id:
                    self.inside[id].append(given["href"])
            if self.cell is not None:
                self.cell.link = given["href"]
        if tag == "td" and "number" in given.get("class", "").split():
            table = next((id for name, id in reversed(self.open) if name == "section" and id), "")
            self.cell = Found(table, "", "", "published" in given["class"].split())

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        self.open.pop()
        if tag == "td" and self.cell is not None:
            self.cells.append(self.cell)
            self.cell = None

    def handle_data(self, data: str) -> None:
        if self.cell is not None:
            self.cell.text += data


class Site:
    """A report folder whose pages are parsed once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.known = folder, dict[str, Parsed]()

    def page(self, name: str) -> Parsed:
        if name not in self.known:
            parsed = Parsed()
            parsed.feed((self.folder / name).read_text())
            self.known[name] = parsed
        return self.known[name]

    def target(self, page: str, link: str) -> tuple[str, str]:
        """(page, fragment) that a link leads to."""
        parts = urlsplit(link)
        where = (self.folder / page).parent / unquote(parts.path) if parts.path else self.folder / page
        return where.resolve().relative_to(self.folder.resolve()).as_posix(), parts.fragment

    def clicks(self, page: str, link: str) -> int | None:
        """How many clicks lead to a page of rows, beginning with this one; None where two don't."""
        first, fragment = self.target(page, link)
        if first.startswith(ROWS):
            return 1
        onward = self.page(first).inside[fragment] if fragment else self.page(first).links
        return 2 if any(self.target(first, one)[0].startswith(ROWS) for one in onward) else None


def stranded(site: Site, page: str) -> list[tuple[str, str]]:
    """Number cells of a page that don't lead to rows within two clicks."""
    lost = []
    for cell in site.page(page).cells:
        text = cell.text.strip()
        if cell.table in ELSEWHERE or cell.published or text in ("", "–", "not run", "best"):
            continue
        if not cell.link or site.clicks(page, cell.link) is None:
            lost.append((cell.table, text))
    return lost


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five arms, one of them with another seed of row 3's recipe."""
    plan = small_plan()
    twin = next(arm for arm in plan["arms"] if arm["name"] == "row-12")
    twin["axes"], twin["seed"] = {**twin["axes"], "pretraining": "none"}, 1
    out = make_run(tmp_path_factory.mktemp("linked"), plan)
    report.write(out)
    return out


def test_every_number_leads_to_its_rows_within_two_clicks(run: Path) -> None:
    site = Site(run / "report")
    tables = {cell.table for cell in site.page("index.html").cells} - ELSEWHERE
    wanted = {"effects", "table-1", "table-2", "table-3", "table-4", "compared", "compared-benchmarks", "seeds", "seeds-1", "benchmarks"}
    assert wanted | {"invalid", "zeroshot", "control", "detail", "effect-strong_vs_weak"} <= tables
    assert stranded(site, "index.html") == []
    for page in sorted(path.relative_to(run / "report").as_posix() for path in (run / "report").rglob("*.html")):
        if not page.startswith(ROWS):
            assert stranded(site, page) == [], page


def test_wrong_answers_stand_with_image_options_and_answer_and_confusions_by_family(run: Path) -> None:
    text = (run / "report" / "rows" / "row-13" / "pets.html").read_text()
    wrong = [line.split("</tr>")[0] for line in text.split('<tr class="wrong')[1:]]
    assert wrong and 'id="show-wrong"' in text and "thumbs/pets.jpg" in text
    for line in wrong:
        assert 'class="thumb"' in line and line.count("<span") == 5 and "<b>" in line and "<code>" in line
    assert sum('class="given"' in line for line in wrong) == sum("invalid</td>" not in line for line in wrong)
    families = (run / "report" / "confusions" / "pets.html").read_text().split('id="families"')[1].split("</section>")[0]
    assert "of all confusions stay inside a family" in families and families.count("<th>genus-") == 2
    shares = [float(cell.split("<")[0]) for line in families.split("<tr><th>genus-")[1:] for cell in line.split('">')[1:]]
    assert len(shares) == 4 and abs(sum(shares) - 200) <= 2, "each row's shares make 100"
    control = (run / "report" / "control" / "row-13" / "pets.html").read_text()
    assert "../../thumbs/control/pets.jpg" in control and "images permuted" in control


def test_a_missing_link_is_seen(run: Path, tmp_path: Path) -> None:
    """The check above can fail."""
    shutil.copytree(run / "report", tmp_path / "report")
    index = tmp_path / "report" / "index.html"
    text = index.read_text()
    text = text.replace('href="rows/row-13/pets.html"', 'href="report.md"', 3)
    index.write_text(text.replace('href="control/row-13/pets.html"', 'name="x"', 1))
    (tmp_path / "report" / "report.md").write_text("no links")
    assert len(stranded(Site(tmp_path / "report"), "index.html")) >= 2


def test_a_large_set_is_paged_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """60 questions where 20 make a list: an arm's list says so and leads to all, ten and fifteen on a page."""
    for module, name, value in ((rowlist, "PER_PAGE", 10), (rowpages, "PER_PAGE", 10), (rowlist, "MOST", 20), (rowpages, "MOST", 20)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(beside, "PER_PAGE", 15)
    out = make_run(tmp_path / "run", small_plan())
    report.write(out)
    folder = out / "report"
    first = (folder / "rows" / "row-13" / "pets.html").read_text()
    assert "The first 20 of 60 questions" in first and 'href="../../answers/pets.html"' in first and 'href="pets-2.html"' in first
    assert (folder / "rows" / "row-13" / "pets-2.html").is_file() and not (folder / "rows" / "row-13" / "pets-3.html").exists()
    assert "thumbs/pets-2.jpg" in (folder / "rows" / "row-13" / "pets-2.html").read_text() and (folder / "thumbs" / "pets-2.jpg").is_file()
    pages = [(folder / "answers" / f"pets{end}.html").read_text() for end in ("", "-2", "-3", "-4")]
    assert sum(page.count("<small>q00") for page in pages) == 60
    assert len(list((folder / "control" / "row-13").glob("pets*.html"))) == 6, "a control is listed whole"
    assert len(list((folder / "encoders").glob("*.html"))) == 4 * 6
    scores = {arm["name"]: arm["scores"]["pets"] for arm in (*small_plan()["arms"], *small_plan()["references"])}
    table = pq.read_table(out / "store" / scores["row-13"] / "scored.parquet")
    right = sum(table.column("correct").to_pylist())
    column = [name.split("</a>")[0].rsplit(">", 1)[1] for name in pages[0].split("<th>")[2:]].index("row-13")
    rows = [line.split("<td")[1:] for page in pages for line in page.split("<tbody>")[1].split("<tr>")[1:]]
    assert sum(cells[1 + column].startswith(' class="r"') for cells in rows) == right, "each arm's own answers stand in its column"
    assert stranded(Site(folder), "index.html") == []


def test_side_by_side_pages_stay_small(run: Path) -> None:
    """A question costs its words once and a letter for each arm: under 25 bytes of table cell an arm."""
    text = (run / "report" / "answers" / "pets.html").read_text()
    cells = [cell for cell in text.split("<td")[1:] if cell.startswith(' class="r"')]
    assert cells and max(len("<td" + cell.split("</td>")[0] + "</td>") for cell in cells) <= 25


def _mended(out: Path, benchmark: str, make: Any) -> None:
    """Every arm's scores of a benchmark made anew: make(predictions) → (table, scores)."""
    plan = json.loads((out / "plan.json").read_text())
    stages = {stage["id"]: stage for stage in plan["stages"]}
    for arm in (*plan["arms"], *plan["references"]):
        for id in (arm["scores"][benchmark], *(arm["controls"].get(name) for name in [benchmark])):
            if id is not None:
                folder = out / "store" / id
                (folder / "scored.parquet").unlink()
                write(*make(pq.read_table(out / "store" / stages[id]["spec"]["predictions"] / "predictions.parquet")), folder)


def test_a_benchmark_without_its_judge_is_not_run(tmp_path: Path) -> None:
    out = make_run(tmp_path / "run", small_plan())
    _mended(out, "mmbench", lambda predictions: (None, {"not_run": "needs a judge model", "metric": "graded", "rule": "strict", "n": 0}))
    report.write(out)
    built = build(load_run(out))
    document = as_json(built)
    assert all(arm["metrics"]["mmbench"] is None and arm["metrics"]["general_vqa"] is None for arm in document["arms"])
    assert all(arm["metrics"]["fine_grained"] is not None for arm in document["arms"])
    table = built.table("table-3")
    assert table is not None and {cells[-2].text for cells in table.rows} == {"not run"}
    means = built.table("table-2")
    assert means is not None and {cells[-2].text for cells in means.rows} == {"–"}
    assert any("mmbench: not run: needs a judge model" in note for note in means.absences())
    assert "not run: MMBench" in built.marks and not any("incomplete" in mark for mark in built.marks)
    assert any("MMBench is not run: needs a judge model" in line for line in built.headline)
    benchmarks = built.table("benchmarks")
    assert benchmarks is not None and [cells[1].text for cells in benchmarks.rows if cells[0].text == "MMBench"] == ["not run"]
    assert stranded(Site(out / "report"), "index.html") == [] and "not run" in (out / "report" / "report.md").read_text()


def test_a_score_of_its_own_says_what_it_is_and_its_rows_agree(tmp_path: Path) -> None:
    """MME's pairs on 60 questions: the cell says points of the maximum, intervals and effects rest on the images."""
    out = make_run(tmp_path / "run", small_plan())

    def paired(predictions: pa.Table) -> Any:
        metas = [json.dumps({"pair": f"i{k // 2}", "category": "OCR" if k < 30 else "count"}) for k in range(predictions.num_rows)]
        return score(predictions.append_column("meta", pa.array(metas)), "vlmevalkit", "mme")

    _mended(out, "mmbench", paired)
    report.write(out)
    results = load_run(out)
    assert not [notice for notice in results.notices if "its rows give" in notice]
    arm = next(arm for arm in results.arms if arm.name == "row-13")
    found, points = arm.scores["mmbench"], arm.scores["mmbench"].points
    assert points is not None and len(points.ids) == 30 and set(points.strata.tolist()) == {"OCR", "count"}
    by_task = [np.mean(points.values[points.strata == task]) for task in ("OCR", "count")]
    assert found.value == pytest.approx(100 * np.mean(by_task)) == pytest.approx(100 * found.told["mme"]["total"] / 400)
    built = build(results)
    table = built.table("table-3")
    assert table is not None and any(" of 400" in cells[-2].detail for cells in table.rows)
    effect = next(one for one in built.effects if one.contrast.name == "strong_vs_weak").benchmarks["mmbench"]
    assert effect.questions == 30 and effect.low is not None and effect.low <= effect.mean <= effect.high
    page = (out / "report" / "benchmarks" / "mmbench.html").read_text()
    assert "OCR, points" in page and "perception, points of 400" in page
    assert stranded(Site(out / "report"), "index.html") == []


def test_a_question_without_options_shows_its_answer_and_who_got_it_right(tmp_path: Path) -> None:
    from datasets_ray.rows import RowTable, row, write_rows
    from grid.report import gallery
    from grid.report.load import read_answers
    from grid.results import Arm, Score

    write_rows([row("q0", images=[], question="What does it say?", answer="STOP", meta={"open": "contains"})], tmp_path / "rows")
    arms = []
    for name, text in (("one", "stop sign"), ("two", "go"), ("three", "")):
        made = [{**RowTable(tmp_path / "rows")[0], "text": text}]
        write(*score(pa.Table.from_pylist(made), "strict", "accuracy"), tmp_path)
        arms.append(Arm(name, {}, scores={"ocr": Score(0.0, answers=read_answers(tmp_path / "scored.parquet"))}))
    card = gallery._card(RowTable(tmp_path / "rows"), 0, arms, "ocr")
    assert "STOP ✓<i>1</i>" in card and 'title="1 of 3 arms"' in card and "1 of 3 answers invalid" in card
