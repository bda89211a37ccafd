"""Pipelines: rows in, micro-batches out, made ahead of their use.

In: rows artefacts, an `Encoding`, and which rows make up which step. Out: a `Stream` that yields in order: lists of `Batch` (training),
`QuestionBatch` (predicting) or `ImageBatch` (embedding). Where Ray runs, the work is a Ray Data pipeline (a task per few steps on a
quarter of a core, order preserved); elsewhere the same functions run in a loop, with the same results. A stream starts working when
it is made, so make it before you build the model. Every step is a pure function of its row numbers, so a stream starts at any step.

    with train_batches(dirs, encoding, index, start_step, rank, world, micro_tokens) as stream:
        for micro_batches in stream: ...
    stream.stats, stream.waited
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from datasets_ray.encoding import Encoding, Row, Sample, Stats, encode_rows, layouts, segment_of
from datasets_ray.errors import UserError
from datasets_ray.images import ImageError, ImageRecipe, pixels
from datasets_ray.order import StepIndex, modality_lengths, steps_of
from datasets_ray.packing import Batch, Pack, Segment, assign, pack
from datasets_ray.prompts import Rendered, RowError, generation_prompt
from datasets_ray.rows import RowTable, open_rows
from datasets_ray.streaming import Stream
from datasets_ray.tokens import encode, load_tokenizer


class Tables:
    """Several rows artefacts end to end, read by global row number."""

    def __init__(self, directories: Sequence[str]) -> None:
        self.tables = [open_rows(str(directory)) for directory in directories]
        self.ends = np.cumsum([len(table) for table in self.tables])

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def take(self, numbers: Sequence[int] | np.ndarray) -> tuple[list[dict[str, Any]], list[Path | None]]:
        """Rows at these numbers, in this order, and each one's image root."""
        rows: list[dict[str, Any]] = []
        roots: list[Path | None] = []
        for number in numbers:
            which = int(np.searchsorted(self.ends, number, side="right"))
            table: RowTable = self.tables[which]
            start = int(self.ends[which - 1]) if which else 0
            rows.append(table[int(number) - start])
            roots.append(table.root)
        return rows, roots


@lru_cache(maxsize=32)
def _tables(directories: tuple[str, ...]) -> Tables:
    return Tables(directories)


def index_of(
    directories: Sequence[str | Path], batch: int, *,
    epochs: float | None = None, steps: int | None = None, seed: int = 0, order: str = "shuffle",
) -> StepIndex:  # fmt: skip
    """`steps_of` over the rows of these artefacts end to end."""
    tables = _tables(tuple(str(d) for d in directories))
    lengths = modality_lengths(tables.tables) if order == "modality_grouped" else None
    return steps_of(len(tables), batch, epochs=epochs, steps=steps, seed=seed, order=order, lengths=lengths)


def _shape(recipe: ImageRecipe | None) -> tuple[int, int] | None:
    """(H, W) of a uniform recipe's images; (0, 0) without images; None where sizes differ."""
    if recipe is None:
        return (0, 0)
    return (recipe.size, recipe.size) if recipe.uniform else None  # type: ignore[attr-defined]


@dataclass(frozen=True)
class TrainTask:
    """Row numbers of a step → this rank's micro-batches. Each rank encodes the whole step and decodes only its own images."""

    directories: tuple[str, ...]
    encoding: Encoding
    rank: int
    world: int
    micro_tokens: int

    def __call__(self, numbers: np.ndarray) -> tuple[list[Batch], Stats]:
        rows, roots = _tables(self.directories).take(numbers)
        samples, stats = encode_rows(rows, roots, self.encoding)
        kept = [at for at, sample in enumerate(samples) if sample is not None]
        alive: list[Sample] = [sample for sample in samples if sample is not None]
        costs = [sum(segment.cost for segment in sample.values()) for sample in alive]
        ranks = assign(costs, self.micro_tokens, self.world)
        stats.micro_batches = sum(len(bins) for bins in ranks)
        stats.empty = sum(not members for bins in ranks for members in bins)
        valid = {name: sum(sample[name].valid for sample in alive) for name in self.encoding.streams}
        batches = []
        for members in ranks[self.rank]:
            numbered = [(kept[m], rows[kept[m]]["id"], roots[kept[m]], alive[m]) for m in members]
            streams = {}
            for name in self.encoding.streams:
                segments = [self._decoded(sample[name], root, id) for _, id, root, sample in numbered]
                streams[name] = pack(segments, [at for at, *_ in numbered], _shape(self.encoding.image))
            batches.append(Batch(streams, samples=len(alive), valid_tokens=sum(valid.values()), valid=valid))
        return batches, stats

    def _decoded(self, segment: Segment, root: Path | None, id: str) -> Segment:
        if not segment.images:
            return segment
        assert self.encoding.image is not None
        try:
            return replace(segment, images=tuple(pixels(image, self.encoding.image, root) for image in segment.images))  # type: ignore[arg-type]
        except ImageError as error:
            # its header was sound, so other ranks count on this sample: it can't be dropped any more
            hint = "build the dataset stage again; sources drop and count what doesn't decode"
            raise UserError(f"the image of row {id!r} can't be decoded", why=str(error), hint=hint) from error


