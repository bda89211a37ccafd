"""Image-text contrastive loss: CLIP's symmetric softmax over all pairs of the step (Radford et al. 2021, section 2.3, figure 3).

In: streams `image` and `text` of caption rows; the model's `embed_images(uint8[S, H, W, 3])` and `embed_texts(pack)` → float[S, E],
unit length, and its learned `logit_scale` (inverse temperature). Every pair of the optimiser step is a negative of every other, whatever
the micro-batch and device count.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from trainers.batch import TensorBatch
from trainers.objectives.base import Output, by_sample


def softmax_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Mean of both directions' cross-entropies, float[].

    image, text: float[B, E], unit length; scale: float[B], every sample's copy of the inverse temperature.
    """
    logits = scale[:, None] * (image @ text.T)
    pairs = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2


class Contrastive:
    """`{"name": "contrastive"}`"""

    streams: ClassVar[dict[str, str]] = {"image": "image", "text": "caption"}
    gathers: tuple[str, ...] = ("image", "text", "scale")

    def forward(self, model: Any, batch: TensorBatch) -> Output:
        images, texts = batch.streams["image"], batch.streams["text"]
        image = by_sample(model.embed_images(images.images), images)
        text = by_sample(model.embed_texts(texts), texts)
        scale = model.logit_scale.expand(len(image))
        return Output(image.new_zeros(()), {"image": image, "text": text, "scale": scale})

    def normaliser(self, batch: TensorBatch) -> float:
        return float(max(1, batch.step_samples))

    def gathered(self, representations: dict[str, Tensor]) -> Tensor:
        return softmax_loss(representations["image"], representations["text"], representations["scale"])
