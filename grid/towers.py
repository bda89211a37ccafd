"""Can an encoder be built here, and does it classify by itself? In: an encoder (or a released vlm) of a profile. Out: why not, the way out.

    said by   the profile (`config`, `shape`); open_clip's own table of names; a checkpoint on this machine (open_clip_config.json,
              config.json); its name on the hub, of families whose towers nobody here builds

What nothing tells is left to whoever loads the checkpoint; `grid.check` reads what was downloaded. Neither torch nor open_clip is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from datasets_ray.schema import registered
from grid.normalisation import kind_of, object_in
from grid.profile import Encoder, Model

Refusal = tuple[str, str, str]
"""(what, why, hint)."""
OURS = {"open_clip": {"tokenizer", "layer"}, "transformers_vision": {"layer"}}
"""Keys of an encoder's config that say nothing of its architecture, by builder."""
WHOLE = ("clip", "siglip")
"""`model_type` of a checkpoint with both towers whose image tower is built."""
HUB: tuple[tuple[str, str], ...] = (
    ("facebook/dinov3*", "a DINOv3"), ("opengvlab/internvit*", "an InternViT"),
    ("google/siglip2-*naflex*", "a SigLIP 2 of any shape (NaFlex)"), ("timm/*siglip*", "timm's SigLIP (google/siglip* are read)"),
    ("timm/resnet*", "a ResNet"), ("timm/*convnext*", "a ConvNeXt"), ("laion/clip-convnext*", "a ConvNeXt"),
    ("apple/mobileclip*", "a MobileCLIP"),
)  # fmt: skip
"""Hub names in small letters whose image towers no builder makes: model types beyond TOWERS, and open_clip models over timm."""


def refusal(asset: Encoder | Model) -> Refusal | None:
    """What is wrong with an encoder, or a released vlm's, as far as it can be told without a download."""
    builder, config, shape = _said(asset)
    wrong = _written(builder, config, shape)
    if wrong is None and asset.checkpoint:
        if os.path.isdir(asset.checkpoint):
            return of_files(builder, config, Path(asset.checkpoint))
        wrong = _named(asset, builder, asset.checkpoint.lower())
    return wrong


def request(asset: Encoder | Model) -> dict[str, Any]:
    """What `of_files` is asked about an asset, as JSON."""
    builder, config, _ = _said(asset)
    return {"builder": builder, "config": dict(config)}


def of_files(builder: str, config: Mapping[str, Any], folder: Path) -> Refusal | None:
    """What is wrong with the tower of a checkpoint's directory, by its own files."""
    exported, whole = object_in(folder / "open_clip_config.json"), object_in(folder / "config.json")
    kind = _kind(whole)
    if builder == "open_clip":
        if exported:
            made = exported.get("model_cfg")
            return _plain(made.get("vision_cfg") if isinstance(made, dict) else None, f"{folder}/open_clip_config.json says so")
        if set(config) - OURS[builder] or not whole or whole.get("model_type") == "clip":
            return None
        hint = "builder: transformers_vision" if kind in built() else supported()
        what = kind or whole.get("architecture") or "checkpoint without model_type"
        return f"a {what} is no open_clip model", f"{folder}/config.json says so", hint
    if set(config) - OURS[builder]:
        return None  # the profile says what it is
    if exported and not whole:
        return "transformers can't read an open_clip export", f"{folder} has no config.json", "builder: open_clip"
    if kind in built() or (not kind and "architecture" not in whole):
        return None
    return f"a tower of type {kind or whole['architecture']!r} can't be built", f"{folder}/config.json says so", supported()


def whole_siglip(asset: Encoder) -> bool:
    """Whether an encoder is a released SigLIP, text tower and all, as far as profile, local files or its name on the hub tell."""
    if asset.builder != "transformers_vision" or not asset.checkpoint or set(asset.config or {}) - OURS[asset.builder]:
        return False
    whole = object_in(Path(asset.checkpoint) / "config.json") if os.path.isdir(asset.checkpoint) else {}
    return whole["model_type"] == "siglip" if whole.get("model_type") else kind_of(asset).startswith("siglip")


