"""Image encoders: pixels uint8[N, H, W, 3] → patch features float[N, K, D] of the penultimate layer, without class token or final norm.

    width            D
    tokens(recipe)   K for an image recipe (a pure number: packing knows it before any model runs)
    forward(pixels)  normalises on the device it runs on, then the tower up to the layer

Built are open_clip CLIPs with a plain vision transformer (no ResNet, nothing over timm) and the towers of TOWERS from transformers; another
checkpoint of these is five lines of YAML in a profile. Another tower of transformers is a line in TOWERS, if it looks like those, else a
class with these three and a line in ENCODERS.
The penultimate layer's patch tokens are LLaVA's choice (`mm_vision_select_layer -2`, `patch`), `layer` in the config says another. Layers
above it are never built.
A part without architecture in its config (`{}` or `{layer: -1}`) takes its checkpoint's: open_clip_config.json or config.json.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from datasets_ray.errors import UserError, nearest
from datasets_ray.images import CLIP_MEAN, CLIP_STD, recipe_from_json
from trainers.models import clip_names, released
from trainers.models.released import Index
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
    any_size: bool = False
    """The tower stretches its position embeddings to the image (DINOv2)."""

    def tokens(self, recipe: dict[str, Any]) -> int:
        """K for images prepared by this recipe. Raises UserError if the tower was built for another size."""
        wanted = {"kind": "square", "size": recipe.get("size") if self.any_size else self.image_size, "patch": self.patch}
        given = {key: recipe.get(key) for key in wanted}
        if given != wanted:
            raise UserError(f"image recipe {given} for an encoder of size {self.image_size}, patch {self.patch}", hint=f"image: {wanted}")
        return (int(recipe["size"]) // self.patch) ** 2

    def follow(self, recipe: dict[str, Any] | None) -> None:
        """Checks a recipe and takes its mean and std (and size, where any will do) over."""
        if recipe is not None:
            self.tokens(recipe)
            parsed = recipe_from_json(recipe)
            self.mean, self.std, self.image_size = parsed.mean, parsed.std, recipe["size"]

    def pixels(self, images: Tensor) -> Tensor:
        """uint8[N, H, W, 3] → normalised float[N, 3, H, W] in the tower's precision."""
        return normalise(images, self.mean, self.std, next(self.parameters()).dtype)


OURS = ("name", "tokenizer", "layer")
"""Keys of an open_clip part's config that open_clip's own configs don't have."""


def open_clip_config(config: dict[str, Any]) -> dict[str, Any]:
    """CLIP's own fields of an open_clip part: {"name": one of open_clip's models} or the config dict itself."""
    ours = set(OURS)
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


def released_open_clip(part: dict[str, Any], source: Source) -> dict[str, Any]:
    """An open_clip part's config; from its checkpoint (open_clip_config.json, or the config.json of a transformers CLIP) where the spec
    names no architecture. UserError where both do and differ in what no tensor's shape shows: heads, sizes, activation."""
    given, path = part["config"], source.released(part)
    if path is None:
        return given
    theirs: dict[str, Any] | None = None
    if (path / "open_clip_config.json").is_file():
        file = path / "open_clip_config.json"
        theirs = released.read_json(file).get("model_cfg")
        if not isinstance(theirs, dict):
            raise UserError("open_clip_config.json has no model_cfg", why="it is not as open_clip saves it", where=str(file))
    elif (path / "config.json").is_file() and released.read_json(path / "config.json").get("model_type") == "clip":
        file = path / "config.json"
        theirs = clip_names.open_clip_config(released.read_json(file))
    if not set(given) - {"tokenizer", "layer"}:
        if theirs is None:
            raise UserError(f"{path} says nothing of its architecture", why="no open_clip_config.json", hint="config: {name: ViT-L-14}")
        return {**theirs, **given}
    if theirs is not None:
        there, here = _looks(theirs), _looks(open_clip_config(given))
        # a file that doesn't mention quick_gelu may still need it (older uploads rely on the model's name); one that does, does
        released.agree({k: v for k, v in here.items() if k != "quick_gelu" or there[k]}, there, str(file))
    return given


def _looks(fields: dict[str, Any]) -> dict[str, Any]:
    """What makes two open_clip image towers the same function of the same tensors, with open_clip's defaults filled in."""
    vision = {"image_size": 224, "patch_size": 16, "width": 768, "layers": 12, "head_width": 64, **fields["vision_cfg"]}
    keys = ("image_size", "patch_size", "width", "layers", "head_width")
    return {"quick_gelu": bool(fields.get("quick_gelu", False)), **{key: vision[key] for key in keys}}


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
        self.config = fields
        self.width, self.image_size, self.patch = vision.width, visual.image_size[0], visual.patch_size[0]

    def released(self, found: Index) -> Index:
        """A transformers CLIP holds the same tower under other names."""
        return clip_names.to_open_clip(found)

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


