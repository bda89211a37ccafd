"""A Llama layer on a CPU as one function with its gradient written out: the same numbers as the modules', in far fewer passes over memory.

    x float[T, D] ──norm, q k v, rotation──► attention over segments ──► output map, norm, gated MLP──► float[T, D] (or its `rows` only)

In: packed hidden states, rotations, a layer's weights. Out: hidden states, and gradients of both. Which models run so: `written_out`.

Small models on a CPU are bound by memory and by calls, not by products. So rows go through a layer `CHUNK` at a time, whose activations
stay in the core's cache; gradients of maps are added up by the products themselves; a segment is attended where it lies, without padding;
and the gate's product is computed again instead of kept. In the last layer everything behind attention is done for the rows that are asked
for only. Rotations pair neighbours instead of halves (one complex product a number): rows of the query's and key's maps are reordered
alike, which leaves their products as they are (Su et al. 2021, equation 34).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from trainers.models.attention import Segments

CHUNK = 256
"""Rows at a time: at some hundred numbers a row, what a chunk needs fits a core's second-level cache."""


@dataclass(frozen=True)
class Form:
    """heads, groups (key-value heads), width of a head, scale of the scores, eps of the two norms."""

    heads: int
    groups: int
    width: int
    scale: float
    eps: tuple[float, float]


