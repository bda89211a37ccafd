"""A small release of every benchmark of experiments/benchmarks in its official layout, answers to its questions and what they score.

An answer `+` stands for the right option's letter, `-` for a wrong one's; anything else is said as it stands. Expected numbers are worked
out by hand: `value` in percentage points, all others as scores.json has them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.io import savemat

from tests.datasets_ray import test_benchmark_tables as tables
from tests.datasets_ray import test_benchmarks as photos
from tests.datasets_ray import test_vlmevalkit_tsv as tsv

BARE = {"A": "", "B": "", "C": ""}
OCR = [*tsv.COLUMNS, "image_path"]


@dataclass(frozen=True)
class Case:
    """write: makes the release below a folder. rows: questions (labelled images where options are mined). expected: of scores.json."""

    write: Callable[[Path], Any]
    rows: int
    answers: Sequence[str]
    expected: dict[str, Any]
    told: dict[str, Any] = field(default_factory=dict)
    """Dotted paths into scores.json → value."""


def imagenet(root: Path) -> None:
    wrong = photos.WNIDS[100:105]
    photos.published(
        photos.in_folders(root), i1={"correct": [photos.OF[1]], "wrong": wrong}, i2={"correct": [photos.OF[2]], "wrong": wrong},
        i3={"correct": [photos.OF[3]], "wrong": wrong[:2]},
    )  # fmt: skip


def pets(root: Path, breeds: Sequence[str] = ("Abyssinian", "beagle", "pug"), count: int = 2) -> Path:
    """Oxford-IIIT Pet's test part, `count` photos a breed; cats are written with a capital."""
    folder, lines = root / "oxford-iiit-pet", []
    (folder / "annotations").mkdir(parents=True)
    for number, breed in enumerate(breeds, 1):
        for photo in range(count):
            photos.photo(folder / "images" / f"{breed}_{photo}.jpg", 40 * number)
            lines.append(f"{breed}_{photo} {number} {1 if breed[0].isupper() else 2} {number}")
    (folder / "annotations" / "test.txt").write_text("\n".join(lines) + "\n")
    return root


def food(root: Path) -> None:
    folder, names = root / "food-101", ["apple_pie/1", "apple_pie/2", "ramen/3"]
    (folder / "meta").mkdir(parents=True)
    (folder / "meta" / "classes.txt").write_text("apple_pie\nramen\n")
    (folder / "meta" / "test.txt").write_text("\n".join(names) + "\n")
    for name in names:
        photos.photo(folder / "images" / f"{name}.jpg")


def cub(root: Path) -> None:
    folder = root / "CUB_200_2011"
    images = ["001.Black_footed_Albatross/a.jpg", "002.Laysan_Albatross/b.jpg", "002.Laysan_Albatross/c.jpg"]
    for image in images:
        photos.photo(folder / "images" / image)
    lists = {
        "images": [f"{n} {image}" for n, image in enumerate(images, 1)], "image_class_labels": ["1 1", "2 2", "3 2"],
        "train_test_split": ["1 0", "2 0", "3 1"], "classes": ["1 001.Black_footed_Albatross", "2 002.Laysan_Albatross"],
    }  # fmt: skip
    for name, lines in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")


def cars(root: Path) -> None:
    folder, names = root / "stanford_cars", ["00001.jpg", "00002.jpg"]
    for name in names:
        photos.photo(folder / "cars_test" / name)
    (folder / "devkit").mkdir()
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": np.array([photos.CARS], dtype=object)})
    savemat(folder / "cars_test_annos_withlabels.mat", {"annotations": photos.records(fname=names, **{"class": [3, 1]})})


def dogs(root: Path) -> None:
    folder = root / "stanford_dogs"
    files = ["n02085936-Maltese_dog/n02085936_10073.jpg", "n02085620-Chihuahua/n02085620_2650.jpg"]
    for name in files:
        photos.photo(folder / "Images" / name)
    savemat(folder / "test_list.mat", {"file_list": np.array(files, dtype=object).reshape(-1, 1), "labels": [[2], [1]]})


def aircraft(root: Path) -> None:
    data = root / "fgvc-aircraft-2013b" / "data"
    for name in ("1514522", "0747566"):
        photos.photo(data / "images" / f"{name}.jpg")
    (data / "variants.txt").write_text("707-320\n737-200\nF/A-18\n")
    (data / "images_variant_test.txt").write_text("1514522 707-320\n0747566 F/A-18\n")
    (data / "images_family_test.txt").write_text("1514522 Boeing 707\n0747566 F/A-18\n")


def mmbench(root: Path) -> None:
    """Two questions of three options and the rotations that the release holds: three of the first, two of the second."""
    turned = [{"A": "dog", "B": "fox", "C": "cat", "answer": "A"}, {"A": "fox", "B": "cat", "C": "dog", "answer": "C"}]
    copies = [tsv.line(1_000_003, image="3", **turned[0]), tsv.line(2_000_003, image="3", **turned[1])]
    other = tsv.line(1_000_004, A="dog", B="fox", C="cat", answer="C", image="4")
    tsv.table(root, tsv.line(3), *copies, tsv.line(4, answer="A"), other, name="MMBench_DEV_EN.tsv")


