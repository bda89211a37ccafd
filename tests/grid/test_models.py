"""Model specs of real plans: every part builds as planned, and has exactly the parameters that the plan counts."""

from __future__ import annotations

import copy
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
