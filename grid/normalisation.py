"""The mean and standard deviation of the channels that a vision encoder was trained with, where a profile leaves them open.

In: a profile's encoders and whole models. Out: their `image.mean` and `image.std` filled in, and for each of them who says so:

    profile   the profile itself
    files     the checkpoint's own, where it is a local directory: preprocessor_config.json, processor_config.json, open_clip_config.json
    kind      `model_type` of `shape`, `config` or a local config.json: 0.5 for SigLIP, ImageNet's for DINOv2
    name      its name on the hub, of families that document one pair for all of theirs
    fresh     CLIP's: it is trained here, on whatever it is given
    assumed   CLIP's, since nothing says otherwise: an assumption, which plan, check and report show

Planning downloads nothing and looks into no cache, so that a plan is the same everywhere; `grid.check` holds downloaded files against it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from datasets_ray.schema import Reader
from grid.profile import CLIP, IMAGENET, SIGLIP, Encoder, Image, Model, Profile

Pair = tuple[tuple[float, ...], tuple[float, ...]]
"""(mean, standard deviation), three channels each."""
NAMES: tuple[tuple[str, str, Pair], ...] = (
    ("laion/clip-vit-l-14-laion2b-s32b-b82k", "", SIGLIP),
    ("google/siglip*", "siglip", SIGLIP), ("facebook/dinov2*", "dinov2", IMAGENET),
    ("openai/clip-*", "clip", CLIP), ("laion/clip-*", "", CLIP), ("apple/dfn*", "", CLIP), ("facebook/metaclip*", "clip", CLIP),
    ("timm/*_clip_*.openai", "", CLIP), ("llava-hf/llava-*", "llava", CLIP),
)  # fmt: skip
"""Hub names in small letters, their `model_type` where all have one, their numbers: by their model cards and open_clip's pretrained.py,
where one of LAION's isn't as its others."""
KINDS: tuple[tuple[str, Pair], ...] = (("siglip", SIGLIP), ("dinov2", IMAGENET))
FILES = ("preprocessor_config.json", "processor_config.json", "open_clip_config.json")


def fill(profile: Profile, reader: Reader) -> dict[str, str]:
    """Dotted path of each image → who says its numbers. Files that can't be read are told to the reader."""
    said = {}
    for path, asset in _seeing(profile):
        image = asset.image
        known, who = _told(asset, path, reader)
        if image is not None and image.mean and image.std:
            said[path] = "profile"
            continue
        if image is None:
            if known == CLIP:
                continue  # what a model without `image` gets anyway
            image = asset.image = Image(size=336, patch=14)
        image.mean, image.std = image.mean or list(known[0]), image.std or list(known[1])
        said[path] = who
    return said


def assumptions(profile: Profile, said: dict[str, str], used: set[str]) -> list[dict[str, Any]]:
    """What is taken for want of anything that says otherwise, as a plan lists assumptions. used: `encoders.NAME` and `models.NAME` of the
    arms that are planned."""
    found = []
    for path, who in said.items():
        kind, _, name = path.removesuffix(".image").partition(".")
        if who == "assumed" and f"{kind}.{name}" in used:
            asset = getattr(profile, kind)[name]
            text = f"CLIP's: nothing here says what {asset.checkpoint} was trained with; its preprocessor_config.json does (`std`, too)"
            found.append({"key": f"{path}.mean", "value": list(asset.image.mean), "text": text})
    return found


def kind_of(asset: Encoder) -> str:
    """`model_type` of an encoder's architecture: as the profile, a local checkpoint's config.json or the hub name says; else empty."""
    for said in (asset.shape, asset.config):
        if said and said.get("model_type"):
            return str(said["model_type"])
    if not asset.checkpoint:
        return ""
    if not os.path.isdir(asset.checkpoint):
        return _by_name(asset.checkpoint)[0]
    return str(object_in(Path(asset.checkpoint) / "config.json").get("model_type") or "")


def of_files(folder: Path, defaults: bool = True) -> tuple[str, Pair] | None:
    """(file, pair) that a checkpoint's directory gives its pixels; None where it says nothing. Raises ValueError for a damaged file.
    defaults: an open_clip export that names no numbers has open_clip's own."""
    for name in FILES:
        if not (folder / name).is_file():
            continue
        whole = json.loads((folder / name).read_text(encoding="utf-8"))
        if not isinstance(whole, dict):
            raise ValueError("it holds no object")
        if name == "open_clip_config.json":
            inner = whole.get("preprocess_cfg") or {}
            given = _three(inner.get("mean")), _three(inner.get("std"))
            return (name, (given[0] or CLIP[0], given[1] or CLIP[1])) if defaults or all(given) else None
        inner = whole.get("image_processor") if name == "processor_config.json" else whole
        mean, std = (_three((inner or {}).get(key)) for key in ("image_mean", "image_std"))
        if mean and std:
            return name, (mean, std)
    return None


def _seeing(profile: Profile) -> Iterator[tuple[str, Encoder | Model]]:
    """Encoders, and whole models whose pixels are made here: a qwen2_vl's are CLIP's, by its release."""
    for name, encoder in profile.encoders.items():
        yield f"encoders.{name}.image", encoder
    for name, model in profile.models.items():
        if model.family == "vlm" and (model.checkpoint or model.config):
            yield f"models.{name}.image", model


def _told(asset: Encoder | Model, path: str, reader: Reader) -> tuple[Pair, str]:
    folder = Path(asset.checkpoint) if asset.checkpoint and os.path.isdir(asset.checkpoint) else None
    if folder is not None:
        try:
            if (found := of_files(folder)) is not None:
                return found[1], "files"
        except (OSError, ValueError) as error:
            why, hint = str(error).splitlines()[0], "download it again, or write `mean` and `std`"
            reader.error(f"{path}: what {folder} says of its pixels can't be read", why=why, hint=hint, at=path)
    kind = kind_of(asset) if isinstance(asset, Encoder) else _tower(asset)
    for start, pair in KINDS:
        if kind.startswith(start):
            return pair, "kind"
    if asset.checkpoint is None:
        return CLIP, "fresh"
    known = None if folder is not None else _by_name(asset.checkpoint)[1]
    return (known, "name") if known is not None else (CLIP, "assumed")


def _tower(model: Model) -> str:
    """`model_type` of a released model's vision tower."""
    whole = object_in(Path(model.checkpoint) / "config.json") if model.checkpoint else {}
    for said in ((model.shape or {}).get("encoder"), (model.config or {}).get("encoder"), whole.get("vision_config")):
        if isinstance(said, dict) and said.get("model_type"):
            return str(said["model_type"])
    return ""


def _by_name(checkpoint: str) -> tuple[str, Pair | None]:
    return next(((kind, pair) for known, kind, pair in NAMES if fnmatchcase(checkpoint.lower(), known)), ("", None))


def object_in(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none: whoever loads the checkpoint tells."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _three(values: Any) -> tuple[float, ...] | None:
    numbers = isinstance(values, list) and len(values) == 3 and all(isinstance(value, (int, float)) for value in values)
    return tuple(float(value) for value in values) if numbers else None
