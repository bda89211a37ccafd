"""Models: a ModelSpec in, a torch module with named parts out.

    model = build(spec, ctx)
    model.parts            {"encoder": ..., "connector": ..., "llm": ...}: what a recipe trains or freezes by name
    model.hidden(pack)     float[T, D]; model.logits(hidden float[K, D]) float[K, V]; model.start / model.step for decoding
    save_part(model, "connector", path)

A family is a class with `build(spec, source)` and a line in FAMILIES; nothing of a family is imported before it is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from datasets_ray.errors import UserError, nearest
from trainers.models.weights import Source, save_part

if TYPE_CHECKING:
    from torch import nn

    from trainers.context import Context

__all__ = ["FAMILIES", "build", "freeze_table", "save_part", "train_parts"]

FAMILIES: dict[str, str] = {
    "vlm": "trainers.models.vlm:Vlm",
    "qwen2_vl": "trainers.models.qwen2_vl:Qwen2Vl",
    "causal_lm": "trainers.models.language:CausalLM",
    "clip": "trainers.models.clip:Clip",
    "existing": "trainers.models.existing:Existing",
}


def build(spec: dict[str, Any], ctx: Context, *, image: dict[str, Any] | None = None, precision: str | None = None) -> Any:
    """The model of a ModelSpec, on the CPU and in eval mode, with every part's weights in place.

    image: the ImageRecipe its pixels are prepared by; precision: "fp32" or "bf16". Both default to what the stage's spec says, the
    image recipe further to the encoder's own normalisation. Activation checkpointing follows ctx.runtime.
    Raises UserError for unknown names and for weights that don't fit.
    """
    import torch

    family = spec["family"]
    if family not in FAMILIES:
        raise UserError(f"unknown model family {family!r}", hint=nearest(family, FAMILIES))
    module_name, class_name = FAMILIES[family].split(":")
    stage = ctx.stage.get("spec", {})
    image = image or stage.get("image") or stage.get("data", {}).get("image")
    precision = precision or stage.get("precision") or "fp32"
    if precision not in {"fp32", "bf16"}:
        raise UserError(f"unknown precision {precision!r}", hint="fp32 or bf16")
    model = getattr(importlib.import_module(module_name), class_name).build(spec, Source(ctx.inputs, image))
    if precision == "bf16":
        model.to(torch.bfloat16)
    model.activation_checkpointing(bool(ctx.runtime.get("activation_checkpointing", False)))
    if "model" in stage:  # a stage that reads text with it
        _check_vocabulary(model, spec)
    return model.eval()


def _check_vocabulary(model: Any, spec: dict[str, Any]) -> None:
    """UserError if the tokenizer has ids beyond the embedding: found here, not at the first row that holds such a token. More rows than
    tokens are fine (vocabularies are padded)."""
    from datasets_ray.tokens import load_tokenizer

    name = spec.get("tokenizer") or getattr(model, "tokenizer", None)
    if name is None:
        return
    ids, rows = max(load_tokenizer(name).get_vocab().values()) + 1, model.vocabulary
    if ids > rows:
        raise UserError(
            f"tokenizer {name!r} has {ids} tokens, the model's embedding {rows} rows",
            why="they are not of one model", hint="give the language model its own tokenizer",
        )  # fmt: skip


def train_parts(model: Any, names: set[str]) -> None:
    """Exactly these parts learn; the others keep no gradients. The model is in training mode afterwards: it has no dropout, but a frozen
    language model below a connector that trains recomputes its activations only there."""
    unknown = names - set(model.parts)
    if unknown:
        raise UserError(f"no part {sorted(unknown)[0]!r} in this model", hint=nearest(sorted(unknown)[0], model.parts))
    for name, part in model.parts.items():
        part.requires_grad_(name in names)
    model.train()


def freeze_table(model: Any) -> list[dict[str, Any]]:
    """What a stage trains: [{"part": name, "parameters": n, "trainable": n}]; tied parameters count once."""
    return [
        {
            "part": name,
            "parameters": sum(_size(p) for p in part.parameters()),
            "trainable": sum(_size(p) for p in part.parameters() if p.requires_grad),
        }
        for name, part in model.parts.items()
    ]


def _size(parameter: nn.Parameter) -> int:
    """Elements of a parameter, of the whole one if it is sharded (ZeRO 3 leaves `ds_numel`)."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
