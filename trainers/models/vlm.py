"""A vision-language model on one page: encoder → connector → language model.

    pack.ids    int64[T]            the text, with a placeholder id at every image token
    pack.images uint8[N, H, W, 3]   0..n images a row, in the order of their placeholders
                    │ encoder     float[N, K, D_e]   K patch tokens an image, penultimate layer
                    │ connector   float[N, K, D]
    embeddings  float[T, D]         rows at pack.image_slots int64[N * K] are image tokens, the others text embeddings
                    │ language model over packed segments
    hidden      float[T, D]

(LLaVA: Liu et al. 2023, "Visual Instruction Tuning", section 4.1.) Training, decoding and weights are elsewhere: `language.TextModel`,
`decoding`, `weights`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from datasets_ray.errors import UserError
from trainers import switches
from trainers.models.connectors import connector
from trainers.models.encoders import Encoder, encoder_part
from trainers.models.language import TextModel, llm_part
from trainers.models.weights import Source, make_part


def replace_placeholders(text: Tensor, images: Tensor, pack: Any) -> Tensor:
    """text float[T, D] with rows pack.image_slots int64[M] replaced by images float[M, D]. A filler image (a rank without images that has
    to run the encoder all the same) has no slots: it leaves no trace but its zero gradient."""
    if getattr(pack, "filler_image", False):
        images = images[:0]
    if len(images) != len(pack.image_slots):
        raise UserError(
            f"{len(pack.image_slots)} image places in the text, {len(images)} image tokens from the encoder",
            why="the data's image recipe and the encoder disagree", hint="one size and patch in both",
        )  # fmt: skip
    return text.index_copy(0, pack.image_slots, images.to(text.dtype))


class Vlm(TextModel):
    """Parts: encoder, connector, llm."""

    @classmethod
    def build(cls, spec: dict[str, Any], source: Source) -> Vlm:
        parts = spec["parts"]
        encoder = encoder_part(parts["encoder"], source)
        llm: Any = llm_part(parts["llm"], source)
        width = llm.get_input_embeddings().embedding_dim
        join = make_part("connector", parts["connector"], source, lambda: connector(parts["connector"], encoder.width, width))
        return cls({"encoder": encoder, "connector": join, "llm": llm})

    @property
    def encoder(self) -> Encoder:
        return self.parts["encoder"]  # type: ignore[return-value]

    def embed(self, pack: Any) -> Tensor:
        """Text embeddings with the placeholders' rows replaced by image tokens: float[T, D]."""
        text = self.llm.get_input_embeddings()(pack.ids.clamp(min=0))  # placeholders are negative ids; their rows are replaced
        known = getattr(pack, "features", None)
        images = self.embed_images(pack.images) if known is None else self.parts["connector"](known.whole(self.encoder, pack.images))
        images = images.flatten(0, 1)
        return replace_placeholders(text, images, pack)

    def embed_images(self, images: Tensor | None) -> Tensor:
        """uint8[N, H, W, 3] → float[N, K, D]. Without images the connector still runs, on no rows: its gradient is zero, not absent,
        so that ranks with text-only packs take part in every reduction; an encoder that trains reads one black image for the same reason,
        whose tokens are dropped. A frozen encoder keeps no activations and is skipped (switch `images`)."""
        encoder = self.encoder
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in encoder.parameters())
        if images is None or len(images) == 0:
            if trains or not switches.on("images"):
                size = encoder.image_size
                with torch.set_grad_enabled(trains):
                    features = encoder(torch.zeros(1, size, size, 3, dtype=torch.uint8, device=self.device))[:0]
            else:
                features = torch.zeros(0, 1, encoder.width, device=self.device, dtype=self.dtype)
        else:
            with torch.set_grad_enabled(trains):
                features = encoder(images)
        return self.parts["connector"](features)

    @property
    def device(self) -> torch.device:
        return self.llm.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.llm.get_input_embeddings().weight.dtype
