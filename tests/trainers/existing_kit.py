"""Tiny released models for tests: random Llava, LLaVA-NeXT, Qwen2-VL, Idefics2 checkpoints as `save_pretrained` writes them, with their
processors over the committed tokenizers. Weights are large and the vocabulary is letters and a few words, so that answers differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trainers.interchange.chat import chat_template
from trainers.interchange.processors import IMAGE_PAD, VIDEO_PAD, tokenizer_with

TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 1024, "rms_norm_eps": 1e-6,
}  # fmt: skip
CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
SQUARE = {"height": 16, "width": 16}
WORDS = "A B C D E the answer is a red one"


def _llava(tokenizer: Any) -> tuple[Any, Any]:
    from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    text = {"model_type": "llama", "vocab_size": len(tokenizer), **TEXT}
    mark = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=CLIP, text_config=text, image_token_index=mark, image_seq_length=4)
    image = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=SQUARE)
    processor = LlavaProcessor(
        image, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=chat_template("vicuna_v1"),
    )  # fmt: skip
    return LlavaForConditionalGeneration(config), processor


def _llava_next(tokenizer: Any) -> tuple[Any, Any]:
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextImageProcessor, LlavaNextProcessor

    text, grids = {"model_type": "llama", "vocab_size": len(tokenizer), **TEXT}, [[16, 32], [32, 16], [32, 32]]
    mark = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaNextConfig(vision_config=CLIP, text_config=text, image_token_index=mark, image_grid_pinpoints=grids)
    image = LlavaNextImageProcessor(size={"shortest_edge": 16}, crop_size=SQUARE, image_grid_pinpoints=grids)
    processor = LlavaNextProcessor(
        image, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=chat_template("vicuna_v1"),
    )  # fmt: skip
    return LlavaNextForConditionalGeneration(config), processor


def _qwen2_vl(tokenizer: Any) -> tuple[Any, Any]:
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    ids = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4, "temporal_patch_size": 2}
    config = Qwen2VLConfig(
        text_config={"vocab_size": len(tokenizer), **TEXT, "rope_parameters": rope}, vision_config={**vision, "spatial_merge_size": 2},
        image_token_id=ids(IMAGE_PAD), video_token_id=ids(VIDEO_PAD), vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )  # fmt: skip
    settings = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(**settings, size={"shortest_edge": 64, "longest_edge": 1024}), tokenizer, Qwen2VLVideoProcessor(**settings),
        chat_template=chat_template("qwen2_vl", IMAGE_PAD),
    )  # fmt: skip
    return Qwen2VLForConditionalGeneration(config), processor


def _idefics2(tokenizer: Any) -> tuple[Any, Any]:
    from transformers import Idefics2Config, Idefics2ForConditionalGeneration, Idefics2ImageProcessor, Idefics2Processor

    image = Idefics2ImageProcessor(size={"shortest_edge": 16, "longest_edge": 32}, do_image_splitting=False)
    processor = Idefics2Processor(image, tokenizer, image_seq_len=3)
    vision = {key: CLIP[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size")}
    perceiver = {"hidden_size": 32, "resampler_n_latents": 3, "resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 16}
    config = Idefics2Config(
        vision_config={**vision, "image_size": 32}, perceiver_config={**perceiver, "num_key_value_heads": 1},
        text_config={"model_type": "mistral", "vocab_size": len(tokenizer), **TEXT}, image_token_id=processor.image_token_id,
    )  # fmt: skip
    return Idefics2ForConditionalGeneration(config), processor


KINDS: dict[str, tuple[Callable[[Any], tuple[Any, Any]], str, list[str]]] = {
    "llava-1.5": (_llava, "tiny-llama", ["<image>"]),
    "llava-next": (_llava_next, "tiny-llama", ["<image>"]),
    "qwen2-vl": (_qwen2_vl, "tiny-qwen2", ["<|vision_start|>", "<|vision_end|>", IMAGE_PAD, VIDEO_PAD]),
    "idefics2": (_idefics2, "tiny-llama", ["<image>", "<fake_token_around_image>", "<end_of_utterance>"]),
}
"""Prompt family → (model and processor over a tokenizer, the tokenizer's name, what it has to hold)."""


def released(kind: str, folder: Path, seed: int = 0) -> Path:
    """A checkpoint of this family in `folder`, as the hub has them."""
    make, name, tokens = KINDS[kind]
    tokenizer = tokenizer_with(name, tokens)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, processor = make(tokenizer)
    words = tokenizer(WORDS, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
        head = torch.zeros(model.lm_head.weight.shape[0], 1)
        head[[*words, tokenizer.eos_token_id]] = 1
        model.lm_head.weight.mul_(head)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    # what released models ask for and a benchmark must not have
    model.generation_config.do_sample, model.generation_config.temperature, model.generation_config.repetition_penalty = True, 0.7, 1.3
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
