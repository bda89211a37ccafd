"""Where rows come from: the registry behind every `dataset` stage. A new source is a file with `build` and a line here.

    build(spec, out, inputs, data_root) -> manifest

Flows in: the stage's spec (`{"source": NAME, ...the source's own keys}`), `inputs(stage id) -> directory` for sources made of other
rows, and the folder of the user's datasets. Flows out: a rows artefact in `out`. Specs, by source:

    specimens  part, rows, seed, split, set, size, style ...   the miniature world: see specimens/world.py
    grocery, pets, food101, cub                                photographs: part labelled | captions | instructions, split train | test,
                                                               rows, seed, folder: see each file and photos.py
    coco       part captions, split train | val
    foci       set oxford_pet | food101 | ..., seed            the benchmark's questions whose images are present
    concat     inputs: [stage ids]                             one artefact after the other
    permuted   input: stage id, seed                           images permuted among questions: the control
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets_ray.errors import UserError, nearest

SOURCES: dict[str, str] = {
    "specimens": "datasets_ray.specimens.world:build",
    "grocery": "datasets_ray.grocery:build",
    "pets": "datasets_ray.pets:build",
    "food101": "datasets_ray.food101:build",
    "cub": "datasets_ray.cub:build",
    "coco": "datasets_ray.coco:build",
    "foci": "datasets_ray.foci:build",
    "concat": "datasets_ray.derived:concat",
    "permuted": "datasets_ray.derived:permuted",
}
"""Name → `module:function`, imported only when asked for."""


def build(spec: dict[str, Any], out: Path, inputs: Callable[[str], Path], data_root: str | None) -> dict[str, Any]:
    """Builds the rows that `spec` describes in `out` and returns their manifest; UserError for a mistake in the spec or the data."""
    name = spec.get("source", "")
    if name not in SOURCES:
        raise UserError(f"unknown source {name!r}", hint=nearest(name, SOURCES))
    module, function = SOURCES[name].split(":")
    return getattr(importlib.import_module(module), function)(spec, Path(out), inputs, data_root)
