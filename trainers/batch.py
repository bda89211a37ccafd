"""One micro-batch on a device: numpy packs of `datasets_ray` → torch tensors of `trainers`.

In: `Batch` (streams of `Pack`) from `datasets_ray.pipeline.train_batches`. Out: `TensorBatch`. What is needed for planning
(segment lengths, sample indices, grids) stays on the host, so that reading it never waits for the device. A rank with nothing
to do at this position gets a *filler*: one token that learns nothing, because collectives need every rank to walk the same graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasets_ray.packing import Batch, Pack
from trainers.features import Features

NOT_LEARNED = -100
"""Label of a position that isn't learned (the value of `torch.nn.functional.cross_entropy`'s ignore_index)."""


@dataclass(frozen=True)
class TensorPack:
    """One stream's segments laid end to end. T tokens, S segments, N images, K image positions, L learned positions."""

    segments: int
    """How many of the segments are real; a filler, if any, comes after them."""
    sample: Tensor
    """int64[segments], host: each real segment's sample within the optimiser step."""
    lengths: Tensor
    """int64[S], host: tokens of each segment (fillers included); empty for a stream of images only."""
    ids: Tensor | None = None
    """int64[T]; image positions hold datasets_ray.tokens.IMAGE_ID."""
    labels: Tensor | None = None
    """int64[T], NOT_LEARNED where nothing is learned."""
    positions: Tensor | None = None
    """int64[T], restarting with every segment."""
    learned: Tensor | None = None
    """int64[L]: positions whose *next* token is learned; the only ones that need logits."""
    targets: Tensor | None = None
    """int64[L]: those next tokens."""
    most_learned: int = 0
    """The largest L of all ranks' micro-batches at this place: work that is split by it is split alike everywhere."""
    images: Tensor | list[Tensor] | None = None
    """uint8[N, H, W, 3], or a list of uint8[H, W, 3] of their own sizes; the model normalises. A filler image has no slots."""
    image_slots: Tensor | None = None
    """int64[K]: positions in `ids` that images fill, in image order."""
    grids: Tensor | None = None
    """int64[N, 3], host: patches in time, height, width of each image."""
    filler_image: bool = False
    """The only image is a filler: no position in `ids` belongs to it, its features are to be dropped after the connector."""
    features: Features | None = None
    """Encoder outputs, where they are kept: of all images; `images` and `grids` are then of those still to be encoded."""

    @property
    def tokens(self) -> int:
        return 0 if self.ids is None else int(self.ids.numel())


@dataclass(frozen=True)
class TensorBatch:
    """One micro-batch of this rank; the counts of the step are global (all micro-batches, all ranks)."""

    streams: dict[str, TensorPack]
    samples: Tensor
    """int64[n], host, ascending: this micro-batch's samples within the step."""
    step_samples: int
    """Samples of the whole step."""
    valid_tokens: int
    """Learned tokens of the whole step."""
    tokens: int
    """Real tokens of this micro-batch over all streams (images' positions included)."""

    @property
    def learned_tokens(self) -> int:
        """Learned tokens of this micro-batch."""
        return sum(int(p.learned.numel()) for p in self.streams.values() if p.learned is not None)


def learned_positions(labels: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where logits are needed, and what they should say: (int64[L] positions, int64[L] next tokens).

    labels int64[T], lengths int64[S] with sum T. A segment's first token has nobody before it to predict it.
    """
    follows = np.ones(len(labels), dtype=bool)
    follows[np.cumsum(lengths)[:-1]] = False
    if len(labels):
        follows[0] = False
    at = np.flatnonzero(follows & (labels != NOT_LEARNED))
    return at - 1, labels[at]


@dataclass(frozen=True)
class Filler:
    """The image that stands in where a pack has none: uint8[H, W, 3] in a size that the model takes, and its patch grid."""

    image: np.ndarray
    uniform: bool
    """The recipe makes all images one size: packs hold one array; else a list."""
    grid: tuple[int, int, int]


def to_device(batch: Batch, device: str = "cpu", filler: Filler | None = None, same_modules: bool = False) -> TensorBatch:
    """A `Batch` on `device`.

    same_modules: ranks gather weights inside the passes (ZeRO-3 on several devices), so that all must run the same modules: a pack
    without images then gets the filler, to which no position in the text belongs.
    """
    streams = {name: _pack(pack, device, filler, same_modules, batch.most_valid.get(name, 0)) for name, pack in batch.streams.items()}
    samples = torch.unique(torch.cat([p.sample for p in streams.values()])) if streams else torch.zeros(0, dtype=torch.int64)
    return TensorBatch(streams, samples, batch.samples, batch.valid_tokens, sum(p.tokens for p in batch.streams.values()))


def _pack(pack: Pack, device: str, filler: Filler | None, same_modules: bool, most_valid: int) -> TensorPack:
    def move(array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor if device == "cpu" else tensor.pin_memory().to(device, non_blocking=True)

    segments = len(pack.sample)
    made: dict[str, Any] = {"segments": segments, "sample": torch.from_numpy(pack.sample), "lengths": torch.zeros(0, dtype=torch.int64)}
    if len(pack.ids) or not segments:
        ids, labels, positions, lengths = pack.ids, pack.labels, pack.positions, pack.lengths
        if not len(ids):
            ids, positions, labels = np.zeros((3, 1), dtype=np.int64)
            labels, lengths = labels + NOT_LEARNED, np.ones(1, dtype=np.int64)
        learned, targets = learned_positions(labels, lengths)
        made |= {"ids": move(ids), "labels": move(labels), "positions": move(positions), "lengths": torch.from_numpy(lengths)}
        made |= {"learned": move(learned), "targets": move(targets), "image_slots": move(pack.image_slots)}
        made["most_learned"] = max(most_valid, len(learned))
    images, grids = pack.images, pack.grids
    if not len(images) and filler is not None and (same_modules or not segments):
        images = filler.image[None] if filler.uniform else [filler.image]
        grids = np.array([filler.grid], dtype=np.int64)
        made["filler_image"] = True
    if len(images):
        made["images"] = [move(i) for i in images] if isinstance(images, list) else move(images)
        made["grids"] = torch.from_numpy(grids)
    if pack.features is not None and len(pack.features.values):
        made["features"] = Features.of(pack.features, move)
    return TensorPack(**made)
