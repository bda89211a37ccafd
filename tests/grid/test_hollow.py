"""Hollow runs under the grid: what is asked of the models, the plan held against what they say, and the command as people call it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from datasets_ray.errors import UserError
from grid import hollow
from grid.load import load
from grid.plan import plan
from grid.run import main
from tests.grid.studies import PROFILE, STUDY, changed, write

ABLATION = Path(__file__).resolve().parents[2] / "experiments" / "full_ablation.yaml"
GIB = 2**30


@pytest.fixture
def here(monkeypatch, tmp_path):
    """The models' side in this process, its rows below a temporary folder."""

    def ask(request):
        from trainers.hollow import Hollow

        folder = tmp_path / "walked"
        folder.mkdir()
        return Hollow(json.loads(json.dumps(request)), folder).run()

    monkeypatch.setattr(hollow, "ask", ask)


@pytest.fixture(scope="module")
def cluster():
    loaded = load(ABLATION, "cluster")
    planned = plan(loaded)
    return planned, hollow.Request(planned, loaded.profile)


def test_each_architecture_is_asked_for_once_and_without_weights(cluster):
    planned, request = cluster
    models = request.json()["models"]
    families = [held["spec"]["family"] for held in models.values()]
    assert sorted(families) == ["clip"] * 3 + ["qwen2_vl"] + ["vlm"] * 5  # 2 encoders x 2 language models, and the released LLaVA
    for held in models.values():
        for part in held["spec"]["parts"].values():
            assert part["weights"] == {"fresh": 0} and part["config"]
    trained = [stage["id"] for stage in planned["stages"] if stage["kind"] == "train"]
    assert [training["id"] for training in request.trainings] == trained
    unfrozen = next(training for training in request.trainings if training["name"] == "pretrain row-23")
    assert unfrozen["phases"] == [["connector"], ["connector", "llm"]]


def test_rows_of_every_data_set_are_asked_for_with_each_template_and_image_recipe(cluster):
    _, request = cluster
    asked = request.json()
    sources = {name: spec["source"] for name, spec in ((s["name"].removeprefix("data "), s) for s in asked["sets"].values())}
    assert len(sources) == 10 and {"llava_json", "pixmo", "imagenet_annotated", "flowers102", "pets", "food101", "vlmevalkit_tsv"} == set(
        sources.values()
    )
    ways = {(w["template"], (w["image"] or {}).get("kind"), (w["image"] or {}).get("fit"), sources_of(request, w)) for w in asked["walks"]}
    assert ("plain", "square", "crop", "llava-558k") in ways and ("plain", "square", "crop", "pixmo-cap") in ways
    assert ("vicuna_v1", "square", "pad", "llava-mix-665k") in ways and ("chatml", "square", "pad", "llava-mix-665k") in ways
    assert any(kind == "native" and source == "llava-mix-665k" for _, kind, _, source in ways)
    told = [json.dumps({k: v for k, v in w.items() if k not in ("id", "name")}, sort_keys=True) for w in asked["walks"] + asked["asked"]]
    assert len(told) == len(set(told))


def test_a_siglip_that_classifies_is_its_checkpoints_own_affair():
    """Its text tower's architecture is in no `shape`; CLIPs beside it are built."""
    loaded = load(ABLATION.with_name("existing_vlms.yaml"), "cluster")
    planned = plan(loaded)
    parts = [stage["spec"]["model"]["parts"]["encoder"] for stage in planned["stages"] if stage["kind"] == "embeddings"]
    assert {part["builder"] for part in parts} == {"open_clip", "transformers_vision"}
    asked = hollow.Request(planned, loaded.profile).json()["models"]
    assert {held["spec"]["parts"]["encoder"]["builder"] for held in asked.values()} == {"open_clip"}


def sources_of(request: hollow.Request, way: dict) -> str:
    return request.sets[way["data"]]["name"].removeprefix("data ")


def test_a_checkpoint_without_shape_is_told_before_anything_is_built(tmp_path):
    study, profile = write(tmp_path, STUDY, changed(PROFILE, "    revision: abc\n", ""))
    loaded = load(study, profile, ["recipe.model=elder"])
    with pytest.raises(UserError, match=r"no architecture of part 'encoder' of nowhere/elder.*\n.*shape:"):
        hollow.Request(plan(loaded), loaded.profile)


