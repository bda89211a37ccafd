"""A report's pages: every link leads somewhere, every score to its rows, every figure and table says what it is of."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from grid import report
from grid.report.build import as_json, build
from grid.report.load import load_run
from tests.grid.pages import Page
from tests.grid.synthetic_run import make_run, small_plan

BENCHMARKS = ("imagenet", "pets", "mmbench")


@pytest.fixture(scope="module")
def run(reported: Path) -> Path:
    """A finished run of five arms with its report."""
    return reported


def test_every_page_nests_and_every_local_link_resolves(run: Path) -> None:
    folder = run / "report"
    pages = {path: Page(path.read_text()) for path in folder.rglob("*.html")}
    per_benchmark = 3 * 3 + 3 + 2 * 2
    said = "the report, arms, their rows; each benchmark's page, confusions and side-by-side answers; controls; encoders alone"
    assert len(pages) == 1 + 5 + 5 * 3 + per_benchmark, said
    for path, page in pages.items():
        assert not page.stack, f"{path.name} leaves {page.stack} open"
        assert len(page.ids) == len(set(page.ids)), f"{path.name} repeats an id"
        for link in page.links:
            parts = urlsplit(link)
            if link.startswith("data:"):
                continue
            assert not parts.scheme and not parts.netloc, f"{path.name} reaches out to {link}"
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.is_file(), f"{path.name} → {link}"
            if parts.fragment:
                ids = pages[target].ids if target in pages else []
                assert parts.fragment in ids, f"{path.name} → {link}"
        assert "http://" not in path.read_text().replace("http://www.w3.org/", ""), "no request to elsewhere"


def test_any_score_leads_to_its_rows_within_two_clicks(run: Path) -> None:
    folder = run / "report"

    def reach(path: Path) -> set[Path]:
        page = Page(path.read_text())
        return {(path.parent / unquote(urlsplit(link).path)).resolve() for link in page.links if urlsplit(link).path.endswith(".html")}

    first = reach(folder / "index.html")
    both = first | {page for one in first for page in reach(one)}
    rows = {path.resolve() for path in (folder / "rows").rglob("*.html")}
    assert len(rows) == 15 and rows <= first, "every benchmark's number is linked to its rows"
    assert rows <= both
    page = Page((folder / "rows" / "row-13" / "pets.html").read_text())
    assert sum(text.startswith("q00") for text in page.text) == 60, "every question is listed"


def test_the_gallery_shows_images_and_options(run: Path) -> None:
    text = (run / "report" / "index.html").read_text()
    assert text.count("data:image/png;base64,") > 3, "small drawings keep their pixels"
    assert text.count("data:image/jpeg;base64,") > 3, "larger ones are scaled down"
    assert "What type of object is in this photo?" in text and "✓" in text
    sheets = list((run / "report" / "thumbs").glob("*.jpg"))
    assert {path.stem for path in sheets} == set(BENCHMARKS)


def test_figures_are_drawn_and_take_the_pages_ink(run: Path) -> None:
    figures = {path.name for path in (run / "report" / "figures").iterdir()}
    assert {"effects.svg", "effects.png", "figure-5.svg", "figure-7.svg"} <= figures
    text = (run / "report" / "index.html").read_text()
    assert text.count('<svg role="img"') >= 3 and "currentColor" in text


def test_the_command_prints_and_writes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(path.stat().st_mtime_ns for path in run.rglob("*"))
    assert report.main([str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == as_json(build(load_run(run)))
    assert sorted(path.stat().st_mtime_ns for path in run.rglob("*")) == before, "--json writes nothing"
    page, tex = tmp_path / "pages" / "toy.html", tmp_path / "toy.tex"
    assert report.main([str(run), "--html", str(page), "--latex", str(tex)]) == 0
    assert r"\begin{tabular}" in tex.read_text()
    rows = tmp_path / "pages" / "rows" / "row-13" / "pets.html"
    assert "../../toy.html" in Page(rows.read_text()).links


def test_published_table_alone_makes_the_same_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--published", "fine_grained"]) == 0
    text = capsys.readouterr().out
    assert "unfreeze llm in pretraining" in text and "Table 4" in text and "miniature" not in text
    page = tmp_path / "published.html"
    assert report.main(["--published", "fine_grained", "--html", str(page)]) == 0
    parsed = Page(page.read_text())
    assert "plot-figure-8" in parsed.ids and not [link for link in parsed.links if link.endswith(".html")]


def test_a_run_that_has_nothing_yet_still_reports(tmp_path: Path) -> None:
    out = make_run(tmp_path / "run", small_plan(), skip=("",))
    report.write(out)
    built = build(load_run(out))
    assert all(arm.value("pets", built.results.groups) is None for arm in built.results.arms)
    assert "has not finished" in (out / "report" / "report.md").read_text()
    plan = small_plan() | {"groups": {}, "contrasts": [], "published": None, "stages": []}
    for arm in (*plan["arms"], *plan["references"]):
        arm.update(scores={}, predictions={}, controls={}, zeroshot={}, stages=[])
    report.write(make_run(tmp_path / "bare", plan))
    assert not Page((tmp_path / "bare" / "report" / "index.html").read_text()).stack
