"""Image encoders: pixels uint8[N, H, W, 3] → patch features float[N, K, D] of the penultimate layer, without class token or final norm.

    width            D
    tokens(recipe)   K for an image recipe (a pure number: packing knows it before any model runs)
    forward(pixels)  normalises on the device it runs on, then the tower up to the layer

A new encoder is a class with these three and a line in ENCODERS; in a study it is five lines of YAML. The penultimate layer's patch
tokens are LLaVA's choice (`mm_vision_select_layer -2`, `patch`), `layer` in the config says another. Layers above it are never built.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from datasets_ray.errors import UserError, nearest
from datasets_ray.images import CLIP_MEAN, CLIP_STD, recipe_from_json
from trainers.models.weights import Source, make_part

SIGLIP_MEAN, SIGLIP_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def normalise(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """uint8[N, H, W, 3] → float[N, 3, H, W], (x / 255 - mean) / std per channel; computed in fp32 whatever comes out."""
    m, s = (torch.tensor(c, device=pixels.device) * 255 for c in (mean, std))
    return pixels.sub(m).div_(s).permute(0, 3, 1, 2).to(dtype)


class Encoder(nn.Module):
    """What every encoder shares: a square tower's size, its normalisation, its number of tokens."""

    width: int
    image_size: int
    patch: int
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def tokens(self, recipe: dict[str, Any]) -> int:
        """K for images prepared by this recipe. Raises UserError if the tower was built for another size."""
        wanted = {"kind": "square", "size": self.image_size, "patch": self.patch}
        given = {key: recipe.get(key) for key in wanted}
        if given != wanted:
            raise UserError(f"image recipe {given} for an encoder of size {self.image_size}, patch {self.patch}", hint=f"image: {wanted}")
        return (self.image_size // self.patch) ** 2

    def follow(self, recipe: dict[str, Any] | None) -> None:
        """Checks a recipe and takes its mean and std over."""
        if recipe is not None:
            self.tokens(recipe)
            parsed = recipe_from_json(recipe)
            self.mean, self.std = parsed.mean, parsed.std

    def pixels(self, images: Tensor) -> Tensor:
        """uint8[N, H, W, 3] → normalised float[N, 3, H, W] in the tower's precision."""
        return normalise(images, self.mean, self.std, next(self.parameters()).dtype)


def open_clip_config(config: dict[str, Any]) -> dict[str, Any]:
    """CLIP's own fields of an open_clip part: {"name": one of open_clip's models} or the config dict itself."""
    ours = {"name", "tokenizer", "layer"}
    fields = {k: v for k, v in config.items() if k not in ours}
    if "name" in config:
        import open_clip

        named = open_clip.get_model_config(config["name"])
        if named is None:
            raise UserError(f"open_clip has no model {config['name']!r}", hint=nearest(config["name"], open_clip.list_models()))
        fields = {**named, **fields}
    fields.pop("custom_text", None)
    known = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale", "init_logit_bias"}
    for key in fields:
        if key not in known:
            raise UserError(f"open_clip config has no {key!r}", hint=nearest(key, known | ours))
    for key in ("embed_dim", "vision_cfg"):
        if key not in fields:
            raise UserError(f"open_clip config without {key}", hint="name: ViT-L-14, or embed_dim, vision_cfg and text_cfg")
    return fields


class OpenClipEncoder(Encoder):
    """The visual tower of an open_clip CLIP. Its tensors keep CLIP's names (`visual.*`), so that one weights file serves the clip
    family and this encoder; what a file holds beyond them (text tower, last block, projection) is not read."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        from open_clip.model import CLIPVisionCfg, _build_vision_tower

        fields = open_clip_config(config)
        vision = CLIPVisionCfg(**fields["vision_cfg"])
        if vision.timm_model_name or isinstance(vision.layers, (list, tuple)):
            raise UserError("this open_clip model has no plain vision transformer", hint="builder: transformers_vision for SigLIP")
        visual = _build_vision_tower(fields["embed_dim"], vision, fields.get("quick_gelu", False))
        layers = len(visual.transformer.resblocks)
        keep = _kept(config.get("layer", -2), layers)
        visual.transformer.resblocks = visual.transformer.resblocks[:keep]
        visual.ln_post, visual.proj = nn.Identity(), None
        self.visual = visual
        self.width, self.image_size, self.patch = vision.width, visual.image_size[0], visual.patch_size[0]

    def ignores(self, key: str) -> bool:
        """Names of a whole CLIP's file that this encoder has no use for: the text tower, the blocks above its layer, the projection."""
        block = re.match(r"visual\.transformer\.resblocks\.(\d+)\.", key)
        if block:
            return int(block[1]) >= len(self.visual.transformer.resblocks)
        return not key.startswith("visual.") or key.startswith(("visual.ln_post.", "visual.proj"))

    def forward(self, images: Tensor) -> Tensor:
        """uint8[N, H, W, 3] → float[N, K, D]."""
        out = self.visual.forward_intermediates(self.pixels(images), indices=1, intermediates_only=True, output_fmt="NLC")
        return out["image_intermediates"][0]


class TransformersEncoder(Encoder):
    """CLIP's or SigLIP's vision tower from transformers: config = its vision config with `model_type`."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        fields = {k: v for k, v in config.items() if k not in {"model_type", "layer"}}
        kind = config.get("model_type")
        if kind == "clip_vision_model":
            from transformers.models.clip.modeling_clip import CLIPVisionConfig, CLIPVisionModel

            tower: Any = CLIPVisionModel._from_config(CLIPVisionConfig(**fields), attn_implementation="sdpa")
            self.prefix_tokens = 1
        elif kind == "siglip_vision_model":
            from transformers.models.siglip.modeling_siglip import SiglipVisionConfig, SiglipVisionModel

            tower = SiglipVisionModel._from_config(SiglipVisionConfig(**fields, vision_use_head=False), attn_implementation="sdpa")
            self.prefix_tokens, self.mean, self.std = 0, SIGLIP_MEAN, SIGLIP_STD
        else:
            raise UserError(f"transformers_vision of type {kind!r}", hint="model_type: clip_vision_model or siglip_vision_model")
        keep = _kept(config.get("layer", -2), len(tower.encoder.layers))
        tower.encoder.layers = tower.encoder.layers[:keep]
        tower.post_layernorm = nn.Identity()
        self.vision_model = tower
        self.width, self.image_size, self.patch = tower.config.hidden_size, tower.config.image_size, tower.config.patch_size

    def forward(self, images: Tensor) -> Tensor:
        """uint8[N, H, W, 3] → float[N, K, D]."""
        tower = self.vision_model
        hidden = tower.embeddings(self.pixels(images))
        if self.prefix_tokens:  # CLIP: class token and a norm before the blocks (transformers spells it so)
            hidden = tower.pre_layrnorm(hidden)
        return tower.encoder(inputs_embeds=hidden).last_hidden_state[:, self.prefix_tokens :]


def _kept(layer: int, layers: int) -> int:
    """Blocks needed for `layer`, counted as transformers counts hidden_states: -1 the last block's output, -2 the one before."""
    keep = layers + 1 + layer if layer < 0 else layer
    if not 1 <= keep <= layers:
        raise UserError(f"encoder layer {layer} of {layers}", hint="layer: -2")
    return keep


ENCODERS: dict[str, type[Encoder]] = {"open_clip": OpenClipEncoder, "transformers_vision": TransformersEncoder}


def encoder_part(part: dict[str, Any], source: Source) -> Encoder:
    """The `encoder` part of a vlm: {"builder", "config", "weights"}."""
    if part["builder"] not in ENCODERS:
        raise UserError(f"unknown encoder {part['builder']!r}", hint=nearest(part["builder"], ENCODERS))
    module = make_part("encoder", part, source, lambda: ENCODERS[part["builder"]](part["config"]))
    assert isinstance(module, Encoder)
    module.follow(source.image)
    return module
