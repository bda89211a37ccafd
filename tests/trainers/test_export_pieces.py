"""What an export is made of, piece by piece: chat templates, prompts, pixels, towers and vocabularies are ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datasets_ray.errors import UserError
from datasets_ray.images import recipe_from_json
from datasets_ray.prompts import TEMPLATES, generation_prompt, render
from datasets_ray.tokens import load_tokenizer
from tests.trainers import evaluation_kit as kit
from tests.trainers.tiny_models import CLIP_VISION
from trainers import export
from trainers.context import Context
from trainers.interchange import models
from trainers.interchange.chat import chat_template
from trainers.interchange.processors import square_processor
from trainers.models import build
from trainers.models.qwen2_vl import patchify

SQUARE = {"kind": "square", "size": 16, "patch": 8, "fit": "pad", "mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}

CONVERSATIONS = [
    [("user", "<image>\nWhat is it?")],
    [("user", "What is it?")],
    [("system", "Be brief."), ("user", "<image>\n<image>\nWhich one, <b>?"), ("assistant", "The 2nd."), ("user", "Why?")],
    [("user", "Look: <image> here"), ("assistant", "Yes.")],
]


@pytest.mark.parametrize("template", [name for name, one in TEMPLATES.items() if not one.captions_only])
@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=len)
def test_the_chat_template_is_the_training_template(template: str, conversation: list[tuple[str, str]]) -> None:
    tokenizer = load_tokenizer("tiny-llama")
    rendered = render({"messages": [{"role": role, "text": text} for role, text in conversation]}, template, bos="<s>", eos="</s>").text
    jinja = chat_template(template)
    asked = [{"role": role, "content": text} for role, text in conversation]
    ours = tokenizer.apply_chat_template(asked, chat_template=jinja, tokenize=False, add_generation_prompt=asked[-1]["role"] == "user")
    assert ours == rendered
    parts = [{"role": role, "content": pieces(text)} for role, text in conversation]
    assert tokenizer.apply_chat_template(parts, chat_template=jinja, tokenize=False, add_generation_prompt=True) == rendered
    if conversation[-1][0] == "user":
        shorter = tokenizer.apply_chat_template(asked, chat_template=jinja, tokenize=False)
        assert rendered.startswith(shorter) and (len(shorter) < len(rendered)) == bool(TEMPLATES[template].user_close)


def pieces(text: str) -> list[dict[str, str]]:
    """A text as OpenAI-style content."""
    first, *others = text.split("<image>")
    content = [{"type": "text", "text": first}] if first else []
    for words in others:
        content += [{"type": "image"}, *([{"type": "text", "text": words}] if words else [])]
    return content


def test_the_question_prompt_is_the_one_predict_asks() -> None:
    row = {"images": [None], "hint": "", "question": "What?", "options": ["a", "b"]}
    rendered = generation_prompt(row, "vicuna_v1", kit.SUFFIX, eos="</s>").text

    class Processor:
        def apply_chat_template(self, messages: Any, **how: Any) -> str:
            how |= {"chat_template": chat_template("vicuna_v1"), "tokenize": False}
            return str(load_tokenizer("tiny-llama").apply_chat_template(messages, **how))

    assert export.ask(Processor(), row, kit.SUFFIX) == rendered


SIZES = [(50, 40), (40, 50), (64, 64), (31, 77), (90, 33), (24, 24), (300, 200)]


def photo_like(width: int, height: int, seed: int) -> Image.Image:
    """Smooth shading with a few hard edges, as photographs have them; noise would only measure how filters clip."""
    draws = np.random.default_rng(seed)
    across, down = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    waves = [np.sin(6 * (a * across + b * down) + c) for a, b, c in draws.uniform(-1, 1, (3, 3))]
    shaded = 128 + 90 * np.stack(waves, -1) + draws.normal(0, 4, (height, width, 3))
    shaded[(across > 0.6) & (down > 0.5)] = draws.uniform(20, 235, 3)
    return Image.fromarray(np.clip(shaded, 0, 255).astype(np.uint8))


def grey_levels(fit: str, images: list[Image.Image], size: int) -> tuple[np.ndarray, np.ndarray]:
    """|theirs - ours| before normalising, every pixel: with the Pillow backend, with the torchvision one."""
    from transformers import LlavaImageProcessorPil

    recipe = {**SQUARE, "size": size, "fit": fit}
    fast = square_processor(recipe)
    slow = LlavaImageProcessorPil(**{key: getattr(fast, key) for key in ("do_pad", "size", "do_center_crop", "crop_size", "image_mean")})
    raw = {"do_rescale": False, "do_normalize": False, "return_tensors": "np"}
    apart: tuple[list[np.ndarray], list[np.ndarray]] = [], []
    for image in images:
        ours = recipe_from_json(recipe).fit(image).astype(int)
        for made, processor in zip(apart, (slow, fast)):
            made.append(np.abs(np.asarray(processor(image, **raw)["pixel_values"][0]).transpose(1, 2, 0).astype(int) - ours).ravel())
    return np.concatenate(apart[0]), np.concatenate(apart[1])


@pytest.mark.parametrize("fit", ["pad", "crop", "squash"])
def test_pixels_are_ours_with_pillow_and_within_a_grey_level_with_torchvision(fit: str) -> None:
    """Pillow backend: equal. torchvision, the default: its bicubic filter rounds once where Pillow rounds after each direction."""
    pillow, torchvision = grey_levels(fit, [photo_like(*size, seed) for seed, size in enumerate(SIZES)], 24)
    assert not pillow.any()
    assert torchvision.max() <= 1, (torchvision.max(), (torchvision > 0).mean())


@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_pixels_of_photographs(fit: str, data_root: Path) -> None:
    photos = sorted(data_root.rglob("*.jpg"))[:: max(1, len(list(data_root.rglob("*.jpg"))) // 8)][:8]
    if not photos:
        pytest.skip("no photographs below the data folder")
    pillow, torchvision = grey_levels(fit, [Image.open(path).convert("RGB") for path in photos], 336)
    assert not pillow.any()
    share = [(torchvision > level).mean() for level in range(4)]
    assert torchvision.max() <= 4 and share[1] < 1e-3, (torchvision.max(), share)


def test_pixels_of_native_sizes() -> None:
    """Qwen2-VL's own processor: the same grids with both backends, the same pixels with Pillow's, nearly so with torchvision's."""
    from transformers import Qwen2VLImageProcessor, Qwen2VLImageProcessorPil

    recipe = recipe_from_json({**kit.NATIVE_IMAGE, "patch": 8, "min_pixels": 512, "max_pixels": 16384})
    size = {"shortest_edge": 512, "longest_edge": 16384}
    settings = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2, "size": size, "do_rescale": False, "do_normalize": False}
    for seed, (width, height) in enumerate(SIZES):
        image = photo_like(width, height, seed)
        layout, fitted = recipe.layout(width, height), torch.from_numpy(recipe.fit(image).copy())
        ours = patchify(fitted, 8, 2, 2, (0.0,) * 3, (1 / 255,) * 3)
        for make, most in ((Qwen2VLImageProcessorPil, 0.0), (Qwen2VLImageProcessor, 0.01)):
            theirs = make(**settings)(images=[image], return_tensors="pt")
            assert theirs["image_grid_thw"].tolist() == [[1, layout.grid_h, layout.grid_w]]
            apart = (theirs["pixel_values"].float() - ours).abs()
            assert float((apart > (1.01 if most else 0.01)).float().mean()) <= most


