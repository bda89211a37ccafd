"""Fine-grained benchmarks in their official layouts, made here in small: what is read, left out, and said about broken files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from datasets_ray.classnames import flower_names, imagenet_names
from datasets_ray.errors import UserError
from datasets_ray.flowers102 import RELEASED, read
from datasets_ray.rows import RowTable
from datasets_ray.sources import build

DATA = Path(os.environ.get("FINEGRID_DATA") or Path(__file__).parents[2].parent / "shared" / "data")
LISTS = DATA / "flowers102_lists"


def photo(path: Path, shade: int = 90) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 12), (shade, 40, 200)).save(path)


def make(spec: dict, root: Path) -> tuple[dict, list[dict]]:
    out = root / "out" / str(abs(hash(json.dumps(spec, sort_keys=True))))
    manifest = build(spec, out, lambda _: out, str(root))
    return manifest, list(RowTable(out))


def records(**fields: list) -> np.ndarray:
    """An array of MATLAB structs."""
    made = np.empty(len(next(iter(fields.values()))), dtype=[(name, object) for name in fields])
    for name, values in fields.items():
        for at, value in enumerate(values):
            made[name][at] = value
    return made


# ── flowers ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────
def flowers(root: Path, labels: list[int], **parts: list[int]) -> Path:
    folder = root / "flowers-102"
    (folder / "jpg").mkdir(parents=True)
    savemat(folder / "imagelabels.mat", {"labels": np.array([labels], dtype=np.uint8)})
    savemat(folder / "setid.mat", {name: np.array([numbers], dtype=np.uint16) for name, numbers in parts.items()})
    for number in range(1, len(labels) + 1):
        photo(folder / "jpg" / f"image_{number:05d}.jpg")
    return folder


@pytest.mark.skipif(not LISTS.is_dir(), reason=f"no Flowers-102 lists in {LISTS}: set FINEGRID_DATA")
def test_the_official_flower_lists_give_the_published_parts():
    seen: list[str] = []
    for split, count in RELEASED.items():
        collection = read(LISTS, split)
        assert len(collection.photos) == count and {p.label for p in collection.photos} == set(flower_names())
        seen += [p.path for p in collection.photos]
    assert len(set(seen)) == len(seen) == 8189


@pytest.mark.skipif(not (DATA / "foci_benchmark").is_dir() or not LISTS.is_dir(), reason="no FOCI files: set FINEGRID_DATA")
def test_flower_names_and_test_part_are_those_of_foci():
    file = next((DATA / "foci_benchmark" / "data").glob("flowers102-*.json"))
    foci = {q["image"]: label for label, questions in json.loads(file.read_text()).items() for q in questions}
    ours = {p.path: p.label for p in read(LISTS, "test").photos}
    assert ours == foci


def test_flowers_parts_labels_and_names(tmp_path):
    flowers(tmp_path, [1, 102, 1, 49], trnid=[2], valid=[1], tstid=[4, 3])
    manifest, rows = make({"source": "flowers102", "part": "labelled", "split": "test"}, tmp_path)
    assert [r["images"][0]["path"] for r in rows] == ["jpg/image_00004.jpg", "jpg/image_00003.jpg"]
    assert [r["label"] for r in rows] == ["oxeye daisy", "pink primrose"]
    assert len(manifest["classes"]) == 102 and manifest["records"] == 2
    _, train = make({"source": "flowers102", "part": "labelled"}, tmp_path)
    assert [r["label"] for r in train] == ["blackberry lily"]


def test_broken_flower_lists_are_one_error(tmp_path):
    folder = flowers(tmp_path, [1, 103], trnid=[1], valid=[1], tstid=[7])
    spec = {"source": "flowers102", "part": "labelled", "split": "test"}
    with pytest.raises(UserError, match="label 103"):
        make(spec, tmp_path)
    savemat(folder / "imagelabels.mat", {"labels": np.array([[1, 2]], dtype=np.uint8)})
    with pytest.raises(UserError, match="image 7"):
        make(spec, tmp_path)
    (folder / "setid.mat").write_text("<!DOCTYPE html><html>moved</html>")
    with pytest.raises(UserError, match="web page"):
        make(spec, tmp_path)
    (folder / "setid.mat").write_bytes(b"MATLAB 5.0 MAT-file" + bytes(200))
    with pytest.raises(UserError, match="MATLAB"):
        make(spec, tmp_path)
    savemat(folder / "setid.mat", {"other": [1]})
    with pytest.raises(UserError, match="no variable tstid"):
        make(spec, tmp_path)


# ── cars, dogs, aircraft ─────────────────────────────────────────────────────────────────────────────────────────────────────
CARS = ["AM General Hummer SUV 2000", "Audi R8 Coupe 2012", "Audi S4 Sedan 2012"]


def test_stanford_cars(tmp_path):
    folder = tmp_path / "stanford_cars"
    for name in ("00001.jpg", "00002.jpg"):
        photo(folder / "cars_test" / name)
    (folder / "devkit").mkdir()
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": np.array([CARS], dtype=object)})
    hidden = records(fname=["00001.jpg", "00002.jpg"], bbox_x1=[1, 2])
    savemat(folder / "cars_test_annos_withlabels.mat", {"annotations": hidden})
    spec = {"source": "stanford_cars", "part": "labelled", "split": "test"}
    with pytest.raises(UserError, match="hides them"):
        make(spec, tmp_path)
    shown = records(fname=["00001.jpg", "00002.jpg"], **{"class": [3, 1]})
    savemat(folder / "cars_test_annos_withlabels.mat", {"annotations": shown})
    manifest, rows = make(spec, tmp_path)
    assert [r["label"] for r in rows] == [CARS[2], CARS[0]] and manifest["classes"] == CARS
    assert json.loads(rows[0]["meta"])["category"] == "Audi"
    with pytest.raises(UserError, match="missing: cars_train"):
        make({**spec, "split": "train"}, tmp_path)


def test_stanford_dogs(tmp_path):
    folder = tmp_path / "stanford_dogs"
    files = ["n02085936-Maltese_dog/n02085936_10073.jpg", "n02085620-Chihuahua/n02085620_2650.jpg"]
    for name in files:
        photo(folder / "Images" / name)
    (folder / "lists").mkdir()
    savemat(folder / "lists" / "test_list.mat", {"file_list": np.array(files, dtype=object).reshape(-1, 1), "labels": [[2], [1]]})
    manifest, rows = make({"source": "stanford_dogs", "part": "labelled", "split": "test"}, tmp_path)
    assert [r["label"] for r in rows] == ["Maltese dog", "Chihuahua"] and manifest["classes"] == ["Chihuahua", "Maltese dog"]
    with pytest.raises(UserError, match=r"train_list\.mat or lists/train_list\.mat"):
        make({"source": "stanford_dogs", "part": "labelled", "split": "train"}, tmp_path)


def test_aircraft(tmp_path):
    data = tmp_path / "fgvc-aircraft-2013b" / "data"
    photo(data / "images" / "1514522.jpg")
    (data / "variants.txt").write_text("707-320\n737-200\nF/A-18\n")
    (data / "images_variant_test.txt").write_text("1514522 707-320\n0747566 F/A-18\n")
    (data / "images_family_test.txt").write_text("1514522 Boeing 707\n0747566 F/A-18\n")
    spec = {"source": "aircraft", "part": "labelled", "split": "test"}
    manifest, rows = make(spec, tmp_path)
    assert [r["label"] for r in rows] == ["707-320"] and json.loads(rows[0]["meta"])["category"] == "Boeing 707"
    assert manifest["dropped"] == {"image missing": 1} and len(manifest["classes"]) == 3
    (data / "images_variant_test.txt").write_text("1514522 707-320\n0747566 Concorde\n")
    with pytest.raises(UserError, match="Concorde"):
        make(spec, tmp_path)
    (data / "images_variant_test.txt").write_text("1514522 707-320\n0747566\n")
    with pytest.raises(UserError, match=r"test\.txt:2"):
        make(spec, tmp_path)


# ── ImageNet ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────
WNIDS = list(imagenet_names())
NAMES = imagenet_names()
OF = {1: WNIDS[65], 2: WNIDS[970], 3: WNIDS[0], 4: WNIDS[1]}


def name_of(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}.JPEG"


def in_folders(root: Path) -> Path:
    for number, wnid in OF.items():
        photo(root / "imagenet" / "val" / wnid / name_of(number))
    return root / "imagenet"


def flat(root: Path) -> Path:
    for number in OF:
        photo(root / "imagenet" / "val" / name_of(number))
    return root / "imagenet"


def kaggle(folder: Path) -> None:
    lines = [f"{name_of(number).removesuffix('.JPEG')},{wnid} 1 2 3 4 {wnid} 5 6 7 8" for number, wnid in sorted(OF.items(), reverse=True)]
    (folder / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "\n".join(lines) + "\n")


def synsets(folder: Path) -> None:
    (folder / "imagenet_2012_validation_synset_labels.txt").write_text("".join(f"{OF[number]}\n" for number in sorted(OF)))


def devkit(folder: Path) -> None:
    """Its numbers are neither the order of ids nor that of names: `meta.mat` says what they mean, parents of classes included."""
    data = folder / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    numbers = {wnid: 1000 - at for at, wnid in enumerate(WNIDS)}
    ids, wnids = [*numbers.values(), 1001], [*numbers, "n00001740"]
    savemat(data / "meta.mat", {"synsets": records(ILSVRC2012_ID=ids, WNID=wnids)})
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{numbers[OF[number]]}\n" for number in sorted(OF)))


def test_imagenet_has_the_same_labels_in_every_layout(tmp_path):
    expected = [NAMES[OF[number]] for number in sorted(OF)]
    in_folders(tmp_path / "folders")
    manifest, rows = make({"source": "imagenet", "part": "labelled"}, tmp_path / "folders")
    assert [r["label"] for r in rows] == expected and len(manifest["classes"]) == 1000
    for number, write in enumerate((kaggle, synsets, devkit)):
        root = tmp_path / f"flat{number}"
        folder = flat(root)
        with pytest.raises(UserError, match="no classes for the flat images"):
            make({"source": "imagenet", "part": "labelled"}, root)
        write(folder)
        _, rows = make({"source": "imagenet", "part": "labelled"}, root)
        assert [r["label"] for r in rows] == expected
        assert [r["images"][0]["path"] for r in rows] == [f"val/{name_of(number)}" for number in sorted(OF)]


def test_class_names_are_clips():
    assert len(NAMES) == 1000 and sorted(NAMES) == list(NAMES)
    twice = {name for name in NAMES.values() if list(NAMES.values()).count(name) > 1}
    assert twice == {"missile", "sunglasses"} and NAMES["n02123045"] == "tabby cat"
    assert len(set(flower_names())) == 102


def published(folder: Path, **annots: dict) -> None:
    given = {name_of(int(key[1:])): marks for key, marks in annots.items()}
    given["some_imagenet_v2_image"] = {"correct": [WNIDS[0]]}
    data = {"initial_annots": given, "problematic_images": {name_of(4): ["unclear"]}, "imagenet_m": []}
    (folder / "human_accuracy_v3.0.0.json").write_text(json.dumps(data))


def test_annotated_errors_become_questions(tmp_path):
    folder = in_folders(tmp_path)
    wrong = WNIDS[100:105]
    published(
        folder,
        i1={"correct": [OF[1], WNIDS[7]], "wrong": [*wrong, WNIDS[7]], "unclear": [wrong[0]]},
        i2={"correct": [OF[2]], "wrong": wrong[:3]},
        i3={"correct": [WNIDS[9]], "wrong": wrong},
        i4={"correct": [OF[4]], "wrong": wrong},
    )
    spec = {"source": "imagenet_annotated", "k": 5, "seed": 0}
    manifest, rows = make(spec, tmp_path)
    assert manifest["filtered"] == {
        "problematic image": 1, "label not among the correct ones": 1, "fewer than 4 wrong classes": 1, "not a validation image": 1,
    }  # fmt: skip
    (only,) = rows
    assert only["label"] == NAMES[OF[1]] == only["options"]["ABCDE".index(only["answer"])]
    assert set(only["options"]) == {NAMES[OF[1]], *(NAMES[w] for w in wrong[1:])}
    assert set(json.loads(only["meta"])["negatives"]) == set(only["options"]) - {only["label"]}
    assert manifest["records"] == 1 and not manifest["dropped"]
    assert manifest["asked_classes"] == 1 and set(NAMES.values()) == set(manifest["classes"]) >= set(only["options"])
    orders = {tuple(make({**spec, "seed": seed}, tmp_path)[1][0]["options"]) for seed in range(6)}
    assert len(orders) > 2
    _, three = make({**spec, "k": 3}, tmp_path)
    assert [len(r["options"]) for r in three] == [3, 3]
    _, strict = make({**spec, "k": 3, "least_wrong": 4}, tmp_path)
    assert len(strict) == 1
    with pytest.raises(UserError, match="least_wrong"):
        make({**spec, "least_wrong": 2}, tmp_path)
    with pytest.raises(UserError, match="no annotated image is left"):
        make({**spec, "k": 9}, tmp_path)


def test_our_own_annotations_and_their_mistakes(tmp_path):
    folder = in_folders(tmp_path)
    file = folder / "imagenet_annotations.jsonl"
    lines = [
        {"image": name_of(3), "label": "tench", "wrong": {"goldfish": 3, WNIDS[2]: 9, "hen": 1, "Tench": 5}},
        {"image": name_of(9), "label": "hen", "wrong": ["tench", "goldfish", "rooster"]},
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    manifest, rows = make({"source": "imagenet_annotated", "k": 3}, tmp_path)
    assert manifest["dropped"] == {"image missing": 1} and len(rows) == 1
    # the most often marked is the hardest and comes last; a namesake of the right one is no option
    assert json.loads(rows[0]["meta"])["negatives"] == ["goldfish", NAMES[WNIDS[2]]]
    for broken, said in (
        ("{oops", ":1: not JSON"), (json.dumps({"image": "x", "label": 3, "wrong": []}), "not an annotation"),
        (json.dumps({"image": "x", "label": "hen", "wrong": {"hen": "often"}}), "'often' times"),
        (json.dumps(lines[0]) + "\n\n" + json.dumps(lines[0]), ":3: .*twice"),
        (json.dumps({**lines[1], "label": "n00000000"}), "n00000000 is no class"),
    ):  # fmt: skip
        file.write_text(broken)
        with pytest.raises(UserError, match=said):
            make({"source": "imagenet_annotated", "k": 3}, tmp_path)
    (folder / "human_accuracy.json").write_text('{"annots": {}}')
    with pytest.raises(UserError, match="initial_annots"):
        make({"source": "imagenet_annotated"}, tmp_path)
