"""Order: which rows make up which optimiser step, fixed before a stage starts.

In: the number of rows, batch, duration, seed (and, for LLaVA's modality-grouped order, each row's signed length). Out: a `StepIndex`,
a pure function of those, so that any step can be rebuilt on its own: streaming starts at any position, device counts don't matter.
`count_steps` is the same arithmetic for the planner; this file needs numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from datasets_ray.errors import UserError, nearest

if TYPE_CHECKING:
    from datasets_ray.rows import RowTable

ORDERS = ("shuffle", "modality_grouped")


def count_samples(rows: int, batch: int, epochs: float | None = None, steps: int | None = None) -> int:
    """Samples seen by a stage: ceil(epochs · rows), or steps · batch. Exactly one of the two durations is given."""
    if (epochs is None) == (steps is None):
        raise UserError("a stage lasts `epochs` or `steps`", why=f"got epochs={epochs}, steps={steps}", hint="give exactly one of them")
    if rows < 1 or batch < 1:
        raise UserError(f"{rows} rows in batches of {batch}", why="both must be at least 1")
    # 0.1 · 30 is 3.0000000000000004 in floating point and means 3
    return steps * batch if steps is not None else math.ceil(round(float(epochs or 0.0) * rows, 6))


def count_steps(rows: int, batch: int, epochs: float | None = None, steps: int | None = None) -> int:
    """Optimiser steps of a stage: ceil(epochs · rows / batch) over all epochs together; the last, partial batch is a step too."""
    return -(-count_samples(rows, batch, epochs, steps) // batch)


@dataclass(frozen=True)
class StepIndex:
    """`index[step]`: int64[B] row numbers of that step; B = batch except in the last step."""

    rows: np.ndarray
    batch: int

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch)

    def __getitem__(self, step: int) -> np.ndarray:
        if not 0 <= step < len(self):
            raise IndexError(step)
        return self.rows[step * self.batch : (step + 1) * self.batch]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[step] for step in range(len(self)))


def steps_of(
    rows: int,
    batch: int,
    *,
    epochs: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    order: str = "shuffle",
    lengths: np.ndarray | None = None,
) -> StepIndex:
    """The rows of every step. Each epoch is a fresh permutation of all rows; the last may be cut short.

    order: `shuffle`, or `modality_grouped` with lengths int64[rows] (`modality_lengths`), LLaVA's LengthGroupedSampler with
    group_by_modality: each modality is permuted and cut into batches, the last of each (whole or not) is set aside, the other batches are
    shuffled, and what was set aside comes last, both modalities together in the rows' own order. Its sorting by length and sharing out
    among devices happen inside a step, where the loss doesn't depend on them. Rows of one modality only: batches in shuffled order.
    """
    if order not in ORDERS:
        raise UserError(f"unknown order {order!r}", hint=nearest(order, ORDERS))
    if order == "modality_grouped" and (lengths is None or len(lengths) != rows):
        raise UserError("order 'modality_grouped' needs the length of every row", hint="pass modality_lengths(tables)")
    samples = count_samples(rows, batch, epochs, steps)
    parts: list[np.ndarray] = []
    have = 0
    while have < samples:
        rng = np.random.default_rng([seed, len(parts)])
        permutation = rng.permutation(rows)
        if order == "modality_grouped":
            assert lengths is not None
            permutation = _grouped(permutation, lengths > 0, batch, head=-have % batch, rng=rng)
        parts.append(permutation)
        have += rows
    return StepIndex(np.concatenate(parts)[:samples] if parts else np.zeros(0, dtype=np.int64), batch)


def _grouped(permutation: np.ndarray, has_image: np.ndarray, batch: int, head: int, rng: np.random.Generator) -> np.ndarray:
    """Whole batches of one modality, shuffled, then the rest. head: rows that first fill up the step the epoch before left open."""
    first, rest = permutation[:head], permutation[head:]
    kinds = [rest[has_image[rest] == modality] for modality in (True, False)]
    mixed = all(len(members) for members in kinds)
    groups, left = [], []
    for members in kinds:
        # of two modalities LLaVA sets the last batch aside even when it is whole
        full = (len(members) - mixed) // batch * batch
        groups += list(members[:full].reshape(-1, batch))
        left.append(members[full:])
    last = np.concatenate(left)
    shuffled = [groups[i] for i in rng.permutation(len(groups))]
    return np.concatenate([first, *shuffled, np.sort(last) if mixed else last])


def modality_lengths(tables: Sequence[RowTable]) -> np.ndarray:
    """int64[rows]: words in a row's messages, negative for rows without images (LLaVA's `modality_lengths`), over the tables end to end."""
    import pyarrow.compute as pc

    lengths = []
    for table in tables:
        messages, images = table.table.column("messages"), table.table.column("images")
        words = pc.count_substring_regex(pc.struct_field(pc.list_flatten(messages), "text"), r"\S+")
        total = np.bincount(pc.list_parent_indices(messages).to_numpy(), weights=words.to_numpy(), minlength=len(table)).astype(np.int64)
        lengths.append(np.where(pc.list_value_length(images).to_numpy() > 0, np.maximum(total, 1), -np.maximum(total, 1)))
    return np.concatenate(lengths) if lengths else np.zeros(0, dtype=np.int64)
