"""Language models: any Hugging Face causal LM run on packs, and the text interface that all generating families share.

    TextModel.embed(pack) float[T, D] ──► LM over packed segments ──hidden──► float[T, D] ──logits at wanted rows──► float[K, V]

A family says how a pack becomes embeddings (`embed`) and positions; hidden states, logits and decoding are here. Logits are never made
for positions that nobody learns from (152k columns for Qwen2). Shapes: T tokens of a pack, S segments, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from datasets_ray.errors import UserError
from trainers.models import attention
from trainers.models.decoding import DecodeState, KeyValues, Step
from trainers.models.weights import Source, make_part


def causal_lm(config: dict[str, Any]) -> nn.Module:
    """A causal LM from a Hugging Face config dict with its `model_type`; weights by whatever initialisation is in force."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(config)
    kind = fields.pop("model_type", None)
    if kind is None:
        raise UserError("a causal_lm config without model_type", hint="model_type: llama, qwen2, ... as in the model's config.json")
    try:
        hf = AutoConfig.for_model(kind, **fields)
    except ValueError as error:
        raise UserError(f"no language model of type {kind!r}", why=str(error).splitlines()[0]) from None
    for field in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(hf, field, None) not in (None, 1, 1.0):
            raise UserError(f"{kind} sets {field}", why="logits are the output embedding of the hidden state and nothing else")
    model = AutoModelForCausalLM.from_config(hf, attn_implementation=attention.register(), dtype=torch.float32)
    model.tie_weights()  # part of the initialisation that loading skips
    return model


def llm_part(part: dict[str, Any], source: Source) -> nn.Module:
    """The `llm` part: `{"builder": "causal_lm", "config": {...}, "weights": W}`. An empty config is read from the checkpoint."""
    config = part["config"]
    if not config or set(config) == {"name"}:
        config = source.config_of(part)
    return without_dropout(make_part("llm", part, source, lambda: causal_lm(config)))


def without_dropout(module: nn.Module) -> nn.Module:
    """Nothing random in a forward pass: recipes here train without dropout, and packed must equal unpacked."""
    for child in module.modules():
        if isinstance(child, nn.Dropout):
            child.p = 0.0
        if getattr(child, "attention_dropout", 0.0):
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

    def hidden(self, pack: Any) -> Tensor:
        """The pack's hidden states after the final norm, float[T, D]; no token sees another segment.

        An empty pack (T = 0: a rank with nothing left in a step) runs one token and drops it, so that gradients are zero, not absent.
        """
        lengths, embeddings, positions = pack.lengths.tolist(), self.embed(pack), self.positions(pack)
        if not lengths:
            filler = self.llm.get_input_embeddings()(pack.ids.new_zeros(1))
            embeddings, positions, lengths = torch.cat([embeddings, filler]), F.pad(positions, (0, 1)), [1]
        hidden = self._run(embeddings[None], positions, attention.Segments(lengths, pack.ids.device))[0]
        return hidden[: len(pack.ids)]

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

    def _run(self, embeddings: Tensor, positions: Tensor, packing: attention.Packing, cache: KeyValues | None = None) -> Tensor:
        """float[B, L, D] → float[B, L, D]."""
        return self.llm.base_model(
            inputs_embeds=embeddings, position_ids=positions, past_key_values=cache, use_cache=cache is not None, packing=packing
        ).last_hidden_state

    # ── prediction ───────────────────────────────────────────────────────────────────────────────────────────────────────
    @torch.no_grad()
    def start(self, pack: Any) -> DecodeState:
        """Reads a pack of S prompts; the state holds the logits float[S, V] that follow each."""
        assert not self.training, "predict in eval mode: activation checkpointing would drop the cache"
        lengths, device = pack.lengths.tolist(), pack.ids.device
        cache = KeyValues(lengths, device)
        positions = self.positions(pack)
        hidden = self._run(self.embed(pack)[None], positions, attention.Segments(lengths, device), cache)[0]
        ends = torch.as_tensor(lengths, device=device).cumsum(0)
        segment = torch.arange(len(lengths), device=device).repeat_interleave(torch.as_tensor(lengths, device=device))
        furthest = positions.reshape(-1, positions.shape[-1]).amax(0)
        following = furthest.new_zeros(len(lengths)).scatter_reduce(0, segment, furthest, "amax", include_self=False) + 1
        return DecodeState(cache, following, self.logits(hidden[ends - 1]))

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
