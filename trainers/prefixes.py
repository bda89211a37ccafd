"""Prefixes: what questions have in common, so that it is read once.

In: questions with their images, and their prompts as tokens. Out: which rows show the same images, an order that keeps such rows
together, and for a batch of prompts a *tree*: levels of spans, each span going on from one of the level before.

    system prompt ──► image 1 ──► question a, question b, question a with its options rolled
                 └──► image 2 ──► question c

Images begin a prompt, so an image that several questions of a batch show is encoded once. All here are functions of the set and the
batch alone; which prompts share a batch changes no answer (`trainers.first_token`).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import pyarrow.compute as pc

from datasets_ray.images import ImageLayout, ImageRecipe
from datasets_ray.packing import Pack, Segment, pack
from datasets_ray.questions import Prompts
from datasets_ray.rows import RowTable
from datasets_ray.tokens import IGNORE, IMAGE_ID
from trainers import switches

WORTH = 0.15
"""Text alone is shared where that saves this part of a batch's tokens: a level of its own costs a pass and a copy of keys and values."""
FEW = 8
"""Prompts that have fewer tokens than this in common beyond what all have don't form a group."""

Images = tuple[int, ...]
"""A row's images by number: equal numbers, equal content."""


def image_numbers(rows: RowTable) -> list[Images]:
    """Each row's images, numbered by content: the path, or the bytes (only those of equal size are compared)."""
    column = rows.table.column("images")
    counts = pc.list_value_length(column).to_pylist()
    flat = pc.list_flatten(column)
    data = pc.struct_field(flat, "bytes")
    keys: list[tuple[object, ...]] = [
        ("path", path) if size is None else ("size", size)
        for path, size in zip(pc.struct_field(flat, "path").to_pylist(), pc.binary_length(data).to_pylist())
    ]
    seen = Counter(keys)
    at = 0
    for chunk in data.chunks:
        for place in range(len(chunk)):
            if seen[keys[at]] > 1 and keys[at][0] == "size":
                keys[at] = (*keys[at], hashlib.blake2b(chunk[place].as_buffer(), digest_size=16).digest())
            at += 1
    numbers: dict[tuple[object, ...], int] = {}
    flat_numbers = [numbers.setdefault(key, len(numbers)) for key in keys]
    ends = np.cumsum([count or 0 for count in counts]).tolist()
    return [tuple(flat_numbers[end - (count or 0) : end]) for end, count in zip(ends, counts)]


def arrange(lengths: np.ndarray, images: Sequence[Images]) -> np.ndarray:
    """Rows that can be asked (lengths int64[N] > 0), those that show the same images side by side, the longest groups first: int64[M]."""
    groups: dict[Images, list[int]] = {}
    for row in np.flatnonzero(lengths > 0).tolist():
        groups.setdefault(images[row] or (-1 - row,), []).append(row)
    ordered = sorted(groups.values(), key=lambda rows: -max(int(lengths[row]) for row in rows))
    return np.array([row for rows in ordered for row in sorted(rows, key=lambda row: -int(lengths[row]))], dtype=np.int64)


def cut(order: np.ndarray, size: int, images: Sequence[Images]) -> list[np.ndarray]:
    """`order` in pieces of at most `size` rows; a group with the same images is parted only where it is larger than that."""

    def joined(at: int) -> bool:
        """Whether rows at - 1 and at belong together."""
        shown = images[order[at]]
        return bool(shown) and images[order[at - 1]] == shown

    pieces, start = [], 0
    while start < len(order):
        end = min(start + size, len(order))
        if end < len(order) and joined(end):
            first = end
            while first > start and joined(first):
                first -= 1
            end = first if first > start else end
        pieces.append(order[start:end])
        start = end
    return pieces


@dataclass(frozen=True)
class Span:
    """Tokens [start, end) of prompt `row` of a batch, after what span `parent` of the level before has read (-1: nothing)."""

    row: int
    start: int
    end: int
    parent: int


