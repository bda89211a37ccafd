"""Parts of the miniature world as rows artefacts. `build(spec, out, inputs, data_root)` is the source named `specimens`.

Every row is a pure function of (part, set, style, split, seed, index): asking for more rows never changes the first ones, train and
test never share a scene. A spec says

    {"source": "specimens", "part": P, "rows": n, "seed": 0, "split": "train"|"test", "set": one set | list of sets, "size": 32, ...}

with `seed` 0, `split` train, `set` all four and `size` 32 pixels when left out (`size` only where there are images). Parts:

    labelled      image + label                                          what mining, embedding and zero-shot read
    captions      image + caption, "style": short | web | long           pretraining; encoders learn from `web`
    corpus        documents about the species, no image                  language models (role `text`: learned from end to end)
    quizzes       text-only multiple choice, "specific": share of species questions (0.7), "turns": questions per row (1)
    chat_text     text-only conversations: quizzes, facts                instruct models
    instructions  image conversations, "text_only": share without image (0.2)    finetuning
                  these three take "answers": letter | text, what multiple-choice answers say
    questions     image + question + options + answer; "set": count | colour | position, or the name of one of the four sets
                  (distractors are then siblings drawn by likeness, not mined)   evaluation
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from datasets_ray.errors import UserError, nearest
from datasets_ray.rows import IMAGE, row
from datasets_ray.shards import Made, write_sharded
from datasets_ray.specimens import talk
from datasets_ray.specimens.draw import CORNERS, draw, png, sample_scene
from datasets_ray.specimens.species import FAMILIES, SETS, Species
from datasets_ray.specimens.text import STYLES, caption, document, pick

Row = dict[str, Any]
COMMON: dict[str, Any] = {"seed": 0, "split": "train", "set": None}


def _image(rng: np.random.Generator, spec: dict[str, Any], species: Species, count: int = 1, corner: str | None = None) -> dict[str, Any]:
    return {"bytes": png(draw(sample_scene(rng, species, count, corner), spec["size"]))}


def _meta(species: Species, **more: Any) -> dict[str, Any]:
    family = FAMILIES[species.set]
    return {"set": species.set, "category": family.noun, "attributes": dict(zip(family.slots, species.values)), **more}


def _turns(turns: tuple[tuple[str, str], ...]) -> list[dict[str, str]]:
    return [{"role": role, "text": text} for turn in turns for role, text in zip(("user", "assistant"), turn)]


def _labelled(rng: np.random.Generator, spec: dict[str, Any], id: str, species: Species) -> Row:
    return row(id, images=[_image(rng, spec, species)], label=species.name, meta=_meta(species))


def _captions(rng: np.random.Generator, spec: dict[str, Any], id: str, species: Species) -> Row:
    """Three in four photos show one specimen large; the others several, or one in a corner."""
    count, corner = 1, None
    if rng.random() < 0.25:
        count = int(rng.integers(1, 5))
        corner = pick(rng, list(CORNERS)) if count == 1 else None
    told = caption(rng, spec["style"], species, count, corner)
    messages = [{"role": "user", "text": IMAGE}, {"role": "assistant", "text": told}]
    return row(id, images=[_image(rng, spec, species, count, corner)], messages=messages, label=species.name, meta=_meta(species))


def _corpus(rng: np.random.Generator, spec: dict[str, Any], id: str, species: Species) -> Row:
    return row(id, messages=[{"role": "text", "text": document(rng, species)}], label=species.name)


def _quizzes(rng: np.random.Generator, spec: dict[str, Any], id: str, species: Species) -> Row:
    turns = tuple(talk.quiz_turn(rng, species, spec["specific"], spec["answers"]) for _ in range(spec["turns"]))
    return row(id, messages=_turns(turns), label=species.name)


def _chat_text(rng: np.random.Generator, spec: dict[str, Any], id: str, species: Species) -> Row:
    return row(id, messages=_turns(talk.text_turns(rng, species, spec["answers"])), label=species.name)


def _instructions(rng: np.random.Generator, spec: dict[str, Any], id: str, species: Species) -> Row:
    if rng.random() < spec["text_only"]:
        return row(id, messages=_turns(talk.text_turns(rng, species, spec["answers"])), label=species.name, meta={"kind": "text_only"})
    said = talk.image_turns(rng, species, spec["answers"])
    shown = said.species or species
    image = _image(rng, spec, shown, said.count, said.corner)
    return row(id, images=[image], messages=_turns(said.turns), label=shown.name, meta=_meta(shown, **said.meta))


def _questions(rng: np.random.Generator, spec: dict[str, Any], id: str, species: Species, right: str | None = None) -> Row:
    asked = talk.species_question(rng, species) if right is None else talk.general_question(rng, spec["set"], species, right)
    image = _image(rng, spec, asked.species, asked.count, asked.corner)
    return row(
        id, images=[image], question=asked.text, options=list(asked.options), answer=asked.letter, label=asked.answer,
        meta=_meta(asked.species, shown=asked.species.name),
    )


PARTS: dict[str, tuple[Callable[..., Row], dict[str, Any]]] = {
    "labelled": (_labelled, {"size": 32}),
    "captions": (_captions, {"size": 32, "style": "short"}),
    "corpus": (_corpus, {}),
    "quizzes": (_quizzes, {"specific": 0.7, "turns": 1, "answers": "letter"}),
    "chat_text": (_chat_text, {"answers": "letter"}),
    "instructions": (_instructions, {"size": 32, "text_only": 0.2, "answers": "letter"}),
    "questions": (_questions, {"size": 32}),
}
"""Part → (row maker, its own keys with defaults)."""


def complete(spec: dict[str, Any]) -> dict[str, Any]:
    """The spec with defaults filled in; UserError for an unknown part, key, set, style or split."""
    part = spec.get("part", "")
    if part not in PARTS:
        raise UserError(f"specimens have no part {part!r}", hint=nearest(part, PARTS))
    known = {**COMMON, **PARTS[part][1]}
    for key in spec:
        if key not in known and key not in {"source", "part", "rows"}:
            raise UserError(f"part {part!r} of specimens has no key {key!r}", hint=nearest(key, [*known, "rows"]))
    full = {**known, **spec}
    if not isinstance(full.get("rows"), int) or full["rows"] < 1:
        raise UserError(f"rows: {full.get('rows')!r} of part {part!r}", why="a positive whole number is needed", hint="rows: 400")
    if full["split"] not in {"train", "test"}:
        raise UserError(f"split: {full['split']!r}", hint=nearest(full["split"], ["train", "test"]))
    if full.get("answers", "letter") not in talk.ANSWERS:
        raise UserError(f"answers: {full['answers']!r}", hint=nearest(full["answers"], talk.ANSWERS))
    if "style" in full and full["style"] not in STYLES:
        raise UserError(f"style: {full['style']!r}", hint=nearest(full["style"], STYLES))
    allowed = (*talk.GENERAL, *SETS) if part == "questions" else SETS
    for name in _sets(full["set"]):
        if name not in allowed:
            raise UserError(f"set: {name!r}", hint=nearest(name, allowed))
    if part == "questions" and not isinstance(full["set"], str):
        raise UserError("questions need one set", hint=f"set: one of {', '.join(allowed)}")
    return full


def _sets(value: str | list[str] | None) -> list[str]:
    return list(SETS) if value is None else [value] if isinstance(value, str) else list(value)


def species_of(spec: dict[str, Any]) -> list[Species]:
    """The species a part draws from: those of its sets; all of them for general questions."""
    sets = [s for s in _sets(spec["set"]) if s in FAMILIES] or list(SETS)
    return [s for name in sets for s in FAMILIES[name].species]


def row_at(spec: dict[str, Any], index: int) -> Row:
    """Row `index` of a complete spec. Labels are balanced: every block of as many rows as species holds each species once; so are the
    right answers of general questions."""
    name = "-".join([spec["part"], *([spec["style"]] if "style" in spec else []), "+".join(_sets(spec["set"])), spec["split"]])
    key = [zlib.crc32(name.encode()), spec["seed"]]

    def dealt(items: Sequence[Any], stream: int) -> Any:
        block, place = divmod(index, len(items))
        return items[int(np.random.default_rng([*key, stream, block]).permutation(len(items))[place])]

    given = [dealt(species_of(spec), 1)]
    if spec["part"] == "questions" and spec["set"] in talk.GENERAL:
        given.append(dealt(talk.GENERAL[spec["set"]], 2))
    return PARTS[spec["part"]][0](np.random.default_rng([*key, 0, index]), spec, f"{name}-{spec['seed']}-{index:06d}", *given)


class Maker:
    """Draws the rows of a range; picklable, so that Ray Data's tasks can."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec

    def __call__(self, start: int, stop: int) -> Made:
        return Made([row_at(self.spec, i) for i in range(start, stop)])


def build(spec: dict[str, Any], out: Path, inputs: Callable[[str], Path], data_root: str | None) -> dict[str, Any]:
    """Writes the part's rows to `out`; returns the manifest."""
    full = complete(spec)
    classes = [s.name for s in species_of(full)] if full["part"] in {"labelled", "captions", "instructions"} else []
    facts = {"classes": classes, "part": full["part"], "spec": full}
    return write_sharded(full["rows"], Maker(full), Path(out), **facts)