def classifies(asset: Encoder) -> bool:
    """Whether an encoder mines and classifies by itself: its text tower is there."""
    return asset.builder == "open_clip" or whole_siglip(asset)


@cache
def built() -> tuple[str, ...]:
    """`model_type` of the towers that transformers_vision builds."""
    return registered("trainers/models/encoders.py", "TOWERS")


def supported() -> str:
    """What can be built, and where another tower goes."""
    types = ", ".join(built())
    return (
        f"builder transformers_vision has {types}; open_clip CLIPs with a plain ViT; another tower goes into trainers/models/encoders.py "
        "(TOWERS, or a class in ENCODERS)"
    )


def _said(asset: Encoder | Model) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """(builder, config, shape) of the encoder."""
    if isinstance(asset, Encoder):
        return asset.builder, asset.config or {}, asset.shape or {}
    parts = ((said or {}).get("encoder") for said in (asset.config, asset.shape))
    config, shape = (part if isinstance(part, dict) else {} for part in parts)
    return "transformers_vision", config, shape


def _written(builder: str, config: Mapping[str, Any], shape: Mapping[str, Any]) -> Refusal | None:
    """By what the profile writes."""
    if builder == "open_clip":
        named = _of_open_clip(config["name"]) if isinstance(config.get("name"), str) else {}
        fields = {**shape, **named, **config}
        why = f"open_clip's {config['name']} says so" if named else "its vision_cfg says so"
        return _plain(fields.get("vision_cfg"), why)
    if "vision_cfg" in config:
        return None  # another builder's, which is told as such
    if set(config) - OURS[builder] and config.get("model_type") not in built():
        kind = config.get("model_type")
        what = f"a tower of type {kind!r} can't be built" if kind else "its config names no `model_type`"
        return what, "transformers_vision builds a tower by its type", supported()
    kind = _kind(shape)
    if kind and kind not in (*built(), *WHOLE):
        return f"a tower of type {kind!r} can't be built", "its `shape` says so", supported()
    return None


def _named(asset: Encoder | Model, builder: str, name: str) -> Refusal | None:
    """By a checkpoint's name on the hub."""
    for known, what in HUB:
        if fnmatchcase(name, known):
            return f"{what} can't be built", f"{asset.checkpoint} is one, by its name", supported()
    kind = kind_of(asset) if isinstance(asset, Encoder) else ""
    if builder == "open_clip" and kind in ("siglip", "dinov2"):
        return f"{asset.checkpoint} is no open_clip model", f"a {kind}, by its name", "builder: transformers_vision"
    if builder != "open_clip" and name.startswith("timm/"):
        return f"{asset.checkpoint} is not in transformers' format", "timm's or open_clip's, by its name", "builder: open_clip for a CLIP"
    return None


def _plain(vision: Any, why: str) -> Refusal | None:
    """Whether an open_clip `vision_cfg` is a plain vision transformer's."""
    if not isinstance(vision, dict):
        return None
    if vision.get("timm_model_name"):
        return f"an open_clip model over timm's {vision['timm_model_name']} can't be built", why, supported()
    if isinstance(vision.get("layers"), (list, tuple)):
        return "an open_clip ResNet can't be built", why, supported()
    return None


def _of_open_clip(name: str) -> dict[str, Any]:
    """open_clip's own config of a name, out of its package's files; empty where there is none: whoever builds it tells."""
    package = find_spec("open_clip")
    if package is None or package.origin is None:
        return {}
    return object_in(Path(package.origin).parent / "model_configs" / f"{name.replace('/', '-')}.json")


def _kind(whole: Mapping[str, Any]) -> str:
    """`model_type` of a config's image tower, as `trainers.models.released.vision_config` reads it; empty where it says none."""
    inner = whole.get("vision_config")
    if not isinstance(inner, dict):
        return str(whole.get("model_type") or "")
    usual = "siglip_vision_model" if whole.get("model_type") == "siglip" else "clip_vision_model"
    return str(inner.get("model_type", usual))
