"""Images: from encoded bytes or a path to uint8 pixels, and how many tokens they will take.

In: an image of a row (`{"bytes", "path"}`), a recipe (JSON in a stage's spec). Out: uint8[H, W, 3]; pixels stay uint8, the
model normalises on its device with the recipe's mean and std. `layout` is a pure function of an image's size and the recipe:
packing and merging both ask it, so they can't disagree. A new visual representation is a recipe class in `RECIPES`.
"""

from __future__ import annotations

import io
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from PIL import Image

from datasets_ray.errors import UserError, nearest
from datasets_ray.files import HEAD, stand_in

MAX_BYTES = 64 << 20
"""Largest encoded image that is read."""
MAX_PIXELS = 100_000_000
"""Largest decoded image: a few kilobytes of PNG can claim gigapixels."""
MAX_ASPECT = 200
"""Longest side over shortest side (Qwen2-VL's own limit), so that a resize of the short side stays bounded."""

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ImageError(ValueError):
    """This image can't be used; `reason` is the short word under which it is counted."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}" if detail else reason)


@dataclass(frozen=True)
class ImageLayout:
    """tokens: how many positions the image takes in the text. grid_h, grid_w: patches down and across, before any merging."""

    tokens: int
    grid_h: int
    grid_w: int


class ImageRecipe(Protocol):
    """What a recipe answers. `kind` names it in JSON; mean and std are per RGB channel, for pixels scaled to 0..1."""

    kind: ClassVar[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def uniform(self) -> bool:
        """Every image comes out in the same size, so a batch is one array."""

    def layout(self, width: int, height: int) -> ImageLayout: ...

    def fit(self, image: Image.Image) -> np.ndarray:
        """RGB image → uint8[H, W, 3] of the layout's size."""


def _crop(image: Image.Image, size: int, _mean: tuple[float, ...]) -> Image.Image:
    """Shortest side to `size`, then the centre: CLIPImageProcessor, LLaVA's `square` (its pretraining)."""
    width, height = image.size
    short, long = min(width, height), max(width, height)
    other = int(size * long / short)
    if width <= height:
        image, top = image.resize((size, other), Image.Resampling.BICUBIC), (other - size) // 2
        return image.crop((0, top, size, top + size))
    # Pillow resizes rows, then columns: those that are cropped needn't be resized (the same bytes, an eighth less work)
    image, left = image.resize((other, height), Image.Resampling.BICUBIC), (other - size) // 2
    return image.crop((left, 0, left + size, height)).resize((size, size), Image.Resampling.BICUBIC)


def _pad(image: Image.Image, size: int, mean: tuple[float, ...]) -> Image.Image:
    """On a square of the mean colour, then resized: LLaVA's `expand2square` (its finetuning), int() as there."""
    width, height = image.size
    if width != height:
        side = max(width, height)
        square = Image.new("RGB", (side, side), tuple(int(m * 255) for m in mean))
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        image = square
    return image.resize((size, size), Image.Resampling.BICUBIC)


def _squash(image: Image.Image, size: int, _mean: tuple[float, ...]) -> Image.Image:
    """Both sides to `size`, whatever the aspect."""
    return image.resize((size, size), Image.Resampling.BICUBIC)


FITS = {"crop": _crop, "pad": _pad, "squash": _squash}


@dataclass(frozen=True)
class SquareRecipe:
    """One square of `size` pixels, one token a patch: CLIP's vision transformers."""

    kind: ClassVar[str] = "square"
    uniform: ClassVar[bool] = True
    size: int
    patch: int
    fit_by: str = "crop"
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def layout(self, width: int, height: int) -> ImageLayout:
        side = self.size // self.patch
        return ImageLayout(side * side, side, side)

    def fit(self, image: Image.Image) -> np.ndarray:
        return np.asarray(FITS[self.fit_by](image, self.size, self.mean))


