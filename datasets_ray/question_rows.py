"""A published question to a row: its parts in, a checked row out, with its images where its text mentions them.

Shared by the readers of VLMEvalKit's TSV and of Parquet and JSON benchmarks. A question that can't be one (a single option, an answer that
no option has) is an error with its place in the file: such a file isn't the benchmark. An image that can't be used is counted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets_ray.errors import UserError, nearest
from datasets_ray.images import verdict
from datasets_ray.open_answers import JUDGED, MMMU, RULES, YES_NO
from datasets_ray.prompts import LETTERS
from datasets_ray.rows import IMAGE, row

_MENTION = re.compile(r"<image (\d+)>")


@dataclass(frozen=True)
class Question:
    """answer: the right option's letter; without options the right answers (any of them). open: rule that reads an answer without options.

    images: `{"bytes"}` or `{"path"}` each, numbered from one as `<image 1>` in the texts mentions them.
    """

    question: str
    answer: str | Sequence[str]
    options: Sequence[str] = ()
    hint: str = ""
    images: Sequence[Mapping[str, Any]] = ()
    open: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Placed:
    """texts: with `<image>` where an image goes. order: the images as they are shown, counted from zero. cut: how many are left out."""

    texts: list[str]
    order: list[int]
    cut: int


def place_images(texts: Sequence[str], count: int, most: int | None = None) -> Placed:
    """Puts each of `count` images where the texts mention it first; one that nothing mentions goes in front.

    most: only the images numbered up to this are shown. A mention of an image that isn't shown, or that is shown already, stays as it is
    written (VLMEvalKit's `split_MMMU` shows an image again wherever it is mentioned, and leaves out what nothing mentions).
    """
    shown = count if most is None else min(count, most)
    mentioned: list[int] = []

    def put(found: re.Match[str]) -> str:
        number = int(found[1]) - 1
        if not 0 <= number < shown or number in mentioned:
            return found[0]
        mentioned.append(number)
        return IMAGE

    placed = [_MENTION.sub(put, text) for text in texts]
    return Placed(placed, [n for n in range(shown) if n not in mentioned] + mentioned, count - shown)


def open_rule(answers: Sequence[str], given: str | None) -> str:
    """The rule for an answer without options: as given, else yes or no by itself, else MMMU's."""
    if given is not None:
        return given
    return YES_NO if answers and all(answer.strip().lower() in ("yes", "no") for answer in answers) else MMMU


def check_open(spec: Mapping[str, Any]) -> str | None:
    """The spec's `open`, a rule of `open_answers`; UserError for an unknown one."""
    given = spec.get("open")
    if given is not None and given not in (*RULES, JUDGED):
        raise UserError(f"open: {given!r} is no rule for answers without options", hint=nearest(str(given), [*RULES, JUDGED]))
    return given


def check_most(spec: Mapping[str, Any]) -> int | None:
    most = spec.get("most_images")
    if most is not None and (not isinstance(most, int) or isinstance(most, bool) or most < 1):
        raise UserError(f"most_images: {most!r}", why="a positive whole number, or leave it out for all")
    return most


def check_question(asked: Question, where: str) -> None:
    """UserError when this isn't a question with one right answer."""
    options, answer = asked.options, asked.answer
    if not asked.question.strip():
        raise UserError("a question without text", where=where)
    if not answer or (not isinstance(answer, str) and not all(one.strip() for one in answer)):
        hint = "a test part hides its answers: name a part that has them"
        raise UserError("a question without an answer", why="nothing could be scored", hint=hint, where=where)
    if len(options) == 1:
        raise UserError("a question with one option", why="there is nothing to choose", where=where)
    if len(options) > len(LETTERS):
        raise UserError(f"a question with {len(options)} options", why=f"there are {len(LETTERS)} letters", where=where)
    if any(not option.strip() for option in options):
        raise UserError(f"option {LETTERS[[not o.strip() for o in options].index(True)]} is empty", where=where)
    if options and answer not in list(LETTERS[: len(options)]):
        raise UserError(f"the answer {answer!r} is none of the letters A to {LETTERS[len(options) - 1]}", where=where)


def question_row(
    id: str, asked: Question, *, root: Path | None = None, most: int | None = None, verify: str = "decode"
) -> tuple[dict[str, Any] | None, str]:
    """(row, "") or (None, why an image can't be used). What the row leaves out is in its meta: `images_cut`."""
    placed = place_images([asked.hint, asked.question, *asked.options], len(asked.images), most)
    images = [asked.images[n] for n in placed.order]
    reason = next((why for image in images if (why := verdict(image, root, verify))), "")
    if reason:
        return None, reason
    hint, question, *options = placed.texts
    meta = {key: value for key, value in asked.meta.items() if value not in ("", None)}
    if placed.cut:
        meta["images_cut"] = placed.cut
    answer = asked.answer if isinstance(asked.answer, str) else asked.answer[0]
    if not options:
        meta["open"] = asked.open
        if not isinstance(asked.answer, str) and len(asked.answer) > 1:
            meta["answers"] = list(asked.answer)
    return row(id, images=images, question=question, hint=hint, options=options, answer=answer, meta=meta), ""