TOWERS: dict[str, tuple[str, str, str, int]] = {
    "clip_vision_model": ("clip", "CLIPVisionModel", "layers", 1),
    "siglip_vision_model": ("siglip", "SiglipVisionModel", "layers", 0),
    "dinov2": ("dinov2", "Dinov2Model", "layer", 1),
    "dinov2_with_registers": ("dinov2_with_registers", "Dinov2WithRegistersModel", "layer", 1),
}
"""model_type → transformers' module and class, its list of blocks, its tokens in front of the patches (registers are counted apart)."""


DINOV2 = (
    ("attention.attention.query", "attention.q_proj"), ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"), ("attention.output.dense", "attention.o_proj"), ("mlp.weights_out", "mlp.down_proj"),
)  # fmt: skip
"""What DINOv2's checkpoints call its maps, and what transformers calls them; its gated MLP (giant) has two in one besides."""


class TransformersEncoder(Encoder):
    """CLIP's or SigLIP's vision tower or a DINOv2 from transformers: config = its vision config with `model_type`."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        fields = {k: v for k, v in config.items() if k not in {"model_type", "layer"}}
        kind = config.get("model_type")
        if kind not in TOWERS:
            raise UserError(f"transformers_vision of type {kind!r}", hint=f"model_type: {', '.join(TOWERS)}")
        package, name, blocks, self.prefix_tokens = TOWERS[kind]
        if kind == "siglip_vision_model":
            fields["vision_use_head"] = False
            self.mean, self.std = SIGLIP_MEAN, SIGLIP_STD
        module = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
        made: Any = getattr(module, name)
        try:
            parsed = made.config_class(**fields)
        except Exception as error:
            raise UserError(f"the {kind} config can't be read", why=str(error).strip().splitlines()[0]) from None
        tower: Any = made._from_config(parsed, attn_implementation="sdpa")
        layers = getattr(tower.encoder, blocks)
        setattr(tower.encoder, blocks, layers[: _kept(config.get("layer", -2), len(layers))])
        for norm in ("post_layernorm", "layernorm"):
            if hasattr(tower, norm):
                setattr(tower, norm, nn.Identity())
        self.kind, self.vision_model, self.any_size = kind, tower, kind.startswith("dinov2")
        self.prefix_tokens += getattr(tower.config, "num_register_tokens", 0)
        self.width, self.image_size, self.patch = tower.config.hidden_size, tower.config.image_size, tower.config.patch_size

    def released(self, found: Index) -> Index:
        """The tower inside a composite, or on its own: whatever stands before its first tensor's name becomes `vision_model.`."""
        first = next(iter(self.vision_model.state_dict()))
        inside = next((key for key in found if key == first or key.endswith(f".{first}")), None)
        if inside is None:
            return found
        prefix, made = inside.removesuffix(first), dict(found)
        for key, stored in found.items():
            if not key.startswith(prefix):
                continue
            name = f"vision_model.{key.removeprefix(prefix)}"
            for theirs, ours in DINOV2 if self.any_size else ():
                name = name.replace(theirs, ours)
            if self.any_size and "mlp.weights_in" in name:
                made |= {name.replace("weights_in", f"{half}_proj"): replace(stored, share=(i, 2)) for i, half in enumerate(("gate", "up"))}
            made[name] = stored
        return made

    def forward(self, images: Tensor) -> Tensor:
        """uint8[N, H, W, 3] → float[N, K, D]."""
        tower = self.vision_model
        hidden = tower.embeddings(self.pixels(images))
        if self.kind == "clip_vision_model":  # a norm before the blocks (transformers spells it so)
            hidden = tower.pre_layrnorm(hidden)
        return tower.encoder(hidden).last_hidden_state[:, self.prefix_tokens :]


def _kept(layer: int, layers: int) -> int:
    """Blocks needed for `layer`, counted as transformers counts hidden_states: -1 the last block's output, -2 the one before."""
    keep = layers + 1 + layer if layer < 0 else layer
    if not 1 <= keep <= layers:
        raise UserError(f"encoder layer {layer} of {layers}", hint="layer: -2")
    return keep


ENCODERS: dict[str, type[Encoder]] = {"open_clip": OpenClipEncoder, "transformers_vision": TransformersEncoder}


def encoder_part(part: dict[str, Any], source: Source) -> Encoder:
    """The `encoder` part of a vlm: {"builder", "config", "weights"}."""
    builder = part["builder"]
    if builder not in ENCODERS:
        raise UserError(f"unknown encoder {builder!r}", hint=nearest(builder, ENCODERS))
    config = released_open_clip(part, source) if builder == "open_clip" else source.config(part, released.vision_config, ("layer",))
    module = make_part("encoder", part, source, lambda: ENCODERS[builder](config))
    assert isinstance(module, Encoder)
    module.follow(source.image)
    return module
