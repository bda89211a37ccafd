"""Encoding: how rows become the streams that an objective asks for.

In: rows and an `Encoding` (tokenizer, template, image recipe, length, streams). Out: one sample per row, a segment in each stream,
images not yet decoded, and `Stats` of what was dropped, cut or left nothing to learn. A stream's kind says what its segments hold;
a new one (an image followed by a prompt, a caption followed by one) is an entry in `KINDS` and a name in the objective's streams.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from datasets_ray.errors import UserError, nearest
from datasets_ray.images import ImageError, ImageLayout, ImageRecipe, image_size, layout, recipe_from_json
from datasets_ray.packing import Segment
from datasets_ray.prompts import Piece, Rendered, RowError, get_template, render
from datasets_ray.rows import IMAGE
from datasets_ray.tokens import Encoded, encode_many, load_tokenizer, require

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
    return render(row, encoding.template, bos=tokenizer.bos_token or "", eos=tokenizer.eos_token or "")


def caption_of(row: Row) -> str:
    """A row's last answer, without image marks. RowError when there is none."""
    answers = [message["text"] for message in row["messages"] if message["role"] in {"assistant", "text"}]
    text = answers[-1].replace(IMAGE, "").strip() if answers else ""
    if not text:
        raise RowError("no caption")
    return text


def _caption(row: Row, encoding: Encoding, spec: StreamSpec, tokenizer: Any) -> Rendered:
    return Rendered((Piece(caption_of(row), False), Piece(tokenizer.eos_token or "", False)))


def _asked(text: str, encoding: Encoding, tokenizer: Any) -> Rendered:
    messages = [{"role": "user", "text": text}]
    return render({"messages": messages}, encoding.template, bos=tokenizer.bos_token or "", eos=tokenizer.eos_token or "")


def _image_prompt(row: Row, encoding: Encoding, spec: StreamSpec, tokenizer: Any) -> Rendered:
    return _asked("\n".join([IMAGE] * len(row["images"]) + [spec.text]), encoding, tokenizer)


def _caption_prompt(row: Row, encoding: Encoding, spec: StreamSpec, tokenizer: Any) -> Rendered:
    return _asked(f"{caption_of(row)}\n{spec.text}", encoding, tokenizer)


KINDS: dict[str, Kind] = {
    "conversation": Kind(_conversation, images=True, learns=True),
    "caption": Kind(_caption, images=False, keep_end=True, templated=False),
    "image": Kind(None, images=True, templated=False),
    # an embedding is read where the answer would begin (VladVA, E5-V)
    "image_prompt": Kind(_image_prompt, images=True),
    "caption_prompt": Kind(_caption_prompt, images=False),
}

Sample = dict[str, Segment]
"""One row: a segment in every stream. A segment's images are still the row's `{"bytes", "path"}`."""


def layouts(row: Row, root: Path | None, recipe: ImageRecipe | None) -> list[ImageLayout]:
    """The layout of each of a row's images, from their headers. Raises ImageError, RowError."""
    if row["images"] and recipe is None:
        raise RowError("images, and no image recipe")
    return [layout(*image_size(image, root), recipe) for image in row["images"]]  # type: ignore[arg-type]


def encode_rows(rows: Sequence[Row], roots: Sequence[Path | None], encoding: Encoding) -> tuple[list[Sample | None], Stats]:
    """A sample for every row (None: dropped, counted in the stats). roots: where each row's image paths start."""
    stats = Stats(rows=len(rows))
    shapes: list[list[ImageLayout] | None] = []
    needs_images = any(KINDS[spec.kind].images for spec in encoding.streams.values())
    for row, root in zip(rows, roots, strict=True):
        try:
            shapes.append(layouts(row, root, encoding.image) if needs_images else [])
        except (ImageError, RowError) as error:
            stats.drop(error.reason, row["id"])
            shapes.append(None)
    samples: list[Sample | None] = [None if shape is None else {} for shape in shapes]
    for name, spec in encoding.streams.items():
        kind = KINDS[spec.kind]
        made = _segments(rows, shapes, samples, encoding, spec, kind)
        for at, segment in made.items():
            sample = samples[at]
            assert sample is not None
            if isinstance(segment, RowError):
                stats.drop(segment.reason, rows[at]["id"])
                samples[at] = None
                continue
            sample[name], truncated = segment
            stats.truncated += truncated
            stats.unlearned += kind.learns and not sample[name].valid
    for sample in samples:
        if sample is not None:
            stats.samples += 1
            stats.tokens += sum(len(segment.ids) for segment in sample.values())
            stats.learned += sum(segment.valid for segment in sample.values())
            stats.images += sum(len(segment.images) for segment in sample.values())
    return samples, stats


def _segments(
    rows: Sequence[Row], shapes: Sequence[list[ImageLayout] | None], samples: Sequence[Sample | None],
    encoding: Encoding, spec: StreamSpec, kind: Kind,
) -> dict[int, tuple[Segment, bool] | RowError]:  # fmt: skip
    """Row number → its segment in one stream and whether it was cut, or why there is none."""
    made: dict[int, tuple[Segment, bool] | RowError] = {}
    kept = [at for at, sample in enumerate(samples) if sample is not None]
    if kind.render is None:
        for at in kept:
            shape = shapes[at] or []
            empty = np.zeros(0, dtype=np.int64)
            cost = sum(one.grid_h * one.grid_w for one in shape)
            segment = Segment(empty, empty, tuple(rows[at]["images"]), _grids(shape), cost)
            made[at] = (segment, False) if shape else RowError("no image")
        return made
    tokenizer = load_tokenizer(encoding.tokenizer or "", encoding.revision)
    rendered: dict[int, Rendered] = {}
    for at in kept:
        try:
            rendered[at] = kind.render(rows[at], encoding, spec, tokenizer)
        except RowError as error:
            made[at] = error
    counts = [[one.tokens for one in shapes[at] or []] if kind.images else [] for at in rendered]
    results = encode_many(list(rendered.values()), tokenizer, counts, encoding.max_tokens, keep_end=kind.keep_end)
    for at, result in zip(rendered, results, strict=True):
        if isinstance(result, Encoded):
            made[at] = segment_of(result, rows[at] if kind.images else None, shapes[at]), result.truncated
        else:
            made[at] = result
    return dict(sorted(made.items()))


def segment_of(encoded: Encoded, row: Row | None, shape: Sequence[ImageLayout] | None) -> Segment:
    """An encoded prompt with the images of its row (None: the stream has no images)."""
    images, grids = (tuple(row["images"]), _grids(shape or [])) if row is not None else ((), _grids([]))
    return Segment(encoded.ids, encoded.labels, images, grids, len(encoded.ids))


def _grids(shape: Sequence[ImageLayout]) -> np.ndarray:
    return np.array([(1, one.grid_h, one.grid_w) for one in shape], dtype=np.int64).reshape(-1, 3)