def mmmu(root: Path) -> None:
    both = str([tsv.image(1), tsv.image(2)])
    lines = [
        tsv.line("dev_Art_1"), tsv.line("validation_Art_1", question="<image 2> or <image 1>?", image=both, split="validation"),
        tsv.line("validation_Art_2", **BARE, answer="['24', '24.0']", split="validation"), tsv.line("validation_Art_3", split="validation"),
    ]  # fmt: skip
    tsv.table(root, *lines, name="MMMU_DEV_VAL.tsv")


def choices(name: str) -> Callable[[Path], None]:
    """A table of four questions with options."""
    return lambda root: tsv.table(root, *(tsv.line(n, answer="ABC"[n % 3], hint="look" if n else "") for n in range(4)), name=name)


def mathvista(root: Path) -> None:
    common = {"image": "1.jpg", "decoded_image": tables.image(4), "precision": None, "metadata": {"task": "chart", "source": "s"}}
    choice: dict[str, Any] = {"question": "How many?", "choices": ["3", "4"], "answer": "4", "unit": None, "answer_type": "text"}
    free: dict[str, Any] = {"question": "How far?", "choices": None, "answer": "1.2", "unit": "m", "answer_type": "float"}
    kinds = [choice, free, free, {**free, "answer": "Paris", "unit": None, "answer_type": "text"}]
    tables.write(root, "MathVista/data/testmini-0.parquet", [{**common, **kind, "pid": str(n)} for n, kind in enumerate(kinds)])


def ocrbench(root: Path) -> None:
    kinds = [
        ("STOP", "Regular Text Recognition"),
        ("x ^ 2", "Handwritten Mathematical Expression Recognition"),
        ("blue", "Scene Text-centric VQA"),
    ]
    tsv.table(
        root, *(tsv.line(n, **BARE, answer=f"['{answer}']", category=kind) for n, (answer, kind) in enumerate(kinds)), name="OCRBench.tsv"
    )


def hallusion(root: Path) -> None:
    """One set of category VD: two questions about each of two figures; a question of category VS without a figure is left out."""
    columns = [*tsv.COLUMNS, "l2-category", "set_id", "figure_id", "question_id"]
    asked = [(0, 0, "Yes"), (0, 1, "No"), (1, 0, "No"), (1, 1, "No")]
    lines = [
        tsv.line(n, **BARE, answer=answer, category="VD", set_id=0, figure_id=figure, question_id=question, **{"l2-category": "illusion"})
        for n, (figure, question, answer) in enumerate(asked)
    ]
    bare = tsv.line(9, **BARE, answer="No", category="VS", set_id=0, figure_id=0, question_id=0, image="", **{"l2-category": "chart"})
    tsv.table(root, *lines, bare, columns=columns, name="HallusionBench.tsv")


def mme(root: Path) -> None:
    """Two images of `existence`, one of `OCR`, two questions each."""
    asked = [("existence", "a.jpg"), ("existence", "b.jpg"), ("OCR", "a.jpg")]
    lines = [
        tsv.line(2 * n + m, **BARE, question="Is it? Please answer yes or no.", answer=("Yes", "No")[m], category=task, image_path=path)
        for n, (task, path) in enumerate(asked) for m in (0, 1)
    ]  # fmt: skip
    tsv.table(root, *lines, columns=OCR, name="MME.tsv")


def pope(root: Path) -> None:
    """Three parts of two questions about one photo; another's photo isn't there."""
    name = "COCO_val2014_000000000001.jpg"
    photos.photo(root / "coco" / "val2014" / name)
    folder = root / "pope" / "output" / "coco"
    folder.mkdir(parents=True)
    for part in ("adversarial", "popular", "random"):
        lines = [{"image": name, "text": f"Is there a {part} {n}?", "label": ("yes", "no")[n]} for n in (0, 1)]
        lines += [{"image": "gone.jpg", "text": "Is there a dog?", "label": "no"}] * (part == "random")
        (folder / f"coco_pope_{part}.json").write_text("\n".join(map(json.dumps, lines)) + "\n")


def foci(name: str, folder: str, image: str) -> Callable[[Path], None]:
    """FOCI's file with two questions of four options about one photo."""

    def write(root: Path) -> None:
        photos.photo(root / folder / image)
        entry = {"image": image, "options": ["right", "near", "nearer", "nearest"], "groundtruth": "right"}
        file = root / "FOCI-Benchmark" / "data" / f"{name}-ViT-L-14-laion2b_s32b_b82k-4.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({"right": [entry, entry]}))

    return write


