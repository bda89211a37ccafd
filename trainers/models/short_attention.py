"""Attention over the segments of a pack on a CPU, with its gradient: short segments by matrix products, long ones by torch's fused kernel.

    q float[Q, heads * width], k, v float[T, groups * width] ──► attended float[Q, heads * width] and what the gradient needs

In: queries of all tokens or of some rows only (`Asked`), keys and values of all, where segments lie (`Segments`). Out: float, same places.
At a hundred tokens a segment the fused kernel takes two to three times what its products take: it computes probabilities again in the
backward pass, and its blocks are made for long sequences. So up to `LONG` tokens probabilities are kept, not normalised: exponentials of
the scores as they are, their sums divide the result (and the gradient that comes back). No maximum is subtracted unless a sum shows that
exponentials have left the range where that is exact. Longer segments, whose square doesn't fit, take the fused kernel (switch `products`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from torch import Tensor

from trainers import switches
from trainers.models.attention import Segments

LONG = 512
"""Tokens of the longest segment whose probabilities are kept: heads * LONG numbers a token and layer at worst."""
SAFE = 1e-20, 1e20
"""Sums of exponentials between which neither they nor their shares of a gradient leave fp32's range."""


@dataclass(frozen=True)
class Form:
    """heads, groups (key-value heads), width of a head, scale of the scores, eps of the two norms."""

    heads: int
    groups: int
    width: int
    scale: float
    eps: tuple[float, float]


@dataclass(frozen=True)
class Asked:
    """Rows of a pack that ask, int64[Q], none twice; where they ascend and segments are short, also how many of each segment they are, and
    which of its keys lie behind them, bool[count, length]. Else all are computed, the others as zeros."""

    rows: Tensor
    counts: list[int] | None = None
    unseen: list[Tensor] | None = None


def by_products(packing: Segments) -> bool:
    return packing.longest <= LONG and switches.on("products")


def asked(rows: Tensor, packing: Segments) -> Asked:
    if not (by_products(packing) and packing.causal) or not bool((rows[1:] > rows[:-1]).all()):
        return Asked(rows)
    bounds = packing.bounds.long()
    counts = torch.searchsorted(rows, bounds).diff()
    within = rows - bounds[:-1].repeat_interleave(counts)
    behind, sizes = within[:, None] < torch.arange(packing.longest), counts.tolist()
    return Asked(rows, sizes, [one[:, :length] for one, length in zip(behind.split(sizes), packing.lengths)])


