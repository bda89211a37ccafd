"""What the benchmark of the step trains on: rows in LLaVA's mix of lengths, the orders in which sides read them, a random model's weights.

In: a vocabulary, or a shape. Out: rows, batches of row numbers, a directory that transformers and ours both read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

BATCH, STEPS, PASSES = 16, 12, 2
POOL, MEGABATCH = 3200, 50
"""Rows that the peer groups by length, and how many batches it sorts together (its default)."""
SIZE, PATCH = 32, 4
IMAGE_TOKENS = (SIZE // PATCH) ** 2
"""64 positions: a ninth of LLaVA's 576, as all lengths here."""
VISION = {
    "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": SIZE, "patch_size": PATCH
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A language model's width, layers and vocabulary, and how many times the peer's speed is the goal."""

    width: int
    layers: int
    vocabulary: int
    goal: float

    @property
    def inner(self) -> int:
        return 3 * self.width

    @property
    def logits_share(self) -> float:
        """Share of the logits in the language model's matrix products, where every position gets its logits."""
        head = self.width * self.vocabulary
        return head / (head + self.layers * (4 * self.width**2 + 3 * self.width * self.inner))


SHAPES = {"logits-heavy": Shape(128, 4, 8192, 2.0), "logits-light": Shape(128, 4, 640, 1.4)}
SMALLER = Shape(16, 1, 64, 0.0)
"""What a side trains first, so that everything is loaded before memory is counted."""


@dataclass(frozen=True)
class Row:
    """ids int64[T] with the image's positions at -200, labels int64[T], -100 where nothing is learned; pixels uint8[H, W, 3] or None."""

    ids: np.ndarray
    labels: np.ndarray
    pixels: np.ndarray | None


def rows_of(vocabulary: int, count: int = POOL) -> list[Row]:
    """LLaVA-1.5's finetuning mix at a ninth of its lengths: 94 % of rows with an image of 64 positions (of 665,298 rows 40,688 have none),
    text of 6 to 200 tokens, log-normal around 28, of which the second half is learned."""
    rng, rows = np.random.default_rng(0), []
    for _ in range(count):
        tokens = int(min(200, max(6, rng.lognormal(math.log(28), 0.9))))
        text, shown = rng.integers(6, vocabulary, tokens), rng.random() < 0.94
        ids = np.concatenate([[1], np.full(IMAGE_TOKENS if shown else 0, -200), text])
        labels = np.where(np.arange(len(ids)) < len(ids) - max(3, tokens // 2), -100, ids)
        rows.append(Row(ids, labels, rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8) if shown else None))
    return rows


def grouped(rows: list[Row]) -> list[list[int]]:
    """The pass, as the peer's grouping forms batches of all rows: STEPS of them, evenly spread from the shortest to the longest."""
    import torch
    from transformers.trainer_pt_utils import get_length_grouped_indices

    order = get_length_grouped_indices([len(row.ids) for row in rows], BATCH, generator=torch.Generator().manual_seed(0))
    batches = [order[start : start + BATCH] for start in range(0, POOL, BATCH)]
    whole = POOL // (BATCH * MEGABATCH)  # sorted stretches: a quantile of each in turn
    return [batches[step % whole * MEGABATCH + (2 * step + 1) * MEGABATCH // (2 * STEPS)] for step in range(STEPS)]


def shuffled(batches: list[list[int]]) -> list[list[int]]:
    """The same rows in random batches."""
    order = np.random.default_rng(1).permutation([number for batch in batches for number in batch]).tolist()
    return [order[start : start + BATCH] for start in range(0, len(order), BATCH)]


def write_model(shape: Shape, folder: Path) -> None:
    """A random LLaVA, as transformers saves it."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.width, intermediate_size=shape.inner, num_hidden_layers=shape.layers,
        num_attention_heads=4, max_position_embeddings=512, pad_token_id=0,
    )  # fmt: skip
    config = LlavaConfig(vision_config=CLIPVisionConfig(**VISION), text_config=text, image_token_id=5, image_seq_length=IMAGE_TOKENS)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