@pytest.mark.parametrize("kind", ["clip_vision_model", "siglip_vision_model", "dinov2"])
def test_a_transformers_encoder_becomes_llavas_tower(kind: str, tmp_path: Path) -> None:
    from tests.trainers.tiny_models import part, vlm_spec

    config = {key: value for key, value in CLIP_VISION.items() if key != "hidden_act"} | {"model_type": kind}
    if kind == "dinov2":
        config["mlp_ratio"] = config.pop("intermediate_size") // 32
    spec = vlm_spec()
    spec["parts"]["encoder"] = part("transformers_vision", config, 1)
    encoder = build(spec, Context.local(tmp_path, {"id": "t", "spec": {}})).encoder
    tower, prefix = models.vision_tower(encoder)
    noise = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    with torch.no_grad():
        theirs = tower(pixel_values=encoder.pixels(noise), output_hidden_states=True).hidden_states[-1][:, prefix:]
        torch.testing.assert_close(encoder(noise), theirs, atol=1e-5, rtol=0)
    assert prefix == (kind != "siglip_vision_model")


def test_encoders_and_connectors_without_a_counterpart_are_refused(tmp_path: Path) -> None:
    from tests.trainers.tiny_models import part, vlm_spec

    config = {**{key: value for key, value in CLIP_VISION.items() if key not in ("hidden_act", "intermediate_size")}, "mlp_ratio": 2}
    spec = vlm_spec()
    spec["parts"]["encoder"] = part("transformers_vision", {**config, "model_type": "dinov2_with_registers", "num_register_tokens": 3}, 1)
    with pytest.raises(UserError, match="an encoder with 3 register tokens"):
        models.vision_tower(build(spec, Context.local(tmp_path, {"id": "t", "spec": {}})).encoder)
    spec["parts"]["encoder"] = part("transformers_vision", {**config, "model_type": "dinov2"}, 1)
    with pytest.raises(UserError, match="an encoder of 16 pixels that was trained at 32"):
        models.vision_tower(build(spec, Context.local(tmp_path, {"id": "t", "spec": {}}), image={**SQUARE, "size": 32}).encoder)
    scaled = {**kit.CLIP, "vision_cfg": {**kit.CLIP["vision_cfg"], "no_ln_pre": True}}
    spec["parts"]["encoder"] = part("open_clip", scaled, 1)
    with pytest.raises(UserError, match="this encoder has no counterpart in transformers"):
        models.vision_tower(build(spec, Context.local(tmp_path, {"id": "t", "spec": {}})).encoder)
    spec["parts"] |= {"encoder": part("open_clip", kit.CLIP, 1), "connector": part("linear", {}, 2)}
    model = build(spec, Context.local(tmp_path, {"id": "t", "spec": {}}))
    with pytest.raises(UserError, match=r"mlp of depth 2"):
        models.llava(model, *models.vision_tower(model.encoder), None)


def test_a_grown_vocabulary_never_answers() -> None:
    weight = torch.randn(10, 4)
    assert models.grown(weight, 10) is weight
    grown = models.grown(weight, 11)
    assert grown.shape == (64, 4) and torch.equal(grown[:10], weight)
    logits = torch.randn(1000, 4) @ grown.T
    assert int(logits.argmax(-1).max()) < 10
