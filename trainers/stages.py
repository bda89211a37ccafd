"""Stage kinds: name → where its `run(spec, ctx)` lives and whether all ranks take part. A new kind is a file and a line here."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets_ray.errors import UserError, nearest


@dataclass(frozen=True)
class Kind:
    target: str
    collective: bool
    """True: every rank calls run (process group collectives allowed). False: rank 0 only."""
    makes: str
    """The typed artefact it leaves behind."""


KINDS: dict[str, Kind] = {
    "dataset": Kind("trainers.dataset:run", False, "rows"),
    "train": Kind("trainers.train:run", True, "weights"),
    "embeddings": Kind("trainers.embeddings:run", False, "embeddings"),
    "similarities": Kind("trainers.similarities:run", False, "similarities"),
    "choices": Kind("trainers.choices:run", False, "rows"),
    "zeroshot": Kind("trainers.zeroshot:run", False, "scores"),
    "predict": Kind("trainers.predict:run", True, "predictions"),
    "score": Kind("trainers.score:run", False, "scores"),
}


def load(kind: str) -> Callable[..., dict[str, Any]]:
    """The run function of a kind; imports its module only now."""
    if kind not in KINDS:
        raise UserError(f"unknown stage kind {kind!r}", hint=nearest(kind, KINDS))
    module, name = KINDS[kind].target.split(":")
    return getattr(importlib.import_module(module), name)
