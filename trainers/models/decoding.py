"""Batched decoding: prompts go in packed, their keys and values stay as a batch whose columns grow.

    pack of S prompts ──prefill──► KeyValues [S, G, L, d] per layer ──step(ids int64[S])──► logits float[S, V] ──► ...
    prefixes read once ──extend(parents int64[S], pack)──► S prompts that go on from them
    S prompts ──branches(rows int64[B], pack)──► B continuations tried on them, several a prompt; nothing is kept

The next token of every prompt takes the same new column; columns that hold nothing of a prompt are masked. Positions are per prompt and
have nothing to do with columns, so a prompt's logits don't depend on its neighbours (fp32: greedy text equals one-by-one decoding).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

ROOM = 16
"""Columns added whenever a batch of keys and values is full."""


class Run(NamedTuple):
    """Neighbours in a pack that have one length: prompts [first, first + prompts), their tokens from `start` on."""

    first: int
    prompts: int
    start: int
    length: int


class Placement:
    """Where the tokens of a pack go: segment b is new columns of prompt rows[b], after those of earlier segments of the same prompt.

    rows, lengths: one per segment, host. S prompts get L new columns each, L the most that any of them needs.
    """

    def __init__(self, rows: Sequence[int], lengths: Sequence[int], prompts: int, device: torch.device | str) -> None:
        self.rows, self.lengths, self.prompts, self.device = list(rows), list(lengths), prompts, device
        used = [0] * prompts
        self._begins = []
        for prompt, length in zip(self.rows, self.lengths):
            self._begins.append(used[prompt])
            used[prompt] += length
        self.width = max(used)

    @cached_property
    def runs(self) -> list[Run] | None:
        """The pack's segments by length; None where a segment isn't a prompt of its own, in the prompts' order."""
        if self.rows != list(range(self.prompts)):
            return None
        found, first, start = [], 0, 0
        for length, same in groupby(self.lengths):
            count = len(list(same))
            found.append(Run(first, count, start, length))
            first, start = first + count, start + count * length
        return found

    @cached_property
    def filled(self) -> Tensor:
        """bool[S, L]: new columns that hold a token."""
        if self.runs is None:
            return self.owner >= 0
        return torch.arange(self.width, device=self.device) < torch.tensor(self.lengths, device=self.device)[:, None]

    @cached_property
    def _plan(self) -> tuple[Tensor, Tensor, Tensor]:
        size, row = np.array(self.lengths, dtype=np.int64), np.array(self.rows, dtype=np.int64)
        first = row * self.width + np.array(self._begins, dtype=np.int64)  # of each segment's slots
        slot = np.arange(size.sum()) + np.repeat(first - (size.cumsum() - size), size)
        # A column that holds nothing repeats token 0: finite, masked, never restored.
        index, owner = np.zeros(self.prompts * self.width, dtype=np.int64), np.full(self.prompts * self.width, -1, dtype=np.int64)
        index[slot], owner[slot] = np.arange(len(slot)), np.repeat(np.arange(len(size)), size)
        made = (torch.from_numpy(one).to(self.device) for one in (index, slot, owner.reshape(self.prompts, self.width)))
        return tuple(made)  # type: ignore[return-value]

    @property
    def index(self) -> Tensor:
        """int64[S * L]: the token that each new column holds."""
        return self._plan[0]

    @property
    def slot(self) -> Tensor:
        """int64[T]: the new column of each token."""
        return self._plan[1]

    @property
    def owner(self) -> Tensor:
        """int64[S, L]: the segment that each new column belongs to, -1 where there is none."""
        return self._plan[2]

    def spread(self, packed: Tensor) -> Tensor:
        """float[1, G, T, d] → float[S, G, L, d]."""
        return packed[0].index_select(1, self.index).unflatten(1, self.owner.shape).transpose(0, 1)

    def gather(self, batch: Tensor) -> Tensor:
        """float[S, H, L, d] → float[1, T, H, d]."""
        return batch.transpose(1, 2).flatten(0, 1).index_select(0, self.slot)[None]


