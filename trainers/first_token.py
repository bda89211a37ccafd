"""Answers by their first token, and the rule that keeps batches from changing them.

A multiple-choice question is *settled by the shortcut* when its prompt's most probable next token is the letter of an option and the one
after that ends the answer: one batched prefill and one step. Every other row goes on, greedily, to its end. Both give what greedy
generation gives, one question at a time.

Rounding differs with what else is in a batch. So a stage measures, on rows of its first batch, how far batched logits lie from those
of the same rows read alone; a row with two candidates closer than a multiple of that, wherever a token was chosen, is answered again
alone. Batch size, packing and workers then change no answer on one device: what isn't redone was decided by more than rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from datasets_ray.answers import LETTERS

MEASURED = 4
"""Rows of a first batch that are answered both ways, from its longest to its shortest prompt."""
SAFETY = 4.0
"""Twice the largest difference is needed, since two candidates may move towards each other; twice that, since few rows are measured."""
ULPS = 2.0
"""The least threshold, in units of the last place of the largest logit: exact ties are never left to a batch."""


def letter_of(text: str, tokens: int, finished: bool, options: Sequence[str]) -> str | None:
    """The option's letter that an answer of one token says before it ends (`A`, ` A` and `▁A` are all decoded to `A`), or None."""
    said = text if finished and tokens == 1 and len(text) == 1 else ""
    return said if said and said in LETTERS[: len(options)] else None


@dataclass(frozen=True)
class Threshold:
    """difference: the largest between batched and alone; value: what two candidates must differ by, to be left as they are."""

    difference: float
    value: float


def measured(pairs: Iterable[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Threshold:
    """From (batched, alone) of the same numbers, computed in `dtype`."""
    difference = largest = 0.0
    for batched, alone in pairs:
        difference = max(difference, float((batched.double() - alone.double()).abs().max()))
        largest = max(largest, float(alone.abs().max()))
    return Threshold(difference, max(SAFETY * difference, ULPS * torch.finfo(dtype).eps * largest))


def compared(batched: Sequence[Tensor], alone: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """A row's logits at each choice, as long as both chose the same tokens before: afterwards they are of different texts."""
    pairs = []
    for one, other in zip(batched, alone):
        pairs.append((one, other))
        if int(one.argmax()) != int(other.argmax()):
            break
    return pairs


def spread(count: int) -> list[int]:
    """Which rows of a batch of `count` are measured."""
    return sorted({round(k * (count - 1) / max(1, MEASURED - 1)) for k in range(min(MEASURED, count))})
