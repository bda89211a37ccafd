"""Encoder outputs that are kept. In: a built model; out: which encoder it has, down to its bits. In: a pack's features; out: all of them.

What an encoder makes of an image depends, in its last bits, on what else is in the batch (measured on a CPU: at widths 96 and 192 in fp32,
192 to 1,024 in bf16: other kernels for other numbers of rows). So with kept features each image is encoded alone: what is trained then
doesn't depend on which of them were found, bit for bit, and equals training without them within rounding, as with another micro-batch size.

The same encoder has the same tensors and gives the same answer to one picture; both are hashed. So whatever else decides an output (heads,
activation, normalisation, library, kernels, threads) makes other features without being declared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from datasets_ray.features_cache import FeatureStore, PackFeatures
from datasets_ray.images import ImageRecipe
from trainers import switches
from trainers.context import Context

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def why_not(spec: dict[str, Any], ctx: Context, recipe: ImageRecipe | None) -> str | None:
    """Why a stage keeps none; None where it does. Cheap: no model is needed. The empty text: nobody asked for them."""
    if not ctx.runtime.get("features") or ctx.features is None or not switches.on("features"):
        return ""
    if spec["model"]["family"] != "vlm" or recipe is None or not recipe.uniform:
        return "features are kept of images of one size only"
    if any("encoder" in phase["learning_rates"] for phase in spec["phases"]):
        return "features aren't kept: the encoder trains"
    if ctx.runtime.get("zero", 0) == 3 and ctx.world > 1:
        return "features aren't kept: under ZeRO 3 all ranks run the encoder together"
    return None


def store_of(model: Any, ctx: Context) -> FeatureStore | None:
    """Where this model's encoder outputs are kept; None for one that doesn't answer alike twice (dropout). It moves to the device here."""
    assert ctx.features is not None
    encoder: nn.Module = model.parts["encoder"].to(ctx.device)
    first, again = (_answer(encoder, model.encoder.image_size, seed) for seed in (0, 1))
    if not torch.equal(first, again):
        return None
    taken = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        taken.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        taken.update(_bytes(tensor).data)
    taken.update(_bytes(first).data)
    dtype = str(first.dtype).removeprefix("torch.")
    return FeatureStore(ctx.features, taken.hexdigest(), first.shape[1], first.shape[2] * first.element_size(), dtype)


def _answer(encoder: nn.Module, side: int, seed: int) -> Tensor:
    """What the encoder makes of one picture while it stands in a model that trains: float[1, K, D]."""
    was, device = encoder.training, next(encoder.parameters()).device
    picture = torch.arange(side * side * 3, device=device).mul_(40503).bitwise_right_shift_(4).bitwise_and_(255).to(torch.uint8)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(seed)
        made = encoder.train()(picture.view(1, side, side, 3))
    encoder.train(was)
    return made


def _bytes(tensor: Tensor) -> np.ndarray:
    """uint8[bytes]."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


@dataclass(frozen=True)
class Features:
    """A pack's encoder outputs on its device. values: float[N, K, D], unset at missing int64[M]; keep: takes what was made of those."""

    values: Tensor
    missing: Tensor
    keep: Callable[[np.ndarray], None]

    @classmethod
    def of(cls, pack: PackFeatures, move: Callable[[np.ndarray], Tensor]) -> Features:
        return cls(move(pack.values).view(DTYPES[pack.dtype]), move(pack.missing), pack.keep)

    def whole(self, encoder: Callable[[Tensor], Tensor], images: Tensor | None) -> Tensor:
        """All of them, float[N, K, D], once images uint8[M, H, W, 3] have gone through the encoder, each alone; those are kept."""
        if images is None or not len(images):
            return self.values
        with torch.no_grad():
            made = torch.cat([encoder(image[None]) for image in images])
        # on a GPU this waits for the encoder, once an image; where features are found nothing waits
        self.keep(_bytes(made).reshape(len(made), made.shape[1], -1))
        return self.values.index_copy(0, self.missing, made)