FOCI = (["+", "-"], {"value": 50.0, "chance": 25.0, "rule": "foci", "valid": 1.0})
HALF = {"value": 50.0, "rule": "vlmevalkit"}

CASES: dict[str, Case] = {
    "imagenet": Case(imagenet, 2, ["+", "-"], {**HALF, "chance": 20.0, "metric": "mean_per_class", "classes": 2}),
    # four classes of a photo each
    "imagenet_mined": Case(photos.in_folders, 4, ["+", "+", "+", "-"], {"value": 75.0, "metric": "mean_per_class", "classes": 4}),
    "flowers": Case(
        lambda root: photos.flowers(root, [1, 102, 1, 49], trnid=[2], valid=[1], tstid=[4, 3]), 2, ["+", "none"], {**HALF, "valid": 0.5}
    ),
    "pets": Case(pets, 6, ["+", "+", "+", "-", "-", "?"], {**HALF, "chance": 50.0, "classes": 3, "unreadable": 1}),
    "food": Case(food, 3, ["+", "-", "-"], {"value": 100 / 3, "classes": 2}),
    "cub": Case(cub, 2, ["+", "+"], {"value": 100.0}),
    "stanford_cars": Case(cars, 2, ["-", "+"], HALF),
    "stanford_dogs": Case(dogs, 2, ["-", "+"], HALF),
    "aircraft": Case(aircraft, 2, ["+", "-"], HALF),
    "mmbench": Case(mmbench, 2, ["+", "the answer is unclear"], {**HALF, "valid": 0.5, "chance": 100 / 3}),
    # the first question is right in all rotations, the second in one of two
    "mmbench_circular": Case(
        mmbench, 5, ["+", "+", "+", "+", "-"], {**HALF, "n": 2, "questions": 5, "vanilla": 1.0, "vanilla_all": 0.8, "metric": "circular"}
    ),
    "mmmu": Case(mmmu, 3, ["-", "It is 24.004", "+"], {"value": 200 / 3}, {"open.mmmu.n": 1, "open.mmmu.accuracy": 1.0}),
    "mmstar": Case(choices("MMStar.tsv"), 4, ["+", "+", "-", "?"], {**HALF, "valid": 0.75}),
    "scienceqa": Case(choices("ScienceQA_TEST.tsv"), 4, ["+", "+", "+", "-"], {"value": 75.0}),
    "ai2d": Case(choices("AI2D_TEST.tsv"), 4, ["+", "-", "-", "-"], {"value": 25.0}),
    "mathvista": Case(
        mathvista, 4, ["+", "about 1.21 m", "2", "It is Paris."], {**HALF}, {"open.number.accuracy": 0.5, "open.exact.accuracy": 0.0}
    ),
    "ocrbench": Case(ocrbench, 3, ["a stop sign", "x^2 ", "red"], {"value": 200 / 3}, {"ocrbench.total": 2, "ocrbench.of": 3}),
    # aAcc 3 of 4; fAcc 1 of 2 figures; qAcc 1 of 2 questions
    "hallusionbench": Case(
        hallusion,
        4,
        ["Yes", "No", "Yes", "No"],
        {"value": 100 * (0.75 + 0.5 + 0.5) / 3},
        {"hallusion.fAcc.accuracy": 0.5, "hallusion.qAcc.right": 1},
    ),
    "mm_vet": Case(
        lambda root: tsv.table(root, tsv.line(1, **BARE, answer="a cat"), name="MMVet.tsv"), 1, ["a cat"], {"n": 0, "metric": "graded"}
    ),
    # existence: 3 of 4 questions and 1 of 2 images, 75 + 50; OCR: 1 of 2 and none, 50: 175 of 400 points
    "mme": Case(
        mme,
        6,
        ["Yes", "No", "yes.", "Yes", "Yes", "maybe"],
        {"value": 100 * 175 / 400, "valid": 5 / 6},
        {"mme.total": 175.0, "mme.perception.points": 175.0},
    ),
    # three yes: two found, one missed; two of three no are called yes: precision 2/4, recall 2/3
    "pope": Case(
        pope,
        6,
        ["Yes", "yes", "Yes.", "No", "No", "Yes, it is"],
        {"value": 100 * 2 * 2 / (4 + 3)},
        {"f1.recall": 2 / 3, "f1.precision": 0.5},
    ),
    "foci_pets": Case(foci("oxford_pet", "oxford-iiit-pet", "images/pug_1.jpg"), 2, *FOCI),
    "foci_flowers": Case(foci("flowers102", "flowers-102", "jpg/image_06734.jpg"), 2, *FOCI),
    "foci_food": Case(foci("food101", "food-101", "images/churros/1061830.jpg"), 2, *FOCI),
    "foci_aircraft": Case(foci("fgvc_aircraft", "fgvc-aircraft-2013b", "data/images/1514522.jpg"), 2, *FOCI),
    "foci_cars": Case(foci("stanford_cars", "stanford_cars", "cars_test/00001.jpg"), 2, *FOCI),
}
