"""Our models as transformers': the same weights, computed to the same numbers.

In: a Vlm or Qwen2Vl with its weights. Out: a LlavaForConditionalGeneration or Qwen2VLForConditionalGeneration that holds the same tensors
(no copy), ready for `save_pretrained`; it can't run itself (what isn't saved is never made).

An encoder keeps the blocks up to the layer that is read, so the tower has as many and `vision_feature_layer` is its last one, -1:
LLaVA's "penultimate layer" without the block above it that nobody reads.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from datasets_ray.errors import UserError
from trainers.models.clip_names import to_transformers
from trainers.models.encoders import OpenClipEncoder, normalise

ROUND = 64
"""A vocabulary that has to grow becomes a multiple of this (32,064 for Llama's 32,000, as llava-hf has it)."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Largest difference of features, over their largest element."""


def vision_tower(encoder: Any) -> tuple[nn.Module, int]:
    """The encoder as a transformers vision model, and how many tokens it puts in front of its patches.

    Raises UserError for an encoder that no transformers tower computes.
    """
    if encoder.any_size and encoder.image_size != encoder.vision_model.config.image_size:
        why = "plain transformers gives the stretched positions, but Llava doesn't ask for them"
        raise UserError(f"an encoder of {encoder.vision_model.config.image_size} pixels that was trained at {encoder.image_size}", why=why)
    state = encoder.state_dict()
    if isinstance(encoder, OpenClipEncoder):
        from transformers import CLIPVisionConfig, CLIPVisionModel

        visual, vision = encoder.visual, encoder.config["vision_cfg"]
        blocks = visual.transformer.resblocks
        config = CLIPVisionConfig(
            hidden_size=encoder.width, intermediate_size=blocks[0].mlp.c_fc.out_features, num_hidden_layers=len(blocks),
            num_attention_heads=blocks[0].attn.num_heads, image_size=encoder.image_size, patch_size=encoder.patch,
            hidden_act="quick_gelu" if encoder.config.get("quick_gelu") else "gelu", projection_dim=encoder.config["embed_dim"],
        )  # fmt: skip
        if vision.get("act_kwargs") or vision.get("ls_init_value") is not None:
            raise UserError("this open_clip tower has no counterpart in transformers", why="its blocks are not CLIP's")
        make, weights, prefix = CLIPVisionModel, to_transformers(state), 1
    else:
        make, prefix = type(encoder.vision_model), encoder.prefix_tokens
        if prefix > 1:
            raise UserError(f"an encoder with {prefix - 1} register tokens", why="Llava drops a class token and nothing else")
        config = copy.deepcopy(encoder.vision_model.config)
        layers = next(child for child in encoder.vision_model.encoder.children() if isinstance(child, nn.ModuleList))
        config.num_hidden_layers = len(layers)
        weights = {key.removeprefix("vision_model."): value for key, value in state.items()}
    from transformers.initialization import no_init_weights

    with no_init_weights():
        tower: Any = make(config)
    for key, value in tower.state_dict().items():
        if key.startswith(("post_layernorm.", "layernorm.")):  # above the features: there for the format, read by nobody
            weights[key] = torch.ones_like(value) if key.endswith("weight") else torch.zeros_like(value)
    dtype = next(encoder.parameters()).dtype
    try:
        tower.to(dtype).load_state_dict({key: value.to(dtype) for key, value in weights.items()}, assign=True)
    except RuntimeError as error:
        why = str(error).strip().splitlines()[-1].strip()
        raise UserError("this encoder has no counterpart in transformers", why=why) from None
    _compare(encoder, tower.eval(), prefix)
    return tower, prefix


@torch.no_grad()
def _compare(encoder: Any, tower: Any, prefix: int) -> None:
    """UserError unless the tower's features of a noise image are the encoder's."""
    size, weight = encoder.image_size, next(encoder.parameters())
    noise = torch.randint(0, 256, (1, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(weight.device)
    ours = encoder(noise)
    pixels = normalise(noise, encoder.mean, encoder.std, weight.dtype)
    theirs = tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-1][:, prefix:]
    apart = float((ours - theirs).abs().max() / ours.abs().max())
    if not apart <= TOLERANCE[weight.dtype]:
        why = f"features are {apart:.2g} of their largest apart"
        raise UserError("this encoder has no counterpart in transformers", why=why, hint="a CLIP, SigLIP or DINOv2 of plain blocks")


def grown(weight: Tensor, tokens: int) -> Tensor:
    """float[V, D] with rows for token ids below `tokens`. New rows are the mean of the old ones: as output embeddings their logit is the
    mean logit, which is never the largest, so greedy answers stay what they were."""
    if weight.shape[0] >= tokens:
        return weight
    rows = -(-tokens // ROUND) * ROUND
    mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
    return torch.cat([weight, mean.expand(rows - weight.shape[0], -1)])


def language(llm: Any, tokens: int) -> tuple[dict[str, Tensor], Tensor, int]:
    """(the language model's tensors without its output embedding, the output embedding, rows of both)."""
    head, inputs = llm.get_output_embeddings(), llm.get_input_embeddings().weight
    if getattr(head, "bias", None) is not None:
        raise UserError(f"a {llm.config.model_type} has a bias on its output embedding", why="Llava's has none")
    state = dict(llm.base_model.state_dict())
    name = next(key for key, value in state.items() if value.data_ptr() == inputs.data_ptr())
    tied = head.weight.data_ptr() == inputs.data_ptr()
    state[name] = grown(inputs.detach(), tokens)
    output = state[name] if tied else grown(head.weight.detach(), tokens)
    return state, output, state[name].shape[0]


def llava(model: Any, tower: Any, prefix: int, processor: Any) -> tuple[Any, dict[str, Tensor]]:
    """LlavaForConditionalGeneration of a Vlm whose connector is LLaVA's two-layer MLP, and its tensors as the hub's Llavas name them (what
    transformers 5 itself would write, transformers 4 and vLLM don't find). Raises UserError for another connector."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    join = model.parts["connector"].state_dict()
    if set(join) != {"0.weight", "0.bias", "2.weight", "2.bias"}:
        raise UserError("this connector has no counterpart in Llava", why="Llava's is linear, GELU, linear", hint="mlp of depth 2")
    state, head, rows = language(model.llm, len(processor.tokenizer))
    text = copy.deepcopy(model.llm.config)
    text.vocab_size = rows
    image = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    side = tower.config.image_size // tower.config.patch_size
    config = LlavaConfig(
        vision_config=tower.config, text_config=text, image_token_index=image, image_seq_length=side * side, projector_hidden_act="gelu",
        vision_feature_layer=-1, vision_feature_select_strategy="default" if prefix else "full",
        tie_word_embeddings=bool(text.tie_word_embeddings),
    )  # fmt: skip
    names = {"0": "linear_1", "2": "linear_2"}
    named = {f"model.language_model.{key}": value for key, value in state.items()} | {"lm_head.weight": head}
    named |= {f"model.vision_tower.{key}": value for key, value in tower.state_dict().items()}
    named |= {f"model.multi_modal_projector.{names[key[0]]}{key[1:]}": value for key, value in join.items()}
    inside = "vision_tower.vision_model." if hasattr(tower, "post_layernorm") else "vision_tower."
    hub = {
        "model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head.", "model.vision_tower.": inside,
        "model.multi_modal_projector.": "multi_modal_projector.",
    }  # fmt: skip
    written = {}
    for key, value in named.items():
        here, there = next(pair for pair in hub.items() if key.startswith(pair[0]))
        if here != "lm_head." or not config.tie_word_embeddings:
            written[there + key.removeprefix(here)] = value
    return _filled(LlavaForConditionalGeneration, config, named), written


def qwen2_vl(model: Any, processor: Any) -> Any:
    """Qwen2VLForConditionalGeneration of a Qwen2Vl."""
    from transformers import Qwen2VLForConditionalGeneration

    tokenizer = processor.tokenizer
    state, head, rows = language(model.llm, len(tokenizer))
    config = copy.deepcopy(model.config)
    config.text_config.vocab_size = rows
    for field, token in (
        ("image_token_id", processor.image_token), ("video_token_id", processor.video_token),
        ("vision_start_token_id", "<|vision_start|>"), ("vision_end_token_id", "<|vision_end|>"),
    ):  # fmt: skip
        if token in tokenizer.get_vocab():
            setattr(config, field, tokenizer.convert_tokens_to_ids(token))
    named = {f"model.language_model.{key}": value for key, value in state.items()}
    named |= {f"model.visual.{key}": value for key, value in model.parts["encoder"].state_dict().items()}
    named |= {f"model.visual.merger.{key}": value for key, value in model.parts["connector"].state_dict().items()}
    return _filled(Qwen2VLForConditionalGeneration, config, {**named, "lm_head.weight": head})


def _filled(make: Any, config: Any, state: dict[str, Tensor]) -> Any:
    """The transformers model around these tensors."""
    with torch.device("meta"):
        model = make(config)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    return model
