"""Prompt families: how released vision-language models of one family are asked, as data: `NAME.json` here is a family.

    asked("llava-1.5")                ──► what a ModelSpec holds of it: all that changes a prompt, nothing that only tells about it
    words(rule, row)                  ──► the user's words, `<image>` where an image goes inside them
    content(rule, text, images)       ──► those words and the images in order: [None, "Question: ..."], None being an image

A family says where its wording comes from (`source`) and where asking here differs from there (`differs`). Keys that change a prompt:

    images      front: before the words, mentions inside them become `<image 1>` ...; placed: where the words mention them; only_first
    square      pad: an image becomes a square in the processor's mean colour first
    images_kwargs   settings of the image processor
    hint, option, choices, unlisted, yes_no, open    wordings; `unlisted` is a question without options in a set of choices (MMMU)
    pairs, figures    yes/no questions of MME and of HallusionBench, where they are worded unlike POPE's; else as `yes_no`
    read, graded, solved    OCRBench, MM-Vet and MathVista's questions without options, where unlike VQA sets; else as `open`
    chat, image     the whole conversation with {images} and {words}; null: the processor's own chat template
    begin       kind of question → what the answer is made to begin with
    batch       most questions at a time; null: as many as the run says
    loads       transformers' auto class: image_text_to_text or causal_lm

`remote_code`: the family's checkpoints bring their own code, which runs only where a profile says so. `unsupported`: why it can't be asked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from datasets_ray.answers import LETTERS
from datasets_ray.errors import UserError, nearest
from datasets_ray.open_answers import CONTAINS, FORMULA, JUDGED, MMMU, YES_NO

HERE = Path(__file__).parent
TELLS = ("about", "source", "differs", "model_types", "remote_code", "unsupported")
"""Keys that tell about a family; all others are what its models are asked with."""
LIKE = {"pairs": "yes_no", "figures": "yes_no", "read": "open", "graded": "open", "solved": "open"}
"""Kinds of questions that a family need not word, and the kind whose wording they get then."""
SOLVED = ("number", "exact")
"""The rules that read MathVista's answers."""
Rule = dict[str, Any]


def names() -> list[str]:
    return sorted(path.stem for path in HERE.glob("*.json"))


@lru_cache(maxsize=64)
def family(name: str) -> Rule:
    """The whole file. Raises UserError for an unknown name."""
    if name not in names():
        raise UserError(f"no prompt family {name!r}", hint=nearest(name, names()))
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


def asked(name: str) -> Rule:
    """What asking a model of this family depends on, with its name."""
    return {"name": name, **{key: value for key, value in family(name).items() if key not in TELLS}}


def of_model(model_type: str) -> str | None:
    """The family of a checkpoint whose config.json names this architecture, if there is one."""
    return next((name for name in names() if model_type in family(name)["model_types"]), None)


def refusal(name: str, remote_code: bool) -> tuple[str, str] | None:
    """(why, way out) where a family can't be asked; None where it can."""
    found = family(name)
    if found["unsupported"]:
        others = [other for other in names() if not family(other)["unsupported"]]
        return found["unsupported"], f"families that can be asked: {', '.join(others)}"
    if found["remote_code"] and not remote_code:
        return "its checkpoints run code of their own", "read that code, pin its `revision`, then say `remote_code: true`"
    return None


def kind_of(row: Mapping[str, Any]) -> str:
    """choices, unlisted (MMMU's open questions), yes_no, open or a kind of `LIKE`: which wording a question gets."""
    if row["options"]:
        return "choices"
    meta = json.loads(row["meta"] or "{}")
    if meta.get("open") == YES_NO:
        return "pairs" if "pair" in meta else "figures" if "set_id" in meta else "yes_no"
    kinds = {MMMU: "unlisted", CONTAINS: "read", FORMULA: "read", JUDGED: "graded", **dict.fromkeys(SOLVED, "solved")}
    return kinds.get(meta.get("open"), "open")


def words(rule: Rule, row: Mapping[str, Any]) -> str:
    """The user's words about a question row, as the family puts them."""
    kind = kind_of(row)
    wording = rule[kind] if kind in rule else rule[LIKE[kind]]
    instruction = wording.rpartition("{question}")[2]
    if instruction.strip() and "{" not in instruction and row["question"].rstrip().endswith(instruction.strip()):
        wording = wording.removesuffix(instruction)  # the question brings it itself
    options = [fill(rule["option"], letter=letter, text=text) for letter, text in zip(LETTERS, row["options"])]
    hint = fill(rule["hint"], hint=row["hint"]) if row["hint"] else ""
    return fill(wording, hint=hint, question=row["question"], options="\n".join(options))


def fill(wording: str, **values: str) -> str:
    """`{name}`s replaced once; what a value says in braces stays as it is."""
    return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), wording)


def content(rule: Rule, text: str, images: int) -> list[str | None]:
    """The user's turn in order, None for an image. images: how many the row has; those that no mention places come first."""
    from datasets_ray.rows import IMAGE  # here, since a plan reads families and needs no Arrow

    pieces = text.split(IMAGE) if images else [text]
    pieces = [*pieces[:images], IMAGE.join(pieces[images:])] if len(pieces) > images + 1 else pieces
    mentions = len(pieces) - 1
    front: list[str | None] = [None] * (images - mentions)
    if rule["images"] == "placed":
        inside = [part for piece in pieces[1:] for part in (None, piece)]
        return [*front, *(part for part in (pieces[0], *inside) if part != "")]
    said = "".join([pieces[0], *(f"<image {images - mentions + n}>{piece}" for n, piece in enumerate(pieces[1:], 1))])
    shown = min(images, 1) if rule["images"] == "only_first" else images
    return [*([None] * shown), said]