@dataclass(frozen=True)
class NativeRecipe:
    """The image's own aspect on a grid of `patch * merge` pixels within the pixel limits; merge² patches make a token: Qwen2-VL."""

    kind: ClassVar[str] = "native"
    uniform: ClassVar[bool] = False
    patch: int
    merge: int
    min_pixels: int
    max_pixels: int
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def layout(self, width: int, height: int) -> ImageLayout:
        high, wide = self._target(width, height)
        grid_h, grid_w = high // self.patch, wide // self.patch
        return ImageLayout(grid_h * grid_w // self.merge**2, grid_h, grid_w)

    def fit(self, image: Image.Image) -> np.ndarray:
        high, wide = self._target(image.width, image.height)
        return np.asarray(image.resize((wide, high), Image.Resampling.BICUBIC))

    def _target(self, width: int, height: int) -> tuple[int, int]:
        """(height, width) in pixels: Qwen2-VL's `smart_resize`."""
        factor = self.patch * self.merge
        high, wide = round(height / factor) * factor, round(width / factor) * factor
        if high * wide > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            high = max(factor, math.floor(height / shrink / factor) * factor)
            wide = max(factor, math.floor(width / shrink / factor) * factor)
        elif high * wide < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (height * width))
            high, wide = math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
        return high, wide


RECIPES: dict[str, Any] = {cls.kind: cls for cls in (SquareRecipe, NativeRecipe)}
_RENAMED = {"fit": "fit_by"}


def recipe_from_json(data: Mapping[str, Any]) -> ImageRecipe:
    """`{"kind": "square", "size", "patch", "fit", "mean", "std"}` or `{"kind": "native", "patch", "merge", "min_pixels", ...}`.

    Raises UserError for an unknown kind, key or fit, and for a size without one patch. Pixels beyond the last whole patch are left out, as
    a vision transformer's first convolution does (SigLIP's 384 pixels are 27 patches of 14).
    """
    kind = data.get("kind")
    if kind not in RECIPES:
        raise UserError(f"unknown image recipe {kind!r}", hint=nearest(str(kind), RECIPES))
    fields = RECIPES[kind].__dataclass_fields__
    given: dict[str, Any] = {_RENAMED.get(key, key): value for key, value in data.items() if key != "kind"}
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    for key in given:
        if key not in fields:
            raise UserError(f"unknown key {key!r} in image recipe {kind!r}", hint=nearest(key, fields))
    missing = [name for name in ("size", "patch", "merge", "min_pixels", "max_pixels") if name in fields and name not in given]
    if missing:
        raise UserError(f"image recipe {kind!r} lacks {', '.join(missing)}", why=f"got {dict(data)}")
    if given.get("fit_by", "crop") not in FITS:
        raise UserError(f"unknown fit {given['fit_by']!r}", hint=nearest(given["fit_by"], FITS))
    if given["patch"] < 1 or given.get("size", given["patch"]) < given["patch"]:
        raise UserError(f"image size {given.get('size')} is less than a patch of {given['patch']}", why="patches tile the image")
    return RECIPES[kind](**given)


def recipe_to_json(recipe: ImageRecipe) -> dict[str, Any]:
    """The inverse of `recipe_from_json`."""
    renamed = {new: old for old, new in _RENAMED.items()}
    fields = {renamed.get(key, key): list(value) if isinstance(value, tuple) else value for key, value in asdict(recipe).items()}  # type: ignore[call-overload]
    return {"kind": recipe.kind, **fields}


def layout(width: int, height: int, recipe: ImageRecipe) -> ImageLayout:
    """Tokens and patch grid of an image of this size (pixels) under this recipe."""
    return recipe.layout(width, height)


