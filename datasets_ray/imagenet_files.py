"""ImageNet's validation folder as people have it: the user's folder in, where each image lies and which class it has out.

Read are the images in class folders (`val/n01440764/ILSVRC2012_val_00000293.JPEG`), and flat (`val/ILSVRC2012_val_00000293.JPEG`) with one
of `LOC_val_solution.csv` (Kaggle), a list of 50,000 WordNet ids in the images' order, or the devkit
(`ILSVRC2012_validation_ground_truth.txt` holds ILSVRC numbers, which are not the label order of frameworks: `meta.mat` translates them).
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from pathlib import Path

from datasets_ray.classnames import imagenet_names
from datasets_ray.errors import UserError
from datasets_ray.files import must_be_data
from datasets_ray.matfile import field, read_mat

USUAL = ("imagenet", "ImageNet", "imagenet-1k", "ILSVRC2012", "ILSVRC")
FOLDERS = ("val", "ILSVRC2012_img_val", "Data/CLS-LOC/val", "ILSVRC/Data/CLS-LOC/val")
SYNSETS = ("imagenet_2012_validation_synset_labels.txt", "ILSVRC2012_validation_synset_labels.txt")
DEVKITS = ("ILSVRC2012_devkit_t12/data", "devkit/data", "data")
TRUTH = "ILSVRC2012_validation_ground_truth.txt"
IMAGES = 50_000
"""Images of the release's validation part, 50 of each class."""
_WNID = re.compile(r"n\d{8}$")


def image_name(number: int) -> str:
    """The number-th image of the validation part, counted from one."""
    return f"ILSVRC2012_val_{number:08d}.JPEG"


def validation(root: Path) -> dict[str, tuple[str, str]]:
    """Image name → (path below the root, WordNet id), in the order of names. Raises UserError when classes can't be told."""
    place = next((folder for folder in FOLDERS if (root / folder).is_dir()), None)
    if place is None:
        raise UserError(f"no validation images in {root}", why=f"looked for {', '.join(FOLDERS)}", hint="put them in val/")
    folders = sorted(path for path in (root / place).iterdir() if path.is_dir() and _WNID.match(path.name))
    if folders:
        _known((folder.name for folder in folders), str(root / place))
        found = {file.name: (f"{place}/{folder.name}/{file.name}", folder.name) for folder in folders for file in folder.iterdir()}
        return dict(sorted(found.items()))
    truth = _truth(root)
    return {name: (f"{place}/{name}", truth[name]) for name in sorted(truth)}


def _truth(root: Path) -> dict[str, str]:
    """Image name → WordNet id, from whichever list lies there."""
    for file in (root / "LOC_val_solution.csv", root / "ILSVRC" / "LOC_val_solution.csv"):
        if file.is_file():
            return _kaggle(file)
    for name in SYNSETS:
        if (root / name).is_file():
            return _numbered(root / name, {wnid: wnid for wnid in imagenet_names()})
    for folder in DEVKITS:
        if (root / folder / TRUTH).is_file():
            return _numbered(root / folder / TRUTH, _synsets(root / folder / "meta.mat"))
    lists = ["LOC_val_solution.csv", SYNSETS[0], f"{DEVKITS[0]}/{TRUTH} with meta.mat"]
    why = f"none of {', '.join(lists)} is there"
    raise UserError(f"no classes for the flat images in {root}", why=why, hint="or sort them into class folders")


def _kaggle(file: Path) -> dict[str, str]:
    """Lines of `ImageId,PredictionString`, where a prediction is `n01751748 111 108 230 366 ...`."""
    must_be_data(file)
    with file.open(newline="", encoding="utf-8") as lines:
        found = {}
        for number, record in enumerate(csv.DictReader(lines), 2):
            wnid = (record.get("PredictionString") or "").split(" ")[0]
            if not record.get("ImageId") or not _WNID.match(wnid):
                hint = "ImageId,PredictionString as Kaggle has them"
                raise UserError("not a line of LOC_val_solution.csv", hint=hint, where=f"{file}:{number}")
            found[f"{record['ImageId']}.JPEG"] = wnid
    _known(found.values(), str(file))
    return found


def _numbered(file: Path, wnids: Mapping[str, str]) -> dict[str, str]:
    """A line an image, in the images' order; `wnids` says what a line means."""
    must_be_data(file)
    found = {}
    for number, line in enumerate(file.read_text().split(), 1):
        if line not in wnids:
            raise UserError(f"{line!r} is no class of ImageNet-1K", where=f"{file}:{number}")
        found[image_name(number)] = wnids[line]
    return found


def _synsets(file: Path) -> dict[str, str]:
    """ILSVRC number → WordNet id. The numbers follow neither the ids nor the names; 1 to 1000 are the classes, the rest their parents."""
    if not file.is_file():
        raise UserError(f"{file} is missing", why="the ground truth's numbers mean nothing without it", hint="it is in the devkit")
    synsets = read_mat(file, ["synsets"])["synsets"]
    pairs = zip(field(synsets, "ILSVRC2012_ID", file), field(synsets, "WNID", file))
    found = {str(int(number)): str(wnid) for number, wnid in pairs if int(number) <= 1000}
    _known(found.values(), str(file))
    return found


def _known(wnids: object, where: str) -> None:
    strangers = sorted(set(wnids) - set(imagenet_names()))  # type: ignore[call-overload]
    if strangers:
        raise UserError(f"{strangers[0]} is no class of ImageNet-1K", why=f"{len(strangers)} such ids", where=where)
