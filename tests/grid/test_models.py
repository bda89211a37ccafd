"""Model specs of real plans: every part builds as planned, and has exactly the parameters that the plan counts."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from datasets_ray.errors import UserError
from grid.plan import make_plan

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


def fresh(model: dict) -> dict:
    """The model with fresh weights in every part: what it is, without what it has learned."""
    made = copy.deepcopy(model)
    for part in made["parts"].values():
        part["weights"] = {"fresh": 0}
    return made


@pytest.mark.parametrize("study", ["full_ablation", "photos"])
def test_every_planned_model_builds_with_the_parameters_that_the_plan_counts(study, tmp_path):
    pytest.importorskip("torch")
    from trainers.context import Context
    from trainers.models import build, freeze_table, train_parts

    seen: list[dict] = []
    for stage in make_plan(EXPERIMENTS / f"{study}.yaml", profile="tiny")["stages"]:
        if stage["kind"] != "train":
            continue
        model, cost = fresh(stage["spec"]["model"]), stage["cost"]
        if model in seen:
            continue
        seen.append(model)
        built = build(model, Context.local(tmp_path / stage["id"], stage))
        train_parts(built, set(cost["trainable"]))
        assert {row["part"]: row["parameters"] for row in freeze_table(built)} == cost["parameters"], stage["name"]
    assert len(seen) >= 4


def test_released_models_of_the_cluster_profile_have_their_published_sizes():
    plan = make_plan(EXPERIMENTS / "full_ablation.yaml", profile="cluster")
    tuned = {stage["name"]: stage["cost"] for stage in plan["stages"] if stage["kind"] == "train"}
    assert tuned["finetune row-12"]["parameters"]["llm"] == 6_738_415_616
    assert tuned["finetune row-14"]["parameters"]["llm"] == 7_615_616_512
    assert sum(tuned["finetune row-11"]["parameters"].values()) == 8_291_375_616
    assert tuned["pretrain row-12"]["parameters"]["connector"] == 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    assert tuned["pretrain row-12"]["steps"] == 2181 and tuned["finetune row-12"]["steps"] == 5198  # as LLaVA-1.5's logs say


def test_five_lines_are_enough_for_an_encoder_without_a_text_tower(tmp_path):
    """SigLIP, DINOv2: an arm's encoder, read by transformers; it can't classify by itself, and nothing that needs it to is planned."""
    dino = """{image: {size: 518, patch: 14, mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]},
      builder: transformers_vision, checkpoint: facebook/dinov2-large, shape: {hidden_size: 1024, intermediate_size: 4096,
      num_hidden_layers: 24, num_attention_heads: 16, image_size: 518, patch_size: 14}}"""
    study = EXPERIMENTS / "full_ablation.yaml"
    sets = [f"encoders.clip-vit-l-14-336={' '.join(dino.split())}"]
    stages = make_plan(study, profile="cluster", arms=["row-12"], sets=sets)["stages"]
    assert not any(stage["kind"] == "zeroshot" for stage in stages)
    miner = [part.replace("clip-vit-l-14-336", "openclip-vit-l-14-laion") for part in sets]
    with pytest.raises(UserError, match="encoder 'openclip-vit-l-14-laion' can't mine, classify or be trained here"):
        make_plan(study, profile="cluster", arms=["row-13"], sets=miner)
    tuned = next(stage for stage in stages if stage["name"] == "finetune row-12")
    weights = {"checkpoint": "facebook/dinov2-large", "revision": None}
    assert tuned["spec"]["model"]["parts"]["encoder"] == {"builder": "transformers_vision", "config": {}, "weights": weights}
    assert tuned["spec"]["data"]["image"]["mean"] == [0.485, 0.456, 0.406]


def test_tokenizers_are_of_the_revision_that_is_pinned_for_their_weights():
    stages = make_plan(EXPERIMENTS / "full_ablation.yaml", profile="cluster", arms=["row-11", "row-14"])["stages"]
    models = {stage["name"]: stage["spec"]["model"] for stage in stages if stage["kind"] == "train"}
    assert models["finetune row-14"]["tokenizer"] == "Qwen/Qwen2-7B@453ed1575b739b5b03ce3758b23befdb0967f40e"
    assert models["finetune row-11"]["tokenizer"] == "Qwen/Qwen2-VL-7B@e61834264a23db10c06dc4f566dac5634c7ca024"
    for sets, wanted in (("llms.qwen2-7b.revision=null", "Qwen/Qwen2-7B"), ("llms.qwen2-7b.tokenizer=own/one", "own/one")):
        stages = make_plan(EXPERIMENTS / "full_ablation.yaml", profile="cluster", arms=["row-14"], sets=[sets])["stages"]
        assert next(s["spec"]["model"]["tokenizer"] for s in stages if s["name"] == "finetune row-14") == wanted


@pytest.mark.parametrize(
    ("kind", "mean"), [("siglip_vision_model", [0.5] * 3), ("dinov2", [0.485, 0.456, 0.406]), ("clip_vision_model", None), ("", None)]
)
def test_pixels_are_normalised_as_the_kind_of_encoder_was_trained(kind, mean, tmp_path):
    """By the profile's `shape`, else by the config.json of a local checkpoint; an open_clip or CLIP tower has CLIP's."""
    (tmp_path / "config.json").write_text(f'{{"model_type": "{kind}"}}')
    clip = [0.48145466, 0.4578275, 0.40821073]
    numbers = "hidden_size: 8, intermediate_size: 16, num_hidden_layers: 2, image_size: 384, patch_size: 14"
    for more in (f"checkpoint: {tmp_path}", f"checkpoint: owner/name, shape: {{model_type: '{kind}', {numbers}}}"):
        one = f"encoders.clip-vit-l-14-336={{image: {{size: 384, patch: 14}}, builder: transformers_vision, {more}}}"
        stages = make_plan(EXPERIMENTS / "full_ablation.yaml", profile="cluster", arms=["row-12"], sets=[one])["stages"]
        image = next(stage["spec"]["data"]["image"] for stage in stages if stage["name"] == "finetune row-12")
        assert image["mean"] == (mean or clip) and image["size"] == 384


@pytest.mark.parametrize(
    ("checkpoint", "mean", "assumed"),
    [
        ("google/siglip-so400m-patch14-384", 0.5, False), ("google/siglip2-base-patch16-224", 0.5, False),
        ("facebook/dinov2-large", 0.485, False), ("facebook/dinov2-with-registers-base", 0.485, False),
        ("openai/clip-vit-large-patch14-336", 0.48145466, False), ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", 0.48145466, False),
        ("laion/CLIP-ViT-L-14-laion2B-s32B-b82K", 0.5, False), ("somebody/eye", 0.48145466, True),
    ],
)  # fmt: skip
def test_an_encoder_named_by_its_hub_id_alone_has_its_familys_pixels_or_an_assumption_says_so(checkpoint, mean, assumed):
    one = f"encoders.clip-vit-l-14-336={{image: {{size: 384, patch: 14}}, builder: transformers_vision, checkpoint: {checkpoint}}}"
    plan = make_plan(EXPERIMENTS / "full_ablation.yaml", profile="cluster", arms=["row-12", "row-15"], sets=[one])
    image = next(stage["spec"]["data"]["image"] for stage in plan["stages"] if stage["name"] == "finetune row-12")
    assert image["mean"][0] == mean
    told = [entry for entry in plan["study"]["assumptions"] if entry["key"].startswith("encoders.")]
    assert [entry["key"] for entry in told] == ["encoders.clip-vit-l-14-336.image.mean"] * assumed
    assert all("somebody/eye" in entry["text"] and entry["value"][0] == mean for entry in told)
    others = make_plan(EXPERIMENTS / "full_ablation.yaml", profile="cluster", arms=["row-11"], sets=[one])["study"]["assumptions"]
    assert not [entry for entry in others if entry["key"].startswith("encoders.")], "of encoders that are planned only"


def test_the_paper_study_assumes_no_pixels():
    for profile in ("cluster", "gpu", "tiny"):
        plan = make_plan(EXPERIMENTS / "full_ablation.yaml", profile=profile)
        assert not [entry for entry in plan["study"]["assumptions"] if entry["key"].endswith(".image.mean")], profile


@pytest.mark.parametrize(
    ("file", "content", "mean"),
    [
        ("preprocessor_config.json", {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}, [0.1, 0.2, 0.3]),
        ("processor_config.json", {"image_processor": {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}}, [0.1, 0.2, 0.3]),
        ("open_clip_config.json", {"model_cfg": {}, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3]}}, [0.1, 0.2, 0.3]),
        ("open_clip_config.json", {"model_cfg": {}, "preprocess_cfg": {"size": 224}}, [0.48145466, 0.4578275, 0.40821073]),
    ],
)
def test_a_local_checkpoints_own_files_say_how_its_pixels_are_normalised(file, content, mean, tmp_path):
    (tmp_path / file).write_text(json.dumps(content))
    builder = "open_clip" if file.startswith("open_clip") else "transformers_vision"
    one = f"encoders.clip-vit-l-14-336={{image: {{size: 384, patch: 14}}, builder: {builder}, checkpoint: {tmp_path}}}"
    plan = make_plan(EXPERIMENTS / "full_ablation.yaml", profile="cluster", arms=["row-12"], sets=[one])
    image = next(stage["spec"]["data"]["image"] for stage in plan["stages"] if stage["name"] == "finetune row-12")
    assert image["mean"] == mean and not [a for a in plan["study"]["assumptions"] if a["key"].startswith("encoders.")]


def test_a_siglip_by_its_hub_id_classifies_by_itself():
    one = (
        "encoders.clip-vit-l-14-336={image: {size: 384, patch: 14}, builder: transformers_vision, "
        "checkpoint: google/siglip-so400m-patch14-384}"
    )
    stages = make_plan(EXPERIMENTS / "full_ablation.yaml", profile="cluster", arms=["row-12"], sets=[one])["stages"]
    assert any(stage["kind"] == "zeroshot" for stage in stages)


def test_a_released_vlm_is_asked_with_its_towers_pixels(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", "vision_config": {"model_type": "siglip_vision_model"}}))
    sets = [f"models.llava-1.5-7b.checkpoint={tmp_path}", "models.llava-1.5-7b.revision=null", "models.llava-1.5-7b.shape=null"]
    plan = make_plan(EXPERIMENTS / "full_ablation.yaml", profile="cluster", arms=["row-01"], sets=sets)
    image = next(stage["spec"]["image"] for stage in plan["stages"] if stage["kind"] == "predict")
    assert image["mean"] == [0.5] * 3 and image["size"] == 336