def open_image(image: Mapping[str, Any], root: Path | None = None) -> Image.Image:
    """The image with its header read and its limits checked, for `rgb`; its file is open until it is decoded or closed. ImageError."""
    data = image.get("bytes")
    path = None if data is not None else resolve(image.get("path"), root)
    try:
        size = _file_size(path) if path is not None else len(data or b"")
    except OSError as error:
        pointer = path is not None and "annex/objects" in path.as_posix()
        raise ImageError("image is a git-annex pointer" if pointer else "image missing", str(error)) from error
    if not size:
        raise ImageError("image is empty")
    if size > MAX_BYTES:
        raise ImageError("image too large", f"{size} bytes")
    try:
        opened = Image.open(path if path is not None else io.BytesIO(data or b""))
    except Image.DecompressionBombError as error:
        raise ImageError("image too large", str(error)) from error
    except MemoryError:
        raise
    except Exception as error:  # on damaged files PIL's formats raise struct.error, IndexError, EOFError ... as well
        what = stand_in(_head(path, data))
        raise ImageError(f"image is {what}" if what else "image unreadable", str(error)) from error
    width, height = opened.size
    if width * height > MAX_PIXELS:
        raise ImageError("image too large", f"{width} x {height} pixels")
    if not width or not height or max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError("image too narrow", f"{width} x {height} pixels")
    return opened


def _file_size(path: Path) -> int:
    """Bytes of a regular file; OSError where there is none: reading a pipe would wait for ever."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise FileNotFoundError(f"{path} is no file")
    return status.st_size


def _head(path: Path | None, data: bytes | None) -> bytes:
    if path is None:
        return (data or b"")[:HEAD]
    with path.open("rb") as file:
        return file.read(HEAD)


def resolve(path: str | None, root: Path | None) -> Path:
    """`path` below `root`, symbolic links followed; ImageError when it leads out of it."""
    if not path:
        raise ImageError("image missing", "the row has neither bytes nor a path")
    if root is None:
        raise ImageError("image missing", f"{path}: the rows' manifest names no root")
    try:
        real = os.path.realpath(root)
        full = os.path.realpath(os.path.join(real, path))
    except (OSError, ValueError) as error:  # a name with a null byte
        raise ImageError("image missing", f"{path!r}: {error}") from error
    if full != real and not full.startswith(real.rstrip(os.sep) + os.sep):
        raise ImageError("image outside its root", path)
    return Path(full)


def image_size(image: Mapping[str, Any], root: Path | None = None) -> tuple[int, int]:
    """(width, height) from the header alone. Raises ImageError."""
    with open_image(image, root) as opened:
        return opened.size


def decode(image: Mapping[str, Any], root: Path | None = None) -> Image.Image:
    """An RGB image from `{"bytes", "path"}`. Raises ImageError."""
    return rgb(open_image(image, root))


def rgb(opened: Image.Image) -> Image.Image:
    """The decoded image; grey, palette, CMYK, alpha and 16-bit are converted. Raises ImageError.

    Of an animation the first frame, and the pixels as they are stored: EXIF's orientation is left alone, as LLaVA leaves it.
    """
    try:
        if opened.format == "JPEG" and opened.mode == "RGB":
            opened.load()
            return opened  # converting would copy it
        if opened.mode.startswith("I;16") or opened.mode in {"I", "F"}:
            # PIL clamps 16 bits at 255 instead of scaling them
            values = np.asarray(opened, dtype=np.float64)
            scale = 255.0 / 65535.0 if values.max(initial=0.0) > 255 else 1.0
            opened = Image.fromarray(np.clip(values * scale, 0, 255).astype(np.uint8))
        if opened.mode == "P" and "transparency" in opened.info:
            opened = opened.convert("RGBA")  # else PIL warns and guesses
        return opened.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:
        raise ImageError("image cut short" if "truncated" in str(error) else "image unreadable", str(error)) from error


VERIFY = ("decode", "header")


def verdict(image: Mapping[str, Any], root: Path | None = None, verify: str = "decode") -> str:
    """Why the image can't be used, as a short phrase to count by; empty when it can.

    verify: `decode` reads every pixel; `header` only opens it, and misses an image whose data is cut short or damaged.
    """
    try:
        decode(image, root) if verify == "decode" else image_size(image, root)
    except ImageError as error:
        return error.reason
    return ""


def pixels(image: Mapping[str, Any], recipe: ImageRecipe, root: Path | None = None) -> np.ndarray:
    """uint8[H, W, 3], fitted by the recipe. Raises ImageError."""
    return recipe.fit(decode(image, root))