def test_bytes_by_zero_stage():
    def gib(zero: int, world: int = 16, width: int = 2, offload: bool = False) -> dict[str, float]:
        found = hollow.held(7_000_000_000, 6_000_000_000, width, {"zero": zero, "world": world, "offload": offload})
        return {kind: round(size / 1e9, 3) for kind, size in found.items()}

    assert gib(0, 1, 4) == {"weights": 28.0, "gradients": 24.0, "optimizer": 48.0}
    assert gib(1, 1, 4) == {"weights": 28.0, "gradients": 24.0, "optimizer": 72.0}  # a master copy of its own
    assert gib(0) == gib(1) == {"weights": 14.0, "gradients": 24.0, "optimizer": 4.5}  # 16 bits shard from ZeRO 1 on
    assert gib(2) == {"weights": 14.0, "gradients": 1.5, "optimizer": 4.5}
    assert gib(3) == {"weights": 0.875, "gradients": 1.5, "optimizer": 4.5}
    assert gib(2, offload=True)["optimizer"] == 0.0


def test_the_run_prints_and_writes_parameters_by_part_and_ends_well(here, tmp_path, capsys):
    study, profile = write(tmp_path)
    code = main([study, "--profile", profile, "--set", "hollow=true", "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert code == 0, said
    made = json.loads((tmp_path / "out" / "hollow.json").read_text())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["hollow.json"] and made["failures"] == []
    assert [arm["name"] for arm in made["arms"]] == ["first", "second", "third", "released"]
    first = made["arms"][0]
    assert first["total"] == sum(first["parameters"].values()) and set(first["parameters"]) == {"encoder", "connector", "llm"}
    third = next(training for training in made["arms"][2]["trainings"] if training["name"] == "pretrain third")
    assert [sorted(part for part, count in phase.items() if count) for phase in third["phases"]] == [["connector"], ["connector", "llm"]]
    for arm in made["arms"]:
        assert f"{arm['name']} " in said and f"{arm['parameters']['connector']:,}" in said
    assert len(made["walks"]) >= 5 and "small committed tokenizers (tiny-llama, tiny-qwen2)" in said and "are as planned" in said


def test_a_plan_that_counts_otherwise_is_wrong_and_ends_with_1(here, tmp_path, capsys, monkeypatch):
    study, profile = write(tmp_path)
    real = hollow.plan

    def miscounted(loaded):
        planned = real(loaded)
        stage = next(stage for stage in planned["stages"] if stage["name"] == "finetune first")
        stage["cost"]["parameters"]["connector"] += 1
        stage["cost"]["memory"]["gradients"] += 1.0
        return planned

    monkeypatch.setattr(hollow, "plan", miscounted)
    assert main([study, "--profile", profile, "--set", "hollow=true", "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().out
    assert "2 WRONG:" in said and "finetune first: connector has" in said and "finetune first: gradients take" in said
    assert len(json.loads((tmp_path / "out" / "hollow.json").read_text())["failures"]) == 2


def test_a_process_that_dies_is_one_message(monkeypatch):
    monkeypatch.setattr(hollow.sys, "executable", "/bin/false")
    with pytest.raises(UserError, match="ended with exit code 1"):
        hollow.ask({})


@pytest.mark.slow
def test_the_papers_22_arms_hollow_and_offline(tmp_path, capfd):
    assert main([str(ABLATION), "--profile", "cluster", "--set", "hollow=true", "--out", str(tmp_path)]) == 0
    made = json.loads((tmp_path / "hollow.json").read_text())
    assert len(made["arms"]) == 24 and made["failures"] == [] and made["notes"] == []
    arms = {arm["name"]: arm["parameters"] for arm in made["arms"]}
    connectors = {name: parts["connector"] for name, parts in arms.items()}
    assert connectors["row-03"] == connectors["row-04"] == 20_979_712 and connectors["row-07"] == 16_522_240
    assert connectors["row-05"] == connectors["row-06"] == 22_028_288 and connectors["row-08"] == 17_439_744
    assert sum(arms["row-11"].values()) == 8_291_375_616
    said = capfd.readouterr().out
    assert all(f"  {name} " in said for name in arms) and len(made["walks"]) > 40
