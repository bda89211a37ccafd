"""Sources `imagenet` (the whole validation part, labelled) and `imagenet_annotated` (questions from annotated model errors).

Flows in: the validation folder (`imagenet_files`) and, for `imagenet_annotated`, one of two annotation files, the key `file`:
  human_accuracy_v3.0.0.json   the published one (Shankar et al., ICML 2020; v3 by Vasudevan et al. 2022; also `imagenet2012_multilabel` of
                               TensorFlow Datasets): `initial_annots: {image: {correct, wrong, unclear}}`, lists of WordNet ids that
                               models predicted and experts judged, for 20,000 validation images; `problematic_images`
  *.jsonl                      ours, as `datasets_ray.choices build --annotations` reads it: `{"image": "ILSVRC2012_val_00000293.JPEG",
                               "label": "tench", "wrong": ["goldfish", ...]}` a line, names or ids; `wrong` may be label → how often
Flows out: labelled rows (photos.py), or k-way questions: the right class and the k - 1 wrong ones marked most often, shown in seeded order.

The paper starts from 19,056 annotated images and keeps 5,457 of 928 classes by a filter that it doesn't state. Ours, an assumption: an
image is left out when it is marked problematic, when its own label isn't among the correct ones, or when fewer than `least_wrong` (k - 1)
distinct wrong classes are left beside correct and unclear ones. What each filter took is in the manifest under `filtered`.
Keys: k, seed, least_wrong, question, file, folder, rows.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets_ray.choices import QUESTION, shown_order
from datasets_ray.classnames import imagenet_names
from datasets_ray.errors import UserError
from datasets_ray.files import below, must_be_data
from datasets_ray.imagenet_files import USUAL, validation
from datasets_ray.images import verdict
from datasets_ray.negatives import check_k, from_annotations, same_name
from datasets_ray.photos import KEYS, PARTS, Collection, Photo, build_part, check_spec, dataset_folder
from datasets_ray.prompts import LETTERS
from datasets_ray.rows import row
from datasets_ray.shards import Made, write_sharded

FILES = ("human_accuracy_v3.0.0.json", "human_accuracy.json", "imagenet_annotations.jsonl")
ANNOTATED, PAPER = 20_000, {"annotated": 19_056, "questions": 5_457, "classes": 928}
"""Validation images that the published file annotates; what the paper says it used and kept."""
_WNID = re.compile(r"n\d{8}$")


@dataclass(frozen=True)
class Annotated:
    """image: file name. wrong: names of wrong classes → how often they were marked."""

    image: str
    label: str
    wrong: Mapping[str, int]


def build(spec: dict[str, Any], out: Path, inputs: Callable[[str], Path], data_root: str | None) -> dict[str, Any]:
    """The validation part, 50,000 images of 1,000 classes in the order of their names."""
    full = check_spec({"split": "val", **spec}, PARTS, ("val",), KEYS)
    root = dataset_folder(full, data_root, USUAL, [])
    names = imagenet_names()
    photos = [Photo(path, names[wnid]) for path, wnid in validation(root).values()]
    classes = list(names.values())
    return build_part(Collection("imagenet", root, photos, classes, dict.fromkeys(classes, "object")), full, out)


class Asked:
    """Question rows of a range of (image, path or None, options: right one first, hardest last); picklable."""

    def __init__(self, items: Sequence[tuple[str, str | None, list[str]]], root: Path, seed: int, question: str) -> None:
        self.items, self.root, self.seed, self.question = items, root, seed, question

    def __call__(self, start: int, stop: int) -> Made:
        made = Made([])
        for image, path, options in self.items[start:stop]:
            reason = verdict({"path": path}, self.root)
            if reason:
                made.dropped.append((image, reason))
                continue
            id = f"imagenet-{Path(image).stem}"
            shown = shown_order(self.seed, id, options)
            made.rows.append(row(
                id, images=[{"path": path}], question=self.question, options=shown, answer=LETTERS[shown.index(options[0])],
                label=options[0], meta={"file": path, "negatives": options[1:]},
            ))  # fmt: skip
        return made


def build_annotated(spec: dict[str, Any], out: Path, inputs: Callable[[str], Path], data_root: str | None) -> dict[str, Any]:
    keys = ["k", "least_wrong", "question", "file"]
    full = {"k": 5, "question": QUESTION, **check_spec({"part": "questions", "split": "val", **spec}, ("questions",), ("val",), keys)}
    k = full["k"]
    if not isinstance(k, int):
        raise UserError(f"k: {k!r}", why="a whole number of options")
    check_k(k, len(LETTERS))
    least = full.get("least_wrong", k - 1)
    if not isinstance(least, int) or least < k - 1:
        raise UserError(f"least_wrong: {least!r}", why=f"{k} options need {k - 1} wrong classes at least")
    root = dataset_folder(full, data_root, USUAL, [])
    home = root.relative_to(Path(str(data_root)))
    file = below(full, "file", data_root, [str(home / name) for name in FILES] + list(FILES))
    places = validation(root)
    annotated, filtered = read_annotations(file, places)
    kept = [one for one in annotated if _distinct(one) >= least]
    filtered[f"fewer than {least} wrong classes"] = len(annotated) - len(kept)
    if not kept:
        raise UserError(f"no annotated image is left in {file}", why=f"filtered: {dict(filtered)}", hint="lower k or least_wrong")
    negatives = from_annotations([one.label for one in kept], [one.wrong for one in kept], k)
    items = [
        (kept[at].image, places[kept[at].image][0] if kept[at].image in places else None, options)
        for at, options in zip(negatives.kept.tolist(), negatives.options)
    ]
    asked = items[: full["rows"]]
    # zero-shot classification is over ImageNet's classes, not over those that happen to be asked about
    classes = dict.fromkeys([*imagenet_names().values(), *(name for *_, options in items for name in options)])
    return write_sharded(
        len(asked), Asked(asked, root, full["seed"], full["question"]), Path(out), kind="questions", part="questions", root=str(root), k=k,
        seed=full["seed"], question=full["question"], classes=list(classes), asked_classes=len({options[0] for *_, options in items}),
        records=len(asked),
        filtered={reason: count for reason, count in filtered.items() if count}, annotations=file.name,
        ties_at_the_cut=negatives.ties_at_the_cut, ties_in_order=negatives.ties_in_order,
    )  # fmt: skip


def _distinct(one: Annotated) -> int:
    """Wrong classes that are distinct in name, and not the right one's namesake."""
    return len({same_name(name) for name in one.wrong} - {same_name(one.label)})


