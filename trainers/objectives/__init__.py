"""Objectives by name. In: `{"name": "next_token", ...its own keys}` from a train stage's spec. Out: an Objective.

Registered names load their module on first use; anything else is `module:Class`, so that a study can bring its own.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from datasets_ray.errors import UserError, nearest
from trainers.objectives.base import Objective, Output

__all__ = ["OBJECTIVES", "Objective", "Output", "load_objective"]

OBJECTIVES = {
    "next_token": "trainers.objectives.next_token:NextToken",
    "contrastive": "trainers.objectives.contrastive:Contrastive",
}


def load_objective(spec: Mapping[str, Any]) -> Objective:
    """The objective of a spec; keys other than `name` go to its constructor. Raises UserError for an unknown name or key."""
    name = str(spec.get("name", ""))
    target = OBJECTIVES.get(name, name)
    module_name, _, class_name = target.partition(":")
    if not class_name:
        raise UserError(f"unknown objective {name!r}", hint=nearest(name, OBJECTIVES) + " or `module:Class`")
    try:
        made = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"objective {name!r} can't be loaded", why=str(error), hint="name it as `module:Class`") from error
    keys = {key: value for key, value in spec.items() if key != "name"}
    try:
        inspect.signature(made).bind(**keys)
    except TypeError as error:
        raise UserError(f"objective {name!r} doesn't take {sorted(keys)}", why=str(error)) from error
    return made(**keys)
