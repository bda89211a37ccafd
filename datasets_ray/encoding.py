"""Encoding: how rows become the streams that an objective asks for.

In: rows and an `Encoding` (tokenizer, template, image recipe, length, streams). Out: a `Record` per row with a segment in each stream,
images not yet decoded, and `Stats` of what was dropped, cut or left nothing to learn. A stream's kind says what its segments hold;
a new one (an image followed by a prompt, a caption followed by one) is an entry in `KINDS` and a name in the objective's streams.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from datasets_ray.errors import UserError, nearest
from datasets_ray.images import ImageError, ImageLayout, ImageRecipe, image_size, layout, recipe_from_json
from datasets_ray.packing import Segment
from datasets_ray.prompts import Piece, Rendered, RowError, get_template, render
from datasets_ray.rows import IMAGE, open_rows
from datasets_ray.tokens import encode_many, load_tokenizer, require

Row = Mapping[str, Any]


@dataclass(frozen=True)
class StreamSpec:
    """kind: an entry of `KINDS`. text: what the kind appends (the prompt of `image_prompt` and `caption_prompt`)."""

    kind: str
    text: str = ""


@dataclass(frozen=True)
class Encoding:
    """Everything besides the rows that decides a stage's tokens and pixels; picklable, sent to the data workers as it is."""

    tokenizer: str | None
    template: str
    image: ImageRecipe | None
    max_tokens: int
    streams: dict[str, StreamSpec]
    revision: str | None = None

    @classmethod
    def of(
        cls,
        *,
        tokenizer: str | None,
        template: str,
        image: Mapping[str, Any] | None,
        max_tokens: int,
        streams: Mapping[str, str | Mapping[str, str]],
        revision: str | None = None,
    ) -> Encoding:
        """From a stage's JSON; streams: name → kind, or name → {"kind", "text"}. UserError where the parts don't fit together."""
        named = {name: StreamSpec(spec) if isinstance(spec, str) else StreamSpec(**spec) for name, spec in streams.items()}
        for spec in named.values():
            if spec.kind not in KINDS:
                raise UserError(f"unknown stream kind {spec.kind!r}", hint=nearest(spec.kind, KINDS))
        recipe = None if image is None else recipe_from_json(image)
        made = cls(tokenizer, template, recipe, max_tokens, named, revision)
        get_template(template)
        if tokenizer is not None and any(KINDS[s.kind].templated for s in named.values()):
            require(template, load_tokenizer(tokenizer, revision))
        return made


