"""What every source of labelled photographs shares: from a dataset's lists to labelled, caption, quiz and instruction rows.

Flows in: a `Collection` (photos with class names, who is like whom, what is written about them), which each source reads from its
official layout, and the stage's spec. Flows out: a rows artefact whose images are paths below the dataset's folder. Spec keys:

    part     labelled      every photo with its class                               evaluation, mining
             captions      photo + text, "style": label | written (where the dataset has texts)   pretraining
             instructions  multiple choice with siblings, short answers, 20 % text only           finetuning
             quizzes       the multiple choice in words, no photo                   language models
             corpus        the texts alone, learned from end to end                 language models
    split    train | test  the dataset's own parts
    answers  letter | text: what multiple-choice answers say (letter; VLMEvalKit's rule reads both)
    rows     how many; all photos once when left out (labelled: the first rows); more than there are go round again
    seed     of order, distractors and wording
    folder   the dataset's folder below the data root, when it isn't the usual name

An image that is missing, undecodable or outside the folder is left out and counted by reason. A missing folder or list is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from datasets_ray.errors import UserError, nearest
from datasets_ray.images import ImageError, decode
from datasets_ray.prompts import LETTERS, SUFFIX
from datasets_ray.rows import IMAGE, row
from datasets_ray.shards import Made, write_sharded

WHAT = "What type of object is in this photo?"
SHORT = "Answer the question using a single word or phrase."
PARTS = ("labelled", "captions", "instructions", "quizzes", "corpus")
ANSWERS = ("letter", "text")
OPTIONS = 5
TEXT_ONLY = 0.2


@dataclass(frozen=True)
class Photo:
    """path: below the collection's root. label: the class name as a person writes it. texts: what people wrote about this photo."""

    path: str
    label: str
    texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Collection:
    """One split. groups: class → what it shares with its siblings (coarse class, cat or dog, last word); noun: what captions call them."""

    name: str
    root: Path
    photos: Sequence[Photo]
    classes: Sequence[str]
    groups: Mapping[str, str]
    nouns: Mapping[str, str] = field(default_factory=dict)

    def distractors(self, rng: np.random.Generator, label: str, count: int) -> list[str]:
        """Other classes, those of the same group first, each half in random order."""
        others = [c for c in self.classes if c != label]
        order = rng.permutation(len(others))
        near = [others[i] for i in order if self.groups.get(others[i]) == self.groups.get(label)]
        far = [others[i] for i in order if self.groups.get(others[i]) != self.groups.get(label)]
        return (near + far)[:count]


def dataset_folder(spec: Mapping[str, Any], data_root: str | None, usual: Sequence[str], needs: Sequence[str], below: str = "") -> Path:
    """The dataset's folder: `folder` of the spec or the first of the `usual` names that exists; each of `needs` must be in it.

    below: a folder inside (`dataset`, `food-101`) that the official archive has. Raises UserError naming what was expected.
    """
    source = spec["source"]
    if not data_root:
        raise UserError(f"source {source!r} needs the folder of your datasets", hint="--set data_root=DIR, or set FINEGRID_DATA")
    base = Path(data_root)
    names = [spec["folder"]] if spec.get("folder") else list(usual)
    found = next((base / name for name in names if (base / name).is_dir()), None)
    if found is None:
        raise UserError(
            f"no folder for source {source!r} in {base}", why=f"looked for {', '.join(names)}", hint="put it there or name it: folder: X"
        )
    if not found.resolve().is_relative_to(base.resolve()):
        raise UserError(f"folder {spec['folder']!r} leads out of the data root", why=f"datasets lie below {base}")
    inner = found / below if below and (found / below).is_dir() else found
    missing = [need for need in needs if not (inner / need).exists()]
    if missing:
        raise UserError(f"{inner} is not the official layout of {source}", why=f"missing: {', '.join(missing)}")
    return inner


def check_spec(spec: Mapping[str, Any], parts: Sequence[str], splits: Sequence[str], keys: Sequence[str] = ()) -> dict[str, Any]:
    """The spec with its defaults; UserError for an unknown key, part, split, or impossible rows or seed."""
    source = spec["source"]
    known = ["source", "part", "split", "rows", "seed", "folder", "answers", *keys]
    for key in spec:
        if key not in known:
            raise UserError(f"source {source!r} has no key {key!r}", hint=nearest(key, known))
    full = {"split": splits[0], "seed": 0, "rows": None, **spec}
    if full.get("part") not in parts:
        raise UserError(f"source {source!r} has no part {full.get('part')!r}", hint=nearest(str(full.get("part")), parts))
    if full["split"] not in splits:
        raise UserError(f"source {source!r} has no split {full['split']!r}", hint=nearest(str(full["split"]), splits))
    if full["rows"] is not None and (not isinstance(full["rows"], int) or full["rows"] < 1):
        raise UserError(f"rows: {full['rows']!r}", why="a positive whole number, or leave it out for all")
    return full


