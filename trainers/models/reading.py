"""A layer in prediction, on a CPU: keys and values go to the cache, and small models' maps run joined, prepared once.

    x float[T, D] ──norm, q k v in one product, rotation──► cache ──► who asks sees his columns ──output map, norm, MLP──► float[T, D]

In: packed hidden states of prompts that begin, go on or are tried (`trainers.models.decoding`). Out: hidden states; the cache holds what is
new. No gradient: norms' weights are multiplied into the maps behind them, the scores' scale into the queries' map, and maps that read the
same input are one product. A prompt that goes on sees what was read before and itself up to itself: prompts of one length at once, by
products and exponentials without a maximum (`trainers.models.short_attention` says when that is exact), else by torch's own attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from trainers import switches
from trainers.models.attention import Packing
from trainers.models.decoding import KeyValues, Run, Step
from trainers.models.layer import _neighbours, _pairs, _scales
from trainers.models.short_attention import SAFE, Form

MOST_PREPARED = 1 << 26
"""Numbers in the maps of a model that are kept a second time, joined. Larger models' products are large enough by themselves."""
NUMBERS = 1 << 19
"""Activations at a time: what fits a core's second-level cache, in rows as wide as a layer needs them."""
MOST_SCORES = 1 << 20
"""Scores of one product; a prompt that has more by itself takes torch's attention."""

STILL = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embeddings whose angles depend on the position alone; others follow the longest sequence so far."""


@dataclass(frozen=True)
class Maps:
    """A layer's maps as columns float[inputs, outputs], norms multiplied in. into: queries (with neighbours paired, scaled), keys (paired)
    and values; up: gates and ups."""

    form: Form
    into: Tensor
    bias: Tensor | None
    out: Tensor
    up: Tensor
    down: Tensor

    @property
    def rows(self) -> int:
        """How many at a time."""
        return max(64, NUMBERS // (2 * self.into.shape[0] + self.into.shape[1] + 3 * self.down.shape[0]))


Stamp = Any
"""Where the weights lie and how often they were changed."""
JOINED: WeakKeyDictionary[nn.Module, tuple[Stamp, list[Maps]]] = WeakKeyDictionary()
TURNS: WeakKeyDictionary[nn.Module, tuple[Stamp, Tensor]] = WeakKeyDictionary()
"""Base model → what was made of it once."""


def joined(form: Form, weights: Sequence[Tensor | None]) -> Maps:
    """From a layer's weights, in `written_out.weights_of`'s order."""
    n1, wq, bq, wk, bk, wv, bv, wo, n2, wg, wu, wd = (None if one is None else one.detach() for one in weights)
    assert not (n1 is None or wq is None or wk is None or wv is None or wo is None or n2 is None or wg is None or wu is None or wd is None)
    of_q, of_k = _neighbours(form.heads, form.width)[0], _neighbours(form.groups, form.width)[0]
    bias = None
    if bq is not None or bk is not None or bv is not None:
        given = ((wq, bq), (wk, bk), (wv, bv))
        q, k, v = (weight.new_zeros(len(weight)) if one is None else one for weight, one in given)
        bias = torch.cat([q[of_q] * form.scale, k[of_k], v])
    into = torch.cat([wq[of_q] * form.scale, wk[of_k], wv]).mul_(n1).t().contiguous()
    return Maps(form, into, bias, wo.t().contiguous(), torch.cat([wg, wu]).mul_(n2).t().contiguous(), wd.t().contiguous())


def prepared(base: nn.Module, layers: Sequence[tuple[Form, Sequence[Tensor | None]]]) -> list[Maps] | None:
    """Each layer's maps from its form and weights, made again when a weight has changed since; None for a model that is too large to be
    held twice, or that trains (an optimiser's writes to `.data` can't be seen)."""
    assert not torch.is_grad_enabled(), "keys and values are kept for prediction only"
    flat = [one for _, weights in layers for one in weights if one is not None]
    if base.training or sum(one.numel() for one in flat) > MOST_PREPARED:
        return None
    stamp = [(one.data_ptr(), one._version) for one in flat]
    known = JOINED.get(base)
    if known is None or known[0] != stamp:
        known = JOINED[base] = stamp, [joined(form, weights) for form, weights in layers]
    return known[1]


def turns(base: Any, x: Tensor, positions: Tensor, tabled: bool) -> Tensor:
    """What each position (int64[B, L]) turns pairs by, complex[B * L, d / 2]. tabled: looked up, where a position always has one angle."""
    rotary = base.rotary_emb
    if not tabled or getattr(rotary, "rope_type", None) not in STILL:
        return _turns(rotary, x, positions)
    stamp, known = (rotary.inv_freq.data_ptr(), rotary.inv_freq._version), TURNS.get(base)
    if known is None or known[0] != stamp or len(known[1]) <= int(positions.max()):
        size = 1 << max(9, int(positions.max()).bit_length())
        known = TURNS[base] = stamp, _turns(rotary, x, torch.arange(size)[None])
    return known[1].index_select(0, positions.flatten())


def _turns(rotary: Any, x: Tensor, positions: Tensor) -> Tensor:
    cos, sin = rotary(x, positions)
    half = cos.shape[-1] // 2
    return torch.complex(cos[..., :half].float(), sin[..., :half].float()).flatten(0, -2)


def layer(
    maps: Maps, index: int, x: Tensor, turn: Tensor, rows: Tensor | None, packing: Packing, cache: KeyValues, shape: torch.Size
) -> Tensor:
    """Layer number `index`: x float[B * L, D], the B and L of `shape` → float[B * L, D]; rows int64[S]: each prompt's last token, which
    sees all of its prompt, → float[S, D]."""
    form, runs = maps.form, cache.runs
    asks, own = form.heads * form.width, form.groups * form.width
    made = project(x, turn, maps, queries=rows is None)
    key, value = made[:, -2 * own :].split(own, 1)
    if runs is not None:
        keys, values = cache.place(key, value, form.groups, index, runs)
    else:
        key, value = (one.reshape(*shape, -1, form.width).transpose(1, 2) for one in (key, value))
        keys, values = cache.update(key, value, index)
    if rows is not None:
        x, (keys, values, visible) = x[rows], cache.held(index)
        query = project(x, turn[rows], maps, others=False).view(len(x), form.heads, 1, form.width)
        attended = Step(visible).attend(query, keys, values, 1.0)
    elif runs is not None:
        attended = attend(made[:, :asks], keys, values, cache.width, runs, form)
    else:
        attended = packing.attend(made[:, :asks].reshape(*shape, -1, form.width).transpose(1, 2), keys, values, 1.0)
    return after(x, attended.reshape(len(x), -1), maps)


def _parts(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def project(x: Tensor, turn: Tensor, maps: Maps, queries: bool = True, others: bool = True) -> Tensor:
    """x float[T, D] → rotated queries, rotated keys and values side by side, float[T, (heads + 2 groups) * width] or one part of it."""
    form = maps.form
    asks, turned = form.heads * form.width, (form.heads + form.groups) * form.width
    first, last = 0 if queries else asks, maps.into.shape[1] if others else asks
    weight, bias = maps.into[:, first:last], None if maps.bias is None else maps.bias[first:last]
    made, scales = x.new_empty(len(x), last - first), _scales(x, form.eps[0])
    for part in _parts(len(x), maps.rows):
        normed, out = x[part] * scales[part], made[part]
        torch.mm(normed, weight, out=out) if bias is None else torch.addmm(bias, normed, weight, out=out)
        _pairs(out[:, : turned - first], form.width).mul_(turn[part])
    return made


def after(x: Tensor, attended: Tensor, maps: Maps) -> Tensor:
    """x float[T, D], attended float[T, heads * width] → the layer's output float[T, D]."""
    out, inner = torch.empty_like(x), maps.down.shape[0]
    size = min(len(x), maps.rows)
    both, spare = x.new_empty(size, 2 * inner), x.new_empty(size, inner)
    for part in _parts(len(x), maps.rows):
        y = torch.addmm(x[part], attended[part], maps.out)
        gates, made = both[: len(y)], spare[: len(y)]
        torch.mm(y * _scales(y, maps.form.eps[1]), maps.up, out=gates)
        torch.ops.aten.silu.out(gates[:, :inner], out=made).mul_(gates[:, inner:])
        torch.addmm(y, made, maps.down, out=out[part])
    return out


