"""What a ModelSpec's entries turn into: plain dictionaries in and out, read alike by whoever plans a stage and by the stage itself."""

from __future__ import annotations

from typing import Any


def trained(weights: dict[str, Any], stage: str) -> dict[str, Any]:
    """A part's `weights` once a stage has trained it; `of` remembers the checkpoint whose architecture it still has."""
    origin = weights if "checkpoint" in weights else weights.get("of")
    return {"stage": stage, "of": origin} if origin else {"stage": stage}
