"""FOCI's question files: JSON in, questions out, and back without a difference.

The format (gregor-ge/FOCI-Benchmark, `data/*.json`): `{label: [{"image": path, "options": [right, ..., hardest], "groundtruth": label}]}`,
right option first, negatives in ascending similarity. They must be shuffled before anyone is asked; `datasets_ray.choices` does that.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from datasets_ray.errors import UserError


@dataclass(frozen=True)
class FociQuestion:
    """image: path as the file has it. options: right one first, negatives in ascending similarity."""

    image: str
    options: tuple[str, ...]

    @property
    def label(self) -> str:
        return self.options[0]


def read_foci(path: str | Path) -> list[FociQuestion]:
    """All questions in the file's order. UserError names the label and position of a question that isn't FOCI's shape."""
    file = Path(path)
    try:
        data = json.loads(file.read_text())
    except OSError as error:
        raise UserError(f"can't read {file}", why=str(error.strerror or error)) from None
    except ValueError as error:
        raise UserError(f"{file} is not JSON", why=str(error)) from None
    if not isinstance(data, dict):
        raise UserError(f"{file} is not a FOCI file", why="the outermost value is an object: label -> list of questions")
    questions = []
    for label, entries in data.items():
        for index, entry in enumerate(entries if isinstance(entries, list) else [entries]):
            where = f"{file}: {label!r} [{index}]"
            if not isinstance(entry, dict) or not {"image", "options", "groundtruth"} <= set(entry):
                raise UserError("not a FOCI question", why="it needs image, options and groundtruth", where=where)
            options = entry["options"]
            if entry["groundtruth"] != label or not options or options[0] != label:
                raise UserError("the right option isn't first", why="FOCI's groundtruth is the key and the first option", where=where)
            if len(set(options)) != len(options):
                raise UserError(f"an option occurs twice in {options}", where=where)
            questions.append(FociQuestion(entry["image"], tuple(options)))
    return questions


def foci_json(questions: Iterable[FociQuestion]) -> dict[str, list[dict[str, object]]]:
    """FOCI's object: labels in order of first appearance, a label's questions in order."""
    data: dict[str, list[dict[str, object]]] = {}
    for question in questions:
        entry: dict[str, object] = {"image": question.image, "options": list(question.options), "groundtruth": question.label}
        data.setdefault(question.label, []).append(entry)
    return data


def write_foci(questions: Iterable[FociQuestion], path: str | Path) -> None:
    """Writes the file as FOCI does (`json.dump` with its defaults)."""
    Path(path).write_text(json.dumps(foci_json(questions)))
