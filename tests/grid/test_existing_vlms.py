"""Released models in a study: what may be said of them, how they are planned, and the figure that holds them against general numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from datasets_ray.errors import UserError, UserErrors
from grid import general_axis, report
from grid.load import load
from grid.plan import make_plan
from grid.plantext import render
from grid.report.existing import axis_of, encoder_average, existing_table
from grid.report.figures import draw
from grid.report.load import load_run
from tests.grid.studies import PROFILE, STUDY, changed, write
from tests.grid.synthetic_run import make_run, small_plan
from trainers import families

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


def existing(**more: str) -> str:
    """The small profile with a released model that is asked through its own processor; more: keys of it."""
    given = {"family": "existing", "prompts": "llava-next", "checkpoint": "some/where", **more}
    said = ", ".join(f"{key}: {value}" for key, value in given.items() if value)
    return changed(PROFILE, "  elder:\n", f"  foreign: {{{said}}}\n  elder:\n")


ASKED = changed(STUDY, "released: rival}", "released: foreign, at: {encoder: strong}}")


def planned(tmp_path: Path, profile: str, study: str = ASKED) -> dict[str, Any]:
    file, scale = write(tmp_path, study, profile)
    return make_plan(file, profile=scale)


def test_an_existing_model_is_asked_with_its_familys_words(tmp_path: Path) -> None:
    made = planned(tmp_path, existing())
    entry = made["references"][0]
    stages = {stage["id"]: stage for stage in made["stages"]}
    spec = stages[entry["predictions"]["birds"]]["spec"]
    assert spec["model"]["prompts"] == families.asked("llava-next") and spec["image"] is None and spec["suffix"] == ""
    weights = {"checkpoint": "some/where", "revision": None}
    assert spec["model"]["parts"] == {"model": {"builder": "transformers", "config": {}, "weights": weights}}
    trained = next(arm for arm in made["arms"] if arm["name"] == "second")
    assert entry["zeroshot"] == trained["zeroshot"] and entry["zeroshot"], "its encoder is asked once for both"
    assert not entry["stands_in"] and stages[entry["predictions"]["birds"]]["cost"]["flops"] == 0
    text = render(made, load(*write(tmp_path, ASKED, existing())))
    assert "without its answers" in text and "is not estimated" in text


def test_another_wording_is_another_stage(tmp_path: Path) -> None:
    def asked(**more: str) -> str:
        return planned(tmp_path, existing(**more))["references"][0]["predictions"]["counts"]

    code = {"remote_code": "true", "revision": "abc"}
    known = [asked(), asked(prompts="default"), asked(revision="abc"), asked(**code), asked(prompts="phi-3-vision", **code)]
    assert len(set(known)) == len(known)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompts": "lava-next"}, "did you mean 'llava-next'"),
        ({"prompts": ""}, "foreign.prompts: missing"),
        ({"prompts": "phi-3-vision"}, "remote_code: true"),
        ({"prompts": "phi-3-vision", "remote_code": "true"}, "`remote_code` without `revision`"),
        ({"prompts": "cogvlm", "remote_code": "true", "revision": "abc"}, "build_conversation_input_ids"),
        ({"family": "qwen2_vl"}, "`prompts` or `remote_code`"),
        ({"checkpoint": "", "config": "{a: 1}"}, "an existing model is a `checkpoint`"),
    ],
)
def test_mistakes_say_what_to_write(tmp_path: Path, changes: dict[str, str], says: str) -> None:
    with pytest.raises(UserErrors, match=says):
        planned(tmp_path, existing(**changes))


def test_likelihoods_are_left_out_or_refused(tmp_path: Path) -> None:
    both = changed(ASKED, "mining:", "evaluation: {method: [generate, likelihood]}\nmining:")
    made = planned(tmp_path, existing(), both)
    stages = {stage["id"]: stage["spec"]["method"] for stage in made["stages"] if stage["kind"] == "predict"}
    assert stages[made["references"][0]["predictions"]["birds"]] == "generate"
    assert stages[made["arms"][0]["predictions"]["birds"]] == ["generate", "likelihood"]
    with pytest.raises(UserError, match=r"method: \[generate, likelihood\]"):
        planned(tmp_path, existing(), changed(ASKED, "mining:", "evaluation: {method: likelihood}\nmining:"))


def test_templates_of_a_class_reach_the_encoders_and_not_the_questions(tmp_path: Path) -> None:
    def specs(text: str) -> tuple[list[Any], list[str]]:
        made = planned(tmp_path, PROFILE, changed(STUDY, "zeroshot: true}", f"zeroshot: true{text}}}"))
        found = [stage["spec"]["template"] for stage in made["stages"] if stage["kind"] == "similarities"]
        return found, [stage["id"] for stage in made["stages"] if stage["kind"] in ("choices", "embeddings")]

    plain, same = specs("")
    assert set(plain) == {"a photo of a {}"}
    several, again = specs(", templates: ['a photo of a {}', 'a drawing of the {c}.']")
    assert several.count(["a photo of a {}", "a drawing of the {c}."]) == len(plain) - 1 and again == same, "no image is read again"
    assert specs(", ensemble: pets")[0].count({"ensemble": "pets"}) == len(plain) - 1
    with pytest.raises(UserErrors, match="stands for the class name"):
        specs(", templates: [a photo]")
    with pytest.raises(UserErrors, match="`templates` and `ensemble`"):
        specs(", templates: ['a {}'], ensemble: pets")


@pytest.mark.parametrize("scale", ["tiny", "cluster", "gpu"])
def test_the_houses_study_plans_at_every_scale(scale: str) -> None:
    made = make_plan(EXPERIMENTS / "existing_vlms.yaml", profile=scale)
    assert len(made["references"]) == 7 and not made["arms"] and made["study"]["assumptions"]
    assert all(entry["stands_in"] == (scale == "tiny") for entry in made["references"])
    families_of = {stage["spec"]["model"]["family"] for stage in made["stages"] if stage["kind"] == "predict"}
    assert families_of == ({"vlm", "qwen2_vl"} if scale == "tiny" else {"existing"})
    assert made["study"]["general_axis"]["name"] == "OpenVLM average"
    with_encoder = [entry["name"] for entry in made["references"] if entry["zeroshot"]]
    assert len(with_encoder) == (6 if scale == "tiny" else 7), "all but the Qwen2-VL that is trained whole; Idefics2's SigLIP, too"
    assert made["study"]["doubts"] == []


def test_the_shipped_axis_has_no_numbers() -> None:
    assert general_axis.read(EXPERIMENTS / "published" / "openvlm_average.csv") == {}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name,average\n", "no column 'model'"),
        ("model,average\nx,many\n", "'many' is no number"),
        ("model,average\nx,140\n", "no average"),
        ("model,average\nx,1\nx,2\n", "'x' twice"),
        ("model,average\n,3\n", "a row without a model"),
    ],
)
def test_an_axis_that_cant_be_read_is_told_before_a_run(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "axis.csv").write_text(text)
    with pytest.raises(UserError, match=says):
        general_axis.read(tmp_path / "axis.csv")
    study = changed(STUDY, "seed: 3", "seed: 3\ngeneral_axis: {file: axis.csv}")
    with pytest.raises(UserErrors, match="general_axis.file: "):
        load(*write(tmp_path, study, PROFILE))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five arms, three of them with a general average."""
    out = tmp_path_factory.mktemp("axis") / "run"
    plan = small_plan()
    plan["published"], plan["study"]["general_axis"] = None, {"name": "Some leaderboard", "file": str(out.parent / "axis.csv")}
    (out.parent / "axis.csv").write_text("model,average\nrow-01,36.9\nrow-06,40\nrow-13,48.25\nrow-12,\nsomebody,50\n")
    return make_run(out, plan)


