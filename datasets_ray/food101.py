"""Source `food101`: Food-101 (Bossard, Guillaumin, Van Gool, ECCV 2014).

Flows in: the official layout, `food-101/{images/<class>/<id>.jpg,meta/{classes,train,test}.txt}`; a list's lines are `class/id`.
Flows out: rows (see photos.py). There is no hierarchy, so siblings are drawn at random. Class names as FOCI writes them:
underscores become spaces (`apple_pie` → `apple pie`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets_ray.errors import UserError
from datasets_ray.photos import KEYS, PARTS, Collection, Photo, build_part, check_spec, dataset_folder

USUAL = ("food101_first10", "food-101", "food101")


def pretty(name: str) -> str:
    return name.replace("_", " ")


def read(root: Path, split: str) -> Collection:
    classes = [line.strip() for line in (root / "meta" / "classes.txt").read_text().splitlines() if line.strip()]
    file = root / "meta" / f"{split}.txt"
    photos = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if not line.strip():
            continue
        label = line.strip().split("/")[0]
        if label not in classes:
            raise UserError(f"class {label!r} is not in meta/classes.txt", where=f"{file}:{number}")
        photos.append(Photo(f"images/{line.strip()}.jpg", pretty(label)))
    names = [pretty(name) for name in classes]
    return Collection("food101", root, photos, names, dict.fromkeys(names, "dish"), dict.fromkeys(names, "dish"))


def build(spec: dict[str, Any], out: Path, inputs: Callable[[str], Path], data_root: str | None) -> dict[str, Any]:
    full = check_spec(spec, PARTS, ("train", "test"), KEYS)
    root = dataset_folder(full, data_root, USUAL, ["images", "meta/classes.txt", f"meta/{full['split']}.txt"], below="food-101")
    return build_part(read(root, full["split"]), full, out)
