"""Source `foci`: the questions of the FOCI benchmark (Geigle, Timofte, Glavas 2024) whose images are present.

Flows in: FOCI's JSON (`{label: [{image, options, groundtruth}]}`, the right option always first) and the images' own folder.
Flows out: question rows with seeded option order. Spec: `set` (oxford_pet | food101 | flowers102 | ...), `seed`, `rows`, `question` (its
words; the paper's when left out), `lead` (a line before the options, such as FOCI's "Choices:") and, when they lie elsewhere than usual,
`file` (the JSON) and `folder` (of the images), both below the data root. Questions whose image is missing or undecodable are left out and
counted: accuracy on what is left is not comparable with the published one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from datasets_ray.errors import UserError, nearest
from datasets_ray.foci_files import FociQuestion, read_foci
from datasets_ray.images import verdict
from datasets_ray.photos import WHAT, check_spec, dataset_folder
from datasets_ray.prompts import LETTERS
from datasets_ray.rows import row
from datasets_ray.shards import Made, write_sharded

FOLDERS: dict[str, tuple[tuple[str, ...], str, str]] = {
    "oxford_pet": (("oxford_iiit_pet_sample", "oxford-iiit-pet", "oxford_pet"), "", "images"),
    "food101": (("food101_first10", "food-101", "food101"), "food-101", "images"),
    "flowers102": (("flowers102", "flowers-102"), "", "jpg"),
    "fgvc_aircraft": (("fgvc_aircraft", "fgvc-aircraft-2013b"), "", "data/images"),
    "stanford_cars": (("stanford_cars",), "", "cars_test"),
}
"""Set → (usual folders, folder inside, where in it the images lie as FOCI writes their paths)."""
FILES = ("derived_foci_runnable/{set}.json", "foci_benchmark/data/{set}-*.json", "FOCI-Benchmark/data/{set}-*.json")


class Maker:
    """Question rows of a range; picklable."""

    def __init__(self, questions: list[FociQuestion], root: Path, name: str, seed: int, words: str = WHAT, lead: str = "") -> None:
        self.questions, self.root, self.name, self.seed, self.words = questions, root, name, seed, words
        self.lead = {"lead": lead} if lead else {}

    def __call__(self, start: int, stop: int) -> Made:
        made = Made([])
        for index, question in enumerate(self.questions[start:stop], start):
            if reason := verdict({"path": question.image}, self.root):
                made.dropped.append((question.image, reason))
                continue
            order = np.random.default_rng([self.seed, index]).permutation(len(question.options))
            options = [question.options[i] for i in order]
            made.rows.append(row(
                f"foci-{self.name}-{index:06d}", images=[{"path": question.image}], question=self.words, options=options,
                answer=LETTERS[int(np.argmax(order == 0))], label=question.label, meta={"file": question.image, **self.lead},
            ))
        return made


def _file(spec: dict[str, Any], data_root: str) -> Path:
    """The question file: the spec's, or the first usual one."""
    base = Path(data_root)
    patterns = [spec["file"]] if spec.get("file") else [pattern.format(set=spec["set"]) for pattern in FILES]
    found = next((match for pattern in patterns for match in sorted(base.glob(pattern))), None)
    if found is None or not found.resolve().is_relative_to(base.resolve()):
        looked = ", ".join(patterns)
        raise UserError(f"no FOCI questions for {spec['set']!r} in {base}", why=f"looked for {looked}", hint="name it: file: PATH")
    return found


def build(spec: dict[str, Any], out: Path, inputs: Callable[[str], Path], data_root: str | None) -> dict[str, Any]:
    full = check_spec({"part": "questions", **spec}, ("questions",), ("test",), ["set", "file", "question", "lead"])
    for key in ("question", "lead"):
        if key in full and (not isinstance(full[key], str) or not full[key].strip() or "\n" in full[key]):
            raise UserError(f"{key}: {full[key]!r}", why="it is a line of text", hint=f"leave {key} out, or write {key}: WORDS")
    if full.get("set") not in FOLDERS:
        raise UserError(f"FOCI has no set {full.get('set')!r}", hint=nearest(str(full.get("set")), FOLDERS))
    usual, below, images = FOLDERS[full["set"]]
    root = dataset_folder(full, data_root, usual, [images], below=below)
    questions = read_foci(_file(full, str(data_root)))[: full["rows"]]
    classes = sorted({question.label for question in questions})
    make = Maker(questions, root, full["set"], full["seed"], full.get("question", WHAT), full.get("lead", ""))
    return write_sharded(len(questions), make, Path(out), root=str(root), classes=classes, part="questions")