def test_the_table_says_gap_and_who_has_no_number(run: Path) -> None:
    results = load_run(run)
    table = existing_table(results)
    assert table is not None
    told = {cells[0].text: [cell.text for cell in cells] for cells in table.rows}
    arm = results.named("row-13")
    assert arm is not None
    value, alone = arm.value("fine_grained", results.groups), encoder_average(arm, ("imagenet", "pets"))
    assert alone is None, "the encoder's mean per class among the options isn't known for ImageNet"
    for one in results.arms:
        one.zeroshot["imagenet"]["among_choices_mean_per_class"] = 0.9
    table = existing_table(results)
    assert table is not None and value is not None
    told = {cells[0].text: [cell.text for cell in cells] for cells in table.rows}
    assert told["row-13"][3] == "85.0" and told["row-13"][5] == "48.2"
    assert float(told["row-13"][4].replace("−", "-")) == pytest.approx(value - 85.0, abs=0.051)
    assert told["row-12"][5] == told["row-03"][5] == "–"
    assert any("somebody" in note for note in table.notes)
    assert any("no number in the file of Some leaderboard" in note and "row-12" in note for note in table.absences())


def test_the_figure_leaves_out_who_has_no_number_and_says_so(run: Path) -> None:
    results = load_run(run)
    for one in results.arms:
        one.zeroshot["imagenet"]["among_choices_mean_per_class"] = 0.9
    figure = next(figure for figure in draw(results, []) if figure.id == "figure-3")
    assert "left out: row-03, row-12" in figure.caption and "Some leaderboard" in figure.svg
    assert figure.svg.count("row-13") == 2 and figure.svg.count("row-12") == 1, "in both halves, and in one"
    blank = run.parent / "blank.csv"
    blank.write_text("model,average\n")
    results.study["general_axis"] = {"name": "Some leaderboard", "file": str(blank)}
    figure = next(figure for figure in draw(results, []) if figure.id == "figure-3")
    assert "no model has a number for the Some leaderboard yet" in figure.caption and figure.svg.count("row-13") == 1
    results.study["general_axis"]["file"] = str(run.parent / "gone.csv")
    name, known, wrong = axis_of(results) or ("", {}, "")
    assert (name, known) == ("Some leaderboard", {}) and "can't be read" in wrong


def test_a_report_holds_table_and_figure(run: Path) -> None:
    report.write(run)
    text = (run / "report" / "index.html").read_text()
    assert 'id="existing"' in text and 'id="plot-figure-3"' in text and text.index('id="existing"') < text.index('id="plot-figure-3"')
    assert "figure-3.png" in (run / "report" / "report.md").read_text()
    plain = make_run(run.parent / "plain", small_plan())
    assert existing_table(load_run(plain)) is None and json.loads((plain / "plan.json").read_text())["study"].get("general_axis") is None