@lru_cache(maxsize=64)
def _neighbours(heads: int, width: int) -> tuple[Tensor, Tensor]:
    """int64[heads * width] and its inverse: halves of each head side by side, and back."""
    within = torch.arange(width).view(2, width // 2).t().reshape(-1)
    order = (torch.arange(heads)[:, None] * width + within).flatten()
    return order, order.argsort()


def _chunks(count: int) -> Iterator[slice]:
    return (slice(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK))


def _scales(x: Tensor, eps: float) -> Tensor:
    """float[T, D] → 1 / sqrt(mean(x²) + eps), float[T, 1]."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _pairs(x: Tensor, width: int) -> Tensor:
    """float[T, heads * width] seen as complex[T, heads, width / 2]."""
    return torch.view_as_complex(x.view(len(x), -1, width // 2, 2))


def before(
    x: Tensor, turn: Tensor, form: Form, norm: Tensor, wq: Tensor, bq: Tensor | None, wk: Tensor, bk: Tensor | None, wv: Tensor,
    bv: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """x float[T, D] → rotated queries and keys, values, float[T, heads or groups * width], and the norm's scales float[T, 1].
    wq, bq, wk, bk: with neighbours paired."""
    (q, k, v), scales = projected(x, turn, form, norm, ((wq, bq, True), (wk, bk, True), (wv, bv, False)))
    return q, k, v, scales


def projected(
    x: Tensor, turn: Tensor, form: Form, norm: Tensor, maps: Sequence[tuple[Tensor, Tensor | None, bool]]
) -> tuple[list[Tensor], Tensor]:
    """x float[T, D] through the first norm and each of the maps (weight, bias, rotated), and the norm's scales float[T, 1]."""
    made = [x.new_empty(len(x), weight.shape[0]) for weight, _, _ in maps]
    scales = _scales(x, form.eps[0])
    for part in _chunks(len(x)):
        normed = (x[part] * scales[part]).mul_(norm)
        for out, (weight, bias, rotated) in zip(made, maps):
            torch.mm(normed, weight.t(), out=out[part]) if bias is None else torch.addmm(bias, normed, weight.t(), out=out[part])
            if rotated:
                _pairs(out[part], form.width).mul_(turn[part])
    return made, scales


def after(
    x: Tensor, attended: Tensor, form: Form, wo: Tensor, norm: Tensor, wg: Tensor, wu: Tensor, wd: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x float[T, D], attended float[T, heads * width] → the layer's output; with `keep` also what its gradient needs: the sum after
    attention float[T, D], its scales float[T, 1], gates and ups float[T, inner]."""
    count, inner = len(x), wg.shape[0]
    out, middle = torch.empty_like(x), torch.empty_like(x) if keep else x
    scales = x.new_empty(count, 1)
    held = count if keep else min(count, CHUNK)
    gates, ups, product = x.new_empty(held, inner), x.new_empty(held, inner), x.new_empty(min(count, CHUNK), inner)
    for part in _chunks(count):
        size = part.stop - part.start
        here = part if keep else slice(0, size)
        gate, up, made = gates[here], ups[here], product[:size]
        y = torch.addmm(x[part], attended[part], wo.t(), out=middle[part]) if keep else torch.addmm(x[part], attended[part], wo.t())
        scale = _scales(y, form.eps[1])
        scales[part] = scale
        normed = (y * scale).mul_(norm)
        torch.mm(normed, wg.t(), out=gate)
        torch.mm(normed, wu.t(), out=up)
        torch.ops.aten.silu.out(gate, out=made).mul_(up)
        torch.addmm(y, made, wd.t(), out=out[part])
    return out, middle, scales, gates, ups


def _runs(packing: Segments) -> list[tuple[int, int, int]]:
    """(first token, segments, length) of neighbours of one length: what attention takes at once, where it lies."""
    runs, start = [], 0
    for length, same in groupby(packing.lengths):
        rows = len(list(same))
        runs.append((start, rows, length))
        start += rows * length
    return runs


def _heads(x: Tensor, run: tuple[int, int, int], heads: int) -> Tensor:
    """float[T, heads * width] → float[segments, heads, length, width] of a run, without a copy."""
    start, rows, length = run
    return x[start : start + rows * length].view(rows, length, heads, -1).transpose(1, 2)


def _repeated(x: Tensor, form: Form) -> Tensor:
    """float[S, groups, L, width] → float[S, heads, L, width]."""
    return x if form.groups == form.heads else x.repeat_interleave(form.heads // form.groups, 1)


def attend(q: Tensor, k: Tensor, v: Tensor, packing: Segments, form: Form) -> tuple[Tensor, list[Tensor]]:
    """Each segment's tokens see their own segment up to themselves: float[T, heads * width], and the softmaxes' logarithms by run."""
    attended, sums = torch.empty_like(q), []
    for run in _runs(packing):
        seen = (_repeated(_heads(x, run, form.groups), form) for x in (k, v))
        found, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            _heads(q, run, form.heads), *seen, 0.0, packing.causal and run[2] > 1, scale=form.scale
        )
        _heads(attended, run, form.heads).copy_(found)
        sums.append(total)
    return attended, sums


def _attend_back(
    outer: Tensor, q: Tensor, k: Tensor, v: Tensor, attended: Tensor, sums: list[Tensor], packing: Segments, form: Form
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k, v."""
    gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for run, total in zip(_runs(packing), sums):
        seen = (_repeated(_heads(x, run, form.groups), form) for x in (k, v))
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _heads(outer, run, form.heads), _heads(q, run, form.heads), *seen, _heads(attended, run, form.heads), total, 0.0,
            packing.causal and run[2] > 1, scale=form.scale,
        )  # fmt: skip
        for into, one in zip(gradients, found):
            heads = into.shape[1] // form.width
            if heads != one.shape[1]:
                one = one.unflatten(1, (heads, -1)).sum(2)
            _heads(into, run, heads).copy_(one)
    return gradients


def _norm_back(outer: Tensor, x: Tensor, scale: Tensor, weight: Tensor, by_weight: Tensor | None) -> Tensor:
    """Gradient of the norm's input from that of its output (written over); the weight's is added to `by_weight`."""
    normed = x * scale
    product = outer * normed
    if by_weight is not None:
        by_weight += product.sum(0)
    along = torch.mv(product, weight).div_(x.shape[-1])[:, None]  # what is parallel to x cancels
    return outer.mul_(weight).addcmul_(normed, along, value=-1).mul_(scale)


def _add(into: Tensor | None, outer: Tensor, x: Tensor, first: bool) -> None:
    """A map's gradient float[outputs, inputs] += outerᵀ x."""
    if into is not None:
        torch.mm(outer.t(), x, out=into) if first else into.addmm_(outer.t(), x)


class Layer(torch.autograd.Function):
    """One layer over packed segments. Arguments as in `forward`; `rows`: which of its rows are asked for."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, turn: Tensor, rows: Tensor | None, packing: Segments, form: Form, n1: Tensor, wq: Tensor, bq: Tensor | None,
        wk: Tensor, bk: Tensor | None, wv: Tensor, bv: Tensor | None, wo: Tensor, n2: Tensor, wg: Tensor, wu: Tensor, wd: Tensor,
    ) -> Tensor:  # fmt: skip
        maps = paired(form, wq, bq, wk, bk)
        q, k, v, scales = before(x, turn, form, n1, *maps, wv, bv)
        attended, sums = attend(q, k, v, packing, form)
        behind, seen = (x, attended) if rows is None else (x[rows], attended[rows])
        keep = any(ctx.needs_input_grad)
        out, middle, scales2, gates, ups = after(behind, seen, form, wo, n2, wg, wu, wd, keep)
        if keep:
            ctx.packing, ctx.form = packing, form
            ctx.save_for_backward(
                x, turn, rows, n1, wq, wk, wv, wo, n2, wg, wu, wd, q, k, v, scales, attended, middle, scales2, gates, ups, *sums
            )
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, turn, rows, n1, wq, wk, wv, wo, n2, wg, wu, wd, q, k, v, scales, attended, middle, scales2, gates, ups, *sums = ctx.saved_tensors
        packing, form, outer = ctx.packing, ctx.form, gradients[0].contiguous()
        needed = ctx.needs_input_grad[5:]
        inputs = (n1, wq, None, wk, None, wv, None, wo, n2, wg, wu, wd)
        found: list[Tensor | None] = [torch.empty_like(w) if w is not None and n else None for w, n in zip(inputs, needed)]
        for norm in (0, 8):
            if found[norm] is not None:
                found[norm].zero_()  # type: ignore[union-attr]
        dn1, dq, _, dk, _, dv, _, do, dn2, dg, du, dd = found

        # behind attention: `before` is the gradient of the sum after attention, `seen` that of what was attended
        count, inner = len(outer), wg.shape[0]
        taken = attended if rows is None else attended[rows]
        before, seen = torch.empty_like(outer), torch.empty_like(taken)
        for one in (do, dg, du, dd):
            if one is not None and not count:
                one.zero_()
        size = min(count, CHUNK)
        by_up, by_gate, product = (outer.new_empty(size, inner) for _ in range(3))
        for part in _chunks(count):
            first, here = part.start == 0, slice(0, part.stop - part.start)
            gate, up, above = gates[part], ups[part], outer[part]
            activated, other, inside = product[here], by_up[here], by_gate[here]
            torch.ops.aten.silu.out(gate, out=activated)
            torch.mm(above, wd, out=other)
            if dd is not None:
                _add(dd, above, torch.mul(activated, up, out=inside), first)
            torch.mul(other, up, out=inside)
            other.mul_(activated)
            torch.ops.aten.silu_backward.grad_input(inside, gate, grad_input=inside)
            if dg is not None or du is not None:
                normed = (middle[part] * scales2[part]).mul_(n2)
                _add(dg, inside, normed, first)
                _add(du, other, normed, first)
            down = torch.mm(inside, wg).addmm_(other, wu)
            torch.add(above, _norm_back(down, middle[part], scales2[part], n2, dn2), out=before[part])
            torch.mm(before[part], wo, out=seen[part])
            _add(do, before[part], taken[part], first)
        if rows is not None:
            seen = torch.zeros_like(attended).index_copy_(0, rows, seen)

        by_q, by_k, by_v = _attend_back(seen, q, k, v, attended, sums, packing, form)
        (oq, back_q), (ok, back_k) = _neighbours(form.heads, form.width), _neighbours(form.groups, form.width)
        pq, pk, back = wq[oq], wk[ok], turn.conj().resolve_conj()
        biases = [needed[2], needed[4], needed[6]]
        into = torch.empty_like(x)
        for part in _chunks(len(x)):
            first = part.start == 0
            for one in (by_q, by_k):
                _pairs(one[part], form.width).mul_(back[part])
            if dq is not None or dk is not None or dv is not None:
                normed = (x[part] * scales[part]).mul_(n1)
                _add(dq, by_q[part], normed, first)
                _add(dk, by_k[part], normed, first)
                _add(dv, by_v[part], normed, first)
            down = torch.mm(by_q[part], pq).addmm_(by_k[part], pk).addmm_(by_v[part], wv)
            down = _norm_back(down, x[part], scales[part], n1, dn1)
            torch.add(before[part], down, out=into[part]) if rows is None else into[part].copy_(down)
        if rows is not None:
            into.index_add_(0, rows, before)
        sums_q, sums_k, sums_v = (one.sum(0) if n else None for one, n in zip((by_q, by_k, by_v), biases))
        return (
            into, None, None, None, None, dn1, None if dq is None else dq[back_q], None if sums_q is None else sums_q[back_q],
            None if dk is None else dk[back_k], None if sums_k is None else sums_k[back_k], dv, sums_v, do, dn2, dg, du, dd,
        )  # fmt: skip


def paired(form: Form, wq: Tensor, bq: Tensor | None, wk: Tensor, bk: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """The query's and key's maps with each head's rows reordered: pairs that rotate together side by side."""
    of_q, of_k = _neighbours(form.heads, form.width)[0], _neighbours(form.groups, form.width)[0]
    return wq[of_q], None if bq is None else bq[of_q], wk[of_k], None if bk is None else bk[of_k]
