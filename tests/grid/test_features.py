"""Keeping encoder outputs: the plan's arithmetic by hand, who gets the room, and which stages can't keep any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from grid import features, plantext
from grid.load import load
from grid.plan import make_plan, plan
from tests.grid.studies import STUDY, changed, write

IMAGE_FLOPS = 2 * (4 * 32**2 + 2 * 32 * 128) * 17 + 2 * (3 * 8 * 8 * 32) * 16 + 4 * 17 * 17 * 32
"""One block of width 32 (the penultimate layer of two) over 16 patches and the class token."""
IMAGE_BYTES = 16 * 32 * 4
SLOW = "device.tflops=1e-6"
"""A device on which everything that is encoded twice is worth keeping."""


def planned(directory: Path, *sets: str, study: str = STUDY) -> dict[str, Any]:
    file, profile = write(directory, study)
    return make_plan(file, profile=profile, sets=["device.mfu=0.5", *sets])


def entries(made: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(entry["encoder"], entry["rows"]): entry for entry in made["features"]}


def kept(made: dict[str, Any]) -> set[str]:
    """Names of the stages that keep features."""
    return {stage["name"] for stage in made["stages"] if stage["runtime"].get("features")}


def test_the_arithmetic_is_what_one_does_by_hand(tmp_path):
    made = planned(tmp_path, "device.tflops=0.001")
    found = entries(made)
    assert found.keys() == {(encoder, rows) for encoder in ("weak", "strong") for rows in ("captions", "chats")}
    entry = found["weak", "captions"]
    names = {stage["id"]: stage["name"] for stage in made["stages"]}
    assert {names[id] for id in entry["stages"]} == {"pretrain first", "pretrain third", "pretrain released"}
    assert (entry["images"], entry["bytes"], entry["readings"]) == (100, 100 * IMAGE_BYTES, 3)
    assert entry["saves"] == pytest.approx(2 * 100 * IMAGE_FLOPS / 0.5e9)
    assert entry["costs"] == pytest.approx(300 * (IMAGE_BYTES / features.RATE + features.IMAGE_SECONDS) + 100 * features.LAYER_SECONDS)
    assert entry["pays"] == (entry["saves"] > entry["costs"])
    costs = [stage["cost"] for stage in made["stages"] if stage["id"] in entry["stages"]]
    assert entry["flops_share"] == pytest.approx(300 * IMAGE_FLOPS / sum(cost["flops"] for cost in costs))
    assert (found["weak", "chats"]["images"], found["weak", "chats"]["readings"]) == (15, 3)  # every other row has one
    assert found["weak", "chats"]["image"]["fit"] == "pad" and entry["image"]["fit"] == "crop"
    assert (found["strong", "captions"]["readings"], found["strong", "captions"]["saves"]) == (1, 0.0)
    assert not found["strong", "captions"]["pays"]


def test_two_epochs_are_two_readings_and_half_an_epoch_is_half_of_the_images(tmp_path):
    twice = STUDY.replace("    data: captions\n    epochs: 1\n", "    data: captions\n    epochs: 2\n")
    assert entries(planned(tmp_path, study=twice))["strong", "captions"]["readings"] == 2
    half = STUDY.replace("    data: captions\n    epochs: 1\n", "    data: captions\n    epochs: 0.5\n")
    entry = entries(planned(tmp_path, study=half))["strong", "captions"]
    assert (entry["readings"], entry["saves"]) == (0.5, 0.0)
    assert entry["costs"] == pytest.approx(50 * (IMAGE_BYTES / features.RATE + features.IMAGE_SECONDS + features.LAYER_SECONDS))


def test_nothing_is_kept_unless_there_is_room(tmp_path):
    made = planned(tmp_path, SLOW)
    assert entries(made)["weak", "captions"]["pays"] and kept(made) == set()
    assert made["run"]["features_mb"] == 0 and not any(entry["kept"] for entry in made["features"])


def test_stages_for_which_it_pays_keep_them_and_stay_the_same_stages(tmp_path):
    made, before = planned(tmp_path, SLOW, "resources.features_mb=1"), planned(tmp_path, SLOW)
    assert {(e["encoder"], e["kept"]) for e in made["features"]} == {("weak", True), ("strong", False)}
    assert kept(made) == {stage["name"] for stage in made["stages"] for e in made["features"] if e["kept"] and stage["id"] in e["stages"]}
    assert len(kept(made)) == 6 and "finetune second" not in kept(made)
    assert [stage["id"] for stage in made["stages"]] == [stage["id"] for stage in before["stages"]]
    fast = planned(tmp_path, "device.tflops=100", "resources.features_mb=1")
    assert kept(fast) == set()


def test_the_room_goes_to_what_saves_most_a_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "MB", 150 * IMAGE_BYTES)
    four = STUDY.replace("    data: chats\n    epochs: 1\n", "    data: chats\n    epochs: 4\n")
    made = planned(tmp_path, SLOW, "resources.features_mb=1", study=four)
    assert {e["rows"] for e in made["features"] if e["kept"]} == {"captions", "chats"}
    monkeypatch.setattr(features, "MB", 110 * IMAGE_BYTES)
    made = planned(tmp_path, SLOW, "resources.features_mb=1", study=four)
    assert {(e["encoder"], e["rows"]) for e in made["features"] if e["kept"]} == {("weak", "chats"), ("strong", "chats")}
    assert kept(made) == {f"finetune {arm}" for arm in ("first", "second", "third", "released")}


def test_a_stage_of_two_data_sets_keeps_all_or_nothing(tmp_path, monkeypatch):
    mixed = STUDY.replace("    data: chats\n", "    data: [captions, chats]\n")
    monkeypatch.setattr(features, "MB", 110 * IMAGE_BYTES)
    made = planned(tmp_path, SLOW, "resources.features_mb=1", study=mixed)
    assert {e["image"]["fit"] for e in made["features"] if e["kept"]} == {"crop"}  # a hundred captions, and not these and chats as well
    assert kept(made) == {"pretrain first", "pretrain third", "pretrain released"}
    monkeypatch.setattr(features, "MB", 220 * IMAGE_BYTES)
    assert kept(planned(tmp_path, SLOW, "resources.features_mb=1", study=mixed)) == {
        *kept(made), "finetune first", "finetune third", "finetune released",
    }  # fmt: skip


def test_an_encoder_that_trains_keeps_none_and_is_another_one_afterwards(tmp_path):
    trains = changed(
        STUDY, "{until: 0.2, learning_rates: {connector: 1e-3}}", "{until: 0.2, learning_rates: {connector: 1e-3, encoder: 1e-5}}"
    )
    made = planned(tmp_path, SLOW, "resources.features_mb=9", study=trains)
    (pretrained,) = [stage["id"] for stage in made["stages"] if stage["name"] == "pretrain third"]
    assert not any(pretrained in entry["stages"] for entry in made["features"]) and "pretrain third" not in kept(made)
    assert entries(made)["pretrain third", "chats"]["readings"] == 1


def test_under_zero_3_on_several_ranks_none_are_kept_and_the_plan_says_so(tmp_path):
    """As `trainers.features.why_not` refuses there."""
    three = ("resources.zero=3", "resources.features_mb=9")
    alone = planned(tmp_path, SLOW, *three)
    assert kept(alone) and not any(entry["together"] for entry in alone["features"])
    file, profile = write(tmp_path)
    loaded = load(file, profile, [SLOW, "device.mfu=0.5", *three, "resources.workers=2"])
    made = plan(loaded)
    assert kept(made) == set() and entries(made).keys() == entries(alone).keys()
    assert all(entry["together"] and not entry["pays"] and not entry["kept"] for entry in made["features"])
    lines = [line for line in plantext.render(made, loaded).splitlines() if line.startswith("  weak x ")]
    assert len(lines) == 2 and all(line.endswith(": doesn't: under ZeRO 3 all ranks run the encoder together") for line in lines)


def test_models_that_take_images_in_their_own_size_are_left_out():
    made = make_plan("experiments/full_ablation.yaml", profile="cluster")
    foreign = {stage["id"] for stage in made["stages"] if (stage["spec"].get("model") or {}).get("family") == "qwen2_vl"}
    listed = {id for entry in made["features"] for id in entry["stages"]}
    assert foreign and listed and not foreign & listed
    assert {entry["encoder"] for entry in made["features"]} == {"clip-vit-l-14-336", "dfn-clip-vit-h-14-378"}


def test_the_plan_says_it_in_a_line_each(tmp_path):
    file, profile = write(tmp_path)
    loaded = load(file, profile, [SLOW, "device.mfu=0.5"])
    text = plantext.render(plan(loaded), loaded)
    (title,) = [line for line in text.splitlines() if line.startswith("Outputs of frozen encoders")]
    assert title.endswith("(features_mb: 0):")
    (line,) = [line for line in text.splitlines() if line.startswith("  weak x captions (crop); ")]
    assert "% of FLOPs, 0.00 GB, read 3 x, saves 4 min, costs 0 s: pays, no room" in line
    (line,) = [line for line in text.splitlines() if line.startswith("  strong x captions (crop); ")]
    assert line.endswith("saves 0 s, costs 0 s: doesn't pay")
    assert "features_mb: 1 has room for all that pays" in text
