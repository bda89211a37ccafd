"""What an objective is: all that the training step knows about what is being learned.

An objective reads named streams of a micro-batch, returns a local loss (a sum over its own units, divided by a *global* count,
so that it doesn't matter how the step's samples are spread) and, if it compares samples with each other, representations that
the step gathers over all micro-batches and devices before it asks for the loss over the whole batch. A new objective is a file
with a class; a study names it `name` (registered) or `module:Class`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from trainers.batch import TensorBatch, TensorPack


@dataclass
class Output:
    """What one micro-batch gives. n samples in the order of `batch.samples`."""

    loss_sum: Tensor
    """float[]: summed over this micro-batch's units, attached to the graph even where there are none."""
    representations: dict[str, Tensor] = field(default_factory=dict)
    """float[n, ...] by name: what the whole step needs from each sample (embeddings, or its copy of a learned scale)."""


class Objective(Protocol):
    streams: Mapping[str, str | Mapping[str, str]]
    """What it reads of a row: stream name → how the row becomes it (a kind in `datasets_ray.encoding.KINDS`, or {"kind", "text"})."""
    gathers: tuple[str, ...]
    """Names of the representations that `gathered` needs from all samples of the step; empty if samples are independent."""

    def forward(self, model: Any, batch: TensorBatch) -> Output:
        """The local part, with gradient. Called again on the same batch when representations are gathered: keep no state."""
        ...

    def normaliser(self, batch: TensorBatch) -> float:
        """The step's global count by which the summed `loss_sum`s are divided."""
        ...

    def gathered(self, representations: dict[str, Tensor]) -> Tensor:
        """float[]: the loss over the step's B samples from float[B, ...] by name, ordered by sample. Not called without `gathers`."""
        ...


def by_sample(rows: Tensor, pack: TensorPack) -> Tensor:
    """float[S, ...] rows of a pack's segments → float[n, ...] in ascending sample order, fillers dropped."""
    return rows[pack.sample.argsort().to(rows.device)]


def last_positions(pack: TensorPack) -> Tensor:
    """int64[S], host: the last position of every segment, where causal models keep a sequence's summary."""
    return pack.lengths.cumsum(0) - 1