def key_of(prompts: Prompts, row: int, images: Images) -> np.ndarray:
    """int64[T]: a prompt whose image positions carry their image's number, so that equal keys are equal inputs."""
    one = prompts.encoded[row]
    assert one is not None, "this row can't be asked"
    key = one.ids.copy()
    if len(images) == 1:  # nearly all of them, so without arrays
        key[one.image_slots] = IMAGE_ID - 1 - images[0]
        return key
    key[one.image_slots] = np.repeat(IMAGE_ID - 1 - np.array(images, dtype=np.int64), [layout.tokens for layout in prompts.layouts[row]])
    return key


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two prompts begin with alike."""
    size = min(len(a), len(b))
    differ = np.flatnonzero(a[:size] != b[:size])
    return int(differ[0]) if len(differ) else size


def _shows(key: np.ndarray) -> bool:
    """Whether there are images among these tokens."""
    return bool((key < IMAGE_ID).any())


def _whole(key: np.ndarray, end: int) -> int:
    """`end`, or where the image begins that it would cut; a prompt keeps a token at least."""
    end = min(end, len(key) - 1)
    while end > 0 and key[end] < IMAGE_ID and key[end - 1] == key[end]:
        end -= 1
    return end


def tree(keys: Sequence[np.ndarray]) -> list[list[Span]]:
    """What to read of S prompts (`key_of`), level after level; the last level has a span a prompt, in their order.

    At most three levels: what all have in common, what groups of them have in common (their image), the rest.
    """
    if not switches.on("prefixes"):
        return [[Span(row, 0, len(key), -1) for row, key in enumerate(keys)]]
    count, total = len(keys), sum(len(key) for key in keys)
    order = sorted(range(count), key=lambda row: keys[row].tobytes())
    common = [_common(keys[a], keys[b]) for a, b in pairwise(order)]
    root = min([_whole(keys[row], n) for row, n in zip(order, common)] + [_whole(keys[row], len(keys[row])) for row in order])

    groups: list[list[int]] = [[order[0]]]
    shared = [len(keys[order[0]])]
    for row, n in zip(order[1:], common):
        beyond = keys[row][root:n]
        if len(beyond) >= FEW or _shows(beyond):
            groups[-1].append(row)
            shared[-1] = min(shared[-1], n, len(keys[row]))
        else:
            groups.append([row])
            shared.append(len(keys[row]))
    ends = [min(_whole(keys[row], n) for row in rows) for rows, n in zip(groups, shared)]

    several = [(rows, end) for rows, end in zip(groups, ends) if len(rows) > 1 and end > root]
    saved = sum((len(rows) - 1) * (end - root) for rows, end in several)
    grouped = saved >= WORTH * total or any(_shows(keys[rows[0]][root:end]) for rows, end in several)
    saved = ((len(groups) if grouped else count) - 1) * root
    rooted = saved >= WORTH * total or (saved > 0 and _shows(keys[0][:root]))

    levels: list[list[Span]] = []
    start = root if rooted else 0
    if rooted:
        levels.append([Span(0, 0, root, -1)])
    if grouped and all(end > start for end in ends):
        levels.append([Span(rows[0], start, end, 0 if rooted else -1) for rows, end in zip(groups, ends)])
        parents = {row: (number, ends[number]) for number, rows in enumerate(groups) for row in rows}
    else:
        parents = dict.fromkeys(range(count), (0 if rooted else -1, start))
    levels.append([Span(row, parents[row][1], len(keys[row]), parents[row][0]) for row in range(count)])
    return levels


def pack_spans(
    spans: Sequence[Span], prompts: Prompts, rows: Sequence[int], images: Sequence[Sequence[np.ndarray]], recipe: ImageRecipe | None
) -> Pack:
    """A level's spans end to end. rows: the batch's row numbers; images: each one's own, decoded."""
    segments, unlearned = [], np.full(max(span.end - span.start for span in spans), IGNORE, dtype=np.int64)
    for span in spans:
        one = prompts.encoded[rows[span.row]]
        assert one is not None, "this row can't be asked"
        ids, shown = one.ids[span.start : span.end], images_of(span, prompts, rows[span.row])
        grids = _grids(tuple(prompts.layouts[rows[span.row]][number] for number in shown))
        pixels = tuple(images[span.row][number] for number in shown)
        segments.append(Segment(ids, unlearned[: len(ids)], pixels, grids, len(ids)))
    shape = None
    if recipe is not None and recipe.uniform:
        shape = next((image.shape[:2] for segment in segments for image in segment.images), (0, 0))  # type: ignore[attr-defined]
    return pack(segments, range(len(segments)), shape)


@lru_cache(maxsize=1024)
def _grids(layouts: tuple[ImageLayout, ...]) -> np.ndarray:
    """int64[N, 3], of a row's images; nearly always the same."""
    return np.array([[1, layout.grid_h, layout.grid_w] for layout in layouts], dtype=np.int64).reshape(-1, 3)


def images_of(span: Span, prompts: Prompts, row: int) -> list[int]:
    """Which of a prompt's images begin in a span."""
    one = prompts.encoded[row]
    assert one is not None
    if not len(one.image_slots):
        return []
    if len(prompts.layouts[row]) == 1:  # nearly all of them, so without arrays
        return [0] if span.start <= one.image_slots[0] < span.end else []
    tokens = np.array([layout.tokens for layout in prompts.layouts[row]], dtype=np.int64)
    firsts = one.image_slots[np.cumsum(tokens) - tokens]
    return np.flatnonzero((firsts >= span.start) & (firsts < span.end)).tolist()
