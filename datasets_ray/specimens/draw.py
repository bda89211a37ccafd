"""Draws scenes of specimens with numpy: anti-aliased shapes over a cluttered background, at any size.

Flows in: a `Scene` (which species, where, how lit), sampled from a random generator. Flows out: uint8[size, size, 3] or PNG bytes.
Coordinates run from -1 to 1; every shape is a signed distance (negative inside), so that an edge is one pixel wide at every size.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from datasets_ray.specimens.species import COLOURS, FAMILIES, Species

Array = np.ndarray
CORNERS: dict[str, tuple[float, float]] = {
    "top left": (-0.5, -0.5), "top right": (0.5, -0.5), "bottom left": (-0.5, 0.5), "bottom right": (0.5, 0.5),
}


@dataclass(frozen=True)
class Item:
    """One specimen: centre, half-size and turn (radians)."""

    species: Species
    x: float
    y: float
    scale: float
    turn: float


@dataclass(frozen=True)
class Scene:
    items: tuple[Item, ...]
    seed: int
    """Of the background, the light and the noise."""


def sample_scene(rng: np.random.Generator, species: Species, count: int = 1, corner: str | None = None) -> Scene:
    """One large specimen; `count` small ones in distinct quarters; or one small specimen in a `corner`."""
    seed = int(rng.integers(2**31))
    wobble = rng.uniform(-1, 1, (4, 4))
    turning = np.pi if species.set == "flowers" else 0.35
    if count == 1 and corner is None:
        places, scale = [(0.0, 0.0)], 0.8
    else:
        corners = list(CORNERS.values()) if corner is None else [CORNERS[corner]]
        places, scale = [corners[i] for i in rng.permutation(len(corners))[:count]], 0.44
    items = [
        Item(species, x + 0.16 * scale * w[0], y + 0.16 * scale * w[1], scale * (1 + 0.15 * w[2]), turning * w[3])
        for (x, y), w in zip(places, wobble)
    ]
    return Scene(tuple(items), seed)


@lru_cache(maxsize=4)
def _grid(size: int) -> tuple[Array, Array]:
    axis = ((np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1).astype(np.float32)
    x, y = np.meshgrid(axis, axis)
    return np.ascontiguousarray(x), np.ascontiguousarray(y)


def _colour(name: str) -> Array:
    return np.asarray(COLOURS[name], np.float32) / 255


class Canvas:
    """An image being painted: `paint(distance, colour)` lays a colour where the distance is negative."""

    def __init__(self, image: Array, pixel: float) -> None:
        self.image, self.pixel = image, pixel

    def paint(self, distance: Array, colour: Array, opacity: float = 1.0) -> None:
        cover = np.clip(0.5 - distance / self.pixel, 0, 1)[..., None] * opacity
        self.image += cover * (colour - self.image)


def _disc(u: Array, v: Array, x: float, y: float, radius: float, squash: float = 1.0) -> Array:
    return np.sqrt((u - x) ** 2 + ((v - y) / squash) ** 2) - radius


def _bands(u: Array, period: float) -> Array:
    """Parallel stripes: negative inside every second band."""
    return (np.abs((u / period) % 1 - 0.5) - 0.25) * period


def _dots(u: Array, v: Array, period: float, radius: float) -> Array:
    return np.hypot((u / period) % 1 - 0.5, (v / period) % 1 - 0.5) * period - radius


def _flower(c: Canvas, u: Array, v: Array, values: tuple[str, ...]) -> None:
    petals, tips, colour, centre = values
    n = {"four": 4, "five": 5, "six": 6, "eight": 8}[petals]
    r, angle = np.hypot(u, v), np.arctan2(v, u)
    phase = np.abs((angle * n / (2 * np.pi)) % 1 * 2 - 1)  # 0 between petals, 1 at a tip
    edge = 0.38 + 0.6 * phase**2.2 if tips == "pointed" else 0.45 + 0.5 * np.sqrt(np.clip(phase * (2 - phase), 0, 1)) - 0.02
    c.paint((r - edge - 0.06) * 0.8, _colour(colour) * 0.55)
    c.paint((r - edge) * 0.8, _colour(colour))
    c.paint(r - 0.3, _colour(centre))


def _pet(c: Canvas, u: Array, v: Array, values: tuple[str, ...]) -> None:
    ears, coat, marking, eyes = values
    fur = _colour(coat)
    dark = fur * 0.45 if coat != "black" else np.full(3, 0.4, np.float32)
    w = np.abs(u)
    if ears == "pointed":
        shape = np.maximum(np.maximum(-0.98 - v, v + 0.2), np.abs(w - 0.55) - (v + 1.0) * 0.42)
    elif ears == "round":
        shape = _disc(w, v, 0.6, -0.6, 0.36)
    else:
        shape = _disc(w, v, 0.82, 0.1, 0.2, 3.2)
    c.paint(shape, fur * 0.75)
    face = _disc(u, v, 0, 0.05, 0.74, 1.08)
    c.paint(face, fur)
    if marking == "striped":
        c.paint(np.maximum(np.maximum(face, _bands(u + 0.085, 0.34)), np.maximum(v + 0.28, -0.75 - v)), dark)
    elif marking == "spotted":
        spots = np.minimum(np.minimum(_disc(u, v, -0.36, -0.42, 0.19), _disc(u, v, 0.3, -0.5, 0.15)), _disc(u, v, 0.42, 0.42, 0.2))
        c.paint(np.minimum(spots, _disc(u, v, -0.42, 0.45, 0.14)), dark)
    elif marking == "masked":
        c.paint(np.maximum(face, np.abs(v + 0.08) - 0.25), dark)
    c.paint(_disc(w, v, 0.3, -0.08, 0.17), _colour(eyes) if eyes != "black" else np.full(3, 0.08, np.float32))
    c.paint(_disc(w, v, 0.3, -0.08, 0.06), np.full(3, 0.02 if eyes != "black" else 0.7, np.float32))
    c.paint(_disc(u, v, 0, 0.34, 0.12, 0.7), np.asarray((0.35, 0.15, 0.15), np.float32))


def _dish(c: Canvas, u: Array, v: Array, values: tuple[str, ...]) -> None:
    base, colour, topping, sauce = values
    r = np.hypot(u, v)
    c.paint(r - 1.02, np.full(3, 0.72, np.float32))
    c.paint(r - 0.96, np.full(3, 0.87, np.float32))
    if base == "round":
        shape = r - 0.72
    elif base == "square":
        shape = np.maximum(np.abs(u), np.abs(v)) - 0.62
    elif base == "ring":
        shape = np.abs(r - 0.5) - 0.27
    else:
        shape = np.maximum(r - 0.82, -v - 0.2)
    c.paint(shape, _colour(colour))
    if topping == "dots":
        mark = _dots(u + 0.2, v + 0.2, 0.4, 0.11)
    elif topping == "stripes":
        mark = _bands(u + v * 0.3, 0.42)
    elif topping == "lattice":
        mark = np.minimum(np.abs((u / 0.42) % 1 - 0.5), np.abs((v / 0.42) % 1 - 0.5)) * 0.42 - 0.05
    else:
        mark = _bands(r - np.arctan2(v, u) * 0.42 / (2 * np.pi), 0.42)
    c.paint(np.maximum(mark, shape + 0.06), _colour(sauce))


def _object(c: Canvas, u: Array, v: Array, values: tuple[str, ...]) -> None:
    outline, pattern, colour, trim = values
    if outline == "star":
        phase = np.abs(((np.arctan2(u, -v)) * 5 / (2 * np.pi)) % 1 * 2 - 1)
        shape = (np.hypot(u, v) - (0.42 + 0.58 * phase)) * 0.7
    elif outline == "cross":
        a, b = np.abs(u), np.abs(v)
        shape = np.maximum(np.maximum(a, b) - 0.88, np.minimum(a, b) - 0.34)
    elif outline == "moon":
        shape = np.maximum(np.hypot(u, v) - 0.9, 0.62 - np.hypot(u - 0.5, v))
    else:
        shape = np.maximum(np.abs(u), np.abs(v)) - 0.74
    c.paint(shape, _colour(trim))
    inner = shape + 0.14
    c.paint(inner, _colour(colour))
    second = _colour(colour) * 0.35
    if pattern == "striped":
        c.paint(np.maximum(inner, _bands(v, 0.42)), second)
    elif pattern == "dotted":
        c.paint(np.maximum(inner, _dots(u, v, 0.4, 0.12)), second)
    elif pattern == "halved":
        c.paint(np.maximum(inner, u), second)


PAINTERS: dict[str, Callable[[Canvas, Array, Array, tuple[str, ...]], None]] = {
    "flowers": _flower, "pets": _pet, "food": _dish, "imagenet": _object,
}
assert set(PAINTERS) == set(FAMILIES)


def draw(scene: Scene, size: int) -> Array:
    """uint8[size, size, 3]: the scene at this many pixels a side (noise is drawn per pixel)."""
    rng = np.random.default_rng(scene.seed)
    x, y = _grid(size)
    corner_a, corner_b = rng.uniform(0.25, 0.8, (2, 3)).astype(np.float32)
    direction = rng.uniform(0, 2 * np.pi)
    slope = ((x * np.cos(direction) + y * np.sin(direction)) * 0.35 + 0.5).astype(np.float32)[..., None]
    image = corner_a + slope * (corner_b - corner_a)
    clutter = rng.uniform(-1, 1, (3, 4))
    tones = rng.uniform(0.15, 0.9, (3, 3)).astype(np.float32)
    canvas = Canvas(image, 2.0 / size)
    for (cx, cy, radius, flat), tone in zip(clutter, tones):
        canvas.paint(_disc(x, y, cx, cy, 0.18 + 0.1 * radius, 1 + 0.5 * flat), tone, 0.6)
    for item in scene.items:
        cos, sin = np.cos(item.turn) / item.scale, np.sin(item.turn) / item.scale
        dx, dy = x - np.float32(item.x), y - np.float32(item.y)
        canvas.pixel = 2.0 / size / item.scale
        PAINTERS[item.species.set](canvas, dx * cos + dy * sin, dy * cos - dx * sin, item.species.values)
    light = rng.uniform(0.75, 1.15) * rng.uniform(0.93, 1.07, 3)
    image = canvas.image * light.astype(np.float32) + rng.standard_normal((size, size, 3), dtype=np.float32) * 0.035
    return (np.clip(image, 0, 1) * 255).astype(np.uint8)


def png(pixels: Array) -> bytes:
    """Lossless, quick (level 1): what a row carries."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
