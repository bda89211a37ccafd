"""A handful of records in the layout of each published data set, drawn: what hollow runs and tests read in place of the releases.

    write(spec, root, count=8)      puts them below `root` where a dataset stage with this spec looks; the readers then do the rest

Flows in: a `dataset` stage's spec and a folder. Flows out: files with the names, columns and fields of the release; its images are
noise, its words are ours. A source that isn't in `WRITERS` has no example.
"""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datasets_ray.classnames import imagenet_names

Spec = Mapping[str, Any]
COUNT = 8
"""Records by default: every kind of record that a layout has, and classes enough for five options."""
SIZES = ((64, 48), (48, 64), (56, 56), (80, 40))
"""(width, height) of the images, in turn."""
WORDS = ("a small red flower", "two birds on a wire", "an old stone bridge over a river", "the front of a bakery at night")


def write(spec: Spec, root: Path, count: int = COUNT) -> bool:
    """Writes the example of a spec's source; False where there is none."""
    writer = WRITERS.get(spec["source"])
    if writer is not None:
        writer(spec, Path(root), count)
    return writer is not None


def jpeg(number: int) -> bytes:
    """An image of smooth noise, the same for the same number."""
    rng, (width, height) = np.random.default_rng(number), SIZES[number % len(SIZES)]
    cells = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(cells).resize((width, height), Image.Resampling.BILINEAR).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _save(path: Path, data: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def _said(number: int) -> str:
    return WORDS[number % len(WORDS)]


def _llava(spec: Spec, root: Path, count: int) -> None:
    """LLaVA-Pretrain's captions, or (a file with `mix` in its name) the conversations of LLaVA-1.5's mix."""
    file = root / spec["file"]
    folder = root / spec["images"] if spec.get("images") else file.parent
    make = _mixed if "mix" in file.name else _captioned
    records = []
    for number in range(count):
        record, stored = make(number)
        if stored:
            _save(folder / stored, jpeg(number))
        records.append(record)
    _save(file, json.dumps(records))


def _captioned(number: int) -> tuple[dict[str, Any], str]:
    path = f"{number:05d}/{number:09d}.jpg"
    asked = "Provide a brief description of the given image." + "\n<image>" if number % 2 else "<image>\nWhat is this?"
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": _said(number)}]
    return {"id": f"{number:09d}", "image": path, "conversations": turns}, path


def _mixed(number: int) -> tuple[dict[str, Any], str]:
    """(record, where its image really lies): COCO, text only, OCR-VQA with another suffix, GQA, TextVQA, Visual Genome, in turn."""
    kind, name = number % 6, f"{number:012d}"
    places = [
        f"coco/train2017/{name}.jpg", "", f"ocr_vqa/images/{name}.jpg", f"gqa/images/{name}.jpg", f"textvqa/train_images/{name}.jpg",
        f"vg/VG_100K/{name}.jpg",
    ]  # fmt: skip
    if kind == 1:
        turns = [("human", "Name a river."), ("gpt", "The Danube."), ("human", "And a lake?"), ("gpt", "Lake Constance.")]
        return {"id": f"text_{number}", "model": "", "conversations": _turns(turns)}, ""
    options = "\nA. a flower\nB. a bird\nC. a bridge\nD. a bakery\nAnswer with the option's letter from the given choices directly."
    turns = [("human", f"<image>\nWhat is shown?{options if kind == 4 else ''}"), ("gpt", "A" if kind == 4 else _said(number))]
    if kind in (0, 5):
        turns += [("human", "What colour is it?\nAnswer the question using a single word or phrase."), ("gpt", "Red")]
    record = {"id": name, "image": places[kind], "conversations": _turns(turns)}
    return record, places[kind].replace(".jpg", ".png") if kind == 2 else places[kind]


def _turns(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"from": who, "value": text} for who, text in turns]


def _pixmo(spec: Spec, root: Path, count: int) -> None:
    """PixMo-Cap's Parquet and the downloader's folder beside it."""
    import pyarrow as pa
    from pyarrow import parquet

    from datasets_ray.download import STATE, image_path

    urls = [f"https://images.example/{number}.jpg" for number in range(count)]
    captions = [f"The photograph shows {_said(number)}. " * 3 for number in range(count)]
    table = pa.table({"image_url": urls, "caption": captions, "transcripts": [[caption] for caption in captions]})
    folder, images = root / "pixmo-cap" / "data", root / spec.get("images", "pixmo-cap/images")
    folder.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, folder / "train-00000-of-00001.parquet")
    for number, url in enumerate(urls):
        _save(images / image_path(url), jpeg(number))
    _save(images / STATE, "".join(json.dumps({"url": url, "status": "ok", "reason": ""}) + "\n" for url in urls))


