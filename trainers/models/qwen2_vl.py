"""Qwen2-VL's own architecture on packs (Wang et al. 2024, "Qwen2-VL", section 2.1), from transformers' modules.

    images  uint8[H_n, W_n, 3] of any size, sides multiples of patch * merge
       │ patchify    float[P, C * 2 * patch * patch]   P = Σ h_n w_n patches, merge x merge neighbours together
       │ encoder     float[P, D_e]                     blocks with 2-D rotary positions, each image by itself
       │ connector   float[P / merge², D]              the merger: norm, merge² patches side by side, MLP
    text with placeholders replaced, positions in three axes (time, height, width), restarting with every segment (M-RoPE)
       │ llm         float[T, D]

Parts: encoder (visual without its merger), connector (visual.merger), llm (language model and lm_head). All three name the same
Qwen2VLConfig. Tensors keep transformers' names below these prefixes, so that a released checkpoint loads part by part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from datasets_ray.errors import UserError
from datasets_ray.images import CLIP_MEAN, CLIP_STD, recipe_from_json
from trainers import switches
from trainers.models import attention
from trainers.models.language import TextModel, without_dropout
from trainers.models.lean import lean
from trainers.models.vlm import replace_placeholders
from trainers.models.weights import Source, make_part


def patchify(image: Tensor, patch: int, merge: int, temporal: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8[H, W, 3] → float[h * w, 3 * temporal * patch²], as Qwen2VLImageProcessor: normalised, the still repeated `temporal` times,
    patches ordered so that each merge x merge neighbourhood is contiguous."""
    high, wide = image.shape[0] // patch, image.shape[1] // patch
    m, s = (torch.tensor(c, device=image.device) * 255 for c in (mean, std))
    x = image.sub(m).div_(s).view(high // merge, merge, patch, wide // merge, merge, patch, 3)
    x = x.permute(0, 3, 1, 4, 6, 2, 5)  # [rows, columns, merge, merge, channel, patch, patch]
    return x.unsqueeze(5).expand(-1, -1, -1, -1, -1, temporal, -1, -1).reshape(high * wide, -1)


def mrope_positions(lengths: Sequence[int], slots: Sequence[int], grids: Sequence[Sequence[int]], merge: int) -> Tensor:
    """int64[3, T]: time, height, width of every token (section 2.1, "M-RoPE"); each segment starts at 0.

    Text counts on in all axes at once. An image's tokens share one time and count rows and columns from there; what follows starts one
    after the furthest of them. slots: int, where image tokens are in the pack; grids: (1, h, w) in patches, in image order.
    """
    total = sum(lengths)
    positions = torch.arange(total).repeat(3, 1)
    image, taken, start = 0, 0, 0
    for length in lengths:
        cursor, shift = start, -start  # position = index + shift
        while taken < len(slots) and slots[taken] < start + length:
            rows, columns = grids[image][1] // merge, grids[image][2] // merge
            first, count = slots[taken], rows * columns
            positions[:, cursor:first] += shift
            corner = first + shift
            cells = torch.arange(count)
            positions[:, first : first + count] = torch.stack([torch.zeros_like(cells), cells // columns, cells % columns]) + corner
            cursor = first + count
            shift = corner + max(rows, columns) - cursor
            image, taken = image + 1, taken + count
        positions[:, cursor : start + length] += shift
        start += length
    return positions


class VisualBlocks(nn.Module):
    """The encoder part: patch embedding and blocks of Qwen2-VL's vision transformer."""

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.patch_embed, self.blocks, self.rotary_pos_emb = visual.patch_embed, visual.blocks, visual.rotary_pos_emb
        self.config = visual.config
        self.width: int = visual.config.embed_dim
        self.recompute = False

    def forward(self, patches: Tensor, grids: Tensor) -> Tensor:
        """patches float[P, 3 * 2 * patch²], grids int64[N, 3] → float[P, D_e] before the merger."""
        from transformers.vision_utils import get_vision_position_ids

        hidden = self.patch_embed(patches)
        rotation = self.rotary_pos_emb(hidden, get_vision_position_ids(grids, self.config.spatial_merge_size).to(hidden.device))
        segments = attention.Segments(grids.prod(1).tolist(), hidden.device, causal=False)
        for block in self.blocks:
            if self.recompute and self.training and torch.is_grad_enabled():
                hidden = checkpoint(_block, block, hidden, rotation, segments, use_reentrant=False)
            else:
                hidden = _block(block, hidden, rotation, segments)
        return hidden


def _block(block: Any, hidden: Tensor, rotation: tuple[Tensor, Tensor], segments: attention.Segments) -> Tensor:
    """Qwen2VLVisionBlock over all images at once, float[P, D_e]; transformers' own loops over images in every layer."""
    from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

    attn = block.attn
    query, key, value = attn.qkv(block.norm1(hidden)).unflatten(-1, (3, attn.num_heads, -1)).unbind(1)  # [P, heads, d]
    query, key = apply_rotary_pos_emb_vision(query, key, *rotation)
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    mixed = segments.attend(query, key, value, attn.scaling)[0]
    hidden = hidden + attn.proj(mixed.flatten(1))
    return hidden + block.mlp(block.norm2(hidden))


class LanguagePart(nn.Module):
    """The llm part: Qwen2-VL's text model and output embedding, with a causal LM's manners."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel

        text = config.text_config
        self.model = lean(Qwen2VLTextModel._from_config(text, attn_implementation=attention.register()))
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        nn.init.normal_(self.lm_head.weight, std=text.initializer_range)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def base_model(self) -> nn.Module:
        return self.model

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


class Qwen2Vl(TextModel):
    """Family `qwen2_vl`."""

    def __init__(self, parts: dict[str, nn.Module], config: Any, image: dict[str, Any] | None) -> None:
        super().__init__(parts)
        self.config = config
        vision = config.vision_config
        self.patch, self.merge, self.temporal = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        self.mean: tuple[float, ...] = CLIP_MEAN
        self.std: tuple[float, ...] = CLIP_STD
        if image is not None:
            wanted = {"kind": "native", "patch": self.patch, "merge": self.merge}
            given = {key: image.get(key) for key in wanted}
            if given != wanted:
                raise UserError(f"image recipe {given} for a Qwen2-VL of patch {self.patch}, merge {self.merge}", hint=f"image: {wanted}")
            recipe = recipe_from_json(image)
            self.mean, self.std = recipe.mean, recipe.std

    @classmethod
    def build(cls, spec: dict[str, Any], source: Source) -> Qwen2Vl:
        from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel, Qwen2VLConfig

        parts = spec["parts"]
        configs = {name: source.config(part, lambda released: released) for name, part in parts.items()}
        kind = configs["llm"].get("model_type", "qwen2_vl")
        if kind != "qwen2_vl":
            raise UserError(f"a checkpoint of type {kind!r} for a qwen2_vl", why="it is another architecture", hint="Qwen/Qwen2-VL-*")
        for name, fields in configs.items():
            if fields != configs["llm"]:
                raise UserError(f"qwen2_vl: {name} and llm have different configs", why="the parts of one architecture share its config")

        def config(depth: int | None = None) -> Any:
            fields = {k: v for k, v in configs["llm"].items() if k != "model_type"}
            made: Any = Qwen2VLConfig(**fields)
            if depth is not None:
                made.vision_config.depth = depth
            return made

        def visual(depth: int | None = None) -> Any:
            return Qwen2VisionTransformerPretrainedModel._from_config(config(depth).vision_config)

        encoder = make_part("encoder", parts["encoder"], source, lambda: VisualBlocks(visual()))
        merger = make_part("connector", parts["connector"], source, lambda: visual(0).merger)
        llm = make_part("llm", parts["llm"], source, lambda: LanguagePart(config()))
        return cls({"encoder": encoder, "connector": merger, "llm": without_dropout(llm)}, config(), source.image)

    def embed(self, pack: Any) -> Tensor:
        """float[T, D]: text embeddings with placeholders replaced by merged patches."""
        text = self.llm.get_input_embeddings()(pack.ids.clamp(min=0))
        return replace_placeholders(text, self.embed_images(pack.images, pack.grids), pack)

    def embed_images(self, images: list[Tensor] | None, grids: Tensor | None) -> Tensor:
        """N images uint8[H_n, W_n, 3] with grids int64[N, 3] → float[M, D], M image tokens in image order. Without images the connector
        runs on no rows and an encoder that trains on one black cell, for the sake of their gradients (see `vlm`)."""
        encoder: Any = self.parts["encoder"]
        weight = encoder.patch_embed.proj.weight
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in encoder.parameters())
        none = images is None or len(images) == 0
        if none and not trains and switches.on("images"):
            features = torch.zeros(0, encoder.width, device=weight.device, dtype=weight.dtype)
        else:
            if none:
                cell = self.patch * self.merge
                images = [torch.zeros(cell, cell, 3, dtype=torch.uint8, device=weight.device)]
                grids = torch.tensor([[1, self.merge, self.merge]])
            assert images is not None and grids is not None
            pixels = torch.cat([patchify(i, self.patch, self.merge, self.temporal, self.mean, self.std) for i in images])
            if len(pixels) != int(grids.prod(1).sum()):
                raise UserError(f"{len(pixels)} patches of pixels, grids of {int(grids.prod(1).sum())}", why="not the model's patch size")
            with torch.set_grad_enabled(trains):
                features = encoder(pixels.to(weight.dtype), grids)
        merged = self.parts["connector"](features)
        return merged[:0] if none else merged

    def positions(self, pack: Any) -> Tensor:
        """int64[3, 1, T]."""
        slots = [] if pack.image_slots is None else pack.image_slots.tolist()
        grids = [] if pack.grids is None else pack.grids.tolist()
        return mrope_positions(pack.lengths.tolist(), slots, grids, self.merge)[:, None].to(pack.ids.device)

    def _step_positions(self, positions: Tensor) -> Tensor:
        """Generated text counts on in all axes: int64[3, S, 1]."""
        return positions[None, :, None].expand(3, -1, -1)

    def activation_checkpointing(self, on: bool) -> None:
        super().activation_checkpointing(on)
        encoder: Any = self.parts["encoder"]
        encoder.recompute = on
