"""The stage graph: what is planned, once, in which order, and that the full ablation is the published table."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from datasets_ray.errors import UserErrors
from grid import plan as planning
from grid.identity import stage_id
from grid.plan import make_plan
from tests.grid.studies import STUDY, changed, write, write_big

ROOT = Path(__file__).resolve().parents[2]
ABLATION = ROOT / "experiments" / "full_ablation.yaml"
AXES = ("encoder", "llm", "arch", "pretraining", "finetuning", "updating")


@pytest.fixture(scope="module")
def ablation():
    return make_plan(ABLATION, profile="tiny")


@pytest.fixture
def small(tmp_path):
    study, profile = write(tmp_path)
    return make_plan(study, profile=profile)


def by_id(plan):
    return {stage["id"]: stage for stage in plan["stages"]}


def training(plan, arm):
    stages = by_id(plan)
    return [stages[id]["name"] for id in arm["stages"] if stages[id]["kind"] == "train"]


def test_the_full_ablation_is_the_published_rows(ablation):
    with (ROOT / "experiments" / "published" / "fine_grained_ablation.csv").open() as file:
        rows = list(csv.DictReader(file))
    for source, key in (("trained", "arms"), ("released", "references")):
        wanted = {int(row["row"]): {axis: row[axis] for axis in AXES} for row in rows if row["source"] == source}
        assert {arm["row"]: arm["axes"] for arm in ablation[key]} == wanted
        assert [arm["name"] for arm in ablation[key]] == [f"row-{row:02d}" for row in sorted(wanted)]
    assert len(ablation["arms"]) == 22 and len(ablation["references"]) == 2


def test_rows_2_and_12_differ_in_init_only(ablation):
    two, twelve = (next(arm for arm in ablation["arms"] if arm["row"] == row) for row in (2, 12))
    assert two["axes"] == twelve["axes"] and (two["init"], twelve["init"]) == ("llava-1.5-connector", "fresh")
    assert not set(two["scores"].values()) & set(twelve["scores"].values())
    assert "pretrain row-01" in training(ablation, two) and "pretrain row-12" in training(ablation, twelve)


def test_every_contrast_of_the_published_effects_has_its_pairs(ablation):
    with (ROOT / "experiments" / "published" / "fine_grained_effects.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(c["name"], c["axis"], c["from"], c["to"], c["where"]) for c in ablation["contrasts"]] == [
        (row["effect"], row["axis"], row["from"], row["to"], row["where"]) for row in rows
    ]


def test_every_row_answers_all_seven_sets_and_one_arm_its_control(ablation):
    everyone = [*ablation["arms"], *ablation["references"]]
    benchmarks = {"imagenet", "flowers", "pets", "food", "mmbench", "mmmu", "mmstar"}
    assert all(set(arm["scores"]) == set(arm["predictions"]) == benchmarks for arm in everyone)
    assert {arm["name"] for arm in everyone if arm["controls"]} == {"row-17"}
    stages = by_id(ablation)
    control = next(arm for arm in everyone if arm["controls"])
    predicted = stages[stages[control["controls"]["pets"]]["spec"]["predictions"]]["spec"]
    assert stages[predicted["questions"]]["spec"]["source"] == "permuted"
    assert predicted["model"] == stages[control["predictions"]["pets"]]["spec"]["model"]
    assert all(stage["cost"]["samples"] >= 400 for stage in ablation["stages"] if stage["kind"] == "predict")


def test_the_miner_is_no_arms_encoder_and_mines_all_four_sets(ablation):
    stages = by_id(ablation)
    mined = [stage for stage in ablation["stages"] if stage["kind"] == "choices"]
    encoders = {
        stage["spec"]["model"]["parts"]["encoder"]["weights"]["stage"]
        for stage in ablation["stages"]
        if stage["name"].startswith("finetune row-1")
    }
    miners = {stages[stage["spec"]["similarities"]]["spec"]["model"]["parts"]["encoder"]["weights"]["stage"] for stage in mined}
    assert len(mined) == 4 and len(miners) == 1 and not miners & encoders


def test_what_each_recipe_trains(ablation):
    stages = {stage["name"]: stage["spec"] for stage in ablation["stages"]}
    connector_only = stages["pretrain row-15"]["phases"]
    assert [(phase["until"], sorted(phase["learning_rates"])) for phase in connector_only] == [(1.0, ["connector"])]
    full = stages["pretrain row-23"]["phases"]
    assert [(phase["until"], sorted(phase["learning_rates"])) for phase in full] == [(0.2, ["connector"]), (1.0, ["connector", "llm"])]
    assert set(stages["finetune row-23"]["phases"][0]["learning_rates"]) == {"connector", "llm"}
    weights = {name: part["weights"] for name, part in stages["finetune row-23"]["model"]["parts"].items()}
    pretrained = next(stage["id"] for stage in ablation["stages"] if stage["name"] == "pretrain row-23")
    assert weights["connector"] == weights["llm"] == {"stage": pretrained}
    assert stages["finetune row-03"]["model"]["parts"]["connector"]["weights"] == {"fresh": 0}
    assert "pretrain row-03" not in stages
    assert (
        set(stages["finetune row-11"]["phases"][0]["learning_rates"]) == {"llm"}
        and stages["finetune row-11"]["model"]["family"] == "qwen2_vl"
    )
    assert stages["pretrain row-12"]["data"]["template"] == "plain" and stages["finetune row-12"]["data"]["template"] == "vicuna_v1"
    assert (stages["pretrain row-12"]["data"]["image"]["fit"], stages["finetune row-12"]["data"]["image"]["fit"]) == ("crop", "pad")


def test_three_finetunings_on_one_pretraining_plan_it_once(tmp_path):
    entries = "  - {name: first}\n" + "".join(f"  - {{name: tuned-{n}, set: {{finetune.batch: {n}}}}}\n" for n in (8, 16))
    study = changed(STUDY, STUDY[STUDY.index("  - {name: first}") : STUDY.index("references:")], entries)
    plan = make_plan(*write(tmp_path, study)[:1], profile=str(tmp_path / "profile.yaml"))
    pretrainings = [stage for stage in plan["stages"] if stage["name"].startswith("pretrain") and "released" not in stage["arms"]]
    assert len(pretrainings) == 1 and pretrainings[0]["arms"] == ["first", "tuned-8", "tuned-16"]
    assert len([stage for stage in plan["stages"] if stage["name"].startswith("finetune")]) == 4


def test_the_graph_is_in_topological_order_and_complete(small, ablation):
    for plan in (small, ablation):
        seen: set[str] = set()
        for stage in plan["stages"]:
            assert set(stage["needs"]) <= seen
            assert stage["id"] not in seen
            seen.add(stage["id"])
        for arm in [*plan["arms"], *plan["references"]]:
            own = set(arm["stages"])
            wanted = {*arm["scores"].values(), *arm["predictions"].values(), *arm["controls"].values(), *arm["zeroshot"].values()}
            assert own <= seen and wanted <= own
            assert all(set(by_id(plan)[id]["needs"]) <= own for id in own)
            assert [stage["id"] for stage in plan["stages"] if arm["name"] in stage["arms"]] == arm["stages"]
        assert all(stage["arms"] for stage in plan["stages"])


def referred(spec) -> set[str]:
    """Every stage id inside a spec."""
    if isinstance(spec, dict):
        return set().union(*(referred(value) for value in spec.values()), set())
    if isinstance(spec, list):
        return set().union(*(referred(value) for value in spec), set())
    return {spec} if isinstance(spec, str) and spec.split("-")[0] in planning.KINDS and len(spec.rsplit("-", 1)[-1]) == 12 else set()


def test_identities_are_contents_and_specs_name_all_their_inputs(small, ablation):
    for plan in (small, ablation):
        for stage in plan["stages"]:
            assert stage["id"] == stage_id(stage["kind"], stage["spec"])
            assert referred(stage["spec"]) == set(stage["needs"]), stage["name"]


def test_a_plan_is_a_function_of_its_files(tmp_path, small):
    study, profile = write(tmp_path)
    assert planning.dump(make_plan(study, profile=profile)) == planning.dump(small)
    assert json.loads(planning.dump(small)) == small


def test_batch_arithmetic(small):
    stages = {stage["name"]: stage["cost"] for stage in small["stages"]}
    assert (stages["pretrain first"]["steps"], stages["pretrain first"]["samples"]) == (math.ceil(100 / 8), 100)
    assert (stages["finetune first"]["steps"], stages["finetune third"]["steps"]) == (math.ceil(30 / 4), math.ceil(30 / 2))
    assert (stages["llm talker"]["steps"], stages["llm talker"]["samples"]) == (4, 32)


def test_chosen_arms_are_planned_alone(tmp_path):
    plan = make_plan(ABLATION, profile="tiny", arms=["row-02", "row-1[45]"])
    assert [arm["name"] for arm in plan["arms"]] == ["row-02", "row-14", "row-15"] and not plan["references"]
    assert not any("row-12" in stage["name"] for stage in plan["stages"])
    whole = by_id(make_plan(ABLATION, profile="tiny"))
    assert {stage["id"] for stage in plan["stages"]} <= set(whole)


def test_planning_loads_neither_torch_nor_ray():
    code = (
        "import sys; from grid import plan; plan.main([sys.argv[1], '--profile', 'tiny']); "
        "print(sorted({'torch', 'ray', 'transformers', 'mlflow', 'deepspeed'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(ABLATION)], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_ten_thousand_arms(tmp_path):
    file, profile = write_big(tmp_path)
    plan = make_plan(file, profile=profile)
    assert len(plan["arms"]) == 10_000 == len({arm["name"] for arm in plan["arms"]})
    pretrained = [stage for stage in plan["stages"] if stage["name"].startswith("pretrain")]
    finetuned = [stage for stage in plan["stages"] if stage["name"].startswith("finetune")]
    assert len(pretrained) == len(finetuned) == 10_001 and all(len(stage["arms"]) == 1 for stage in finetuned)
    shared = [stage for stage in plan["stages"] if stage["kind"] == "choices"]
    assert len(shared) == 1 and len(shared[0]["arms"]) == 10_001


def test_the_text_names_every_arm_every_assumption_and_the_papers_cost(capsys, ablation):
    planning.main([str(ABLATION), "--profile", "tiny"])
    said = capsys.readouterr().out
    assert said.startswith("profile tiny (--profile)")
    assert all(arm["name"] in said for arm in [*ablation["arms"], *ablation["references"]])
    assert all(entry["key"] in said for entry in ablation["study"]["assumptions"])
    assert "MINIATURE" in said and "16 x A100-40GB, up to 20 h" in said
    finetuning = next(stage["cost"] for stage in ablation["stages"] if stage["name"] == "finetune row-14")
    assert f"{finetuning['rows']:,}" in said and f"{finetuning['steps']:,}" in said


def test_optimisations_turned_off_are_told_and_change_no_identity(tmp_path, small):
    study, profile = write(tmp_path)
    made = make_plan(study, profile=profile, sets=["resources.disable=[segments, layers]"])
    assert [stage["id"] for stage in made["stages"]] == [stage["id"] for stage in small["stages"]]
    assert all(stage["runtime"]["disable"] == ["layers", "segments"] for stage in made["stages"])
    assert [doubt for doubt in made["study"]["doubts"] if "resources.disable turns off segments, layers" in doubt]
    assert not any("disable" in stage["runtime"] for stage in small["stages"]) and not any("disable" in d for d in small["study"]["doubts"])
    with pytest.raises(UserErrors, match="no optimisation 'segment'.*segments"):
        make_plan(study, profile=profile, sets=["resources.disable=[segment]"])


def test_general_benchmarks_are_asked_as_the_study_says_and_cheaply_in_miniature(ablation):
    """MMBench circularly, all rotations of English dev; MMMU's open questions with room for an answer."""
    large = make_plan(ROOT / "experiments" / "full_ablation.yaml", profile="cluster", arms=["row-12"])
    found = {}
    for scale, made in (("cluster", large), ("tiny", ablation)):
        stages, arm = by_id(made), next(arm for arm in made["arms"] if arm["name"] == "row-12")
        for name in ("mmbench", "mmmu"):
            predict, score = stages[arm["predictions"][name]], stages[arm["scores"][name]]
            found[scale, name] = (predict["cost"]["samples"], predict["spec"]["max_new_tokens"], score["spec"]["metric"])
    assert found == {
        ("cluster", "mmbench"): (4329, 8, "circular"), ("cluster", "mmmu"): (900, 64, "accuracy"),
        ("tiny", "mmbench"): (400, 8, "accuracy"), ("tiny", "mmmu"): (400, 8, "accuracy"),
    }  # fmt: skip
    data = {stage["name"]: stage["spec"] for stage in large["stages"] if stage["kind"] == "dataset"}
    assert data["data mmbench"]["circular"] is True and data["data mmbench"]["expect"] == 1164
    assert data["data mmmu"]["open"] == "mmmu" and data["data mmmu"]["most_images"] == 1
    assert {"key": "benchmarks.mmmu.max_new_tokens", "value": 64} in [
        {key: one[key] for key in ("key", "value")} for one in large["study"]["assumptions"]
    ]