def attend(q: Tensor, keys: Tensor, values: Tensor, width: int, of: Sequence[Run], form: Form) -> Tensor:
    """q float[T, heads * d], scaled; keys, values float[S, groups, columns, d], where each prompt's first `width` columns were read before
    and its new tokens follow. Each token sees those and its prompt's new ones up to itself: float[T, heads * d]."""
    attended = torch.empty(len(q), form.heads * form.width)
    each = form.heads // form.groups
    for run in of:
        seen = width + run.length
        size = max(1, MOST_SCORES // (form.heads * run.length * seen))
        for part in _parts(run.prompts, size):
            rows = part.stop - part.start
            at = slice(run.start + part.start * run.length, run.start + part.stop * run.length)
            own = slice(run.first + part.start, run.first + part.stop)
            by_group = (rows, run.length, form.groups, each, form.width)
            query = q[at].view(by_group).permute(0, 2, 3, 1, 4).reshape(rows * form.groups, each * run.length, form.width)
            key, value = (one[own, :, :seen].flatten(0, 1) for one in (keys, values))
            found = _seen(query, key, value, width, run.length)
            attended[at].view(by_group).copy_(found.view(rows, form.groups, each, run.length, form.width).permute(0, 3, 1, 2, 4))
    return attended


def _seen(query: Tensor, key: Tensor, value: Tensor, width: int, length: int) -> Tensor:
    """query float[B, each * length, d], key, value float[B, width + length, d] → float[B, each * length, d]."""
    if query.shape[1] * key.shape[1] > MOST_SCORES or not switches.on("products"):
        mask = torch.ones(length, key.shape[1], dtype=torch.bool).tril_(width).repeat(query.shape[1] // length, 1)
        return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=1.0)
    for exact in (False, True):
        scores = torch.bmm(query, key.transpose(1, 2))
        by_token = scores.view(-1, length, key.shape[1])
        if exact:
            unseen = torch.ones(length, key.shape[1], dtype=torch.bool).triu_(width + 1)
            by_token.masked_fill_(unseen, -torch.inf)
            scores.sub_(scores.amax(-1, keepdim=True))
        scores.exp_()
        if not exact:
            by_token.tril_(width)
        sums = scores.sum(-1, keepdim=True)
        low, high = sums.aminmax()
        if exact or (float(low) > SAFE[0] and float(high) < SAFE[1]):
            break
    return torch.bmm(scores, value).div_(sums)
