"""How a published record becomes a question, for each set that `benchmark_tables` reads: columns, file names, adapters.

In: a record of a release (a dict of its columns) and where it stands. Out: a `Question`, or a UserError where the record isn't that set's.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets_ray.errors import UserError
from datasets_ray.open_answers import MMMU, YES_NO
from datasets_ray.prompts import LETTERS
from datasets_ray.question_rows import Question

Record = Mapping[str, Any]
RELEASED = {
    "mmstar": {"val": 1500}, "scienceqa": {"train": 12726, "validation": 4241, "test": 4241}, "ai2d": {"test": 3088},
    "mathvista": {"testmini": 1000, "test": 5141}, "mmmu": {"dev": 150, "validation": 900, "test": 10500}, "pope": {"test": 9000},
}  # fmt: skip
"""Questions of each part; ScienceQA's test has 2,017 with an image, MMMU's validation 53 without options, POPE is 3 x 3,000."""


@dataclass(frozen=True)
class Set:
    """read: a record as a question. columns: what it needs. usual: the release's file names, `{split}` filled in. image: None, or the
    column that is null where a question has no image; name: what a record is called by."""

    read: Callable[[Record, str], Question]
    columns: tuple[str, ...]
    usual: tuple[str, ...]
    splits: tuple[str, ...]
    name: Callable[[Record, int], str]
    image: str | None = None


def _image(value: Any) -> list[dict[str, Any]]:
    """A Parquet image: a struct of bytes and path, or bytes; none where it is null."""
    if value is None:
        return []
    data = value.get("bytes") if isinstance(value, dict) else value
    return [{"bytes": bytes(data)}] if data is not None else [{"path": value.get("path")}]


def _letter(number: Any, options: Sequence[str], where: str) -> str:
    """The letter of an option's number, counted from zero."""
    try:
        return LETTERS[int(number)] if 0 <= int(number) < len(options) else str(number)
    except (TypeError, ValueError):
        raise UserError(f"the answer {number!r} is no number of an option", where=where) from None


def _written(text: Any) -> list[str]:
    """A list written as text: `['a', 'b']`."""
    try:
        values = ast.literal_eval(text) if isinstance(text, str) and text.startswith("[") else []
    except (ValueError, SyntaxError):
        values = []
    return [str(value) for value in values] if isinstance(values, list) else []


def split_options(text: str) -> tuple[str, list[str]]:
    """(question, options) of MMStar's `question\\nOptions: A: x, B: y, C: z`; no options where the text has no such end."""
    question, found, tail = text.rpartition("\nOptions:")
    if not found:
        return text, []
    rest, options = tail.strip().rstrip("."), []
    for letter, following in zip(LETTERS, LETTERS[1:]):
        opened = re.match(rf"{letter}:\s*", rest)
        if opened is None:
            return text, []
        rest = rest[opened.end() :]
        end = re.search(rf",\s*(?={following}:)", rest)
        options.append((rest[: end.start()] if end else rest).strip())
        if end is None:
            return question, options
        rest = rest[end.end() :]
    return text, []


def _mmstar(record: Record, where: str) -> Question:
    question, options = split_options(record["question"])
    if not options:
        raise UserError("no options in the question's text", why="MMStar's ends in `Options: A: ..., B: ...`", where=where)
    meta = {"category": record.get("category"), "l2_category": record.get("l2_category"), "index": record["index"]}
    return Question(question, str(record["answer"]).strip(), options, images=_image(record["image"]), meta=meta)


def _scienceqa(record: Record, where: str) -> Question:
    options = list(record["choices"])
    meta = {name: record.get(name) for name in ("subject", "topic", "category", "grade")}
    answer = _letter(record["answer"], options, where)
    return Question(record["question"], answer, options, record.get("hint") or "", _image(record["image"]), meta=meta)


def _ai2d(record: Record, where: str) -> Question:
    options = list(record["options"])
    return Question(record["question"], _letter(record["answer"], options, where), options, images=_image(record["image"]))


def _mathvista(record: Record, where: str) -> Question:
    told = record.get("metadata") or {}
    meta = {"category": told.get("task"), "source": told.get("source"), "answer_type": record.get("answer_type")}
    unit = f" (Unit: {record['unit']})" if record.get("unit") else ""
    options, images = list(record["choices"] or []), _image(record["decoded_image"])
    if options:
        if record["answer"] not in options:
            raise UserError(f"the answer {record['answer']!r} is none of the choices", where=where)
        return Question(record["question"] + unit, LETTERS[options.index(record["answer"])], options, images=images, meta=meta)
    rule = "number" if record.get("answer_type") in ("integer", "float") else "exact"
    return Question(record["question"] + unit, [str(record["answer"])], images=images, open=rule, meta=meta)


def _mmmu(record: Record, where: str) -> Question:
    images = [image for number in range(1, 8) for image in _image(record.get(f"image_{number}"))]
    meta = {"category": record.get("subfield"), "index": record["id"]}
    options = _written(record["options"])
    if record["question_type"] == "open":
        return Question(record["question"], _written(record["answer"]) or [str(record["answer"])], images=images, open=MMMU, meta=meta)
    if not options:
        raise UserError("a multiple-choice question without options", why=f"options: {record['options']!r}", where=where)
    return Question(record["question"], str(record["answer"]).strip(), options, images=images, meta=meta)


def _pope(record: Record, where: str) -> Question:
    """Both spellings: the authors' `text`, `label` and image names, and Hugging Face's `question`, `answer` and image bytes."""
    question, answer = record.get("text", record.get("question")), record.get("label", record.get("answer"))
    if not isinstance(question, str) or not isinstance(answer, str):
        raise UserError("not a record of POPE", why="it needs text and label, or question and answer", where=where)
    image = record.get("image")
    images = [{"path": image}] if isinstance(image, str) else _image(image)
    return Question(question, [answer], images=images, open=YES_NO, meta={"category": record.get("category")})


def _numbered(record: Record, number: int) -> str:
    return f"{number:06d}"


SETS: dict[str, Set] = {
    "mmstar": Set(
        _mmstar, ("index", "question", "image", "answer"), ("mmstar.parquet", "MMStar/mmstar.parquet", "MMStar/{split}*.parquet"), ("val",),
        lambda record, number: str(record["index"]),
    ),
    "scienceqa": Set(
        _scienceqa, ("image", "question", "choices", "answer"), ("ScienceQA/data/{split}-*.parquet", "ScienceQA/{split}-*.parquet"),
        ("test", "validation", "train"), _numbered, "image",
    ),
    "ai2d": Set(
        _ai2d, ("question", "options", "answer", "image"), ("ai2d/data/{split}-*.parquet", "ai2d/{split}-*.parquet"), ("test",), _numbered
    ),
    "mathvista": Set(
        _mathvista, ("pid", "question", "decoded_image", "choices", "answer", "answer_type"),
        ("MathVista/data/{split}-*.parquet", "MathVista/{split}-*.parquet"), ("testmini", "test"),
        lambda record, number: str(record["pid"]),
    ),
    "mmmu": Set(
        _mmmu, ("id", "question", "options", "answer", "question_type", "image_1"),
        ("MMMU/*/{split}-*.parquet", "MMMU/data/{split}-*.parquet", "MMMU/{split}-*.parquet"), ("validation", "dev", "test"),
        lambda record, number: str(record["id"]),
    ),
    "pope": Set(
        _pope, (), ("pope/output/coco/coco_pope_*.json", "POPE/output/coco/coco_pope_*.json", "POPE/data/{split}-*.parquet"), ("test",),
        _numbered,
    ),
}  # fmt: skip
