"""Can a profile's numbers be? Image sizes, architectures, rows. Mistakes go to the reader with their line."""

from __future__ import annotations

from typing import Any

from datasets_ray.benchmarks import DERIVED
from datasets_ray.errors import nearest
from datasets_ray.schema import Reader
from grid import shapes, towers
from grid.normalisation import kind_of
from grid.profile import ROWS, Data, Encoder, Image, Model, Profile
from grid.validate_profile import registered

NAMED = {"name", "tokenizer", "layer", "depth"}
"""Keys of a config that say nothing of the architecture's numbers."""


def check_assets(profile: Profile, reader: Reader) -> None:
    """Every encoder, language model, whole model and data set."""
    for name, encoder in profile.encoders.items():
        path = f"encoders.{name}"
        _image(encoder.image, f"{path}.image", reader)
        _fits(encoder, path, reader)
        _builder(encoder, path, reader)
        _tower(encoder, path, reader)
        family = "clip" if encoder.trained else "vlm"
        _numbers(family, {"encoder": encoder.builder}, encoder, path, reader)
    for name, llm in profile.llms.items():
        _numbers("vlm", {"llm": "causal_lm"}, llm, f"llms.{name}", reader)
    for name, model in profile.models.items():
        path = f"models.{name}"
        if model.image is not None:
            _image(model.image, f"{path}.image", reader)
        if model.family == "vlm":
            _tower(model, path, reader)
        if model.family == "qwen2_vl":
            _numbers(model.family, {"llm": "qwen2_vl"}, model, path, reader)
    for name, data in profile.data.items():
        _data(data, f"data.{name}", reader)


def _image(image: Image, path: str, reader: Reader) -> None:
    wanted = ("size",) if image.kind == "square" else ("merge", "min_pixels", "max_pixels")
    missing = [name for name in wanted if getattr(image, name) is None]
    if missing:
        hint = f"add {', '.join(f'`{name}: ...`' for name in missing)}"
        reader.error(f"{path}: {' and '.join(missing)} missing", why=f"a {image.kind} image has them", hint=hint, at=path)
    elif image.kind == "square" and image.size is not None and image.size < image.patch:
        reader.error(f"{path}: size {image.size} for patches of {image.patch}", why="no patch fits", at=path)
    elif image.min_pixels and image.max_pixels and image.min_pixels > image.max_pixels:
        reader.error(f"{path}: min_pixels {image.min_pixels} above max_pixels {image.max_pixels}", at=path)


def _fits(encoder: Encoder, path: str, reader: Reader) -> None:
    """Pixels of the size that a tower of plain numbers is built for (a DINOv2 takes any)."""
    for part in ("config", "shape"):
        said = getattr(encoder, part) or {}
        vision = said.get("vision_cfg") or said.get("vision_config") or said
        if not isinstance(vision, dict) or kind_of(encoder).startswith("dinov2"):
            continue
        for ours, theirs in (("size", "image_size"), ("patch", "patch_size")):
            built, given = vision.get(theirs), getattr(encoder.image, ours)
            if isinstance(built, int) and given is not None and built != given:
                why = f"the tower's {theirs} is {built}"
                reader.error(f"{path}.image.{ours}: {given}", why=why, hint=f"image: {{{ours}: {built}}}", at=f"{path}.image")


def _builder(encoder: Encoder, path: str, reader: Reader) -> None:
    """Whether an architecture that is written out is its builder's: open_clip's has `vision_cfg`, transformers' has not."""
    config = encoder.config or {}
    if not set(config) - NAMED or "name" in config:
        return
    if ("vision_cfg" in config) != (encoder.builder == "open_clip"):
        what = f"{path}.config is {'open_clip' if 'vision_cfg' in config else 'transformers'}'s"
        hint = f"builder: {'open_clip' if 'vision_cfg' in config else 'transformers_vision'}"
        reader.error(what, why=f"builder {encoder.builder} can't make it", hint=hint, at=f"{path}.config")


def _tower(asset: Encoder | Model, path: str, reader: Reader) -> None:
    """Whether somebody builds the image tower."""
    if (refused := towers.refusal(asset)) is not None:
        what, why, hint = refused
        reader.error(f"{path}: {what}", why=why, hint=hint, at=path)


def _numbers(family: str, parts: dict[str, str], asset: Any, path: str, reader: Reader) -> None:
    """Whether an architecture written in the profile has the numbers that make one."""
    for key in ("config", "shape"):
        said = getattr(asset, key)
        if not said or not set(said) - NAMED or "name" in said:
            continue
        for name, builder in parts.items():
            try:
                shapes.of(family, name, builder, said)
            except KeyError as error:
                reader.error(f"{path}.{key}: {error} is missing", why="the model's size hangs on it", at=f"{path}.{key}")
            except (TypeError, ValueError, ZeroDivisionError, AttributeError, IndexError) as error:
                reader.error(f"{path}.{key} holds a number that can't be", why=str(error), at=f"{path}.{key}")


def _data(data: Data, path: str, reader: Reader) -> None:
    if data.source is not None:
        known = [name for name in registered("datasets_ray/sources.py", "SOURCES") if name not in DERIVED]
        if data.source not in known:
            hint = "concat: [one set, another]" if data.source == "concat" else nearest(data.source, known)
            reader.error(f"{path}.source: unknown source {data.source!r}", hint=hint, at=f"{path}.source")
    rows = data.keys.get("rows")
    if isinstance(rows, int) and not 1 <= rows <= ROWS:
        reader.error(f"{path}.keys: rows {rows}", why="a data set has at least one row, and no more than anybody could", at=f"{path}.keys")
    beside = [key for key in ("keys", "revision", "rows", "expect") if getattr(data, key)]
    if data.concat and beside:
        what, why = f"{path}: `concat` beside {', '.join(f'`{key}`' for key in beside)}", "it is what its parts are"
        reader.error(what, why=why, hint="say it of the parts", at=path)
