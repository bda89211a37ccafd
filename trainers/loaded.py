"""The model that a worker holds between stages: seven benchmarks of an arm load its weights once."""

from __future__ import annotations

import gc
import hashlib
import json
from typing import Any

from trainers import switches
from trainers.context import Context
from trainers.models import build


def identity(value: Any) -> str:
    """Hash of a JSON value's content."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:24]


def load_model(model: dict[str, Any], image: dict[str, Any] | None, precision: str, ctx: Context) -> Any:
    """A ModelSpec's model on the stage's device, in eval mode. Only the last one asked for is kept, so that two never share the memory."""
    key = "model:" + identity([model, image, precision, ctx.device, switches.on("lean")])
    dropped = ctx.cache.drop("model:", keep=key)

    def make() -> Any:
        if dropped:
            gc.collect()  # modules hold each other: the one before goes now, not after the next stages
        return build(model, ctx, image=image, precision=precision).to(ctx.device).eval()

    return ctx.cache.get(key, make)
