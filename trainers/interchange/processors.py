"""What goes with an exported model: tokenizer, image processor, chat template, generation settings, all as the arm was trained.

In: an arm and its model. Out: a LlavaProcessor or Qwen2VLProcessor and a GenerationConfig. Pictures are prepared by transformers' own
processors with our settings (pad in the mean colour, centre crop, squash, native size): the same pixels with its Pillow backend, at most
a grey level apart here and there with its torchvision one, whose bicubic filter rounds otherwise.
"""

from __future__ import annotations

import copy
from typing import Any

from datasets_ray.errors import UserError
from datasets_ray.images import recipe_from_json, recipe_to_json
from datasets_ray.rows import IMAGE
from datasets_ray.tokens import end_id, load_tokenizer
from trainers.interchange.arm import Arm
from trainers.interchange.chat import chat_template

IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
MAX_NEW_TOKENS = 256
"""What generation does where the caller says nothing; benchmarks were asked for fewer, as the model card says."""


def tokenizer_with(name: str, tokens: list[str]) -> Any:
    """The tokenizer, these tokens in it (added at the end where it lacks them); pads on the left, as batched generation needs."""
    from tokenizers import AddedToken

    tokenizer = copy.deepcopy(load_tokenizer(name))  # the loaded one is shared
    known = tokenizer.get_vocab()
    new = [AddedToken(token, special=True, normalized=False) for token in tokens if token not in known]
    if new:
        tokenizer.add_tokens(new, special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    tokenizer.chat_template = None
    return tokenizer


def square_processor(image: dict[str, Any]) -> Any:
    """LlavaImageProcessor that makes a square as the recipe's `fit` does."""
    from transformers import LlavaImageProcessor

    recipe = recipe_to_json(recipe_from_json(image))
    size, fit = recipe["size"], recipe["fit"]
    square = {"height": size, "width": size}
    ways: dict[str, dict[str, Any]] = {
        "pad": {"do_pad": True, "size": square, "do_center_crop": False},
        "crop": {"do_pad": False, "size": {"shortest_edge": size}, "do_center_crop": True},
        "squash": {"do_pad": False, "size": square, "do_center_crop": False},
    }
    if fit not in ways:
        raise UserError(f"images fitted by {fit!r} have no counterpart in transformers' Llava processor", hint=", ".join(ways))
    return LlavaImageProcessor(**ways[fit], crop_size=square, image_mean=recipe["mean"], image_std=recipe["std"])


def llava_processor(arm: Arm, prefix_tokens: int) -> Any:
    """prefix_tokens: what the vision tower puts in front of its patches (1: a class token, which Llava drops)."""
    from transformers import LlavaProcessor

    tokenizer = tokenizer_with(arm.model["tokenizer"], [IMAGE])
    return LlavaProcessor(
        image_processor=square_processor(arm.image), tokenizer=tokenizer, patch_size=arm.image["patch"], image_token=IMAGE,
        vision_feature_select_strategy="default" if prefix_tokens else "full", num_additional_image_tokens=prefix_tokens,
        chat_template=chat_template(arm.model["template"]),
    )  # fmt: skip


def qwen2_vl_processor(arm: Arm, temporal: int) -> Any:
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    recipe = recipe_to_json(recipe_from_json(arm.image))
    size = {"shortest_edge": recipe["min_pixels"], "longest_edge": recipe["max_pixels"]}
    settings = {
        "patch_size": recipe["patch"], "merge_size": recipe["merge"], "temporal_patch_size": temporal, "size": size,
        "image_mean": recipe["mean"], "image_std": recipe["std"],
    }  # fmt: skip
    tokenizer = tokenizer_with(arm.model["tokenizer"], [IMAGE_PAD, VIDEO_PAD])
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**settings), tokenizer=tokenizer, video_processor=Qwen2VLVideoProcessor(**settings),
        chat_template=chat_template(arm.model["template"], IMAGE_PAD),
    )  # fmt: skip


def generation(arm: Arm, tokenizer: Any) -> Any:
    """Greedy, to the template's end token, as the benchmarks were answered."""
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False, max_new_tokens=MAX_NEW_TOKENS, bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=end_id(arm.model["template"], load_tokenizer(arm.model["tokenizer"])),
    )  # fmt: skip