class Maker:
    """Rows of a range of indices; picklable. Row i is a pure function of (collection, spec, i)."""

    def __init__(self, collection: Collection, spec: Mapping[str, Any]) -> None:
        self.collection, self.spec = collection, dict(spec)
        self.make: Callable[[np.random.Generator, str, Photo], dict[str, Any]] = getattr(self, f"_{spec['part']}")

    def __call__(self, start: int, stop: int) -> Made:
        made, verdicts = Made([]), dict[str, str]()
        for index in range(start, stop):
            photo, rng = self._photo(index), np.random.default_rng([self.spec["seed"], 0, index])
            identity = f"{self.collection.name}-{self.spec['split']}-{self.spec['part']}-{self.spec['seed']}-{index:06d}"
            built = self.make(rng, identity, photo)
            if built["images"] and photo.path not in verdicts:
                verdicts[photo.path] = self._verdict(photo)
            if built["images"] and verdicts[photo.path]:
                made.dropped.append((photo.path, verdicts[photo.path]))
            else:
                made.rows.append(built)
        return made

    def _verdict(self, photo: Photo) -> str:
        """Why the photo can't be used; empty when it can."""
        try:
            decode({"path": photo.path}, self.collection.root)
        except ImageError as error:
            return error.reason
        return ""

    def _photo(self, index: int) -> Photo:
        """Labelled rows keep the lists' order; other parts go round the photos, each round in its own seeded order."""
        photos = self.collection.photos
        if self.spec["part"] == "labelled":
            return photos[index]
        turn, place = divmod(index, len(photos))
        return photos[int(np.random.default_rng([self.spec["seed"], 1, turn]).permutation(len(photos))[place])]

    def _meta(self, photo: Photo, **more: Any) -> dict[str, Any]:
        return {"category": self.collection.groups.get(photo.label, ""), "file": photo.path, **more}

    def _told(self, rng: np.random.Generator, photo: Photo, style: str) -> str:
        if style == "written" and photo.texts:
            return photo.texts[int(rng.integers(len(photo.texts)))]
        noun = self.collection.nouns.get(photo.label)
        named = f"a photo of a {photo.label}"
        return f"{named}, a {noun}" if noun and rng.random() < 0.3 else named

    def _choice(self, rng: np.random.Generator, photo: Photo) -> tuple[str, str]:
        """(question with options and suffix, its answer)"""
        options = [photo.label, *self.collection.distractors(rng, photo.label, OPTIONS - 1)]
        order = rng.permutation(len(options))
        lines = [f"{letter}. {options[i]}" for letter, i in zip(LETTERS, order)]
        letter = LETTERS[int(np.argmax(order == 0))]
        return "\n".join([WHAT, *lines, SUFFIX]), letter if self.spec["answers"] == "letter" else photo.label

    def _labelled(self, rng: np.random.Generator, identity: str, photo: Photo) -> dict[str, Any]:
        return row(identity, images=[{"path": photo.path}], label=photo.label, meta=self._meta(photo))

    def _captions(self, rng: np.random.Generator, identity: str, photo: Photo) -> dict[str, Any]:
        messages = [{"role": "user", "text": IMAGE}, {"role": "assistant", "text": self._told(rng, photo, self.spec["style"])}]
        return row(identity, images=[{"path": photo.path}], messages=messages, label=photo.label, meta=self._meta(photo))

    def _instructions(self, rng: np.random.Generator, identity: str, photo: Photo) -> dict[str, Any]:
        kind = rng.random()
        if kind < TEXT_ONLY:
            return self._quizzes(rng, identity, photo)
        if kind < 0.9:
            question, answer = self._choice(rng, photo)
        else:
            question, answer = f"{WHAT}\n{SHORT}", photo.label
        messages = [{"role": "user", "text": f"{IMAGE}\n{question}"}, {"role": "assistant", "text": answer}]
        return row(identity, images=[{"path": photo.path}], messages=messages, label=photo.label, meta=self._meta(photo))

    def _quizzes(self, rng: np.random.Generator, identity: str, photo: Photo) -> dict[str, Any]:
        question, answer = self._choice(rng, photo)
        style = "written" if rng.random() < 0.3 else "label"
        messages = [{"role": "user", "text": f"{self._told(rng, photo, style)}\n{question}"}, {"role": "assistant", "text": answer}]
        return row(identity, messages=messages, label=photo.label, meta={"kind": "text_only"})

    def _corpus(self, rng: np.random.Generator, identity: str, photo: Photo) -> dict[str, Any]:
        return row(identity, messages=[{"role": "text", "text": self._told(rng, photo, "written")}], label=photo.label)


def build_part(collection: Collection, spec: Mapping[str, Any], out: Path, *, style: str = "label") -> dict[str, Any]:
    """Writes the part that `spec` asks for; `style`: the captions' default. Returns the manifest."""
    full = {"style": style, "answers": "letter", **spec}
    if full["answers"] not in ANSWERS:
        raise UserError(f"answers: {full['answers']!r}", hint=nearest(str(full["answers"]), ANSWERS))
    if full["style"] not in {"label", "written"}:
        raise UserError(f"style: {full['style']!r}", hint=nearest(str(full["style"]), ["label", "written"]))
    if full["style"] == "written" and not any(photo.texts for photo in collection.photos):
        raise UserError(f"source {full['source']!r} has no written texts", hint="style: label")
    available = len(collection.photos)
    if not available:
        raise UserError(f"source {full['source']!r} lists no photo in its {full['split']} part", where=str(collection.root))
    count = available if full["rows"] is None else full["rows"]
    if full["part"] == "labelled":
        count = min(count, available)
    facts = {"root": str(collection.root), "classes": list(collection.classes), "part": full["part"], "photos": available}
    return write_sharded(count, Maker(collection, full), Path(out), **facts)
