"""What every source of labelled photographs shares: from a dataset's lists to labelled, caption, quiz and instruction rows.

Flows in: a `Collection` (photos with class names, who is like whom, what is written about them), which each source reads from its
official layout, and the stage's spec. Flows out: a rows artefact whose images are paths below the dataset's folder. Spec keys:

    part     labelled      every photo with its class                               evaluation, mining
             captions      photo + text, "style": label | written (where the dataset has texts)   pretraining
             instructions  multiple choice with siblings, short answers, text only                finetuning
             quizzes       the multiple choice in words, no photo                   language models
             corpus        the texts alone, learned from end to end                 language models
    split    train | test  the dataset's own parts
    answers  letter | text: what multiple-choice answers say (letter; VLMEvalKit's rule reads both)
    rows     how many; all photos once when left out (labelled: the first rows); more than there are go round again
    seed     of order, distractors and wording
    augment  captions, instructions of training parts: instead of the path, the bytes of a square of so many pixels, cropped (side 1/2 to 1
             of the photo's short side, anywhere), flipped (half of them) and lit (factor 0.85 to 1.15) as the row's number says
    short, text_only     instructions: share of short answers (0.1) and of questions without a photo (0.2), the rest is multiple choice
    folder   the dataset's folder below the data root, when it isn't the usual name

An image that is missing, undecodable or outside the folder is left out and counted by reason. A missing folder or list is an error.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datasets_ray.errors import UserError, nearest
from datasets_ray.images import ImageError, decode, verdict
from datasets_ray.prompts import LETTERS, SUFFIX
from datasets_ray.rows import IMAGE, row
from datasets_ray.shards import SHARD, Made, write_sharded

WHAT = "What type of object is in this photo?"
SHORT = "Answer the question using a single word or phrase."
PARTS = ("labelled", "captions", "instructions", "quizzes", "corpus")
ANSWERS = ("letter", "text")
AUGMENTED = ("captions", "instructions")
KEYS = ("style", "augment", "short", "text_only")
"""What sources of photographs know beside the keys that all sources have."""
OPTIONS = 5
CROPS, LIGHTS = (0.5, 1.0), (0.85, 1.15)
QUALITY = 90
"""Of the JPEGs that augmented rows hold."""
MOST_AUGMENTED = 1 << 26
"""Raw bytes of the augmented images of one shard."""


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


def augmented(image: Image.Image, side: int, rng: np.random.Generator) -> bytes:
    """JPEG of a random square of `image`, `side` pixels wide: cropped, perhaps flipped, made darker or lighter."""
    edge = rng.uniform(*CROPS) * min(image.size)
    left, top = rng.uniform(0, image.width - edge), rng.uniform(0, image.height - edge)
    flipped, light = rng.random() < 0.5, rng.uniform(*LIGHTS)
    square = image.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, left + edge, top + edge))
    if flipped:
        square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    buffer = io.BytesIO()
    square.point([min(255, round(value * light)) for value in range(256)] * 3).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


class Maker:
    """Rows of a range of indices; picklable. Row i is a pure function of (collection, spec, i)."""

    def __init__(self, collection: Collection, spec: Mapping[str, Any]) -> None:
        self.collection, self.spec = collection, dict(spec)
        self.make: Callable[[np.random.Generator, str, Photo], dict[str, Any]] = getattr(self, f"_{spec['part']}")

    def __call__(self, start: int, stop: int) -> Made:
        made, verdicts, small = Made([]), dict[str, str](), dict[str, Image.Image]()
        for index in range(start, stop):
            photo, rng = self._photo(index), np.random.default_rng([self.spec["seed"], 0, index])
            identity = f"{self.collection.name}-{self.spec['split']}-{self.spec['part']}-{self.spec['seed']}-{index:06d}"
            built = self.make(rng, identity, photo)
            if built["images"] and photo.path not in verdicts:
                verdicts[photo.path] = self._reduce(photo, small) if self.spec.get("augment") else self._verdict(photo)
            if built["images"] and verdicts[photo.path]:
                made.dropped.append((photo.path, verdicts[photo.path]))
                continue
            if built["images"] and photo.path in small:
                varied = np.random.default_rng([self.spec["seed"], 2, index])  # its own, so that texts stay as they are without
                built["images"] = [{"bytes": augmented(small[photo.path], self.spec["augment"], varied), "path": None}]
            made.rows.append(built)
        return made

    def _reduce(self, photo: Photo, small: dict[str, Image.Image]) -> str:
        """Puts the photo at twice the side of its crops, the size at which none is enlarged, into `small`; else why it can't be used."""
        try:
            image = decode({"path": photo.path}, self.collection.root)
        except ImageError as error:
            return error.reason
        scale = 2 * self.spec["augment"] / min(image.size)
        if scale < 1:
            image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC, reducing_gap=2.0)
        small[photo.path] = image
        return ""

    def _verdict(self, photo: Photo) -> str:
        """Why the photo can't be used; empty when it can."""
        return verdict({"path": photo.path}, self.collection.root)

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
        if kind < self.spec["text_only"]:
            return self._quizzes(rng, identity, photo)
        if kind < 1 - self.spec["short"]:
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
    full = {"style": style, "answers": "letter", "augment": None, "short": 0.1, "text_only": 0.2, **spec}
    if full["answers"] not in ANSWERS:
        raise UserError(f"answers: {full['answers']!r}", hint=nearest(str(full["answers"]), ANSWERS))
    if full["style"] not in {"label", "written"}:
        raise UserError(f"style: {full['style']!r}", hint=nearest(str(full["style"]), ["label", "written"]))
    _check_variety(full)
    if full["style"] == "written" and not any(photo.texts for photo in collection.photos):
        raise UserError(f"source {full['source']!r} has no written texts", hint="style: label")
    available = len(collection.photos)
    if not available:
        raise UserError(f"source {full['source']!r} lists no photo in its {full['split']} part", where=str(collection.root))
    count = available if full["rows"] is None else full["rows"]
    if full["part"] == "labelled":
        count = min(count, available)
    facts = {"root": str(collection.root), "classes": list(collection.classes), "part": full["part"], "photos": available}
    size = max(1, min(4 * SHARD, MOST_AUGMENTED // (3 * full["augment"] ** 2))) if full["augment"] else None
    return write_sharded(count, Maker(collection, full), Path(out), size=size, **facts)


def _check_variety(spec: Mapping[str, Any]) -> None:
    """UserErrors of `augment`, `short` and `text_only`."""
    side = spec["augment"]
    if side is not None:
        if spec["part"] not in AUGMENTED:
            raise UserError(f"part {spec['part']!r} can't be augmented", hint=f"leave augment out, or part: {' | '.join(AUGMENTED)}")
        if spec["split"] == "test":
            raise UserError("photos of a test part are never augmented", hint="split: train")
        if isinstance(side, bool) or not isinstance(side, int) or not 8 <= side <= 1024:
            raise UserError(f"augment: {side!r}", why="a square's side in pixels, 8 to 1024", hint="the encoder's or a little more")
    for key in ("short", "text_only"):
        if isinstance(spec[key], bool) or not isinstance(spec[key], (int, float)) or not 0 <= spec[key] <= 1:
            raise UserError(f"{key}: {spec[key]!r}", why="a share of the rows, from 0 to 1")
    if spec["short"] + spec["text_only"] > 1:
        raise UserError(f"short {spec['short']} and text_only {spec['text_only']} exceed 1", why="multiple choice is the rest")
