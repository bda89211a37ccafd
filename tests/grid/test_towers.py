"""Encoders whose tower nobody here builds are refused before anything runs, by each of those who can say so; what is built passes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from datasets_ray.errors import UserErrors
from grid import probe, towers
from grid.plan import make_plan
from grid.profile import Encoder, Image, Model
from tests.grid.studies import PROFILE, STUDY, changed, write

IMAGE = Image(size=32, patch=8)
NUMBERS = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 1, "image_size": 32, "patch_size": 8}
VISION = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2}


def encoder(builder: str, **said: Any) -> Encoder:
    return Encoder(image=IMAGE, builder=builder, **said)  # type: ignore[arg-type]


def folder(path: Path, **files: Any) -> str:
    """A checkpoint's directory with these JSON files."""
    path.mkdir(exist_ok=True)
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return str(path)


@pytest.mark.parametrize(
    ("builder", "name", "what"),
    [
        ("transformers_vision", "facebook/dinov3-vitl16-pretrain-lvd1689m", "a DINOv3 can't be built"),
        ("transformers_vision", "OpenGVLab/InternViT-300M-448px", "an InternViT can't be built"),
        ("transformers_vision", "google/siglip2-so400m-patch16-naflex", "NaFlex"),
        ("transformers_vision", "timm/ViT-SO400M-14-SigLIP-384", "timm's SigLIP"),
        ("open_clip", "timm/ViT-SO400M-14-SigLIP-384", "timm's SigLIP"),
        ("open_clip", "laion/CLIP-convnext_large_d.laion2B-s26B-b102K-augreg", "a ConvNeXt"),
        ("open_clip", "timm/resnet50_clip.openai", "a ResNet"),
        ("open_clip", "google/siglip-so400m-patch14-384", "is no open_clip model"),
        ("transformers_vision", "timm/vit_large_patch14_clip_336.openai", "is not in transformers' format"),
    ],
)
def test_a_hub_name_says_that_nobody_builds_it(builder: str, name: str, what: str) -> None:
    told = towers.refusal(encoder(builder, checkpoint=name))
    assert told is not None and what in told[0] and "by its name" in told[1]
    assert told[2].startswith("builder: ") or all(part in told[2] for part in ("dinov2_with_registers", "trainers/models/encoders.py"))


