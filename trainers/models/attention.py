"""Block-diagonal causal attention over packed tokens: no dense mask, no attention across samples.

A pack is one row of T tokens made of S segments. `Segments` computes once per pack where every token goes; all layers share it.
On a GPU in half precision the fused variable-length kernel runs on the pack as it is. Elsewhere the segments are gathered into
right-padded buckets of similar lengths `[S_b, H, T_b, d]`; pads sit after every real token, so that the causal mask alone is exact,
and a dense `[T, T]` mask (20 times dearer on a CPU) never exists.

`register()` makes it known to transformers as attention implementation `"packed"`. No mask function is registered under that name,
so transformers builds no mask; models receive the plan as the keyword argument `packing` of their forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from datasets_ray.errors import UserError
from trainers import switches

NAME = "packed"
"""The attention implementation's name in a transformers config."""


class Packing(Protocol):
    """Who may look at whom. `attend` is called by every layer with its queries, keys and values."""

    longest: int

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query float[B, H, L, d], key and value float[B, G, M, d] (G key-value heads, H a multiple of G) → float[B, L, H, d]."""
        ...


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """float[B, G, T, d] → float[B, H, T, d]: head h reads key-value head h // (H / G)."""
    batch, groups, length, width = x.shape
    if groups == heads:
        return x
    return x[:, :, None].expand(batch, groups, heads // groups, length, width).reshape(batch, heads, length, width)


class Segments:
    """The index plan of one pack.

    lengths: tokens of each segment in order, all positive. causal: each token sees itself and what precedes it in its segment;
    else its whole segment (images in a native-resolution encoder), and then buckets hold equal lengths only, for want of a mask.
    """

    WASTE = 0.75
    """A segment joins a bucket if it fills at least this share of it: at worst 1 / 0.75² of the work is padding."""
    SHORT = 64
    """Below this length a bucket costs more to launch than to pad."""

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu", causal: bool = True) -> None:
        assert all(n > 0 for n in lengths), "a segment holds at least one token"
        self.lengths, self.causal = list(lengths), causal
        self.longest = max(self.lengths, default=0)
        self.total = sum(self.lengths)
        self.bounds = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=device)
        starts = [0, *accumulate(self.lengths)]

        buckets: list[list[int]] = []
        for segment in sorted(range(len(self.lengths)), key=lambda s: -self.lengths[s]):
            top = self.lengths[buckets[-1][0]] if buckets else 0
            fits = self.lengths[segment] >= self.WASTE * top or top <= self.SHORT if causal else self.lengths[segment] == top
            if buckets and fits:
                buckets[-1].append(segment)
            else:
                buckets.append([segment])

        self.buckets: list[tuple[int, int]] = []
        """(segments, padded length) of each bucket, longest first."""
        gather: list[Tensor] = []
        restore = torch.empty(self.total, dtype=torch.long)
        offset = 0
        for bucket in buckets:
            width = self.lengths[bucket[0]]
            bucket.sort()
            self.buckets.append((len(bucket), width))
            start = torch.tensor([starts[s] for s in bucket])[:, None]
            size = torch.tensor([self.lengths[s] for s in bucket])[:, None]
            column = torch.arange(width)[None]
            real = column < size
            # A pad repeats its segment's first token: finite, never seen by a real query, never restored, so without gradient.
            gather.append(torch.where(real, start + column, start).flatten())
            slot = offset + torch.arange(len(bucket))[:, None] * width + column
            restore[(start + column)[real]] = slot[real]
            offset += len(bucket) * width
        plan = torch.cat(gather) if gather else torch.empty(0, dtype=torch.long)
        # Segments of one length lie in the pack as they lie in their bucket: nothing to move.
        self.in_place = offset == self.total and bool((plan == torch.arange(self.total)).all())
        self.gather, self.restore = plan.to(device), restore.to(device)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query float[1, H, T, d], key, value float[1, G, T, d] → float[1, T, H, d]."""
        if not switches.on("segments"):
            return self._masked(query, key, value, scale)
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, d]
        if self._fused(q):
            from torch.nn.attention.varlen import varlen_attn

            window = (-1, 0) if self.causal else (-1, -1)
            out = varlen_attn(
                q, k, v, self.bounds, self.bounds, self.longest, self.longest,
                scale=scale, window_size=window, enable_gqa=q.shape[1] != k.shape[1],
            )  # fmt: skip
            assert isinstance(out, Tensor)
            return out[None]
        return self._bucketed(q, k, v, scale)[None]

    def _masked(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """float[1, T, H, d] by one attention over the pack with a dense mask bool[T, T]: the plain path."""
        owner = torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths)).to(query.device)
        seen = owner[:, None] == owner[None]
        key, value = (repeat_heads(x, query.shape[1]) for x in (key, value))
        mask = seen.tril() if self.causal else seen
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale).transpose(1, 2)

    def _fused(self, q: Tensor) -> bool:
        """Flash attention: half precision, head width a multiple of 8 up to 256."""
        return q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256

    def _bucketed(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """float[T, H, d] by scaled-dot-product attention over the buckets."""
        heads, width = q.shape[1], q.shape[2]
        if not self.in_place:
            q, k, v = (Spread.apply(x, self.gather, self.restore) for x in (q, k, v))  # type: ignore[misc]
        outputs, offset = [], 0
        for rows, length in self.buckets:
            part = slice(offset, offset + rows * length)
            qb, kb, vb = (x[part].reshape(rows, length, x.shape[1], x.shape[2]).transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(
                qb, repeat_heads(kb, heads), repeat_heads(vb, heads), is_causal=self.causal and length > 1, scale=scale
            )
            outputs.append(out.transpose(1, 2).reshape(rows * length, heads, width))
            offset += rows * length
        packed = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return packed if self.in_place else Collect.apply(packed, self.gather, self.restore)  # type: ignore[return-value]


class Spread(torch.autograd.Function):
    """Tokens [T, ...] → slots [S, ...]: x[gather]. A pad's gradient is zero, so the way back is a selection where autograd would add up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gather: Tensor, restore: Tensor) -> Tensor:
        ctx.save_for_backward(restore)
        return x.index_select(0, gather)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0].index_select(0, ctx.saved_tensors[0]), None, None


class Collect(torch.autograd.Function):
    """Slots [S, ...] → tokens [T, ...]: x[restore]. Every token has a slot of its own; pads get a zero gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gather: Tensor, restore: Tensor) -> Tensor:
        ctx.save_for_backward(restore)
        ctx.slots = len(gather)
        return x.index_select(0, restore)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        outer = gradients[0]
        return outer.new_zeros(ctx.slots, *outer.shape[1:]).index_copy_(0, ctx.saved_tensors[0], outer), None, None


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    packing: Packing | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface. `others` is what models pass along for other kernels (positions, cache flags); the ones that
    would change the result are refused. Returns (float[B, L, H, d], None)."""
    assert packing is not None and attention_mask is None, "the packed attention gets its plan from trainers.models"
    if sliding_window is not None and packing.longest > sliding_window:
        raise UserError(
            f"a segment of {packing.longest} tokens in a model with a sliding window of {sliding_window}",
            why="packed attention looks at whole segments", hint=f"set max_tokens to {sliding_window} or less",
        )  # fmt: skip
    for name in ("softcap", "s_aux", "position_bias"):
        if others.get(name) is not None:
            raise UserError(f"{type(module).__name__} uses {name}", why="packed attention is plain softmax attention")
    return packing.attend(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling), None


def register() -> str:
    """Makes the implementation known to transformers (idempotent); returns its name."""
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
    return NAME
