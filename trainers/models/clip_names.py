"""One CLIP under two names: transformers' CLIPModel and open_clip's CLIP hold the same tensors (Radford et al. 2021, section 2.4).

In: what a transformers checkpoint holds, or its config. Out: the same as open_clip calls it, so that a released CLIPModel serves zero-shot
classification and an arm's encoder like any open_clip model; and back, an open_clip image tower as a CLIPVisionModel for exports.
They differ in three things: queries, keys and values lie in one matrix, projections are transposed, quick-GELU is a flag.
"""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from datasets_ray.errors import UserError
from trainers.models.released import Index, Stored

BLOCK = (
    ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("attn.out_proj", "self_attn.out_proj"), ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
)  # fmt: skip
"""A block's modules: open_clip's name, transformers' name. Attention's input maps are apart."""
OUTSIDE = (
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.ln_pre", "vision_model.pre_layrnorm"),
    ("visual.ln_post", "vision_model.post_layernorm"),
    ("token_embedding", "text_model.embeddings.token_embedding"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final", "text_model.final_layer_norm"),
    ("logit_scale", "logit_scale"),
)
TRANSPOSED = (("visual.proj", "visual_projection.weight"), ("text_projection", "text_projection.weight"))
TOWERS = {"vision_model": "visual.transformer", "text_model": "transformer"}
KINDS = ("weight", "bias")


def to_open_clip(found: Index) -> Index:
    """A transformers CLIP's tensors in open_clip's names; what is no transformers CLIP stays as it is."""
    if "vision_model.embeddings.patch_embedding.weight" not in found:
        return found
    made: Index = {}
    for ours, theirs in OUTSIDE:
        for end in ("", *(f".{kind}" for kind in KINDS)):
            if theirs + end in found:
                made[ours + end] = found[theirs + end]
    for ours, theirs in TRANSPOSED:
        if theirs in found:
            made[ours] = Stored(found[theirs].pieces, transposed=True)
    for tower, name in TOWERS.items():
        layer = re.compile(rf"{tower}\.encoder\.layers\.(\d+)\.layer_norm1\.weight")
        for number in sorted(int(match[1]) for key in found if (match := layer.fullmatch(key))):
            theirs, ours = f"{tower}.encoder.layers.{number}", f"{name}.resblocks.{number}"
            for kind in KINDS:
                pairs = [(f"{ours}.{mine}.{kind}", f"{theirs}.{other}.{kind}") for mine, other in BLOCK]
                made |= {mine: found[other] for mine, other in pairs if other in found}
                maps = [f"{theirs}.self_attn.{letter}_proj.{kind}" for letter in "qkv"]
                if all(key in found for key in maps):
                    made[f"{ours}.attn.in_proj_{kind}"] = Stored(tuple(piece for key in maps for piece in found[key].pieces))
    return made


def open_clip_config(whole: dict[str, Any]) -> dict[str, Any]:
    """A transformers CLIP config (config.json) as open_clip's model_cfg. Raises UserError for what open_clip's CLIP doesn't compute."""
    from transformers import CLIPConfig

    try:
        hf: Any = CLIPConfig(**{key: value for key, value in whole.items() if key != "model_type"})
    except Exception as error:
        raise UserError("the checkpoint's CLIP config can't be read", why=str(error).strip().splitlines()[0]) from None
    vision, text = hf.vision_config, hf.text_config
    if vision.hidden_act != text.hidden_act or vision.hidden_act not in ("quick_gelu", "gelu"):
        what = f"a CLIP with the activations {vision.hidden_act} and {text.hidden_act}"
        raise UserError(what, why="open_clip's has one, gelu or quick_gelu")
    if {vision.layer_norm_eps, text.layer_norm_eps} != {1e-5}:
        raise UserError(f"a CLIP with layer_norm_eps {vision.layer_norm_eps}", why="open_clip's norms use 1e-5")
    return {
        "embed_dim": hf.projection_dim,
        "quick_gelu": vision.hidden_act == "quick_gelu",
        "vision_cfg": {
            "image_size": vision.image_size, "patch_size": vision.patch_size, "width": vision.hidden_size,
            "layers": vision.num_hidden_layers, "head_width": vision.hidden_size // vision.num_attention_heads, "mlp_ratio": _ratio(vision),
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings, "vocab_size": text.vocab_size, "width": text.hidden_size,
            "heads": text.num_attention_heads, "layers": text.num_hidden_layers, "mlp_ratio": _ratio(text),
        },
    }  # fmt: skip


def _ratio(tower: Any) -> float:
    """open_clip makes int(width * ratio) wide MLPs: half an element more, so that a fraction never falls one short."""
    inner, width = tower.intermediate_size, tower.hidden_size
    return inner / width if inner % width == 0 else (inner + 0.5) / width


def to_transformers(visual: dict[str, Tensor]) -> dict[str, Tensor]:
    """An open_clip image tower's tensors (`visual.*`) as a CLIPVisionModel calls them; blocks as far as there are any."""
    made: dict[str, Tensor] = {}
    for ours, theirs in OUTSIDE:
        if theirs.startswith("vision_model."):
            name = theirs.removeprefix("vision_model.")
            made |= {name + end: visual[ours + end] for end in ("", ".weight", ".bias") if ours + end in visual}
    for key in visual:
        if not (match := re.fullmatch(r"visual\.transformer\.resblocks\.(\d+)\.ln_1\.weight", key)):
            continue
        ours, theirs = f"visual.transformer.resblocks.{match[1]}", f"encoder.layers.{match[1]}"
        for kind in KINDS:
            made |= {f"{theirs}.{other}.{kind}": visual[f"{ours}.{mine}.{kind}"] for mine, other in BLOCK}
            maps = visual[f"{ours}.attn.in_proj_{kind}"].chunk(3)
            made |= {f"{theirs}.self_attn.{letter}_proj.{kind}": piece for letter, piece in zip("qkv", maps)}
    return made
