"""Tiny model specs and packs for the tests of trainers.models: real architectures, a few thousand parameters, seeded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trainers.context import Context

VOCABULARY, SIZE, PATCH, IMAGE_TOKENS, IMAGE = 96, 16, 8, 4, -200
LLAMA = {
    "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rope_theta": 10000.0,
}  # fmt: skip
QWEN2 = {**LLAMA, "model_type": "qwen2", "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
LLMS = {"llama": LLAMA, "qwen2": QWEN2}
OPEN_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": SIZE, "patch_size": PATCH, "width": 32, "layers": 3, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": VOCABULARY, "width": 32, "heads": 2, "layers": 2, "pool_type": "eos", "eos_id": 2},
    "tokenizer": "tiny-llama",
}
CLIP_VISION = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": SIZE, "patch_size": PATCH, "hidden_act": "gelu",
}  # fmt: skip
ENCODERS = {"open_clip": OPEN_CLIP, "transformers_vision": CLIP_VISION}
QWEN2_VL = {
    "model_type": "qwen2_vl",
    "vision_config": {
        "depth": 2, "embed_dim": 32, "hidden_size": 48, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4, "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "text_config": {
        "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 4, 4]},
    },
    "image_token_id": VOCABULARY - 1, "video_token_id": VOCABULARY - 2,
}  # fmt: skip
NATIVE = {"kind": "native", "patch": 4, "merge": 2, "min_pixels": 64, "max_pixels": 4096}


def part(builder: str, config: dict[str, Any], seed: int = 0, weights: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"builder": builder, "config": config, "weights": weights or {"fresh": seed}}


def vlm_spec(llm: str = "llama", encoder: str = "open_clip") -> dict[str, Any]:
    parts = {
        "encoder": part(encoder, ENCODERS[encoder], 1),
        "connector": part("mlp", {"depth": 2}, 2),
        "llm": part("causal_lm", LLMS[llm], 3),
    }
    return {"family": "vlm", "template": "plain", "tokenizer": "tiny-llama", "parts": parts}


def qwen2_vl_spec() -> dict[str, Any]:
    parts = {name: part("qwen2_vl", QWEN2_VL, seed) for seed, name in enumerate(("encoder", "connector", "llm"))}
    return {"family": "qwen2_vl", "template": "chatml", "tokenizer": "tiny-qwen2", "parts": parts}


def context(directory: Path, inputs: dict[str, Path] | None = None, **stage: Any) -> Context:
    return Context.local(directory, {"id": "train-0", "spec": {}, "runtime": {}, **stage}, inputs)


@dataclass
class Sample:
    """One row: ids int64[t] with IMAGE placeholders, its images uint8[H, W, 3] and their patch grids."""

    ids: Tensor
    images: list[Tensor] = field(default_factory=list)
    grids: list[list[int]] = field(default_factory=list)

    @property
    def labels(self) -> Tensor:
        return torch.where(self.ids == IMAGE, -100, self.ids)


def sample(seed: int, length: int, images: int = 0) -> Sample:
    """`length` random text tokens with square images between them."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY - 2, (length,), generator=g)
    cuts = sorted((torch.randperm(length - 1, generator=g)[:images] + 1).tolist())
    pieces = []
    for start, end in zip([0, *cuts], [*cuts, length]):
        pieces += [ids[start:end], torch.full((IMAGE_TOKENS if end < length else 0,), IMAGE)]
    made = [torch.randint(0, 256, (SIZE, SIZE, 3), generator=g, dtype=torch.uint8) for _ in range(images)]
    return Sample(torch.cat(pieces), made, [[1, SIZE // PATCH, SIZE // PATCH]] * images)


def native_sample(seed: int, length: int, sizes: Sequence[tuple[int, int]] = ()) -> Sample:
    """The same with images of these (height, width)s, for Qwen2-VL: patch 4, merge 2."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY - 2, (length,), generator=g)
    cuts = sorted((torch.randperm(length - 1, generator=g)[: len(sizes)] + 1).tolist())
    pieces, images, grids = [ids[: cuts[0] if cuts else length]], [], []
    for (high, wide), start, end in zip(sizes, cuts, [*cuts[1:], length]):
        pieces += [torch.full((high * wide // 64,), IMAGE), ids[start:end]]
        images.append(torch.randint(0, 256, (high, wide, 3), generator=g, dtype=torch.uint8))
        grids.append([1, high // 4, wide // 4])
    return Sample(torch.cat(pieces), images, grids)


def pack_of(samples: Sequence[Sample], native: bool = False) -> Any:
    """A pack with the fields of trainers.batch.TensorPack."""
    empty = torch.empty(0, dtype=torch.long)
    ids = torch.cat([s.ids for s in samples]) if samples else empty
    images: Any = [i for s in samples for i in s.images]
    if not native:
        images = torch.stack(images) if images else torch.zeros(0, SIZE, SIZE, 3, dtype=torch.uint8)
    return SimpleNamespace(
        ids=ids,
        labels=torch.cat([s.labels for s in samples]) if samples else empty,
        positions=torch.cat([torch.arange(len(s.ids)) for s in samples]) if samples else empty,
        lengths=torch.tensor([len(s.ids) for s in samples], dtype=torch.long),
        sample=torch.arange(len(samples)),
        images=images,
        image_slots=torch.nonzero(ids == IMAGE)[:, 0],
        grids=torch.tensor([g for s in samples for g in s.grids], dtype=torch.long).reshape(-1, 3),
    )


def loss_of(logits: Tensor, samples: Sequence[Sample]) -> Tensor:
    """Σ cross entropy of next tokens over rows laid end to end: logits float[T, V]."""
    total, start = logits.new_zeros(()), 0
    for s in samples:
        rows = logits[start : start + len(s.ids) - 1]
        total = total + F.cross_entropy(rows, s.labels[1:], ignore_index=-100, reduction="sum")
        start += len(s.ids)
    return total


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Every parameter's gradient (zeros where there is none), then cleared."""
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Equal within `tolerance` of the largest element of each tensor (at least 1)."""
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        scale = max(1.0, float(theirs[name].abs().max()))
        assert float((gradient - theirs[name]).abs().max()) <= tolerance * scale, name
