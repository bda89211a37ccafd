"""Pipelines: rows in, micro-batches out, made ahead of their use.

In: rows artefacts, an `Encoding`, and which rows make up which step. Out: a `Stream` that yields in order: lists of `Batch` (training)
or `ImageBatch` (embedding). Where Ray runs, the work is a Ray Data pipeline (a task per few steps on a quarter of a core, order
preserved); elsewhere the same functions run in a loop, with the same results. A stream starts working when it is made, so make it
before you build the model. Every step is a pure function of its row numbers, so a stream starts at any step.

    with train_batches(dirs, encoding, index, start_step, rank, world, micro_tokens) as stream:
        for micro_batches in stream: ...
    stream.stats, stream.waited
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from datasets_ray.encoding import Encoding, Place, Record, Stats, encode_rows, tally
from datasets_ray.errors import UserError
from datasets_ray.images import ImageError, ImageRecipe, pixels
from datasets_ray.kept import Kept
from datasets_ray.order import StepIndex, modality_lengths, steps_of
from datasets_ray.packing import Batch, Segment, assign, pack
from datasets_ray.prompts import RowError
from datasets_ray.rows import open_rows
from datasets_ray.streaming import Stream

RECORDS: Kept[Record] = Kept(48 << 20)
"""Tokenised rows of this process, by place and encoding."""
PIXELS: Kept[np.ndarray] = Kept(96 << 20)
"""Fitted images of this process, by place and recipe: a miniature's whole training set, a drop of a large one."""


class Tables:
    """Several rows artefacts end to end, read by global row number."""

    def __init__(self, directories: Sequence[str]) -> None:
        self.tables = [open_rows(str(directory)) for directory in directories]
        self.ends = np.cumsum([len(table) for table in self.tables])

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def places(self, numbers: Sequence[int] | np.ndarray) -> list[Place]:
        """Where the rows with these numbers lie."""
        which = np.searchsorted(self.ends, numbers, side="right")
        starts = np.concatenate([[0], self.ends])[which]
        return [Place(str(self.tables[t].directory), int(number - start)) for t, number, start in zip(which, numbers, starts)]


def read(place: Place) -> dict[str, Any]:
    return open_rows(place.directory)[place.row]


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


def _row_bytes(recipe: ImageRecipe | None, tokens: int) -> int:
    """About what a row takes on its way to the consumer: ids, labels and positions of a typical row, one image."""
    side = 0 if recipe is None else recipe.size if recipe.uniform else 640  # type: ignore[attr-defined]
    return 24 * min(tokens, 256) + 3 * side * side


@dataclass(frozen=True)
class TrainTask:
    """Row numbers of a step → this rank's micro-batches. Each rank encodes the whole step and decodes only its own images."""

    directories: tuple[str, ...]
    encoding: Encoding
    rank: int
    world: int
    micro_tokens: int

    @cached_property
    def _key(self) -> str:
        """What a record depends on besides its row."""
        return repr(self.encoding)

    def __call__(self, numbers: np.ndarray) -> tuple[list[Batch], Stats]:
        places = _tables(self.directories).places(numbers)
        records = self._records(places)
        stats = tally(records)
        kept = [(record.id, record.sample) for record in records if record.sample is not None]
        costs = [sum(segment.cost for segment in sample.values()) for _, sample in kept]
        ranks = assign(costs, self.micro_tokens, self.world)
        stats.micro_batches = sum(len(bins) for bins in ranks)
        stats.empty = sum(not members for bins in ranks for members in bins)
        valid = {name: sum(sample[name].valid for _, sample in kept) for name in self.encoding.streams}
        batches = []
        for place, members in enumerate(ranks[self.rank]):
            streams, most = {}, {}
            for name in self.encoding.streams:
                segments = [self._decoded(kept[m][1][name], kept[m][0]) for m in members]
                streams[name] = pack(segments, members, _shape(self.encoding.image))  # numbered without gaps: objectives gather by it
                most[name] = max(sum(kept[m][1][name].valid for m in bins[place]) for bins in ranks)
            batches.append(Batch(streams, len(kept), sum(valid.values()), valid, most))
        return batches, stats

    def _records(self, places: Sequence[Place]) -> list[Record]:
        found = {place: RECORDS.get((place, self._key)) for place in places}
        missing = [place for place, record in found.items() if record is None]
        for place, made in zip(missing, encode_rows([read(place) for place in missing], missing, self.encoding)):
            RECORDS.put((place, self._key), made, made.nbytes)
            found[place] = made
        return [record for place in places if (record := found[place]) is not None]

    def _decoded(self, segment: Segment, id: str) -> Segment:
        if not segment.images:
            return segment
        assert self.encoding.image is not None
        try:
            return replace(segment, images=tuple(_pixels(place, self.encoding.image) for place in segment.images))  # type: ignore[arg-type]
        except ImageError as error:
            # its header was sound, so other ranks count on this sample: it can't be dropped any more
            hint = "build the dataset stage again; sources drop and count what doesn't decode"
            raise UserError(f"the image of row {id!r} can't be decoded", why=str(error), hint=hint) from error


def _pixels(place: Place, recipe: ImageRecipe) -> np.ndarray:
    """uint8[H, W, 3] of an image, fitted once per process."""
    made = PIXELS.get((place, recipe))
    if made is None:
        table = open_rows(place.directory)
        made = pixels(table.table.column("images")[place.row].as_py()[place.image], recipe, table.root)
        PIXELS.put((place, recipe), made, made.nbytes + 200)
    return made


def train_batches(
    directories: Sequence[str | Path], encoding: Encoding, index: StepIndex,
    start_step: int = 0, rank: int = 0, world: int = 1, micro_tokens: int = 4096, *, name: str = "train",
) -> Stream[list[Batch]]:  # fmt: skip
    """For every step from `start_step` on: this rank's micro-batches; all ranks have equally many, missing ones are empty packs.

    A step's samples, and `samples` and `valid` of its batches, are the same for all ranks. A row dropped from a step leaves it smaller.
    """
    task = TrainTask(tuple(str(d) for d in directories), encoding, rank, world, micro_tokens)
    steps = [index[step] for step in range(start_step, len(index))]
    return Stream(task, steps, name=name, step_bytes=_row_bytes(encoding.image, encoding.max_tokens) * (len(steps[0]) if steps else 1))


def _runs(directory: str, batch: int, rank: int, world: int) -> list[np.ndarray]:
    """Row numbers of an artefact in order, `batch` at a time, every world-th run for this rank."""
    rows = len(_tables((directory,)))
    return [np.arange(start, min(start + batch, rows)) for start in range(0, rows, batch)][rank::world]


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
        table = open_rows(self.directory)
        rows = table.take(numbers.tolist())
        stats = Stats(rows=len(rows))
        segments: list[Segment] = []
        kept: list[int] = []
        empty = np.zeros(0, dtype=np.int64)
        for at, row in enumerate(rows):
            try:
                if not row["images"]:
                    raise RowError("no image")
                image = pixels(row["images"][0], self.recipe, table.root)
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
    runs = _runs(str(directory), batch, rank, world)
    return Stream(ImageTask(str(directory), recipe), runs, name=name, step_bytes=_row_bytes(recipe, 0) * batch)
