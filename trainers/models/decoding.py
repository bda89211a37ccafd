"""Batched greedy decoding: prompts go in packed, their keys and values come out as a left-padded batch that grows by a column a step.

    pack of S prompts ──prefill──► KeyValues [S, G, L, d] per layer ──step(ids int64[S])──► logits float[S, V] ──► ...

Left padding puts the next token of every prompt into the same column. Positions are per prompt and have nothing to do with columns,
so a prompt's logits don't depend on its neighbours (fp32: greedy text equals one-by-one decoding).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ROOM = 16
"""Columns added whenever a batch of keys and values is full."""


class KeyValues:
    """Keys and values of all layers, float[S, G, capacity, d] each: what transformers models call `past_key_values`."""

    def __init__(self, lengths: Sequence[int], device: torch.device | str) -> None:
        self.width = max(lengths)
        self.prefilling = True
        size = torch.tensor(list(lengths))
        ends = size.cumsum(0)
        column = torch.arange(self.width)[None]
        first = (self.width - size)[:, None]
        # Column c of prompt s holds token c - (width - length) of its segment; pads repeat its first token and are masked.
        index = (ends - size)[:, None] + (column - first).clamp(min=0)
        self.index = index.flatten().to(device)
        self.visible = (column >= first).to(device)
        """bool[S, width]: columns that hold a token."""
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def update(self, key: Tensor, value: Tensor, layer_idx: int, cache_kwargs: Any = None) -> tuple[Tensor, Tensor]:
        """Prefill: stores packed float[1, G, T, d] as a padded batch and hands it back. Step: appends float[S, G, 1, d], returns all."""
        if self.prefilling:
            assert layer_idx == len(self.keys), "layers fill the store in order"
            self.keys.append(self._padded(key))
            self.values.append(self._padded(value))
            return key, value
        column = self.width - 1  # the step has already opened the column
        for store, new in ((self.keys, key), (self.values, value)):
            if store[layer_idx].shape[2] <= column:
                store[layer_idx] = F.pad(store[layer_idx], (0, 0, 0, ROOM))
            store[layer_idx][:, :, column] = new[:, :, 0]
        return self.keys[layer_idx][:, :, : self.width], self.values[layer_idx][:, :, : self.width]

    def _padded(self, packed: Tensor) -> Tensor:
        batch = packed[0].index_select(1, self.index).unflatten(1, self.visible.shape)  # [G, S, width, d]
        return F.pad(batch.transpose(0, 1), (0, 0, 0, ROOM))

    def open_column(self) -> None:
        self.prefilling = False
        self.width += 1
        self.visible = F.pad(self.visible, (0, 1), value=True)

    def select(self, rows: Tensor) -> None:
        self.keys = [k[rows] for k in self.keys]
        self.values = [v[rows] for v in self.values]
        self.visible = self.visible[rows]

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
