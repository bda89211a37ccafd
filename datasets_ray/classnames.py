"""Class names that a release doesn't hold itself: a committed list in, names in label order out.

`names/*.json` say where their names come from and under which licence. They are the names that CLIP is asked with (Radford et al. 2021).
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "names"


@lru_cache(maxsize=8)
def _classes(name: str) -> tuple[Any, ...]:
    return tuple(json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))["classes"])


def flower_names() -> list[str]:
    """The 102 names; label n of `imagelabels.mat` is the n-th, counted from one."""
    return list(_classes("flowers102"))


def imagenet_names() -> dict[str, str]:
    """WordNet id → name of the 1,000 classes in label order. Two names occur twice, `missile` and `sunglasses`."""
    return dict(_classes("imagenet"))
