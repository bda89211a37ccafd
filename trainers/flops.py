"""Model FLOPs of a step, by part, of what it really ran; and what the device could have done meanwhile.

In: a built model whose parts are frozen or not, then each step's micro-batches. Out: FLOPs by part; the rate of a matrix product here.

Counted (Kaplan et al. 2020, section 2.1; Chowdhery et al. 2022, appendix B): a multiply-add is two FLOPs. A map of n weights costs 2n a
row that meets it; 2n more for its own gradient if it learns; 2n more for its input's gradient if anything before it learns. Attention over
a segment of L tokens costs 4 L² width a layer, half of it where it is causal, and twice that again where a gradient passes. Segments,
images and learned positions are the batch's own: no padding, no fillers, no logits at positions that nobody learns, nor what is left out
for them in the last layer (`trainers.models.written_out`). Not counted: biases, norms, activations, softmax, what an objective does with
representations, and whatever is computed a second time (activation checkpointing, chunked losses, a first pass for gathered losses). So
the rate that follows is the model's, not the hardware's.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from trainers.batch import TensorBatch
from trainers.models import written_out

OUTPUTS = ("o_proj", "out_proj", "proj")
"""Names of an attention's last map, whose inputs are heads * head_dim."""
KNOWN = ("positional_embedding", "position_embeddings", "proj", "text_projection", "in_proj_weight", "q_proj_weight", "k_proj_weight",
         "v_proj_weight")  # fmt: skip
"""Matrices outside of maps that are added (positions), or counted by name."""
MOST_ROWS = 8192
QUICK = 2e8
"""FLOPs of the largest product that a CPU is measured with."""


def size(parameter: nn.Parameter | torch.Tensor) -> int:
    """Elements, of the whole one if it is sharded (ZeRO 3)."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


class Flops:
    """`step(batches)` is arithmetic on numbers that the host has: nothing waits for a device.

    parts: part → FLOPs for one of each of `amounts`' units. uncounted: matrices that stand in no map known here (experts); with any of
    them the numbers are too low, and no share of a peak should be shown. largest: (inputs, outputs) of the map with most work.
    """

    def __init__(self, model: Any) -> None:
        parts = model.parts
        self.parts: dict[str, dict[str, float]] = {name: defaultdict(float) for name in parts}
        self.uncounted = [name for name, module in parts.items() for _ in _unknown(module)]
        maps = [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)]
        self.largest: tuple[int, int] = max(maps, key=lambda pair: pair[0] * pair[1], default=(1, 1))
        encoder = dict(parts.items()).get("encoder")
        self.extra = _prefix(encoder)
        if "llm" in parts:
            llm, flowing = parts["llm"], False
            if encoder is not None:
                flowing = _walk(encoder, False, self.parts["encoder"], "places", "place_pairs")
            if "connector" in parts:
                flowing = _walk(parts["connector"], flowing, self.parts["connector"], "visual")
            head = llm.get_output_embeddings()
            flowing = _walk(llm, flowing, self.parts["llm"], "tokens", "pairs", causal=True, skip=head, few=_asked(model))
            self.parts["llm"]["learned"] += _passes(size(head.weight), head.weight.requires_grad, flowing)
        elif encoder is not None:
            self._clip(encoder, self.parts["encoder"])

    def _clip(self, clip: Any, into: dict[str, float]) -> None:
        """Both towers of a CLIP and the two projections."""
        flowing = _walk(clip.visual, False, into, "places", "place_pairs")
        if isinstance(clip.visual.proj, nn.Parameter):
            into["images"] += _passes(size(clip.visual.proj), clip.visual.proj.requires_grad, flowing)
        flowing = _walk(clip.token_embedding, False, into, "tokens") or clip.positional_embedding.requires_grad
        flowing = _walk(clip.transformer, flowing, into, "tokens", "pairs", causal=True)
        projection = getattr(clip.text_projection, "weight", clip.text_projection)
        into["texts"] += _passes(size(projection), projection.requires_grad, flowing)

    def step(self, batches: Sequence[TensorBatch]) -> dict[str, float]:
        """FLOPs by part of this rank's micro-batches."""
        found = [amounts(batch, self.extra) for batch in batches]
        whole = {unit: sum(one.get(unit, 0.0) for one in found) for units in self.parts.values() for unit in units}
        return {part: sum(each * whole[unit] for unit, each in units.items()) for part, units in self.parts.items()}


def amounts(batch: TensorBatch, extra: int = 0) -> dict[str, float]:
    """What there is of each unit in a micro-batch, over its streams.

    tokens, pairs (Σ L² over segments), texts, learned (positions that meet the vocabulary), visual (positions that images fill), images,
    patches, places (patches and the encoder's own tokens, `extra` an image), place_pairs (Σ places² over images).
    """
    found: dict[str, float] = defaultdict(float)
    for pack in batch.streams.values():
        if pack.ids is not None:
            lengths = pack.lengths[: pack.segments]
            found["tokens"] += int(lengths.sum())
            found["pairs"] += int(lengths.square().sum())
            found["texts"] += pack.segments
            found["learned"] += 0 if pack.learned is None else pack.learned.numel()
            found["visual"] += 0 if pack.image_slots is None else pack.image_slots.numel()
        if pack.grids is not None and not pack.filler_image:
            patches = pack.grids.prod(1)
            found["images"] += len(patches)
            found["patches"] += int(patches.sum())
            found["places"] += int((patches + extra).sum())
            found["place_pairs"] += int((patches + extra).square().sum())
    return found


