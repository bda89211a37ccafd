"""Sources `stanford_cars` and `stanford_dogs`: two fine-grained sets whose lists are MATLAB files.

Flows in: Stanford Cars (Krause, Stark, Deng, Fei-Fei, 3DRR 2013): `cars_train/`, `cars_test/`, `devkit/cars_meta.mat`,
`devkit/cars_train_annos.mat`, `cars_test_annos_withlabels.mat` (at the top or in devkit). Stanford Dogs (Khosla et al., FGVC 2011):
`Images/n02085620-Chihuahua/*.jpg` and `train_list.mat`, `test_list.mat` (at the top or in `lists/`).
Flows out: rows (see photos.py). Cars are named `Make Model Type Year`; siblings are of one make. Dogs lose number and underscores
(`n02085936-Maltese_dog` → `Maltese dog`), as their folders spell them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets_ray.errors import UserError
from datasets_ray.matfile import field, read_mat
from datasets_ray.photos import KEYS, PARTS, Collection, Photo, build_part, check_spec, dataset_folder

CARS, DOGS = ("stanford_cars", "stanford-cars", "StanfordCars"), ("stanford_dogs", "stanford-dogs", "StanfordDogs")
CAR_LISTS = {"train": "cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"}
RELEASED_CARS = {"train": 8144, "test": 8041}
"""Images of each part; 196 classes."""
RELEASED_DOGS = {"train": 12000, "test": 8580}
"""Images of each part; 120 classes."""


def _list(root: Path, name: str, folders: tuple[str, ...]) -> Path:
    """A list that releases and mirrors keep in different places."""
    found = next((root / folder / name for folder in folders if (root / folder / name).is_file()), None)
    if found is None:
        places = " or ".join(f"{folder}/{name}".removeprefix("./") for folder in folders)
        raise UserError(f"{root} is not the official layout", why=f"missing: {places}")
    return found


def read_cars(root: Path, split: str) -> Collection:
    names = [" ".join(str(name).split()) for name in read_mat(root / "devkit" / "cars_meta.mat", ["class_names"])["class_names"]]
    file = _list(root, CAR_LISTS[split], (".", "devkit"))
    records = read_mat(file, ["annotations"])["annotations"]
    if records.dtype.names is not None and "class" not in records.dtype.names:
        hint = "cars_test_annos_withlabels.mat has them"
        raise UserError(f"{file} has no classes", why="the devkit's own test list hides them", hint=hint)
    photos = []
    for image, number in zip(field(records, "fname", file), field(records, "class", file)):
        if not 1 <= int(number) <= len(names):
            raise UserError(f"{file} gives {image} class {number}", why=f"cars_meta.mat names {len(names)}")
        photos.append(Photo(f"cars_{split}/{image}", names[int(number) - 1]))
    return Collection("stanford_cars", root, photos, names, {name: name.split()[0] for name in names}, dict.fromkeys(names, "car"))


def dog_name(folder: str) -> str:
    return folder.split("-", 1)[-1].replace("_", " ")


def read_dogs(root: Path, split: str) -> Collection:
    file = _list(root, f"{split}_list.mat", (".", "lists"))
    files = [str(path) for path in read_mat(file, ["file_list"])["file_list"]]
    wrong = next((path for path in files if path.count("/") != 1), None)
    if wrong is not None:
        raise UserError(f"{file} lists {wrong!r}", why="every entry is class-folder/image.jpg")
    photos = [Photo(f"Images/{path}", dog_name(path.split("/")[0])) for path in files]
    folders = {path.name for path in (root / "Images").iterdir() if path.is_dir()} | {path.split("/")[0] for path in files}
    names = [dog_name(folder) for folder in sorted(folders)]
    same = dict.fromkeys(names, "dog")
    return Collection("stanford_dogs", root, photos, names, same, same)


def cars(spec: dict[str, Any], out: Path, inputs: Callable[[str], Path], data_root: str | None) -> dict[str, Any]:
    full = check_spec(spec, PARTS, ("train", "test"), KEYS)
    root = dataset_folder(full, data_root, CARS, [f"cars_{full['split']}", "devkit/cars_meta.mat"])
    return build_part(read_cars(root, full["split"]), full, out)


def dogs(spec: dict[str, Any], out: Path, inputs: Callable[[str], Path], data_root: str | None) -> dict[str, Any]:
    full = check_spec(spec, PARTS, ("train", "test"), KEYS)
    root = dataset_folder(full, data_root, DOGS, ["Images"])
    return build_part(read_dogs(root, full["split"]), full, out)
