"""The images that were asked about, small enough for a page: data URIs for the gallery, one sheet per benchmark for row pages.

In: a rows artefact (`datasets_ray.rows.RowTable`). Out: encoded thumbnails; an image that can't be read becomes a named gap.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets_ray.errors import UserError
from datasets_ray.rows import RowTable

SIDE = 168
"""Longest side of a gallery thumbnail, pixels; smaller images are kept as they are and shown with hard pixels."""
TILE = 64
COLUMNS = 24


@dataclass(frozen=True)
class Sheet:
    """Thumbnails side by side in one image: `places[id]` is (x, y) in pixels of a TILE × TILE square."""

    data: bytes
    width: int
    height: int
    places: dict[str, tuple[int, int]]


def open_questions(path: Path) -> RowTable | None:
    """The rows that were asked; None where they are gone."""
    try:
        return RowTable(path)
    except (UserError, OSError):
        return None


def thumbnail(row: dict[str, Any], root: Path | None) -> tuple[str, int, int, bool] | None:
    """(data URI, width, height, whether it is shown larger than it is) of a row's first image; None without a readable one."""
    image = _decode(row, root)
    if image is None:
        return None
    small = max(image.size) < SIDE
    if not small:
        image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    if small:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=82)
    scale = max(1, SIDE // max(image.size)) if small else 1
    kind = "png" if small else "jpeg"
    uri = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return uri, image.width * scale, image.height * scale, small


def sheet(rows: Sequence[dict[str, Any]], root: Path | None) -> Sheet | None:
    """One JPEG with the first image of every row; None where no row has a readable image."""
    from PIL import Image

    tiles: list[tuple[str, Any]] = []
    for row in rows:
        image = _decode(row, root)
        if image is None:
            continue
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        how = Image.Resampling.NEAREST if side < TILE else Image.Resampling.BILINEAR
        tiles.append((row["id"], image.resize((TILE, TILE), how, box=(left, top, left + side, top + side), reducing_gap=2.0)))
    if not tiles:
        return None
    lines = -(-len(tiles) // COLUMNS)
    canvas = Image.new("RGB", (COLUMNS * TILE, lines * TILE))
    places = {}
    for k, (id, tile) in enumerate(tiles):
        places[id] = (k % COLUMNS * TILE, k // COLUMNS * TILE)
        canvas.paste(tile, places[id])
    buffer = io.BytesIO()
    canvas.save(buffer, "JPEG", quality=80)
    return Sheet(buffer.getvalue(), canvas.width, canvas.height, places)


def _decode(row: dict[str, Any], root: Path | None) -> Any:
    from datasets_ray.images import ImageError, decode

    if not row["images"]:
        return None
    try:
        return decode(row["images"][0], root)
    except (ImageError, OSError):
        return None