class KeyValues:
    """Keys and values of all layers, float[S, G, capacity, d] each: what transformers models call `past_key_values`."""

    def __init__(self, prompts: int, device: torch.device | str) -> None:
        self.width = 0
        self.visible = torch.zeros(prompts, 0, dtype=torch.bool, device=device)
        """bool[S, width]: columns that hold a token."""
        self.new: Placement | None = None
        """Where the tokens of the pass under way go; None: one a prompt, into the last column."""
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def update(self, key: Tensor, value: Tensor, layer_idx: int, cache_kwargs: Any = None) -> tuple[Tensor, Tensor]:
        """Stores a layer's new keys and values, float[1, G, T, d] by `new` or float[S, G, 1, d]; returns what attention looks at:
        the pack itself where prompts begin, else all columns float[S, G, columns, d]."""
        start, end = (self.width - 1, self.width) if self.new is None else (self.width, self.width + self.new.width)
        for store, packed in ((self.keys, key), (self.values, value)):
            columns = packed if self.new is None else self.new.spread(packed)
            if layer_idx == len(store):
                store.append(F.pad(columns, (0, 0, 0, ROOM)))
                continue
            if store[layer_idx].shape[2] < end:
                store[layer_idx] = F.pad(store[layer_idx], (0, 0, 0, end + ROOM - store[layer_idx].shape[2]))
            store[layer_idx][:, :, start:end] = columns
        if start == 0:
            return key, value
        return self.keys[layer_idx][:, :, :end], self.values[layer_idx][:, :, :end]

    @property
    def runs(self) -> list[Run] | None:
        """The new tokens by length, where each prompt's follow its others without a gap, so that no mask is needed (`place`)."""
        return None if self.new is None or not bool(self.visible.all()) else self.new.runs

    def place(self, key: Tensor, value: Tensor, groups: int, layer_idx: int, runs: Sequence[Run]) -> tuple[Tensor, Tensor]:
        """`update` with `runs`, key and value float[T, groups * d]; returns all columns: those that hold nothing are zero."""
        assert self.new is not None
        end = self.width + self.new.width
        for store, packed in ((self.keys, key), (self.values, value)):
            heads = packed.unflatten(1, (groups, -1))
            if layer_idx == len(store):
                store.append(packed.new_zeros(self.new.prompts, heads.shape[1], end + ROOM, heads.shape[2]))
            elif store[layer_idx].shape[2] < end:
                store[layer_idx] = F.pad(store[layer_idx], (0, 0, 0, end + ROOM - store[layer_idx].shape[2]))
            into = store[layer_idx]
            for run in runs:
                tokens = heads[run.start : run.start + run.prompts * run.length].unflatten(0, (run.prompts, run.length))
                into[run.first : run.first + run.prompts, :, self.width : self.width + run.length] = tokens.transpose(1, 2)
        return self.keys[layer_idx][:, :, :end], self.values[layer_idx][:, :, :end]

    def held(self, layer_idx: int) -> tuple[Tensor, Tensor, Tensor]:
        """After `update` with a placement: a layer's columns, float[S, G, columns, d] twice, and which hold a token, bool[S, columns]."""
        assert self.new is not None
        end = self.width + self.new.width
        visible = torch.cat([self.visible, self.new.filled], 1)
        return self.keys[layer_idx][:, :, :end], self.values[layer_idx][:, :, :end], visible

    def keep(self) -> None:
        """The tokens of this pass belong to their prompts from now on."""
        assert self.new is not None
        self.visible = torch.cat([self.visible, self.new.filled], 1)
        self.width += self.new.width
        self.new = None

    def forget(self) -> None:
        """The tokens of this pass were only tried; their columns are written again."""
        self.new = None

    def open_column(self) -> None:
        self.width += 1
        self.visible = F.pad(self.visible, (0, 1), value=True)

    def select(self, rows: Tensor) -> None:
        self.keys = [k[rows] for k in self.keys]
        self.values = [v[rows] for v in self.values]
        self.visible = self.visible[rows]

    def branch(self, parents: Tensor, room: int) -> KeyValues:
        """A copy whose prompt s is this one's prompt parents[s], with room for so many more columns."""
        made = KeyValues(0, self.visible.device)
        made.width, made.visible = self.width, self.visible[parents]
        for store, grown in ((self.keys, made.keys), (self.values, made.values)):
            for layer in store:
                columns = layer.new_zeros(len(parents), layer.shape[1], self.width + room + ROOM, layer.shape[3])
                columns[:, :, : self.width] = layer[:, :, : self.width] if len(layer) == 1 else layer[:, :, : self.width][parents]
                grown.append(columns)
        return made

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Part of transformers' cache interface; positions are always passed, so that nothing is derived from it."""
        return self.width


class Step:
    """Packing of one decoding step: one query per prompt, which sees its prompt and what was generated, never the pads."""

    def __init__(self, visible: Tensor) -> None:
        self.visible = visible
        self.longest = visible.shape[1]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query float[S, H, 1, d], key, value float[S, G, L, d] → float[S, 1, H, d]. A group's heads ride as its queries: no repeats."""
        rows, heads, _, width = query.shape
        grouped = query.reshape(rows, key.shape[1], heads // key.shape[1], width)
        out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=self.visible[:, None, None], scale=scale)
        return out.reshape(rows, 1, heads, width)


class Extension:
    """Packing of several new tokens a prompt: each sees the columns before (visible bool[S, W]) and its own segment up to itself."""

    def __init__(self, placement: Placement, visible: Tensor) -> None:
        self.placement, self.visible, self.longest = placement, visible, visible.shape[1] + placement.width
        self._bias: Tensor | None = None

    @cached_property
    def sees(self) -> Tensor:
        """bool[S, L, W + L]."""
        owner, new = self.placement.owner, self.placement.width
        own = (owner[:, :, None] == owner[:, None]) & torch.ones(new, new, dtype=torch.bool, device=owner.device).tril()
        return torch.cat([self.visible[:, None].expand(-1, new, -1), own], 2)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query float[1, H, T, d], key, value float[S, G, W + L, d] → float[1, T, H, d]."""
        batch = self.placement.spread(query)
        prompts, heads, new, width = batch.shape
        each = heads // key.shape[1]
        grouped = batch.reshape(prompts, key.shape[1], each * new, width)  # a group's heads ride as its queries
        out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=self._mask(each, query.dtype), scale=scale)
        return self.placement.gather(out.reshape(prompts, heads, new, width))

    def _mask(self, heads: int, dtype: torch.dtype) -> Tensor:
        """float[S, 1, heads * L, W + L], 0 or -inf; the same for all layers."""
        if self._bias is None:
            bias = torch.zeros(self.sees.shape, dtype=dtype, device=self.sees.device).masked_fill_(~self.sees, float("-inf"))
            self._bias = bias[:, None].repeat(1, 1, heads, 1)
        return self._bias


@dataclass
class DecodeState:
    """Where a batch of prompts stands."""

    cache: KeyValues
    positions: Tensor
    """int64[S]: position of the next token of each prompt."""
    logits: Tensor
    """float[S, V]: after the last token so far."""

    def __len__(self) -> int:
        return self.positions.shape[0]

    def select(self, rows: Tensor) -> None:
        """Keeps these prompts (bool[S] or int64 indices): drop the finished ones, the rest goes on unchanged."""
        self.cache.select(rows)
        self.positions, self.logits = self.positions[rows], self.logits[rows]
