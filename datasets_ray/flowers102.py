"""Source `flowers102`: Oxford Flowers-102 (Nilsback & Zisserman, ICVGIP 2008), 102 kinds of flowers.

Flows in: the official layout, `jpg/image_00001.jpg ...`, `imagelabels.mat` (a label 1..102 an image) and `setid.mat` (image numbers of
each part). Flows out: rows (see photos.py). The files hold no class names: they are CLIP's list (`names/flowers102.json`).

Parts as the release has them: train `trnid`, val `valid`, test `tstid`. Some code trains on the larger `tstid` and tests on `trnid`;
numbers of such code are not comparable with these, nor with CLIP's, FOCI's and the paper's (test = `tstid`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets_ray.classnames import flower_names
from datasets_ray.errors import UserError
from datasets_ray.matfile import read_mat
from datasets_ray.photos import KEYS, PARTS, Collection, Photo, build_part, check_spec, dataset_folder

USUAL = ("flowers102", "flowers-102", "oxford_flowers102", "102flowers")
LISTS = {"train": "trnid", "val": "valid", "test": "tstid"}
RELEASED = {"train": 1020, "val": 1020, "test": 6149}
"""Images of each part in the release; 8,189 together."""


def read(root: Path, split: str) -> Collection:
    labels = read_mat(root / "imagelabels.mat", ["labels"])["labels"]
    numbers = read_mat(root / "setid.mat", [LISTS[split]])[LISTS[split]]
    names = flower_names()
    if labels.min() < 1 or labels.max() > len(names):
        raise UserError(f"{root / 'imagelabels.mat'} has label {labels.max()}", why=f"labels are 1 to {len(names)}")
    if numbers.min() < 1 or numbers.max() > len(labels):
        raise UserError(f"{root / 'setid.mat'} names image {numbers.max()}", why=f"imagelabels.mat has {len(labels)} labels")
    photos = [Photo(f"jpg/image_{int(n):05d}.jpg", names[int(labels[int(n) - 1]) - 1]) for n in numbers]
    same = dict.fromkeys(names, "flower")
    return Collection("flowers102", root, photos, names, same, same)


def build(spec: dict[str, Any], out: Path, inputs: Callable[[str], Path], data_root: str | None) -> dict[str, Any]:
    full = check_spec(spec, PARTS, tuple(LISTS), KEYS)
    root = dataset_folder(full, data_root, USUAL, ["jpg", "imagelabels.mat", "setid.mat"])
    return build_part(read(root, full["split"]), full, out)
