"""Packing: one optimiser step's samples into micro-batches without padding.

In: a step's encoded samples (one or more streams each). Out: for every rank equally many `Batch`es whose packs hold whole samples end
to end, with restarting positions and segment lengths, so that attention stays inside a sample. Packing never crosses a step: which
samples a step holds is the recipe's, how they are laid into memory is not, and neither loss nor gradient depend on it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from datasets_ray.tokens import IGNORE, IMAGE_ID

if TYPE_CHECKING:
    from datasets_ray.features_cache import PackFeatures


@dataclass(frozen=True)
class Segment:
    """One sample in one stream: ids, labels int64[T] (T may be 0: images alone), its images fitted or to be, grids int64[N, 3].

    cost: what it takes of a micro-batch's token budget (text and image positions; an image alone counts its own tokens).
    """

    ids: np.ndarray
    labels: np.ndarray
    images: tuple[object, ...]
    grids: np.ndarray
    cost: int

    @property
    def valid(self) -> int:
        return int(np.count_nonzero(self.labels != IGNORE))


@dataclass
class Pack:
    """Segments of one stream end to end. T tokens, S segments (one a sample), N images, K image positions.

    ids, labels: int64[T], labels aligned with ids and IGNORE at every segment's first token. positions: int64[T], from 0 in each segment.
    lengths: int64[S], sums to T. sample: int64[S], the segment's sample within the step. image_counts: int64[S], images of each segment.
    images: uint8[N, H, W, 3], or a list of uint8[H, W, 3] where sizes differ. image_slots: int64[K], where ids == IMAGE_ID, in image order.
    grids: int64[N, 3], (1, rows, columns) in patches. features: encoder outputs, where they are kept; images and grids are then of those
    that have none.
    """

    ids: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    lengths: np.ndarray
    sample: np.ndarray
    images: np.ndarray | list[np.ndarray]
    image_counts: np.ndarray
    image_slots: np.ndarray
    grids: np.ndarray
    features: PackFeatures | None = None

    @property
    def tokens(self) -> int:
        return len(self.ids)


@dataclass
class Batch:
    """One micro-batch of one rank. samples, valid_tokens and valid describe the whole step over all ranks: they are the normalisers."""

    streams: dict[str, Pack]
    samples: int
    valid_tokens: int
    valid: dict[str, int] = field(default_factory=dict)
    """Learned positions of each stream; valid_tokens is their sum."""
    most_valid: dict[str, int] = field(default_factory=dict)
    """Learned positions of each stream in the fullest of all ranks' micro-batches at this place, so that ranks agree without asking."""


def assign(costs: Sequence[int], capacity: int, world: int) -> list[list[list[int]]]:
    """Which samples go where: `[rank][micro-batch] -> sample numbers, ascending`.

    Every rank has equally many micro-batches; some may be empty. Best fit, longest first; a sample above the capacity has a bin to
    itself. When the number of bins isn't a multiple of the ranks, the samples are spread over the next multiple (longest to the
    emptiest) if they fit, which costs nobody an extra round.
    """
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    bins = _best_fit(order, costs, capacity)
    target = max(1, -(-len(bins) // world)) * world
    if len(bins) < target:
        spread = _spread(order, costs, target)
        if all(len(b) <= 1 or sum(costs[i] for i in b) <= capacity for b in spread):
            bins = spread
    bins += [[] for _ in range(target - len(bins))]
    # heaviest first, dealt back and forth, so that ranks carry alike
    bins.sort(key=lambda b: (-sum(costs[i] for i in b), b[:1]))
    ranks: list[list[list[int]]] = [[] for _ in range(world)]
    for number, members in enumerate(bins):
        turn, place = divmod(number, world)
        ranks[place if turn % 2 == 0 else world - 1 - place].append(sorted(members))
    return ranks


def _best_fit(order: Sequence[int], costs: Sequence[int], capacity: int) -> list[list[int]]:
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, bin), ascending
    for sample in order:
        if costs[sample] > capacity:
            bins.append([sample])
            continue
        at = bisect_left(room, (costs[sample], -1))
        if at == len(room):
            bins.append([])
            free, number = capacity, len(bins) - 1
        else:
            free, number = room.pop(at)
        bins[number].append(sample)
        insort(room, (free - costs[sample], number))
    return bins


def _spread(order: Sequence[int], costs: Sequence[int], count: int) -> list[list[int]]:
    bins: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, number) for number in range(count)]
    for sample in order:
        load, number = loads.pop(0)
        bins[number].append(sample)
        insort(loads, (load + costs[sample], number))
    return bins


def _join(arrays: list[np.ndarray], width: int | None = None) -> np.ndarray:
    if arrays:
        return np.concatenate(arrays).astype(np.int64, copy=False)
    return np.zeros((0,) if width is None else (0, width), dtype=np.int64)


def pack(segments: Sequence[Segment], samples: Sequence[int], image_shape: tuple[int, int] | None = None) -> Pack:
    """Lays segments end to end. samples: each segment's number within the step. image_shape: (H, W) of a uniform recipe, None: a list."""
    ids = _join([s.ids for s in segments])
    lengths = np.array([len(s.ids) for s in segments], dtype=np.int64)
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    images = [image for s in segments for image in s.images]
    stacked: np.ndarray | list[np.ndarray] = images  # type: ignore[assignment]
    if image_shape is not None:
        stacked = np.stack(images) if images else np.zeros((0, *image_shape, 3), dtype=np.uint8)  # type: ignore[arg-type]
    return Pack(
        ids=ids,
        labels=_join([s.labels for s in segments]),
        positions=np.arange(len(ids), dtype=np.int64) - starts,
        lengths=lengths,
        sample=np.array(samples, dtype=np.int64),
        images=stacked,
        image_counts=np.array([len(s.images) for s in segments], dtype=np.int64),
        image_slots=np.flatnonzero(ids == IMAGE_ID),
        grids=_join([s.grids for s in segments if len(s.grids)], 3),
    )