def train_batches(
    directories: Sequence[str | Path], encoding: Encoding, index: StepIndex,
    start_step: int = 0, rank: int = 0, world: int = 1, micro_tokens: int = 4096, *, name: str = "train",
) -> Stream[list[Batch]]:  # fmt: skip
    """For every step from `start_step` on: this rank's micro-batches; all ranks have equally many, missing ones are empty packs.

    A step's samples, and `samples` and `valid` of its batches, are the same for all ranks. A row dropped from a step leaves it smaller.
    """
    task = TrainTask(tuple(str(d) for d in directories), encoding, rank, world, micro_tokens)
    return Stream(task, [index[step] for step in range(start_step, len(index))], name=name)


@dataclass
class QuestionBatch:
    """Questions ready for a model: rows (without images), their prompts and one pack with a segment each (`pack.sample`: place in `rows`).

    dropped: (row, reason) of questions that can't be asked; they aren't in the pack and count as invalid answers.
    """

    rows: list[dict[str, Any]]
    prompts: list[str]
    pack: Pack
    dropped: list[tuple[dict[str, Any], str]]


@dataclass(frozen=True)
class QuestionTask:
    directory: str
    encoding: Encoding
    suffix: str

    def __call__(self, numbers: np.ndarray) -> tuple[QuestionBatch, Stats]:
        rows, roots = _tables((self.directory,)).take(numbers)
        stats = Stats(rows=len(rows))
        asked: list[dict[str, Any]] = []
        prompts: list[Rendered] = []
        segments: list[Segment] = []
        dropped: list[tuple[dict[str, Any], str]] = []
        for row, root in zip(rows, roots, strict=True):
            bare = {key: value for key, value in row.items() if key not in {"images", "messages"}}
            try:
                prompt, segment = self._segment(row, root)
            except (RowError, ImageError) as error:
                stats.drop(error.reason, row["id"])
                dropped.append((bare, error.reason))
                continue
            asked.append(bare)
            prompts.append(prompt)
            segments.append(segment)
        stats.samples, stats.tokens = len(asked), sum(len(s.ids) for s in segments)
        stats.images = sum(len(s.images) for s in segments)
        packed = pack(segments, range(len(asked)), _shape(self.encoding.image))
        return QuestionBatch(asked, [prompt.text for prompt in prompts], packed, dropped), stats

    def _segment(self, row: Row, root: Path | None) -> tuple[Rendered, Segment]:
        encoding = self.encoding
        tokenizer = load_tokenizer(encoding.tokenizer or "", encoding.revision)
        shape = layouts(row, root, encoding.image)
        prompt = generation_prompt(row, encoding.template, self.suffix, bos=tokenizer.bos_token or "", eos=tokenizer.eos_token or "")
        encoded = encode(prompt, tokenizer, [one.tokens for one in shape], encoding.max_tokens)
        if encoded.truncated:
            raise RowError("a prompt longer than max_tokens")
        segment = segment_of(encoded, row, shape)
        images = tuple(pixels(image, encoding.image, root) for image in row["images"])  # type: ignore[arg-type]
        return prompt, replace(segment, images=images)


def _runs(directory: str, batch: int, rank: int, world: int) -> list[np.ndarray]:
    """Row numbers of an artefact in order, `batch` at a time, every world-th run for this rank."""
    rows = len(_tables((directory,)))
    return [np.arange(start, min(start + batch, rows)) for start in range(0, rows, batch)][rank::world]


def question_batches(
    directory: str | Path, encoding: Encoding, suffix: str, batch: int, *, rank: int = 0, world: int = 1, name: str = "questions"
) -> Stream[QuestionBatch]:  # fmt: skip
    """The rows' questions in row order, `batch` at a time, as prompts that end where the answer begins; no padding."""
    return Stream(QuestionTask(str(directory), encoding, suffix), _runs(str(directory), batch, rank, world), name=name)


@dataclass
class ImageBatch:
    """The first image of each row. numbers: int64[N] rows; images: uint8[N, H, W, 3] or a list; grids: int64[N, 3] in patches."""

    numbers: np.ndarray
    ids: list[str]
    labels: list[str]
    images: np.ndarray | list[np.ndarray]
    grids: np.ndarray


@dataclass(frozen=True)
class ImageTask:
    directory: str
    recipe: ImageRecipe

    def __call__(self, numbers: np.ndarray) -> tuple[ImageBatch, Stats]:
        rows, roots = _tables((self.directory,)).take(numbers)
        stats = Stats(rows=len(rows))
        segments: list[Segment] = []
        kept: list[int] = []
        empty = np.zeros(0, dtype=np.int64)
        for at, (row, root) in enumerate(zip(rows, roots, strict=True)):
            try:
                if not row["images"]:
                    raise RowError("no image")
                image = pixels(row["images"][0], self.recipe, root)
            except (RowError, ImageError) as error:
                stats.drop(error.reason, row["id"])
                continue
            shape = self.recipe.layout(image.shape[1], image.shape[0])
            segments.append(Segment(empty, empty, (image,), np.array([[1, shape.grid_h, shape.grid_w]]), shape.tokens))
            kept.append(at)
        stats.samples = stats.images = len(kept)
        packed = pack(segments, kept, _shape(self.recipe))
        ids, labels = [rows[at]["id"] for at in kept], [rows[at]["label"] for at in kept]
        return ImageBatch(np.asarray(numbers)[kept], ids, labels, packed.images, packed.grids), stats


def image_batches(
    directory: str | Path, recipe: ImageRecipe, batch: int, *, rank: int = 0, world: int = 1, name: str = "images"
) -> Stream[ImageBatch]:  # fmt: skip
    """The rows' first images in row order, `batch` rows at a time; rows without a readable image are dropped and counted."""
    return Stream(ImageTask(str(directory), recipe), _runs(str(directory), batch, rank, world), name=name)