@dataclass
class Stats:
    """What happened to the rows of a stage; kept per step and summed by the stream."""

    rows: int = 0
    samples: int = 0
    tokens: int = 0
    learned: int = 0
    images: int = 0
    truncated: int = 0
    """Segments cut at max_tokens."""
    unlearned: int = 0
    """Conversation segments without a single learned position; they stay in their step."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Reason → rows that are missing from their step."""
    examples: dict[str, str] = field(default_factory=dict)
    """Reason → the id of the first such row."""
    micro_batches: int = 0
    empty: int = 0
    """Micro-batches without a sample, there so that all ranks take part equally often."""

    def add(self, other: Stats) -> None:
        for name in ("rows", "samples", "tokens", "learned", "images", "truncated", "unlearned", "micro_batches", "empty"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.dropped.update(other.dropped)
        for reason, id in other.examples.items():
            self.examples.setdefault(reason, id)

    def drop(self, reason: str, id: str) -> None:
        self.dropped[reason] += 1
        self.examples.setdefault(reason, id)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "dropped": dict(self.dropped), "examples": dict(self.examples)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Stats:
        return cls(**{**data, "dropped": Counter(data["dropped"]), "examples": dict(data["examples"])})

    def check(self, share: float) -> None:
        """UserError when more than this share of the rows was dropped."""
        lost = sum(self.dropped.values())
        if lost > share * max(self.rows, 1):
            why = ", ".join(f"{reason}: {count} (first: {self.examples.get(reason)})" for reason, count in self.dropped.most_common())
            hint = "mend the data, or raise the share of rows that may be dropped"
            raise UserError(f"{lost} of {self.rows} rows were dropped, more than {share:.1%}", why=why, hint=hint)


@dataclass(frozen=True)
class Kind:
    """How a stream's segments are made from a row. render: the prompt, None for no text; images: the row's images belong to it."""

    render: Callable[[Row, Encoding, StreamSpec, Any], Rendered] | None
    images: bool
    keep_end: bool = False
    """Truncation keeps the last token (CLIP's text tower reads its end token)."""
    learns: bool = False
    templated: bool = True
    """It is written in the conversation template."""


def _conversation(row: Row, encoding: Encoding, spec: StreamSpec, tokenizer: Any) -> Rendered:
    return render(row, encoding.template, bos=tokenizer.bos_token or "", eos=tokenizer.eos_token or "", images=len(row["images"]))


def caption_of(row: Row) -> str:
    """A row's last answer, without image marks. RowError when there is none."""
    answers = [message["text"] for message in row["messages"] if message["role"] in {"assistant", "text"}]
    text = answers[-1].replace(IMAGE, "").strip() if answers else ""
    if not text:
        raise RowError("no caption")
    return text


def _caption(row: Row, encoding: Encoding, spec: StreamSpec, tokenizer: Any) -> Rendered:
    return Rendered((Piece(caption_of(row), False, literal=True), Piece(tokenizer.eos_token or "", False)))


def _asked(text: str, images: int, encoding: Encoding, tokenizer: Any) -> Rendered:
    messages = [{"role": "user", "text": text}]
    return render({"messages": messages}, encoding.template, bos=tokenizer.bos_token or "", eos=tokenizer.eos_token or "", images=images)


def _image_prompt(row: Row, encoding: Encoding, spec: StreamSpec, tokenizer: Any) -> Rendered:
    return _asked("\n".join([IMAGE] * len(row["images"]) + [spec.text]), len(row["images"]), encoding, tokenizer)


def _caption_prompt(row: Row, encoding: Encoding, spec: StreamSpec, tokenizer: Any) -> Rendered:
    return _asked(f"{caption_of(row)}\n{spec.text}", 0, encoding, tokenizer)


KINDS: dict[str, Kind] = {
    "conversation": Kind(_conversation, images=True, learns=True),
    "caption": Kind(_caption, images=False, keep_end=True, templated=False),
    "image": Kind(None, images=True, templated=False),
    # an embedding is read where the answer would begin (VladVA, E5-V)
    "image_prompt": Kind(_image_prompt, images=True),
    "caption_prompt": Kind(_caption_prompt, images=False),
}

Sample = dict[str, Segment]
"""One row: a segment in every stream. A segment's images are places (`Place`) still, not pixels."""


class Place(NamedTuple):
    """A row of a finished rows artefact, or one of its images."""

    directory: str
    row: int
    image: int = 0


@dataclass(frozen=True)
class Record:
    """What became of one row under an encoding. reason: why there is no sample."""

    id: str
    sample: Sample | None
    reason: str = ""
    truncated: int = 0
    unlearned: int = 0

    @property
    def nbytes(self) -> int:
        return 200 + sum(300 + s.ids.nbytes + s.labels.nbytes + s.grids.nbytes for s in (self.sample or {}).values())


def tally(records: Sequence[Record]) -> Stats:
    """The records of a step, counted."""
    stats = Stats(rows=len(records))
    for record in records:
        if record.sample is None:
            stats.drop(record.reason, record.id)
            continue
        stats.samples += 1
        stats.truncated += record.truncated
        stats.unlearned += record.unlearned
        for segment in record.sample.values():
            stats.tokens += len(segment.ids)
            stats.learned += segment.valid
            stats.images += len(segment.images)
    return stats


Size = tuple[int, int]
"""(width, height)"""


def layouts(row: Row, root: Path | None, recipe: ImageRecipe | None, known: Sequence[Size | None] = ()) -> list[ImageLayout]:
    """The layout of each of a row's images, from their headers where a size isn't known. Raises ImageError, RowError."""
    if row["images"] and recipe is None:
        raise RowError("images, and no image recipe")
    sizes = [size or image_size(image, root) for image, size in zip_longest(row["images"], known)]
    return [layout(width, height, recipe) for width, height in sizes]  # type: ignore[arg-type]


def encode_rows(
    rows: Sequence[Row], places: Sequence[Place], encoding: Encoding,
    known: Callable[[Place, Mapping[str, Any]], Size | None] = lambda place, image: None,
) -> list[Record]:  # fmt: skip
    """A record for every row, tokenised in one batch per stream.

    places: where the rows lie. known: an image's size from elsewhere than its header read here; it may raise ImageError as well.
    """
    shapes: list[list[ImageLayout]] = []
    reasons: dict[int, str] = {}
    needs_images = any(KINDS[spec.kind].images for spec in encoding.streams.values())
    for at, (row, place) in enumerate(zip(rows, places, strict=True)):
        shape: list[ImageLayout] = []
        try:
            if needs_images:
                sizes = [known(place._replace(image=at), image) for at, image in enumerate(row["images"])] if encoding.image else []
                shape = layouts(row, open_rows(place.directory).root, encoding.image, sizes)
        except (ImageError, RowError) as error:
            reasons[at] = error.reason
        shapes.append(shape)
    samples: list[Sample] = [{} for _ in rows]
    truncated, unlearned = np.zeros(len(rows), dtype=int), np.zeros(len(rows), dtype=int)
    for name, spec in encoding.streams.items():
        kind = KINDS[spec.kind]
        for at, made in _encoded(rows, [at for at in range(len(rows)) if at not in reasons], shapes, encoding, spec).items():
            if isinstance(made, RowError):
                reasons[at] = made.reason
                continue
            ids, labels, cut = made
            shape = shapes[at] if kind.images else []
            images = tuple(places[at]._replace(image=number) for number in range(len(shape)))
            cost = len(ids) or sum(one.grid_h * one.grid_w for one in shape)
            samples[at][name] = Segment(ids, labels, images, _grids(shape), cost)
            truncated[at] += cut
            unlearned[at] += kind.learns and not samples[at][name].valid
    return [
        Record(row["id"], None, reasons[at])
        if at in reasons
        else Record(row["id"], samples[at], truncated=int(truncated[at]), unlearned=int(unlearned[at]))
        for at, row in enumerate(rows)
    ]


Cut = tuple[np.ndarray, np.ndarray, bool]
"""ids, labels int64[T], and whether they were cut at max_tokens."""


def _encoded(
    rows: Sequence[Row], kept: Sequence[int], shapes: Sequence[list[ImageLayout]], encoding: Encoding, spec: StreamSpec
) -> dict[int, Cut | RowError]:
    """Row number → its text in one stream, or why there is none."""
    kind = KINDS[spec.kind]
    made: dict[int, Cut | RowError] = {}
    if kind.render is None:
        nothing = np.zeros(0, dtype=np.int64)
        return {at: (nothing, nothing, False) if shapes[at] else RowError("no image") for at in kept}
    tokenizer = load_tokenizer(encoding.tokenizer or "", encoding.revision)
    rendered: dict[int, Rendered] = {}
    for at in kept:
        try:
            rendered[at] = kind.render(rows[at], encoding, spec, tokenizer)
        except RowError as error:
            made[at] = error
    counts = [[one.tokens for one in shapes[at]] if kind.images else [] for at in rendered]
    results = encode_many(list(rendered.values()), tokenizer, counts, encoding.max_tokens, keep_end=kind.keep_end)
    for at, result in zip(rendered, results, strict=True):
        made[at] = result if isinstance(result, RowError) else (result.ids, result.labels, result.truncated)
    return made


def _grids(shape: Sequence[ImageLayout]) -> np.ndarray:
    return np.array([(1, one.grid_h, one.grid_w) for one in shape], dtype=np.int64).reshape(-1, 3)
