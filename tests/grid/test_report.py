"""A report says what the run's rows say, in every format, and hides nothing: marks, reasons for absence, links that resolve."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datasets_ray.errors import UserError
from grid import report
from grid.report.build import as_json, build
from grid.report.load import load_run
from tests.grid.synthetic_run import make_run, small_plan

BENCHMARKS = ("imagenet", "pets", "mmbench")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of five arms with its report."""
    out = make_run(tmp_path_factory.mktemp("run"), small_plan())
    report.write(out)
    return out


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run where one arm failed in finetuning and another's last prediction is missing."""
    out = make_run(tmp_path_factory.mktemp("broken"), small_plan(), skip=("finetune row-06", "predict row-12 pets"))
    failed = next(stage["id"] for stage in small_plan()["stages"] if stage["name"] == "finetune row-06")
    event = {"event": "fail", "stage": failed, "kind": "deterministic", "message": "the loss is not a number at step 7", "final": True}
    (out / "ledger.jsonl").write_text(json.dumps(event) + "\n" + '{"event": "fa')
    report.write(out)
    return out


class Page(HTMLParser):
    """Collects links, ids and the text; complains about tags that don't nest."""

    VOID = {"meta", "img", "br", "input", "link", "hr"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.text: list[str] = []
        self.stack: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.links += [given[name] or "" for name in ("href", "src") if name in given]
        self.ids += [given["id"] or ""] if "id" in given else []
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.stack and self.stack[-1] == tag, f"</{tag}> closes {self.stack[-3:]} at {self.getpos()}"
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def _document(run: Path) -> dict:
    return json.loads((run / "report" / "report.json").read_text())


def test_json_has_the_stable_shape(run: Path) -> None:
    document = _document(run)
    assert [arm["name"] for arm in document["arms"]] == ["row-01", "row-03", "row-06", "row-12", "row-13"]
    for arm in document["arms"]:
        assert set(arm["axes"]) == {"encoder", "llm", "arch", "pretraining", "finetuning", "updating"}
        assert set(arm["metrics"]) == {"fine_grained", "general_vqa", *BENCHMARKS}
        assert all(0 <= value <= 100 for value in arm["metrics"].values())
    assert [effect["name"] for effect in document["effects"]] == ["strong_vs_weak", "pretraining"]
    for effect in document["effects"]:
        assert isinstance(effect["pairs"], int) and effect["pairs"] == 2
        assert {"axis", "from", "to"} <= set(effect)
        for group in ("fine_grained", "general_vqa"):
            assert effect[group]["low"] <= effect[group]["mean"] <= effect[group]["high"]
    assert "paired bootstrap over questions" in document["interval"]["method"]


def test_numbers_are_those_of_the_rows(run: Path) -> None:
    plan, document = small_plan(), _document(run)
    arm = next(arm for arm in plan["arms"] if arm["name"] == "row-13")
    shown = next(arm for arm in document["arms"] if arm["name"] == "row-13")
    tables = {b: pq.read_table(run / "store" / arm["scores"][b] / "scored.parquet") for b in BENCHMARKS}
    accuracy = 100 * np.mean(tables["pets"].column("correct").to_pylist())
    assert shown["metrics"]["pets"] == pytest.approx(accuracy, abs=1e-3)
    correct, labels = (np.array(tables["imagenet"].column(name).to_pylist()) for name in ("correct", "label"))
    per_class = 100 * np.mean([correct[labels == label].mean() for label in np.unique(labels)])
    assert shown["metrics"]["imagenet"] == pytest.approx(per_class, abs=1e-3)
    assert shown["metrics"]["fine_grained"] == pytest.approx((accuracy + per_class) / 2, abs=1e-3)
    assert shown["detail"]["pets"]["n"] == 60 and shown["detail"]["pets"]["chance"] == pytest.approx(20)
    assert shown["published"]["fine_grained"] == 61.2, "row 13 of the published table stands beside ours"


def test_effect_is_the_mean_difference_of_its_pairs(run: Path) -> None:
    document = _document(run)
    value = {arm["name"]: arm["metrics"] for arm in document["arms"]}
    effect = document["effects"][0]
    assert effect["matched"] == [["row-03", "row-06"], ["row-12", "row-13"]], "the released row 1 stands back for row 12"
    for name in ("fine_grained", "general_vqa"):
        expected = np.mean([value[b][name] - value[a][name] for a, b in effect["matched"]])
        assert effect[name]["mean"] == pytest.approx(expected, abs=1e-3)


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


def test_every_table_and_figure_says_miniature_and_subset(run: Path) -> None:
    built = build(load_run(run))
    assert list(built.marks) == ["miniature", "subset: 5 of 24 rows", "subset: not all questions of ImageNet, Pets, MMBench"]
    benchmarks = built.table("benchmarks")
    assert benchmarks is not None and any("Pets: 60 of 62 rows" in note for note in benchmarks.notes)
    for table in built.tables:
        if table.id not in ("assumptions", "versions"):
            assert list(table.marks) == list(built.marks), table.id
    markdown = (run / "report" / "report.md").read_text()
    assert markdown.count("**miniature**") >= 8
    assert (run / "report" / "report.tex").read_text().count(r"\emph{(miniature)}") >= 6
    plan = small_plan()
    plan["study"]["miniature"] = False
    assert "miniature" not in build(load_run(_copy(run, plan))).marks


def _copy(run: Path, plan: dict) -> Path:
    """The same store under another plan."""
    out = run.parent / f"{run.name}-other"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    (out / "plan.json").write_text(json.dumps(plan))
    (out / "run.json").write_text(json.dumps({"store": str(run / "store")}))
    return out


def test_a_missing_score_is_shown_with_its_reason_and_never_averaged(broken: Path) -> None:
    document = _document(broken)
    arms = {arm["name"]: arm for arm in document["arms"]}
    assert arms["row-06"]["metrics"] == dict.fromkeys(("fine_grained", "general_vqa", *BENCHMARKS))
    assert "finetune row-06 failed: the loss is not a number at step 7" in arms["row-06"]["missing"]["pets"]
    assert arms["row-12"]["metrics"]["imagenet"] is not None
    assert arms["row-12"]["metrics"]["pets"] is None and arms["row-12"]["metrics"]["fine_grained"] is None
    assert "predict row-12 pets has not finished" in arms["row-12"]["missing"]["pets"]
    text = (broken / "report" / "report.md").read_text()
    assert "the loss is not a number at step 7" in text and "scores missing for 2 of 5 arms" in text
    effect = document["effects"][1]
    assert effect["pairs"] == 2 and effect["general_vqa"]["pairs"] == 1 and effect["fine_grained"]["mean"] is None
    assert any("general_vqa: 1 of 2 pairs" in note for note in effect["notes"])


def test_the_seeds_alone_are_shown_where_a_recipe_is_repeated(run: Path) -> None:
    assert build(load_run(run)).table("seeds") is None
    results = load_run(run)
    results.arms[1].axes, results.arms[1].seed = results.arms[2].axes, 1
    table = build(results).table("seeds")
    assert table is not None and [cells[0].text for cells in table.rows] == ["row-03, row-06"]
    values = [arm.value("general_vqa", results.groups) for arm in results.arms[1:3]]
    assert table.rows[0][6].text == f"{np.mean(values):.1f}" and table.rows[0][7].text == f"{np.std(values, ddof=1):.1f}"


def test_how_answers_came_about_is_told(run: Path, tmp_path: Path) -> None:
    """A likelihood is no answer that a rule has read, and options that weren't shown are another question."""
    copied = Path(shutil.copytree(run, tmp_path / "run"))
    plan = json.loads((copied / "plan.json").read_text())
    stages = {stage["id"]: stage for stage in plan["stages"]}
    (asked, *_), scored = plan["arms"][0]["predictions"].items(), plan["arms"][0]["scores"]
    benchmark, predicted = asked
    stages[predicted]["spec"]["listed"] = False
    (copied / "plan.json").write_text(json.dumps(plan))
    (copied / "run.json").write_text(json.dumps({**json.loads((copied / "run.json").read_text()), "store": str(copied / "store")}))
    scores = copied / "store" / scored[benchmark] / "scores.json"
    scores.write_text(json.dumps({**json.loads(scores.read_text()), "method": "likelihood"}))
    results = load_run(copied)
    score = next(arm for arm in results.arms if arm.name == plan["arms"][0]["name"]).scores[benchmark]
    assert score.read_by == "likelihood of the options' texts, options not shown"
    others = [one for arm in results.arms for one in arm.scores.values() if one is not score]
    assert {one.read_by for one in others} == {one.rule for one in others}


def test_why_answers_are_invalid_is_told(run: Path) -> None:
    results = load_run(run)
    built = build(results)
    table = built.table("invalid")
    assert table is not None
    invalid = sum(int((~score.answers.valid).sum()) for arm in results.arms for score in arm.scores.values() if score.answers is not None)
    assert invalid == sum(int(cells[2].text) for cells in table.rows) > 0
    assert [column.title for column in table.columns][4] == "other words" and {cells[4].text for cells in table.rows} == {"100.0"}
    assert all("“no idea, sorry” for " in cells[-1].text for cells in table.rows)
    assert any("of the others 100.0 % say other words" in line for line in built.headline)


def test_control_is_tested_against_chance(run: Path) -> None:
    table = build(load_run(run)).table("control")
    assert table is not None and [cells[0].text for cells in table.rows] == ["row-13"] * 3
    for cells in table.rows:
        z = float(cells[8].text.replace("−", "-"))
        assert cells[9].text == ("yes" if abs(z) <= 2 else "no")
        assert float(cells[4].text) < float(cells[7].text), "permuted images are worse than their own"


def test_what_was_lost_assumed_and_spent_is_told(run: Path) -> None:
    built = build(load_run(run))
    lost = built.table("lost")
    assert lost is not None
    told = {tuple(cell.text for cell in cells[:5]) for cells in lost.rows}
    assert told == {("dataset", "dropped: unreadable image", "6", "12", "360"), ("train", "truncated", "5", "15", "3200")}
    for id, says in (
        ("assumptions", "nobody says"),
        ("time", "finetune: 4 stages took 50.0 core-seconds of 80.0 budgeted"),
        ("zeroshot", "80.0"),
    ):
        table = built.table(id)
        assert table is not None
        assert says in " ".join([*table.notes, *(cell.text for cells in table.rows for cell in cells)]), id
    assert "a notice of the plan" in built.results.notices
    steps = built.table("table-1")
    assert steps is not None and any("row 22" in note and "DFN" in note for note in steps.notes)


def test_the_time_table_has_the_mfu_of_each_kind_of_training(run: Path) -> None:
    from grid.report.provenance import time_table

    results = load_run(run)
    plain = time_table(results)
    assert plain is not None and {cells[5].text + cells[6].text for cells in plain.rows} == {""}, "an earlier run's stages don't say"
    for stage in results.stages.values():
        if stage["kind"] == "train":
            compute = {"tflops": {"llm": 3.0}, "seconds": 2.0, "devices": 1, "measured_tflops_per_second": 4.0}
            stage["done"] = {**stage["done"], "summary": {**stage["done"]["summary"], "compute": compute}}
    table = time_table(results)
    assert table is not None
    assert [(cells[0].text, cells[5].text) for cells in table.rows if cells[5].text] == [("train: finetune", "37.5")]


def test_a_score_that_differs_from_its_rows_is_noticed(run: Path) -> None:
    plan = small_plan()
    out = _copy(run, plan)
    store = out / "store"
    shutil.copytree(run / "store", store)
    (out / "run.json").write_text(json.dumps({"store": str(store)}))
    path = store / plan["arms"][0]["scores"]["pets"] / "scored.parquet"
    table = pq.read_table(path)
    wrong = pa.array([not value for value in table.column("correct").to_pylist()])
    pq.write_table(table.set_column(table.schema.get_field_index("correct"), "correct", wrong), path)
    assert any("row-03 on pets" in notice and "its rows give" in notice for notice in load_run(out).notices)


def test_reports_are_reproducible(run: Path) -> None:
    first = {path.name: path.read_bytes() for path in (run / "report").rglob("*") if path.is_file()}
    report.write(run)
    again = {path.name: path.read_bytes() for path in (run / "report").rglob("*") if path.is_file()}
    assert first == again


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


@pytest.mark.parametrize(
    "arguments, says",
    [
        ([], "either a run directory or --published"),
        (["--published", "fine_graned"], "did you mean 'fine_grained'"),
        (["nowhere"], "no such folder"),
        (["somewhere", "--table", "x.csv"], "--table needs --published"),
        (["--published", "fine_grained", "--table", "nothing.csv"], "no table nothing.csv"),
    ],
)
def test_mistakes_say_what_to_do(arguments: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        report.main(arguments)


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


def test_a_damaged_plan_is_a_users_error(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"study": ')
    with pytest.raises(UserError, match="plan.json can't be read"):
        load_run(tmp_path)