@pytest.mark.parametrize(
    ("builder", "name"),
    [
        ("transformers_vision", "google/siglip-so400m-patch14-384"), ("transformers_vision", "google/siglip2-base-patch16-224"),
        ("transformers_vision", "facebook/dinov2-large"), ("transformers_vision", "facebook/dinov2-with-registers-base"),
        ("transformers_vision", "openai/clip-vit-large-patch14-336"), ("open_clip", "openai/clip-vit-large-patch14-336"),
        ("open_clip", "timm/vit_large_patch14_clip_336.openai"), ("open_clip", "apple/DFN5B-CLIP-ViT-H-14-378"),
        ("open_clip", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"), ("transformers_vision", "somebody/eye"), ("open_clip", "somebody/eye"),
    ],
)  # fmt: skip
def test_names_of_what_is_built_and_of_nobody_pass(builder: str, name: str) -> None:
    assert towers.refusal(encoder(builder, checkpoint=name)) is None


@pytest.mark.parametrize(
    ("builder", "files", "what"),
    [
        ("transformers_vision", {"config": {"model_type": "dinov3_vit"}}, "type 'dinov3_vit' can't be built"),
        ("transformers_vision", {"config": {"model_type": "intern_vit_6b"}}, "type 'intern_vit_6b'"),
        (
            "transformers_vision",
            {"config": {"model_type": "siglip2", "vision_config": {"model_type": "siglip2_vision_model"}}},
            "siglip2_vision",
        ),
        ("transformers_vision", {"config": {"architecture": "vit_so400m_patch14_siglip_384"}}, "'vit_so400m_patch14_siglip_384'"),
        ("transformers_vision", {"open_clip_config": {"model_cfg": {"vision_cfg": VISION}}}, "can't read an open_clip export"),
        (
            "open_clip",
            {"open_clip_config": {"model_cfg": {"vision_cfg": {"timm_model_name": "convnext_base"}}}},
            "over timm's convnext_base",
        ),
        ("open_clip", {"open_clip_config": {"model_cfg": {"vision_cfg": {**VISION, "layers": [3, 4, 6, 3]}}}}, "an open_clip ResNet"),
        ("open_clip", {"config": {"model_type": "siglip", "vision_config": {}}}, "a siglip_vision_model is no open_clip model"),
        ("transformers_vision", {"config": {"model_type": "clip", "vision_config": {}}}, None),
        ("transformers_vision", {"config": {"model_type": "siglip", "vision_config": {"model_type": "siglip_vision_model"}}}, None),
        ("transformers_vision", {"config": {"model_type": "dinov2_with_registers"}}, None),
        ("transformers_vision", {"config": {"model_type": "llava", "vision_config": {"model_type": "clip_vision_model"}}}, None),
        ("open_clip", {"config": {"model_type": "clip", "vision_config": {}}}, None),
        ("open_clip", {"config": {"architecture": "vit"}, "open_clip_config": {"model_cfg": {"vision_cfg": VISION}}}, None),
    ],
)
def test_a_checkpoints_own_files_say_it_to_plan_and_check(builder: str, files: dict[str, Any], what: str | None, tmp_path: Path) -> None:
    asset = encoder(builder, checkpoint=folder(tmp_path / "eye", **files))
    told = towers.refusal(asset)
    tower = {"at": "encoders.eye", **towers.request(asset)}
    request = {"tokenizers": [], "checkpoints": [{"checkpoint": asset.checkpoint, "revision": None, "towers": [tower]}]}
    failures = probe.models(json.loads(json.dumps(request)))["failures"]
    if what is None:
        assert told is None and failures == []
        return
    assert told is not None and what in told[0] and "config.json" in told[1] and "builder" in told[2]
    assert failures == [{"what": f"encoders.eye: {told[0]}", "why": told[1], "hint": told[2]}]


@pytest.mark.parametrize(
    ("builder", "said", "what"),
    [
        ("transformers_vision", {"config": {"model_type": "dinov3_vit", **NUMBERS}}, "type 'dinov3_vit'"),
        ("transformers_vision", {"config": NUMBERS}, "names no `model_type`"),
        ("transformers_vision", {"checkpoint": "a/b", "shape": {"model_type": "dinov3_vit", **NUMBERS}}, "type 'dinov3_vit'"),
        ("open_clip", {"checkpoint": "a/b", "shape": {"vision_cfg": {"timm_model_name": "vit_b"}}}, "over timm's vit_b"),
        ("transformers_vision", {"config": {"model_type": "dinov2", **NUMBERS}}, None),
        (
            "transformers_vision",
            {"checkpoint": "a/b", "config": {"layer": -1}, "shape": {"model_type": "siglip", "vision_config": NUMBERS}},
            None,
        ),
        ("open_clip", {"config": {"embed_dim": 8, "vision_cfg": VISION}}, None),
    ],
)
def test_a_profile_that_writes_such_a_tower_is_told(builder: str, said: dict[str, Any], what: str | None) -> None:
    told = towers.refusal(encoder(builder, **said))
    assert told is None if what is None else told is not None and what in told[0]


def test_open_clips_own_names_tell_what_they_are() -> None:
    pytest.importorskip("open_clip")
    wrong = {name: towers.refusal(encoder("open_clip", config={"name": name})) for name in ("RN50", "convnext_base", "ViT-B-16-SigLIP-384")}
    assert all(told is not None and "open_clip" in told[1] for told in wrong.values()), wrong
    for name in ("ViT-L-14", "ViT-H-14-378-quickgelu", "no such model"):
        assert towers.refusal(encoder("open_clip", config={"name": name})) is None


def test_a_released_vlm_is_held_to_the_same(tmp_path: Path) -> None:
    whole = {"model_type": "llava", "vision_config": {"model_type": "intern_vit_6b"}}
    parts: dict[str, Any] = {"encoder": {}, "connector": {"depth": 2}, "llm": {}}
    told = towers.refusal(Model(checkpoint=folder(tmp_path / "vlm", config=whole), config=parts))
    assert told is not None and "type 'intern_vit_6b'" in told[0]


def test_one_mistake_stops_the_plan_and_names_the_encoder(tmp_path: Path) -> None:
    of_its_own = (
        "  strong:\n    builder: transformers_vision\n    image: {size: 32, patch: 8}\n    checkpoint: facebook/dinov3-vits16\n  miner:\n"
    )
    before, rest = PROFILE.split("  strong:\n")
    study, profile = write(tmp_path, STUDY, before + of_its_own + rest.split("  miner:\n")[1])
    with pytest.raises(UserErrors) as caught:
        make_plan(study, profile=profile)
    (error,) = caught.value.errors
    assert error.what == "encoders.strong: a DINOv3 can't be built" and "trainers/models/encoders.py" in error.hint
    assert "profile.yaml:" in error.where


def test_what_classifies_by_itself(tmp_path: Path) -> None:
    """A layer is an arm's choice and takes no text tower away; a vision tower's own checkpoint has none."""
    siglip = {"checkpoint": "google/siglip-so400m-patch14-384"}
    assert towers.classifies(encoder("open_clip", checkpoint="a/b"))
    assert towers.classifies(encoder("transformers_vision", **siglip))
    assert towers.classifies(encoder("transformers_vision", **siglip, config={"layer": -1}))
    assert not towers.classifies(encoder("transformers_vision", **siglip, config={"model_type": "siglip_vision_model", **NUMBERS}))
    assert not towers.classifies(encoder("transformers_vision", checkpoint="facebook/dinov2-large"))
    for kind, whole in (("siglip", True), ("siglip_vision_model", False), ("dinov2", False)):
        here = folder(tmp_path / kind, config={"model_type": kind})
        assert towers.classifies(encoder("transformers_vision", checkpoint=here)) == whole, kind


def test_an_encoder_that_can_not_be_asked_by_itself_is_doubtful_where_benchmarks_ask_it(tmp_path: Path) -> None:
    of_its_own = (
        "  strong:\n    builder: transformers_vision\n    image: {size: 32, patch: 8}\n    checkpoint: facebook/dinov2-small\n  miner:\n"
    )
    before, rest = PROFILE.split("  strong:\n")
    profile = before + of_its_own + rest.split("  miner:\n")[1]
    study, file = write(tmp_path, STUDY, profile)
    said = make_plan(study, profile=file)["study"]["doubts"]
    assert said == ["encoder strong isn't asked by itself (birds: zeroshot): it has no text tower"]
    study, file = write(tmp_path, changed(STUDY, "zeroshot: true", "zeroshot: false"), profile)
    assert make_plan(study, profile=file)["study"]["doubts"] == []


def test_a_layer_beside_a_siglip_keeps_its_zero_shot_stage(tmp_path: Path) -> None:
    of_its_own = (
        "  strong:\n    builder: transformers_vision\n    image: {size: 224, patch: 16}\n    checkpoint: google/siglip-base-patch16-224\n"
        "    config: {layer: -1}\n  miner:\n"
    )
    before, rest = PROFILE.split("  strong:\n")
    study, file = write(tmp_path, STUDY, before + of_its_own + rest.split("  miner:\n")[1])
    made = make_plan(study, profile=file)
    assert made["study"]["doubts"] == [] and any(s["name"] == "zero-shot birds strong" for s in made["stages"] if s["kind"] == "zeroshot")
