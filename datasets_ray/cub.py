"""Source `cub`: CUB-200-2011 (Wah et al. 2011) with ten human captions per photo (Reed et al. 2016), where they lie beside it.

Flows in: the official layout, `CUB_200_2011/{images/,images.txt,image_class_labels.txt,train_test_split.txt,classes.txt}` and
`text_c10/<class>/<image>.txt`, one caption a line. Flows out: rows (see photos.py). Siblings share the last word of the name (`Albatross`).
Class names lose number and underscores (`001.Black_footed_Albatross` → `Black footed Albatross`); classes are those that have a photo here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets_ray.errors import UserError
from datasets_ray.photos import KEYS, PARTS, Collection, Photo, build_part, check_spec, dataset_folder

USUAL = ("cub_200_2011_first10", "CUB_200_2011", "cub")
LISTS = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")


def pretty(name: str) -> str:
    return name.split(".", 1)[-1].replace("_", " ")


def _table(file: Path) -> dict[str, str]:
    """`id value` lines."""
    pairs = [line.split(maxsplit=1) for line in file.read_text().splitlines() if line.strip()]
    if any(len(pair) != 2 for pair in pairs):
        raise UserError(f"{file} is not one of CUB's lists", why="every line is `id value`")
    return {key: value.strip() for key, value in pairs}


def _captions(root: Path, image: str) -> tuple[str, ...]:
    """The photo's captions: `text_c10` lies beside the images' folder in the usual archives."""
    for place in (root, root.parent):
        file = place / "text_c10" / Path(image).with_suffix(".txt")
        if file.is_file():
            return tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    return ()


def read(root: Path, split: str) -> Collection:
    images, labels, training, classes = (_table(root / name) for name in LISTS)
    unknown = [key for key in images if key not in labels or key not in training]
    if unknown:
        raise UserError(f"image {unknown[0]} of images.txt is missing from the other lists", where=str(root))
    wanted = "1" if split == "train" else "0"
    names = {key: pretty(classes[labels[key]]) for key in images}
    photos = [Photo(f"images/{images[key]}", names[key], _captions(root, images[key])) for key in images if training[key] == wanted]
    present = sorted(set(names.values()))
    kinds = {name: name.split()[-1] for name in present}
    return Collection("cub", root, photos, present, kinds, dict.fromkeys(present, "bird"))


def build(spec: dict[str, Any], out: Path, inputs: Callable[[str], Path], data_root: str | None) -> dict[str, Any]:
    full = check_spec(spec, PARTS, ("train", "test"), KEYS)
    root = dataset_folder(full, data_root, USUAL, ["images", *LISTS], below="CUB_200_2011")
    collection = read(root, full["split"])
    return build_part(collection, full, out, style="written" if any(photo.texts for photo in collection.photos) else "label")
