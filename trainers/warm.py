"""What a lane does once so that no stage has to: imports, the first DeepSpeed engine, the first processes of Ray Data.

In: the planned stages. Out: nothing but a warm process; each first time costs seconds (transformers' models 5-10 s, a first engine 1-2 s,
Ray Data's first stream 5-8 s on two cores), which otherwise every lane's first stages pay. A failure here is left to the stage that needs
what failed: it can say what for.
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Iterable
from typing import Any

from trainers import stages

log = logging.getLogger(__name__)


def needs(planned: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What the stages will import and start: {"kinds", "modules", "tokenizers", "deepspeed", "data"} (JSON, made by the driver)."""
    kinds: set[str] = set()
    modules: set[str] = set()
    tokenizers: set[str] = set()
    for stage in planned:
        kinds.add(stage["kind"])
        model = stage["spec"].get("model") or {}
        if model.get("tokenizer"):
            tokenizers.add(model["tokenizer"])
        for part in model.get("parts", {}).values():
            config = part.get("config") or {}
            kind = "qwen2_vl" if part["builder"] == "qwen2_vl" else config.get("model_type")
            if kind:
                modules.add(f"transformers.models.{kind}.modeling_{kind}")
            if part["builder"] == "open_clip":
                modules.add("open_clip")
    train = "train" in kinds
    return {"kinds": sorted(kinds), "modules": sorted(modules), "tokenizers": sorted(tokenizers), "deepspeed": train, "data": train}


def warm(what: dict[str, Any], device: str, rank: int) -> None:
    """All of it; Ray Data's processes start beside the rest and beside the first stages, which draw rows. The process group must be up
    (DeepSpeed asks for it)."""
    if what["data"] and rank == 0:
        threading.Thread(target=_quietly, args=(_stream, what["tokenizers"]), name="warm-up", daemon=True).start()
    for kind in what["kinds"]:
        _quietly(stages.load, kind)
    for module in what["modules"]:
        _quietly(importlib.import_module, module)
    if what["deepspeed"]:
        _quietly(_engine, device)


def _quietly(function: Any, *arguments: Any) -> None:
    try:
        function(*arguments)
    except Exception as error:
        log.info("warming up: %s: %s", getattr(function, "__name__", function), error)


def _engine(device: str) -> None:
    """One optimiser step of one weight. Every rank must call it."""
    import torch

    from trainers.engine import load_deepspeed

    deepspeed = load_deepspeed(device)
    module = torch.nn.Linear(1, 1).to(device)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}, "zero_allow_untested_optimizer": True}
    optimizer = torch.optim.AdamW(module.parameters())
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
    engine.backward(engine(torch.ones(1, 1, device=device)).sum())
    engine.step()
    engine.destroy()


def _stream(tokenizers: list[str]) -> None:
    """Starts Ray Data's helpers and a pair of its workers, which load what encoding needs."""
    import numpy as np

    from datasets_ray.streaming import WORKERS, Stream

    steps = [np.arange(1)] * (8 * WORKERS)
    with Stream(_Touch(tokenizers), steps, name="warm-up") as stream:
        for _ in stream:
            pass


class _Touch:
    """A data task that loads tokenizers and returns nothing."""

    def __init__(self, tokenizers: list[str]) -> None:
        self.tokenizers = tokenizers

    def __call__(self, numbers: Any) -> tuple[None, Any]:
        from datasets_ray.encoding import Stats
        from datasets_ray.tokens import load_tokenizer

        for name in self.tokenizers:
            _quietly(load_tokenizer, name)
        return None, Stats()
