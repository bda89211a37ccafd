"""Language models: any Hugging Face causal LM run on packs, and the text interface that all generating families share.

    TextModel.embed(pack) float[T, D] ──► LM over packed segments ──hidden──► float[T, D] ──logits at wanted rows──► float[K, V]

A family says how a pack becomes embeddings (`embed`) and positions; hidden states, logits and decoding are here. Logits are never made
for positions that nobody learns from (152k columns for Qwen2). Shapes: T tokens of a pack, S segments, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datasets_ray.errors import UserError
from trainers.models import attention, support, written_out
from trainers.models.decoding import DecodeState, Extension, KeyValues, Placement, Step
from trainers.models.lean import lean
from trainers.models.released import Index, as_transformers, text_config
from trainers.models.weights import Source, make_part


def causal_lm(config: dict[str, Any], released: bool = False) -> nn.Module:
    """A causal LM from a Hugging Face config dict with its `model_type`; weights by whatever initialisation is in force. released: they
    will come from a hub checkpoint. Raises UserError for a family that doesn't exist or that packs would compute wrongly."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(config)
    kind = fields.pop("model_type", None)
    if kind is None:
        raise UserError("a causal_lm config without model_type", hint="model_type: llama, qwen2, ... as in the model's config.json")
    try:
        hf = AutoConfig.for_model(kind, **fields)
    except Exception as error:  # the library's config validation has several exceptions of its own
        raise UserError(f"no language model of type {kind!r}", why=str(error).strip().splitlines()[0]) from None
    support.refuse(hf, released)
    try:
        model = AutoModelForCausalLM.from_config(hf, attn_implementation=attention.register(), dtype=torch.float32)
    except Exception as error:  # no such class, no such attention: each family has its own way of saying so
        why = f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0][:200]}"
        hint = "llama, mistral, qwen2, qwen3 and their like"
        raise UserError(f"{kind!r} is no causal language model that runs on packs", why=why, hint=hint) from None
    model.tie_weights()  # part of the initialisation that loading skips
    model.released = partial(_released, type(model).__name__, kind)
    return lean(model)


def _released(name: str, kind: str, found: Index) -> Index:
    return as_transformers(found, name, kind)


def llm_part(part: dict[str, Any], source: Source) -> nn.Module:
    """The `llm` part: `{"builder": "causal_lm", "config": {...}, "weights": W}`. An empty config is read from the checkpoint, which may
    hold a whole Llava."""
    config = source.config(part, text_config, ("name",))
    released = "checkpoint" in part["weights"]
    llm = without_dropout(make_part("llm", part, source, lambda: causal_lm(config, released)))
    support.check(llm)
    return llm


def without_dropout(module: nn.Module) -> nn.Module:
    """Nothing random in a forward pass: recipes here train without dropout, and packed must equal unpacked."""
    for child in module.modules():
        if isinstance(child, nn.Dropout):
            child.p = 0.0
        if isinstance(getattr(child, "attention_dropout", None), float):
            child.attention_dropout = 0.0  # type: ignore[assignment]
    return module


