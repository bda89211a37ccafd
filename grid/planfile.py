"""plan.json as text: a plan's dictionary in, one line per arm and stage out, so that two plans can be compared line by line."""

from __future__ import annotations

import json
from typing import Any

HOLE = "\0"
"""Where a rendered model goes; no spec holds this text."""


def dump(content: dict[str, Any]) -> str:
    """The text; a value that is no list of entries stands on one line."""
    lines = []
    models: dict[int, str] = {}
    for key, value in content.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            text = "[\n" + ",\n".join([_line(item, models) for item in value]) + "\n]"
        else:
            text = json.dumps(value)
        lines.append(f"{json.dumps(key)}: {text}")
    return "{" + ",\n".join(lines) + "}\n"


def _line(item: dict[str, Any], models: dict[int, str]) -> str:
    """An item's JSON; a model that many stages share is rendered once."""
    model = item.get("spec", {}).get("model")
    if model is None:
        return json.dumps(item)
    if id(model) not in models:
        models[id(model)] = json.dumps(model)
    return json.dumps({**item, "spec": {**item["spec"], "model": HOLE}}).replace(json.dumps(HOLE), models[id(model)], 1)
