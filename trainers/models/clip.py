"""Family `clip`: an image tower and a text tower that meet in one space (open_clip's CLIP). Trained by contrastive objectives, read by
zero-shot classification and hard-negative mining. Its weights file also serves a vlm's `open_clip` encoder.

    embed_images(uint8[N, H, W, 3]) → float[N, E]      embed_texts(pack of S texts) → float[S, E]      both L2-normalised
    logit_scale → float[]: what similarities are multiplied by (1 / temperature, at most 100 as in Radford et al. 2021, section 2.5)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datasets_ray.errors import UserError
from datasets_ray.images import CLIP_MEAN, CLIP_STD, recipe_from_json
from trainers.models.clip_names import to_open_clip
from trainers.models.encoders import normalise, open_clip_config, released_open_clip
from trainers.models.weights import Source, make_part


def open_clip_model(config: dict[str, Any]) -> nn.Module:
    """open_clip.CLIP with both towers."""
    from open_clip.model import CLIP

    fields = open_clip_config(config)
    text = fields.get("text_cfg")
    if text is None or text.get("hf_model_name") or text.get("no_causal_mask"):
        raise UserError("this open_clip model's text tower is not CLIP's causal transformer", hint="text_cfg of a ViT-* model")
    # [1] and not []: DeepSpeed broadcasts every parameter as bytes, which a tensor without dimensions can't be viewed as
    model = CLIP(**{**fields, "nonscalar_logit_scale": True})
    model.released = to_open_clip  # a transformers CLIPModel's checkpoint holds the same tensors
    return model


class Clip(nn.Module):
    """Parts: encoder (both towers and the temperature)."""

    streams = ("image", "text")

    def __init__(self, module: nn.Module, config: dict[str, Any], image: dict[str, Any] | None) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"encoder": module})
        self.config = config
        self.tokenizer: str | None = config.get("tokenizer")
        """The text tower's tokenizer: a name for datasets_ray.tokens; None for open_clip's own."""
        self.mean: tuple[float, ...] = CLIP_MEAN
        self.std: tuple[float, ...] = CLIP_STD
        if image is not None:
            recipe = recipe_from_json(image)
            self.mean, self.std = recipe.mean, recipe.std

    @classmethod
    def build(cls, spec: dict[str, Any], source: Source) -> Any:
        """A Clip; a Siglip where transformers_vision builds it."""
        part = spec["parts"]["encoder"]
        if part["builder"] != "open_clip":
            from trainers.models.siglip import Siglip

            return Siglip.build(spec, source)
        config = released_open_clip(part, source)
        module = make_part("encoder", part, source, lambda: open_clip_model(config))
        size: int = module.visual.image_size[0]  # type: ignore[union-attr, index, assignment]
        if source.image is not None and source.image.get("size") != size:
            raise UserError(f"images of size {source.image.get('size')} for a CLIP of size {size}", hint=f"kind: square, size: {size}")
        return cls(module, config, source.image)

    @property
    def clip(self) -> Any:
        return self.parts["encoder"]

    @property
    def width(self) -> int:
        """E."""
        return self.clip.text_projection.shape[-1]

    @property
    def vocabulary(self) -> int:
        """Rows of the text tower's embedding."""
        return self.clip.token_embedding.num_embeddings

    @property
    def context_length(self) -> int:
        """Tokens that the text tower reads at most."""
        return self.clip.context_length

    @property
    def logit_scale(self) -> Tensor:
        return self.clip.logit_scale.reshape(()).clamp(max=math.log(100.0)).exp()

    def embed_images(self, images: Tensor) -> Tensor:
        """uint8[N, H, W, 3] → float[N, E], unit length."""
        pixels = normalise(images, self.mean, self.std, self.clip.visual.conv1.weight.dtype)
        return F.normalize(self.clip.encode_image(pixels), dim=-1)

    def embed_texts(self, texts: Any) -> Tensor:
        """A pack of S texts, each read at its last token, or padded ids int64[S, L], read where the tower's own pooling says
        (end-of-text) → float[S, E], unit length. Causal: what pads the right of a text changes nothing."""
        if isinstance(texts, Tensor):
            ids, last = texts, None
        else:
            lengths: list[int] = texts.lengths.tolist()
            ids = torch.nn.utils.rnn.pad_sequence(list(texts.ids.split(lengths)), batch_first=True) if lengths else texts.ids.view(0, 1)
            last = torch.tensor(lengths, device=ids.device, dtype=torch.long) - 1
        clip, length = self.clip, ids.shape[1]
        if length > self.context_length:
            raise UserError(
                f"a text of {length} tokens for a text tower of {self.context_length}", hint=f"set max_tokens to {self.context_length}"
            )
        dtype = clip.transformer.get_cast_dtype()
        hidden = clip.token_embedding(ids).to(dtype) + clip.positional_embedding[:length].to(dtype)
        hidden = clip.ln_final(clip.transformer(hidden, attn_mask=clip.attn_mask[:length, :length]))
        if last is None:
            from open_clip.transformer import text_global_pool

            pooled = text_global_pool(hidden, ids, clip.text_pool_type, eos_token_id=clip.text_eos_id)
        else:
            pooled = hidden[torch.arange(len(ids), device=ids.device), last]
        projection = clip.text_projection
        return F.normalize(projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection, dim=-1)

    def activation_checkpointing(self, on: bool) -> None:
        """Recompute each block in the backward pass (both towers)."""
        self.clip.set_grad_checkpointing(on)