def _passes(weights: int, learns: bool, flowing: bool) -> float:
    """FLOPs of one row through a map and back."""
    return 2.0 * weights * (1 + learns + flowing)


def _walk(
    module: nn.Module, flowing: bool, into: dict[str, float], rows: str, pairs: str = "", *, causal: bool = False,
    skip: nn.Module | None = None, few: Collection[nn.Module] = (),
) -> bool:  # fmt: skip
    """Adds a stack's maps (met by `rows`) and attentions (by `pairs`), in the order in which they are registered, which is that of the
    computation. flowing: whether its input has a gradient; few: maps that only learned positions meet. Returns whether its output has
    one."""
    for child in module.modules():
        if child is skip:
            continue
        if isinstance(child, nn.Linear):
            met = "learned" if child in few else rows
            into[met] += _passes(child.in_features * child.out_features, child.weight.requires_grad, flowing)
        elif isinstance(child, (nn.Conv2d, nn.Conv3d)):  # a patch embedding: pixels have no gradient
            into["patches"] += _passes(size(child.weight), child.weight.requires_grad, False)
        elif isinstance(child, nn.MultiheadAttention):
            weight = child.in_proj_weight
            into[rows] += _passes(3 * child.embed_dim * child.embed_dim, weight is not None and weight.requires_grad, flowing)
        if width := _attention_width(child):
            passes = flowing or any(p.requires_grad for p in child.parameters())
            into[pairs] += 4.0 * width * (0.5 if causal else 1.0) * (3 if passes else 1)
        flowing = flowing or any(p.requires_grad for p in child.parameters(recurse=False))
    return flowing


def _asked(model: Any) -> list[nn.Module]:
    """Maps of the language model that run for learned positions only: the last layer's but its keys' and values', where written out."""
    base: Any = getattr(model.parts["llm"], "base_model", None)
    if not written_out.takes(base, model.parts["llm"].get_input_embeddings().weight):
        return []
    last = base.layers[base.config.num_hidden_layers - 1]
    return [last.self_attn.q_proj, last.self_attn.o_proj, last.mlp.gate_proj, last.mlp.up_proj, last.mlp.down_proj]


def _attention_width(module: nn.Module) -> int:
    """heads * head_dim of an attention, 0 of anything else."""
    if "Attention" not in type(module).__name__:
        return 0
    return next((getattr(module, name).in_features for name in OUTPUTS if hasattr(getattr(module, name, None), "in_features")), 0)


def _prefix(encoder: Any) -> int:
    """Tokens that an encoder adds to an image's patches (class token, registers)."""
    return int(getattr(encoder, "prefix_tokens", hasattr(encoder, "visual")))


def _unknown(module: nn.Module) -> Iterator[str]:
    """Names of matrices that are no map, no embedding and nothing known."""
    for child in module.modules():
        if not isinstance(child, (nn.Linear, nn.Conv2d, nn.Conv3d, nn.Embedding)):
            for name, parameter in child.named_parameters(recurse=False):
                shape = getattr(parameter, "ds_shape", parameter.shape)
                if len(shape) > 1 and shape[0] > 1 and name not in KNOWN:
                    yield name


@lru_cache(maxsize=64)
def matmul_rate(device: str, dtype: torch.dtype, inputs: int, outputs: int, rows: int = MOST_ROWS, seconds: float = 0.05) -> float:
    """FLOP/s of [rows, inputs] @ [inputs, outputs] here: the best of what `seconds` have room for, once per process, without dice.

    On a CPU as many rows as a short product has room for.
    """
    cuda = device.startswith("cuda")
    rows = min(rows, MOST_ROWS)
    if not cuda:
        rows = max(16, min(rows, int(QUICK / (2 * inputs * outputs))))

    def matrix(high: int, wide: int) -> torch.Tensor:  # no zeros: a GPU is faster and cooler with them
        return torch.linspace(-1.0, 1.0, high * wide, device=device).view(high, wide).to(dtype)

    with torch.no_grad():
        left, right, repeats = matrix(rows, inputs), matrix(inputs, outputs), 8 if cuda else 1
        best, deadline = 0.0, time.perf_counter() + seconds
        left @ right
        while not best or time.perf_counter() < deadline:
            if cuda:
                torch.cuda.synchronize(device)
            begin = time.perf_counter()
            for _ in range(repeats):
                left @ right
            if cuda:
                torch.cuda.synchronize(device)
            best = max(best, 2.0 * rows * inputs * outputs * repeats / (time.perf_counter() - begin))
    return best


def share(flops: float, seconds: float, rate: float | None) -> float | None:
    """Of what a device of this rate (FLOP/s) does in that time; None where the rate isn't known."""
    return flops / (seconds * rate) if rate and seconds > 0 else None