def _imagenet(spec: Spec, root: Path, count: int) -> None:
    """Validation images in class folders, with annotations of what models took them for."""
    wnids, annotated = list(imagenet_names()), {}
    for number in range(count):
        name = f"ILSVRC2012_val_{number + 1:08d}.JPEG"
        _save(root / "imagenet" / "val" / wnids[number] / name, jpeg(number))
        others = [wnids[(number + step) % 100] for step in range(1, 6)]
        annotated[name] = {"correct": [wnids[number]], "wrong": others, "unclear": []}
    _save(root / "imagenet" / "human_accuracy_v3.0.0.json", json.dumps({"initial_annots": annotated, "problematic_images": {}}))


def _flowers(spec: Spec, root: Path, count: int) -> None:
    """Flowers-102: images by number, labels and parts in MATLAB files. Every part holds `count` images."""
    from scipy.io import savemat

    folder = root / "flowers102"
    folder.mkdir(parents=True, exist_ok=True)
    numbers = np.arange(1, 3 * count + 1)
    for number in numbers:
        _save(folder / "jpg" / f"image_{number:05d}.jpg", jpeg(int(number)))
    savemat(folder / "imagelabels.mat", {"labels": (numbers - 1)[None] % min(count, 102) + 1})
    savemat(folder / "setid.mat", {name: part[None] for name, part in zip(("trnid", "valid", "tstid"), np.split(numbers, 3))})


def _pets(spec: Spec, root: Path, count: int) -> None:
    """Oxford-IIIT Pet: images by breed and lists of the two parts."""
    breeds = ["Abyssinian", "Bengal", "Birman", "Ragdoll", "beagle", "boxer", "pug", "saint_bernard"]
    folder, lines = root / "oxford-iiit-pet", {"trainval": "", "test": ""}
    for part, shift in (("trainval", 0), ("test", count)):
        for number in range(count):
            breed = number % len(breeds)
            name = f"{breeds[breed]}_{shift + number + 1}"
            _save(folder / "images" / f"{name}.jpg", jpeg(shift + number))
            species = 1 if breeds[breed][0].isupper() else 2
            lines[part] += f"{name} {breed + 1} {species} {breed % 4 + 1}\n"
    for part, text in lines.items():
        _save(folder / "annotations" / f"{part}.txt", text)


def _food(spec: Spec, root: Path, count: int) -> None:
    """Food-101: images by class and lists of the two parts."""
    classes = ["apple_pie", "baklava", "ceviche", "donuts", "gnocchi", "hummus", "paella", "ramen"]
    folder = root / "food-101"
    for part, shift in (("train", 0), ("test", count)):
        names = [f"{classes[number % len(classes)]}/{1000 + shift + number}" for number in range(count)]
        for number, name in enumerate(names):
            _save(folder / "images" / f"{name}.jpg", jpeg(shift + number))
        _save(folder / "meta" / f"{part}.txt", "".join(f"{name}\n" for name in names))
    _save(folder / "meta" / "classes.txt", "".join(f"{name}\n" for name in classes))


def _tsv(spec: Spec, root: Path, count: int) -> None:
    """VLMEvalKit's table. Where several images may be shown a record in four has two; one in eight of those has no options."""
    several = spec.get("most_images") is not None or "MMMU" in spec["file"]
    path = root / spec["file"]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "l2-category", "split", "image"])
        for number in range(count):
            two, open_ = several and number % 4 == 1, several and number % 8 == 7
            images = [base64.b64encode(jpeg(number + shift)).decode() for shift in range(2 if two else 1)]
            asked = "What do <image 1> and <image 2> have in common?" if two else f"How many {_said(number).split()[-1]}s are there?"
            options = ["", "", "", ""] if open_ else ["one", "two", "three", "" if number % 3 else "four"]
            table.writerow([
                number, asked, "Look closely." if number % 2 else "", *options, "2" if open_ else "ABC"[number % 3], "counting",
                "finegrained", spec.get("split", "dev"), str(images) if two else images[0],
            ])  # fmt: skip


WRITERS: dict[str, Callable[[Spec, Path, int], None]] = {
    "llava_json": _llava, "pixmo": _pixmo, "imagenet_annotated": _imagenet, "imagenet": _imagenet, "flowers102": _flowers, "pets": _pets,
    "food101": _food, "vlmevalkit_tsv": _tsv,
}  # fmt: skip
