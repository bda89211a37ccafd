"""A report says what the run's rows say, in every format, and hides nothing: marks, reasons for absence, links that resolve."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datasets_ray.errors import UserError
from grid import report
from grid.report.build import build
from grid.report.load import load_run
from tests.grid.synthetic_run import make_run, small_plan

BENCHMARKS = ("imagenet", "pets", "mmbench")


@pytest.fixture(scope="module")
def run(reported: Path) -> Path:
    """A finished run of five arms with its report."""
    return reported


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run where one arm failed in finetuning and another's last prediction is missing."""
    out = make_run(tmp_path_factory.mktemp("broken"), small_plan(), skip=("finetune row-06", "predict row-12 pets"))
    failed = next(stage["id"] for stage in small_plan()["stages"] if stage["name"] == "finetune row-06")
    event = {"event": "fail", "stage": failed, "kind": "deterministic", "message": "the loss is not a number at step 7", "final": True}
    (out / "ledger.jsonl").write_text(json.dumps(event) + "\n" + '{"event": "fa')
    report.write(out)
    return out


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
