"""Low-rank adapters (LoRA: Hu et al. 2021, section 4.1): a part's own weights stay as they are, small products beside its maps learn.

In: a model with named parts and a train spec's `adapters`, {"llm": {"kind": "lora", "rank", "alpha", "dropout", "targets"}}. Out: the
same part, whose chosen maps compute W x + alpha / rank * B A x with B = 0 at first, through peft. At the stage's end B A is added to W in
fp32, so that whatever comes later reads a plain part; the adapters themselves are kept beside it in peft's own format (`adapters/llm/`).

    attach(model, spec["adapters"], seed)     before an engine and before a checkpoint's weights
    freeze_rest(model)                        after models.train_parts: only adapters of an adapted part learn
    merge(module, directory)                  the adapters to files, the part plain again
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from datasets_ray.errors import UserError, nearest

NAME = "default"
"""The adapter's name inside peft."""
ALL = "all-linear"
"""Targets: every linear map of the part but its output embedding."""


def attach(model: Any, adapters: Mapping[str, Mapping[str, Any]] | None, seed: int) -> None:
    """Puts adapters into parts; A is drawn under `seed` alone, B is 0, so that the model computes what it did. Raises UserError."""
    for part, wanted in (adapters or {}).items():
        if part not in model.parts:
            raise UserError(f"adapters for part {part!r}", why="the model has no such part", hint=nearest(part, model.parts))
        if wanted.get("kind", "lora") != "lora":
            raise UserError(f"unknown adapter {wanted['kind']!r}", hint=nearest(wanted["kind"], ["lora"]))
        if wanted.get("dropout"):
            raise UserError(
                f"adapter dropout {wanted['dropout']}", why="its draws would depend on micro-batch and worker count", hint="dropout: 0.0"
            )
        _inject(model.parts[part], part, wanted, seed)


def _inject(module: nn.Module, part: str, wanted: Mapping[str, Any], seed: int) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=int(wanted["rank"]), lora_alpha=wanted["alpha"], lora_dropout=0.0, bias="none",
        target_modules=targets(module, part, wanted.get("targets", ALL)),
    )  # fmt: skip
    training = module.training
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        inject_adapter_in_model(config, module, adapter_name=NAME)
    module.train(training)
    module.adapter_config = config  # type: ignore[assignment]


def targets(module: nn.Module, part: str, wanted: str | Sequence[str]) -> list[str]:
    """Full names of the linear maps that get an adapter. wanted: `all-linear`, or last names such as `q_proj`."""
    head = getattr(module, "get_output_embeddings", lambda: None)()
    maps = [name for name, child in module.named_modules() if type(child) is nn.Linear and child is not head]
    if wanted == ALL:
        return maps
    last = {name.rpartition(".")[2] for name in maps}
    for name in [wanted] if isinstance(wanted, str) else wanted:
        if name not in last:
            raise UserError(f"adapters of {part}: no linear map {name!r}", hint=f"{nearest(name, last)}; or {ALL}")
    return [name for name in maps if name.rpartition(".")[2] in wanted]


def layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, peft's layer) of every map that has an adapter."""
    if hasattr(module, "adapter_config"):
        from peft.tuners.lora import LoraLayer

        yield from ((name, child) for name, child in list(module.named_modules()) if isinstance(child, LoraLayer))


def freeze_rest(model: Any) -> None:
    """In parts with adapters nothing else learns."""
    for module in model.parts.values():
        if hasattr(module, "adapter_config"):
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(parameter.requires_grad and ".lora_" in name)


@torch.no_grad()
def merge(module: nn.Module, directory: Path) -> list[Path]:
    """Writes the adapters in peft's format (`PeftModel.from_pretrained(base, directory)` reads them), then adds them to the weights, in
    fp32 with one rounding to the weights' type, and takes them out. Returns the files; none for a part without adapters. The weights have
    to be whole (`Engine.gathered`)."""
    found = list(layers(module))
    if not found:
        return []
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, layer in found:
        low, high, base = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight, layer.get_base_layer()
        for kind, tensor in (("lora_A", low), ("lora_B", high)):
            tensors[f"base_model.model.{name}.{kind}.weight"] = tensor.detach().to("cpu", copy=True).contiguous()
        base.weight.data = (base.weight.float() + layer.scaling[NAME] * (high.float() @ low.float())).to(base.weight.dtype)
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, base)
    file = directory / "adapter_model.safetensors"
    save_file(tensors, str(file), metadata={"format": "pt"})
    module.adapter_config.save_pretrained(str(directory))  # type: ignore[union-attr, operator]
    del module.adapter_config
    vars(module).pop("peft_config", None)
    return [file, directory / "adapter_config.json"]
