"""A Llama layer on a CPU as one function with its gradient written out: the same numbers as the modules', in far fewer passes over memory.

    x float[T, D] ──norm, q k v, rotation──► attention over segments ──► output map, norm, gated MLP──► float[T, D] (or its `rows` only)

In: packed hidden states, rotations, a layer's weights. Out: hidden states, and gradients of both. Which models run so: `written_out`.

Small models on a CPU are bound by memory and by calls, not by products. So rows go through a layer `CHUNK` at a time, whose activations
stay in the core's cache; gradients of maps are added up by the products themselves; a segment is attended where it lies, without padding
(`short_attention`); and what the gate makes is computed again instead of kept. In the last layer everything but keys and values is done
for the rows that are asked for only. Rotations pair neighbours instead of halves (one complex product a number): rows of the query's and
key's maps are reordered alike, which leaves their products as they are (Su et al. 2021, equation 34).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from trainers.models.attention import Segments
from trainers.models.short_attention import Form, asked, attend, attend_back
from trainers.models.workspace import Lease, Workspace

CHUNK = 384
"""Rows at a time: at some hundred numbers a row, what a chunk needs fits a core's second-level cache."""


@lru_cache(maxsize=64)
def _neighbours(heads: int, width: int) -> tuple[Tensor, Tensor]:
    """int64[heads * width] and its inverse: halves of each head side by side, and back."""
    within = torch.arange(width).view(2, width // 2).t().reshape(-1)
    order = (torch.arange(heads)[:, None] * width + within).flatten()
    return order, order.argsort()


def _chunks(*of: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same `CHUNK` rows of each tensor; none of tensors without rows."""
    return zip(*(one.split(CHUNK) for one in of)) if len(of[0]) else iter(())


def _scales(x: Tensor, eps: float) -> Tensor:
    """float[T, D] → 1 / sqrt(mean(x²) + eps), float[T, 1]."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(x.new_tensor(eps), length, length, value=1.0 / x.shape[-1]).rsqrt_()


def _pairs(x: Tensor, width: int) -> Tensor:
    """float[T, heads * width] seen as complex[T, heads, width / 2]."""
    return torch.view_as_complex(x.view(len(x), -1, width // 2, 2))


def projected(
    x: Tensor, turn: Tensor, form: Form, norm: Tensor, maps: Sequence[tuple[Tensor, Tensor | None, bool]],
    new: Callable[..., Tensor] = torch.empty,
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """x float[T, D] through the first norm and each of the maps (weight, bias, rotated), and the norm's scales float[T, 1].
    Rotated maps: with neighbours paired."""
    made = [new(len(x), weight.shape[0]) for weight, _, _ in maps]
    scales = _scales(x, form.eps[0])
    inward = [(weight.t(), bias, rotated) for weight, bias, rotated in maps]
    for rows, scale, angles, *outs in _chunks(x, scales, turn, *made):
        normed = (rows * scale).mul_(norm)
        for out, (weight, bias, rotated) in zip(outs, inward):
            torch.mm(normed, weight, out=out) if bias is None else torch.addmm(bias, normed, weight, out=out)
            if rotated:
                _pairs(out, form.width).mul_(angles)
    return made, scales


def after(
    x: Tensor, attended: Tensor, form: Form, wo: Tensor, norm: Tensor, wg: Tensor, wu: Tensor, wd: Tensor, keep: bool,
    new: Callable[..., Tensor] = torch.empty,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """x float[T, D], attended float[T, heads * width] → the layer's output, float[T, D]; with `keep` also what its gradient needs: the sum
    after attention float[T, D], its scales float[T, 1], gates and ups float[T, inner]."""
    out, kept, inner = torch.empty_like(x), [], wg.shape[0]
    if keep:
        kept = [new(len(x), columns) for columns in (x.shape[1], 1, inner, inner)]
    first, second = (new(min(len(x), CHUNK), inner) for _ in range(2))
    ot, gt, ut, dt = wo.t(), wg.t(), wu.t(), wd.t()
    for rows, seen, into, *held in _chunks(x, attended, out, *kept):
        made, spare = first[: len(rows)], second[: len(rows)]
        y = torch.addmm(rows, seen, ot, out=held[0] if keep else None)
        scale = _scales(y, form.eps[1])
        normed = (y * scale).mul_(norm)
        if keep:
            _, scales, gate, up = held
            scales.copy_(scale)
            torch.mm(normed, gt, out=gate)
            torch.ops.aten.silu.out(gate, out=made)
            made.mul_(torch.mm(normed, ut, out=up))
        else:
            torch.mm(normed, gt, out=spare)
            torch.ops.aten.silu.out(spare, out=made)
            made.mul_(torch.mm(normed, ut, out=spare))
        torch.addmm(y, made, dt, out=into)
    return out, kept


def _norm_back(outer: Tensor, x: Tensor, scale: Tensor, weight: Tensor, by_weight: Tensor | None) -> Tensor:
    """Gradient of the norm's input from that of its output (written over); the weight's is added to `by_weight`."""
    normed = x * scale
    product = outer * normed
    if by_weight is not None:
        by_weight += product.sum(0)
    along = torch.mv(product, weight).div_(x.shape[-1])[:, None]  # what is parallel to x cancels
    return outer.mul_(weight).addcmul_(normed, along, value=-1).mul_(scale)


def _projected_back(
    into: Tensor, x: Tensor, turn: Tensor, scales: Tensor, form: Form, norm: Tensor, by_norm: Tensor | None,
    maps: Sequence[tuple[Tensor, Tensor, Tensor | None, bool]],
) -> None:  # fmt: skip
    """into float[T, D] += the gradient of `projected`'s input. maps: (gradient of what it made, rotated back here; weight; where the
    weight's own gradient is added; rotated). turn: the other way round."""
    learns = any(by_weight is not None for _, _, by_weight, _ in maps)
    for above, rows, scale, angles, *made in _chunks(into, x, scales, turn, *(one[0] for one in maps)):
        if learns:
            normed = (rows * scale).mul_(norm)
        down: Tensor | None = None
        for outer, (_, weight, by_weight, rotated) in zip(made, maps):
            if rotated:
                _pairs(outer, form.width).mul_(angles)
            if by_weight is not None:
                by_weight.addmm_(outer.t(), normed)
            down = torch.mm(outer, weight) if down is None else down.addmm_(outer, weight)
        assert down is not None
        above += _norm_back(down, rows, scale, norm, by_norm)


def _after_back(
    outer: Tensor, attended: Tensor, kept: Sequence[Tensor], form: Form, wo: Tensor, norm: Tensor, wg: Tensor, wu: Tensor, wd: Tensor,
    by_weight: Sequence[Tensor | None], new: Callable[..., Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of x and attended; those of the five weights are added to `by_weight`."""
    do, dn, dg, du, dd = by_weight
    before, seen, one = new(*outer.shape), new(*attended.shape), outer.new_ones(())
    spare = [new(min(len(outer), CHUNK), wg.shape[0]) for _ in range(4)]
    for above, taken, middle, scale, gate, up, into, into_seen in _chunks(outer, attended, *kept, before, seen):
        by_gate, by_up, sigmoid, activated = (part[: len(above)] for part in spare)
        torch.mul(gate, torch.sigmoid(gate, out=sigmoid), out=activated)
        if dd is not None:
            dd.addmm_(above.t(), torch.mul(activated, up, out=by_up))
        torch.mm(above, wd, out=by_up)
        torch.mul(by_up, up, out=by_gate)
        by_up.mul_(activated)
        by_gate.mul_(torch.lerp(activated, one, sigmoid, out=sigmoid))  # silu' = s + silu (1 - s)
        if dg is not None or du is not None:
            normed = (middle * scale).mul_(norm)
            for weight, inside in ((dg, by_gate), (du, by_up)):
                if weight is not None:
                    weight.addmm_(inside.t(), normed)
        down = torch.mm(by_gate, wg).addmm_(by_up, wu)
        torch.add(above, _norm_back(down, middle, scale, norm, dn), out=into)
        torch.mm(into, wo, out=into_seen)
        if do is not None:
            do.addmm_(into.t(), taken)
    return before, seen


class Layer(torch.autograd.Function):
    """One layer over packed segments. Arguments as in `forward`; `rows`: which of its rows are asked for."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, turn: Tensor, rows: Tensor | None, packing: Segments, form: Form, space: Workspace | None, n1: Tensor,
        wq: Tensor, bq: Tensor | None, wk: Tensor, bk: Tensor | None, wv: Tensor, bv: Tensor | None, wo: Tensor, n2: Tensor, wg: Tensor,
        wu: Tensor, wd: Tensor,
    ) -> Tensor:  # fmt: skip
        keep = any(ctx.needs_input_grad)
        lease = Lease(space if keep else None)
        new = lease.take
        pq, pbq, pk, pbk = paired(form, wq, bq, wk, bk)
        asks, others = (pq, pbq, True), ((pk, pbk, True), (wv, bv, False))
        if rows is None:
            only, behind = None, x
            (q, k, v), scales = projected(x, turn, form, n1, (asks, *others), new)
        else:
            only, behind = asked(rows, packing), x[rows]
            (k, v), scales = projected(x, turn, form, n1, others, new)
            (q,), _ = projected(behind, turn[rows], form, n1, (asks,), new)
        attended, sums = attend(q, k, v, packing, form, only, keep, new)
        out, kept = after(behind, attended, form, wo, n2, wg, wu, wd, keep, new)
        if keep:
            ctx.packing, ctx.form, ctx.only, ctx.held, ctx.lease = packing, form, only, len(kept), lease
            ctx.save_for_backward(x, turn, rows, n1, pq, pk, wv, wo, n2, wg, wu, wd, q, k, v, scales, attended, *kept, *sums)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.lease is not None, "a second backward pass would find other numbers in the workspace"
        x, turn, rows, n1, pq, pk, wv, wo, n2, wg, wu, wd, q, k, v, scales, attended, *saved = ctx.saved_tensors
        lease = Lease(ctx.lease.workspace)
        new = lease.take
        packing, form, only, outer = ctx.packing, ctx.form, ctx.only, gradients[0].contiguous()
        kept, sums = saved[: ctx.held], saved[ctx.held :]
        needed = ctx.needs_input_grad[6:]
        inputs = (n1, pq, None, pk, None, wv, None, wo, n2, wg, wu, wd)
        found = [torch.zeros_like(w) if w is not None and n else None for w, n in zip(inputs, needed)]
        dn1, dq, _, dk, _, dv, _, do, dn2, dg, du, dd = found

        # behind attention: `before` is the gradient of the sum after attention, `seen` that of what was attended
        before, seen = _after_back(outer, attended, kept, form, wo, n2, wg, wu, wd, (do, dn2, dg, du, dd), new)
        by_q, by_k, by_v = attend_back(seen, q, k, v, attended, sums, packing, form, only, new)

        # before it; where few ask, their share first
        back, asks = turn.conj().resolve_conj(), (by_q, pq, dq, True)
        maps = [(by_k, pk, dk, True), (by_v, wv, dv, False)]
        if rows is None:
            into, maps = before.clone(), [asks, *maps]
        else:
            _projected_back(before, x[rows], back[rows], scales[rows], form, n1, dn1, [asks])
            into = torch.zeros_like(x).index_copy_(0, rows, before)
        _projected_back(into, x, back, scales, form, n1, dn1, maps)
        biases = [one.sum(0) if n else None for one, n in zip((by_q, by_k, by_v), (needed[2], needed[4], needed[6]))]
        to_q, to_k = _neighbours(form.heads, form.width)[1], _neighbours(form.groups, form.width)[1]
        dq, dk, dbq, dbk = (
            one if one is None else one[to] for one, to in ((dq, to_q), (dk, to_k), (biases[0], to_q), (biases[1], to_k))
        )  # fmt: skip
        lease.end()
        ctx.lease.end()
        ctx.lease = None
        return (into, None, None, None, None, None, dn1, dq, dbq, dk, dbk, dv, biases[2], do, dn2, dg, du, dd)


def paired(form: Form, wq: Tensor, bq: Tensor | None, wk: Tensor, bk: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """The query's and key's maps with each head's rows reordered: pairs that rotate together side by side."""
    of_q, of_k = _neighbours(form.heads, form.width)[0], _neighbours(form.groups, form.width)[0]
    return wq[of_q], None if bq is None else bq[of_q], wk[of_k], None if bk is None else bk[of_k]
