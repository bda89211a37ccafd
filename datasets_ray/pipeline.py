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
from typing import Any, cast

import numpy as np

from datasets_ray import features_cache
from datasets_ray.encoding import Encoding, Place, Record, Stats, encode_rows, tally
from datasets_ray.features_cache import FeatureStore, FillFeatures
from datasets_ray.fitted import Fill, Headers, image_of, missing
from datasets_ray.images import ImageError, ImageRecipe, pixels
from datasets_ray.kept import Kept
from datasets_ray.order import StepIndex, modality_lengths, steps_of
from datasets_ray.packing import Batch, Segment, assign, pack
from datasets_ray.pixels_cache import PixelStore
from datasets_ray.prompts import RowError
from datasets_ray.rows import open_rows
from datasets_ray.streaming import Stream, node

RECORDS: Kept[Record] = Kept(48 << 20)
"""Tokenised rows of this process, by place and encoding."""
MADE = 4
"""To make kept pixels takes as much of a task's time as handing on a quarter of their bytes."""


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

    def split(self, numbers: np.ndarray) -> list[np.ndarray]:
        """These row numbers by table, counted from its first."""
        starts = np.concatenate([[0], self.ends])
        return [numbers[(numbers >= start) & (numbers < end)] - start for start, end in zip(starts, self.ends)]


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
    """Row numbers of a step → this rank's micro-batches. Each rank encodes the whole step and decodes only its own images.

    store: where pixels are kept; None: they travel with the batches. Else a batch's images are a list, of slots where they are kept on the
    consumer's machine, its `node`; `Fill` makes of it what it would have been. features: whose outputs are kept, so that images go without
    pixels where those are found; `FillFeatures` reads them.
    """

    directories: tuple[str, ...]
    encoding: Encoding
    rank: int
    world: int
    micro_tokens: int
    store: PixelStore | None = None
    node: str = ""
    features: FeatureStore | None = None

    @cached_property
    def _key(self) -> str:
        """What a record depends on besides its row."""
        return repr(self.encoding)

    def __call__(self, numbers: np.ndarray) -> tuple[list[Batch], Stats]:
        with Headers(self.encoding.image, self.store) as headers:
            return self._made(_tables(self.directories).places(numbers), headers)

    def _made(self, places: Sequence[Place], headers: Headers) -> tuple[list[Batch], Stats]:
        here = node() == self.node  # not kept: a task that ran here is sent elsewhere, too
        records = self._records(places, headers)
        stats = tally(records)
        kept = [record.sample for record in records if record.sample is not None]
        costs = [sum(segment.cost for segment in sample.values()) for sample in kept]
        ranks = assign(costs, self.micro_tokens, self.world)
        stats.micro_batches = sum(len(bins) for bins in ranks)
        stats.empty = sum(not members for bins in ranks for members in bins)
        valid = {name: sum(sample[name].valid for sample in kept) for name in self.encoding.streams}
        batches = []
        for place, members in enumerate(ranks[self.rank]):
            streams, most = {}, {}
            for name in self.encoding.streams:
                segments = [self._decoded(kept[m][name], here, headers) for m in members]
                shape = _shape(self.encoding.image) if self.store is None and self.features is None else None
                streams[name] = pack(segments, members, shape)  # numbered without gaps: objectives gather by it
                most[name] = max(sum(kept[m][name].valid for m in bins[place]) for bins in ranks)
            batches.append(Batch(streams, len(kept), sum(valid.values()), valid, most))
        return batches, stats

    def _records(self, places: Sequence[Place], headers: Headers) -> list[Record]:
        found = {place: RECORDS.get((place, self._key)) for place in places}
        new = [place for place, record in found.items() if record is None]
        for place, made in zip(new, encode_rows([read(place) for place in new], new, self.encoding, headers.size)):
            RECORDS.put((place, self._key), made, made.nbytes)
            found[place] = made
        return [record for place in places if (record := found[place]) is not None]

    def _decoded(self, segment: Segment, here: bool, headers: Headers) -> Segment:
        if not segment.images:
            return segment
        assert self.encoding.image is not None
        recipe, kept, places = self.encoding.image, self.features, cast(tuple[Place, ...], segment.images)
        if kept is None:
            return replace(segment, images=tuple(image_of(place, recipe, self.store, here, headers.take(place)) for place in places))
        return replace(segment, images=tuple(features_cache.asked(place, recipe, self.store, kept, here) for place in places))


def train_batches(
    directories: Sequence[str | Path], encoding: Encoding, index: StepIndex,
    start_step: int = 0, rank: int = 0, world: int = 1, micro_tokens: int = 4096, *, name: str = "train", store: PixelStore | None = None,
    features: FeatureStore | None = None,
) -> Stream[list[Batch]]:  # fmt: skip
    """For every step from `start_step` on: this rank's micro-batches; all ranks have equally many, missing ones are empty packs.

    A step's samples, and `samples` and `valid` of its batches, are the same for all ranks. A row dropped from a step leaves it smaller.
    store: where decoded pixels are kept (`datasets_ray.pixels_cache`); the batches are the same without. features: where encoder outputs
    are (`datasets_ray.features_cache`); packs then hold them, and pixels only of images that have none. Uniform recipes only.
    """
    recipe = encoding.image
    store, features = (store, features) if recipe is not None else (None, None)
    task = TrainTask(tuple(str(d) for d in directories), encoding, rank, world, micro_tokens, store, node(), features)
    steps = [index[step] for step in range(start_step, len(index))]
    known = FillFeatures(recipe, store, features) if recipe is not None and features is not None else None
    fill = known.pixels if known else Fill(recipe, store) if recipe is not None and store is not None else None
    stream = Stream(task, steps, name=name, step_bytes=_step_bytes(task, steps), finish=known or fill)
    stream.pixels = fill.counts if fill and store is not None else None
    stream.features = known.counts if known else None
    return stream


def _step_bytes(task: TrainTask, steps: Sequence[np.ndarray]) -> int:
    """About what a step hands on. Kept pixels stay where they are: those still to be made count for the time that they take."""
    rows, recipe = len(steps[0]) if steps else 1, task.encoding.image
    whole = rows * _row_bytes(recipe, task.encoding.max_tokens)
    if (task.store is None and task.features is None) or recipe is None or not steps:
        return whole
    bare = rows * _row_bytes(None, task.encoding.max_tokens)
    numbers = np.concatenate(steps)
    split = _tables(task.directories).split(numbers)
    if task.features is not None and not features_cache.missing(task.directories, recipe, task.features, split):
        return bare
    if task.store is None:
        return whole
    to_make = missing(task.directories, recipe, task.store, split)
    return bare + int((whole - bare) * min(1.0, to_make / len(numbers)) / MADE)


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