class TextModel(nn.Module):
    """What trains with next-token prediction and answers questions. Subclasses fill `parts` and override `embed`."""

    streams = ("text",)

    def __init__(self, parts: dict[str, nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(parts)

    @property
    def llm(self) -> Any:
        return self.parts["llm"]

    @property
    def width(self) -> int:
        """D."""
        return self.llm.get_input_embeddings().embedding_dim

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding: V, or fewer of them than tokens exist where the tokenizer is another model's."""
        return self.llm.get_input_embeddings().num_embeddings

    @property
    def lm_head(self) -> nn.Module:
        return self.llm.get_output_embeddings()

    # ── what a family decides ────────────────────────────────────────────────────────────────────────────────────────────
    def embed(self, pack: Any) -> Tensor:
        """ids int64[T] → float[T, D]."""
        return self.llm.get_input_embeddings()(pack.ids)

    def positions(self, pack: Any) -> Tensor:
        """int64[1, T]; families with several position axes return int64[axes, 1, T]."""
        return pack.positions[None]

    # ── training ─────────────────────────────────────────────────────────────────────────────────────────────────────────
    def forward(self, pack: Any) -> Tensor:
        return self.hidden(pack)

    def hidden(self, pack: Any, rows: Tensor | None = None) -> Tensor:
        """The pack's hidden states after the final norm, float[T, D]; no token sees another segment. rows: int64[K] of the tokens, none
        twice, whose states are asked for: float[K, D].

        An empty pack (T = 0: a rank with nothing left in a step) runs one token and drops it, so that gradients are zero, not absent.
        """
        lengths, embeddings, positions = pack.lengths.tolist(), self.embed(pack), self.positions(pack)
        if not lengths:
            filler = self.llm.get_input_embeddings()(pack.ids.new_zeros(1))
            embeddings, positions, lengths = torch.cat([embeddings, filler]), F.pad(positions, (0, 1)), [1]
        packing = attention.Segments(lengths, pack.ids.device)
        if rows is not None and len(rows):
            return self._run(embeddings[None], positions, packing, rows=rows)
        # nothing to be learned here: gradients are zero, not absent
        hidden = self._run(embeddings[None], positions, packing)[0]
        return hidden[: len(pack.ids)] if rows is None else hidden[:0]

    def logits(self, hidden: Tensor) -> Tensor:
        """float[K, D] → float[K, V]: call it on the positions you need."""
        return self.lm_head(hidden)

    def activation_checkpointing(self, on: bool) -> None:
        """Recompute each layer in the backward pass instead of keeping its activations (training mode only)."""
        for child in self.modules():
            if hasattr(child, "grad_checkpointing"):  # open_clip
                child.grad_checkpointing = on  # type: ignore[assignment]
            elif hasattr(child, "gradient_checkpointing_enable") and on:  # transformers
                child.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]

    def _run(
        self, embeddings: Tensor, positions: Tensor, packing: attention.Packing, cache: KeyValues | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """float[B, L, D] → float[B, L, D]; with rows int64[K] of the B * L float[K, D]."""
        base = self.llm.base_model
        if positions.dim() == 2 and written_out.takes(base, embeddings):
            hidden = written_out.run(base, embeddings, positions, packing, cache, rows)
            return hidden if rows is not None else hidden.view(embeddings.shape)
        hidden = base(
            inputs_embeds=embeddings, position_ids=positions, past_key_values=cache, use_cache=cache is not None, packing=packing
        ).last_hidden_state
        return hidden if rows is None else hidden.flatten(0, 1).index_select(0, rows)

    # ── prediction ───────────────────────────────────────────────────────────────────────────────────────────────────────
    @torch.no_grad()
    def start(self, pack: Any) -> DecodeState:
        """Reads a pack of S prompts; the state holds the logits float[S, V] that follow each."""
        lengths, device = pack.lengths.tolist(), pack.ids.device
        cache = KeyValues(len(lengths), device)
        cache.new = Placement(range(len(lengths)), lengths, len(lengths), device)
        return self._read(pack, cache, attention.Segments(lengths, device))

    @torch.no_grad()
    def extend(self, state: DecodeState, parents: Tensor, pack: Any) -> DecodeState:
        """S prompts that begin alike: prompt s is what `state` has read as prompt parents[s] (int64[S]), then segment s of the pack.
        `state` stays as it is."""
        lengths, device = pack.lengths.tolist(), pack.ids.device
        cache = state.cache.branch(parents, max(lengths))
        cache.new = Placement(range(len(lengths)), lengths, len(lengths), device)
        return self._read(pack, cache, Extension(cache.new, cache.visible), state.positions[parents])

    @torch.no_grad()
    def branches(self, state: DecodeState, rows: Sequence[int], pack: Any) -> Tensor:
        """Tries B continuations: segment b of the pack after prompt rows[b], any number a prompt. Their hidden states, float[T, D];
        `state` stays as it is."""
        state.cache.new = placement = Placement(rows, pack.lengths.tolist(), len(state), pack.ids.device)
        segment = torch.as_tensor(rows).repeat_interleave(pack.lengths).to(pack.ids.device)
        positions = self.positions(pack) + state.positions[segment]
        hidden = self._run(self.embed(pack)[None], positions, Extension(placement, state.cache.visible), state.cache)[0]
        state.cache.forget()
        return hidden

    def _read(self, pack: Any, cache: KeyValues, packing: attention.Packing, following: Tensor | None = None) -> DecodeState:
        """A pass over new tokens that stay. following: int64[S], each prompt's next position so far; None: prompts begin."""
        assert not self.training, "predict in eval mode: activation checkpointing would drop the cache"
        lengths = pack.lengths.to(pack.ids.device)
        segment = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
        positions = self.positions(pack)
        if following is not None:
            positions = positions + following[segment]
        hidden = self._run(self.embed(pack)[None], positions, packing, cache, lengths.cumsum(0) - 1)
        cache.keep()
        furthest = positions.reshape(-1, positions.shape[-1]).amax(0)
        following = furthest.new_zeros(len(lengths)).scatter_reduce(0, segment, furthest, "amax", include_self=False) + 1
        return DecodeState(cache, following, self.logits(hidden))

    @torch.no_grad()
    def step(self, state: DecodeState, ids: Tensor) -> Tensor:
        """Appends one token to each prompt (ids int64[S]); returns the logits float[S, V] that follow, also kept in the state."""
        state.cache.open_column()
        embeddings = self.llm.get_input_embeddings()(ids)[:, None]
        hidden = self._run(embeddings, self._step_positions(state.positions), Step(state.cache.visible), state.cache)
        state.positions = state.positions + 1
        state.logits = self.logits(hidden[:, 0])
        return state.logits

    def _step_positions(self, positions: Tensor) -> Tensor:
        """int64[S] → what `positions` would give for one token a row: int64[S, 1] (or int64[axes, S, 1])."""
        return positions[:, None]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TextModel:
        """`.bfloat16()`, `.to(...)`: rotary frequencies stay fp32 (in bf16 neighbouring positions become equal), whoever casts."""
        kept = {(m, n): b for m in self.modules() for n, b in m._buffers.items() if n.endswith("inv_freq") and b is not None}
        super()._apply(fn, recurse)
        for (module, name), buffer in kept.items():
            moved = module._buffers[name]
            assert moved is not None
            module._buffers[name] = buffer.to(moved.device)
        return self


class CausalLM(TextModel):
    """Family `causal_lm`: text only."""

    @classmethod
    def build(cls, spec: dict[str, Any], source: Source) -> CausalLM:
        return cls({"llm": llm_part(spec["parts"]["llm"], source)})