def attend(
    q: Tensor, k: Tensor, v: Tensor, packing: Segments, form: Form, only: Asked | None = None, keep: bool = True,
    new: Callable[..., Tensor] = torch.empty,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Each token that asks sees its own segment up to itself. Returns (float[Q, heads * width], what `attend_back` needs if `keep`)."""
    if only is not None and only.counts is None:
        attended, kept = attend(_spread(q, k, only), k, v, packing, form, None, keep, new)
        return attended[only.rows], kept
    if not by_products(packing):
        return _fused(q, k, v, packing, form)
    attended, (k, v) = new(*q.shape), (_repeated(one, form) for one in (k, v))
    sums = new(len(q), form.heads)
    sizes, unseen = (packing.lengths, None) if only is None else (only.counts or [], only.unseen)
    squares = [form.heads * n * m for n, m in zip(sizes, packing.lengths)]
    powers = new(sum(squares) if keep else max(squares, default=0))
    for exact in (False, True):
        by_segment = zip(_scores(powers, sizes, packing, form), *_heads(sizes, form, q, attended), *_heads(packing.lengths, form, k, v))
        totals = sums.t().split(sizes, 1)
        for number, (scores, query, out, key, value) in enumerate(by_segment):
            scores.baddbmm_(query, key.transpose(1, 2), beta=0, alpha=form.scale)
            if exact and packing.causal:
                scores.masked_fill_(_unseen(scores) if unseen is None else unseen[number], -torch.inf)
            if exact and len(query[0]):
                scores.sub_(scores.amax(-1, keepdim=True))
            scores.exp_()
            if packing.causal and not exact:
                scores.tril_() if unseen is None else scores.masked_fill_(unseen[number], 0.0)
            torch.sum(scores, -1, out=totals[number])
            torch.bmm(scores, value, out=out)
        if not len(q) or (float(sums.amin()) > SAFE[0] and float(sums.amax()) < SAFE[1]):
            break
    attended.view(len(q), form.heads, -1).div_(sums[..., None])
    return attended, [powers, sums]


def attend_back(
    outer: Tensor, q: Tensor, k: Tensor, v: Tensor, attended: Tensor, kept: list[Tensor], packing: Segments, form: Form,
    only: Asked | None = None, new: Callable[..., Tensor] = torch.empty,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k, v from that of what was attended (written over)."""
    if only is not None and only.counts is None:
        outer, q, attended = (_spread(one, k, only) for one in (outer, q, attended))
        by_q, by_k, by_v = attend_back(outer, q, k, v, attended, kept, packing, form, None, new)
        return by_q[only.rows], by_k, by_v
    if not by_products(packing):
        return _fused_back(outer, q, k, v, attended, kept, packing, form)
    k, v = (_repeated(one, form) for one in (k, v))
    by_q, by_k, by_v = (new(*one.shape) for one in (q, k, v))
    probabilities, sums = kept
    sizes = packing.lengths if only is None else only.counts or []
    outer.view(len(q), form.heads, -1).div_(sums[..., None])
    along = (outer * attended).view(len(q), form.heads, -1).sum(-1)  # float[Q, heads]: each row's Σ p dp, over its sum
    scratch = new(form.heads * max((n * m for n, m in zip(sizes, packing.lengths)), default=0))
    by_segment = zip(
        _scores(probabilities, sizes, packing, form), along.t()[..., None].split(sizes, 1), *_heads(sizes, form, outer, q, by_q),
        *_heads(packing.lengths, form, k, v, by_k, by_v),
    )  # fmt: skip
    for shares, shift, above, query, into_q, key, value, into_k, into_v in by_segment:
        torch.bmm(shares.transpose(1, 2), above, out=into_v)
        inside = scratch[: shares.numel()].view_as(shares)
        torch.bmm(above, value.transpose(1, 2), out=inside).sub_(shift).mul_(shares)
        into_q.baddbmm_(inside, key, beta=0, alpha=form.scale)
        into_k.baddbmm_(inside.transpose(1, 2), query, beta=0, alpha=form.scale)
    return by_q, _summed(by_k, form), _summed(by_v, form)


def _spread(x: Tensor, like: Tensor, only: Asked) -> Tensor:
    """float[Q, W] → float[T, W], zeros where nobody asks."""
    return x.new_zeros(len(like), x.shape[1]).index_copy_(0, only.rows, x)


def _heads(sizes: list[int], form: Form, *of: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Each tensor float[T, heads * width] by segment: float[heads, length, width], where it lies."""
    return (one.view(len(one), form.heads, form.width).transpose(0, 1).split(sizes, 1) for one in of)


def _scores(kept: Tensor, sizes: list[int], packing: Segments, form: Form) -> list[Tensor]:
    """float[...] by segment: float[heads, asked, length]."""
    shapes = [(form.heads, n, m) for n, m in zip(sizes, packing.lengths)]
    squares = [h * n * m for h, n, m in shapes]
    parts = kept.split(squares) if len(kept) == sum(squares) else [kept[:square] for square in squares]  # one after the other in one place
    return [one.view(shape) for one, shape in zip(parts, shapes)]


def _unseen(scores: Tensor) -> Tensor:
    """bool[length, length]: keys behind the query."""
    return torch.ones(scores.shape[1:], dtype=torch.bool).triu_(1)


def _repeated(x: Tensor, form: Form) -> Tensor:
    """float[T, groups * width] → float[T, heads * width]."""
    if form.groups == form.heads:
        return x
    return x.view(len(x), form.groups, 1, form.width).expand(-1, -1, form.heads // form.groups, -1).reshape(len(x), -1)


def _summed(x: Tensor, form: Form) -> Tensor:
    """The gradient's way back through `_repeated`."""
    return x if form.groups == form.heads else x.view(len(x), form.groups, -1, form.width).sum(2).view(len(x), -1)


# ── torch's fused kernel ─────────────────────────────────────────────────────────────────────────────────────────────────
def _runs(packing: Segments) -> list[tuple[int, int, int]]:
    """(first token, segments, length) of neighbours of one length: what the kernel takes at once, where it lies."""
    runs = [(length, len(list(same))) for length, same in groupby(packing.lengths)]
    starts = accumulate((length * rows for length, rows in runs), initial=0)
    return [(start, rows, length) for start, (length, rows) in zip(starts, runs)]


def _run(x: Tensor, run: tuple[int, int, int], heads: int) -> Tensor:
    """float[T, heads * width] → float[segments, heads, length, width] of a run, without a copy."""
    start, rows, length = run
    return x[start : start + rows * length].view(rows, length, heads, -1).transpose(1, 2)


def _fused(q: Tensor, k: Tensor, v: Tensor, packing: Segments, form: Form) -> tuple[Tensor, list[Tensor]]:
    """As `attend`, and the softmaxes' logarithms by run."""
    attended, sums, (k, v) = torch.empty_like(q), [], (_repeated(one, form) for one in (k, v))
    for run in _runs(packing):
        found, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(_run(x, run, form.heads) for x in (q, k, v)), 0.0, packing.causal and run[2] > 1, scale=form.scale
        )
        _run(attended, run, form.heads).copy_(found)
        sums.append(total)
    return attended, sums


def _fused_back(
    outer: Tensor, q: Tensor, k: Tensor, v: Tensor, attended: Tensor, sums: list[Tensor], packing: Segments, form: Form
) -> tuple[Tensor, Tensor, Tensor]:
    k, v = (_repeated(one, form) for one in (k, v))
    gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for run, total in zip(_runs(packing), sums):
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(_run(x, run, form.heads) for x in (outer, q, k, v, attended)), total, 0.0, packing.causal and run[2] > 1, scale=form.scale
        )
        for into, one in zip(gradients, found):
            _run(into, run, form.heads).copy_(one)
    return gradients[0], _summed(gradients[1], form), _summed(gradients[2], form)
