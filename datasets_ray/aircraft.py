"""Source `aircraft`: FGVC-Aircraft 2013b (Maji, Rahtu, Kannala, Blaschko, Vedaldi 2013), 100 variants of aircraft.

Flows in: the official layout, `data/images/<id>.jpg`, `data/variants.txt`, `data/images_variant_{train,val,trainval,test}.txt`
(lines `id variant name`) and, where present, `data/images_family_<split>.txt`. Flows out: rows (see photos.py). Siblings are variants
of one family (Boeing 737), where the family lists lie beside. Images keep the release's copyright strip at their foot, as the peers do.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets_ray.errors import UserError
from datasets_ray.photos import KEYS, PARTS, Collection, Photo, build_part, check_spec, dataset_folder

USUAL = ("fgvc-aircraft-2013b", "fgvc_aircraft", "aircraft")
SPLITS = ("train", "val", "trainval", "test")
RELEASED = {"train": 3334, "val": 3333, "trainval": 6667, "test": 3333}
"""Images of each part; 100 variants."""


def _pairs(file: Path) -> list[tuple[str, str]]:
    """(image id, name) of a list's lines."""
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        fields = line.split(maxsplit=1)
        if fields and len(fields) != 2:
            raise UserError(f"not a line of the Aircraft lists: {line!r}", hint="image-id variant name", where=f"{file}:{number}")
        if fields:
            found.append((fields[0], fields[1].strip()))
    return found


def read(root: Path, split: str) -> Collection:
    variants = [line.strip() for line in (root / "variants.txt").read_text(encoding="utf-8").splitlines() if line.strip()]
    file = root / f"images_variant_{split}.txt"
    listed, known = _pairs(file), set(variants)
    unknown = next((name for _, name in listed if name not in known), None)
    if unknown is not None:
        raise UserError(f"{file} has the variant {unknown!r}", why="variants.txt doesn't", hint="are the lists of one release?")
    photos = [Photo(f"images/{image}.jpg", name) for image, name in listed]
    families = root / f"images_family_{split}.txt"
    family = dict(_pairs(families)) if families.is_file() else {}
    groups = {name: family.get(image, "") for image, name in listed}
    return Collection("aircraft", root, photos, variants, groups, dict.fromkeys(variants, "aircraft"))


def build(spec: dict[str, Any], out: Path, inputs: Callable[[str], Path], data_root: str | None) -> dict[str, Any]:
    full = check_spec(spec, PARTS, SPLITS, KEYS)
    root = dataset_folder(full, data_root, USUAL, ["images", "variants.txt", f"images_variant_{full['split']}.txt"], below="data")
    return build_part(read(root, full["split"]), full, out)
