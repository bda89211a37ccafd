"""Source `pets`: Oxford-IIIT Pet (Parkhi, Vedaldi, Zisserman, Jawahar, CVPR 2012), 37 breeds of cats and dogs.

Flows in: the official layout, `images/<name>.jpg` and `annotations/{trainval,test}.txt` whose lines are `name class species breed`
(species 1 cat, 2 dog). Flows out: rows (see photos.py); split train is the official trainval. Siblings are of the same species.
Class names as FOCI and CLIP write them: underscores become spaces, words get capitals (`american_bulldog` → `American Bulldog`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets_ray.errors import UserError
from datasets_ray.photos import KEYS, PARTS, Collection, Photo, build_part, check_spec, dataset_folder

USUAL = ("oxford_iiit_pet_sample", "oxford-iiit-pet", "oxford_iiit_pet", "oxford_pet")
LISTS = {"train": "trainval", "test": "test"}
SPECIES = {"1": "cat", "2": "dog"}


def pretty(name: str) -> str:
    return " ".join(word[:1].upper() + word[1:] for word in name.split("_"))


def _list(root: Path, split: str) -> list[tuple[str, str, str]]:
    """(image name, breed, cat or dog) of a split's list."""
    file = root / "annotations" / f"{LISTS[split]}.txt"
    found = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        fields = line.split()
        if len(fields) != 4 or fields[2] not in SPECIES:
            raise UserError(f"not a line of the Pet lists: {line!r}", hint="name class-id species breed-id", where=f"{file}:{number}")
        found.append((fields[0], pretty(fields[0].rsplit("_", 1)[0]), SPECIES[fields[2]]))
    return found


def read(root: Path, split: str) -> Collection:
    listed = {part: _list(root, part) for part in LISTS if (root / "annotations" / f"{LISTS[part]}.txt").is_file()}
    animal = {breed: species for entries in listed.values() for _, breed, species in entries}
    photos = [Photo(f"images/{name}.jpg", breed) for name, breed, _ in listed[split]]
    return Collection("pets", root, photos, sorted(animal), animal, animal)


def build(spec: dict[str, Any], out: Path, inputs: Callable[[str], Path], data_root: str | None) -> dict[str, Any]:
    full = check_spec(spec, PARTS, ("train", "test"), KEYS)
    root = dataset_folder(full, data_root, USUAL, ["images", f"annotations/{LISTS[full['split']]}.txt"])
    return build_part(read(root, full["split"]), full, out)