def read_annotations(file: Path, places: Mapping[str, tuple[str, str]]) -> tuple[list[Annotated], Counter[str]]:
    """The usable annotations in the order of image names, and how many were left out, by reason. Raises UserError."""
    must_be_data(file)
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".jsonl":
        return _lines(file, text), Counter()
    try:
        data = json.loads(text)
    except ValueError as error:
        raise UserError(f"{file} is not JSON", why=str(error), hint="is it JSON lines? then name it *.jsonl") from None
    if not isinstance(data, dict) or not isinstance(data.get("initial_annots"), dict):
        why = "an object `initial_annots` is needed"
        raise UserError(f"{file} holds no annotations", why=why, hint="human_accuracy_v3.0.0.json has it")
    names, problematic = imagenet_names(), set(data.get("problematic_images", ()))
    usable, left_out = [], Counter[str]()
    for image, marks in sorted(data["initial_annots"].items()):
        if not image.startswith("ILSVRC2012_val_"):
            left_out["not a validation image"] += 1
        elif image in problematic:
            left_out["problematic image"] += 1
        elif image not in places:
            left_out["no image or label in the folder"] += 1
        elif places[image][1] not in marks.get("correct", ()):
            left_out["label not among the correct ones"] += 1
        else:
            right = {*marks["correct"], *marks.get("unclear", ())}
            wrong = [wnid for wnid in marks.get("wrong", ()) if wnid not in right]
            where = f"{file}: {image}"
            usable.append(Annotated(image, names[places[image][1]], dict.fromkeys((_name(w, names, where) for w in wrong), 1)))
    return usable, left_out


def _name(given: str, names: Mapping[str, str], where: str) -> str:
    """A class name; a WordNet id is looked up."""
    if not _WNID.match(given):
        return given
    if given not in names:
        raise UserError(f"{given} is no class of ImageNet-1K", where=where)
    return names[given]


def _lines(file: Path, text: str) -> list[Annotated]:
    names, found, seen = imagenet_names(), [], set()
    hint = 'write {"image": "ILSVRC2012_val_00000001.JPEG", "label": "tench", "wrong": ["goldfish"]}'
    for number, line in enumerate(text.splitlines(), 1):
        where = f"{file}:{number}"
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise UserError("not JSON", why=str(error), hint=hint, where=where) from None
        fits = isinstance(entry, dict) and isinstance(entry.get("image"), str) and isinstance(entry.get("label"), str)
        wrong = entry.get("wrong") if fits else None
        if not isinstance(wrong, list | dict) or not all(isinstance(name, str) for name in wrong):
            why = "`image` and `label` are texts, `wrong` is a list or an object"
            raise UserError("not an annotation", why=why, hint=hint, where=where)
        image = Path(entry["image"]).name
        if image in seen:
            raise UserError(f"{image} is annotated twice", where=where)
        seen.add(image)
        marks: Counter[str] = Counter()
        for name, count in wrong.items() if isinstance(wrong, dict) else Counter(wrong).items():
            if not isinstance(count, int) or isinstance(count, bool) or count < 0:
                raise UserError(f"{name!r} is marked {count!r} times", why="a whole number", hint=hint, where=where)
            if count:
                marks[_name(name, names, where)] += count
        found.append(Annotated(image, _name(entry["label"], names, where), marks))
    return sorted(found, key=lambda one: one.image)
