"""Source `grocery`: the Grocery Store Dataset (Klasson, Zhang, Kjellstrom, WACV 2019), 81 fine classes in 43 coarse ones.

Flows in: the authors' repository layout, `dataset/{train.txt,test.txt,val.txt,classes.csv,train/,test/,...}`; a list's lines are
`path, fine id, coarse id`. Flows out: rows (see photos.py). Siblings share the coarse class; the shop's product descriptions are the
written texts. Class names: hyphens become spaces (`Golden-Delicious` → `Golden Delicious`).
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets_ray.errors import UserError
from datasets_ray.photos import KEYS, PARTS, Collection, Photo, build_part, check_spec, dataset_folder

USUAL = ("grocery_store", "GroceryStoreDataset")


def pretty(name: str) -> str:
    return name.replace("-", " ").strip()


def _classes(root: Path) -> dict[int, tuple[str, str, tuple[str, ...]]]:
    """Fine class id → (name, coarse name, descriptions)."""
    found: dict[int, tuple[str, str, tuple[str, ...]]] = {}
    with (root / "classes.csv").open(newline="", encoding="utf-8") as file:
        for record in csv.DictReader(file):
            text = root / record["Product Description Path (str)"].lstrip("/")
            told = " ".join(text.read_text(encoding="utf-8").split()) if text.is_file() else ""
            name, coarse = record["Class Name (str)"], record["Coarse Class Name (str)"]
            found[int(record["Class ID (int)"])] = (pretty(name), pretty(coarse), (told,) if told else ())
    return found


def read(root: Path, split: str) -> Collection:
    classes = _classes(root)
    photos = []
    for number, line in enumerate((root / f"{split}.txt").read_text().splitlines(), 1):
        if not line.strip():
            continue
        fields = [part.strip() for part in line.split(",")]
        if len(fields) != 3 or not fields[1].isdecimal() or int(fields[1]) not in classes:
            where = f"{root / split}.txt:{number}"
            raise UserError(f"not a line of the Grocery Store lists: {line!r}", hint="path, fine id, coarse id", where=where)
        name, _, told = classes[int(fields[1])]
        photos.append(Photo(fields[0], name, told))
    coarse = {name: group for name, group, _ in classes.values()}
    return Collection("grocery", root, photos, [name for name, _, _ in classes.values()], coarse, coarse)


def build(spec: dict[str, Any], out: Path, inputs: Callable[[str], Path], data_root: str | None) -> dict[str, Any]:
    full = check_spec(spec, PARTS, ("train", "test", "val"), KEYS)
    root = dataset_folder(full, data_root, USUAL, ["classes.csv", f"{full['split']}.txt"], below="dataset")
    return build_part(read(root, full["split"]), full, out, style="written")
