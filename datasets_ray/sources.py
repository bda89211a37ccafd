"""Where rows come from: the registry behind every `dataset` stage. A new source is a file with `build` and a line here.

    build(spec, out, inputs, data_root) -> manifest

Flows in: the stage's spec (`{"source": NAME, ...the source's own keys}`), `inputs(stage id) -> directory` for sources made of other
rows, and the folder of the user's datasets. Flows out: a rows artefact in `out`. Specs, by source:

    specimens  part, rows, seed, split, set, size, style ...   the miniature world: see specimens/world.py
    grocery, pets, food101, cub                                photographs: part labelled | captions | instructions, split train | test,
                                                               rows, seed, folder: see each file and photos.py
    coco       part captions, split train | val
    foci       set oxford_pet | food101 | ..., seed            the benchmark's questions whose images are present
    flowers102, stanford_cars, stanford_dogs, aircraft         part labelled, split test | train | ...; as grocery
    imagenet             part labelled, folder                 the validation part
    imagenet_annotated   k, seed, least_wrong, file            questions from annotated model errors
    vlmevalkit_tsv       file, split, circular, most_images, images, open, pair, text_only      VLMEvalKit's tables
    benchmark_tables     set mmstar | scienceqa | ai2d | mathvista | mmmu | pope, file, split   Parquet and JSON lines
    llava_json   file, images, verify                          LLaVA's lists: 558K captions, mix-665K conversations
    pixmo        files, images, part caption, verify           PixMo-Cap with the images that datasets_ray.download fetched
    webdataset   files, text txt | json, field, verify         tar archives
    hf_datasets  folder | files, split, image, text | conversations, id, images, verify     what Hugging Face `datasets` saves
    concat     inputs: [stage ids]                             one artefact after the other
    permuted   input: stage id, seed                           images permuted among questions: the control

With any source: `expect`, `allow_subset` and `most_dropped` (see policy.py). `rows: n` reads only the first n records, and then the
release's count isn't checked: that is how a preflight tries a source.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets_ray.errors import UserError, nearest
from datasets_ray.policy import Policy

SOURCES: dict[str, str] = {
    "specimens": "datasets_ray.specimens.world:build",
    "grocery": "datasets_ray.grocery:build",
    "pets": "datasets_ray.pets:build",
    "food101": "datasets_ray.food101:build",
    "cub": "datasets_ray.cub:build",
    "coco": "datasets_ray.coco:build",
    "foci": "datasets_ray.foci:build",
    "flowers102": "datasets_ray.flowers102:build",
    "stanford_cars": "datasets_ray.stanford:cars",
    "stanford_dogs": "datasets_ray.stanford:dogs",
    "aircraft": "datasets_ray.aircraft:build",
    "imagenet": "datasets_ray.imagenet:build",
    "imagenet_annotated": "datasets_ray.imagenet:build_annotated",
    "vlmevalkit_tsv": "datasets_ray.vlmevalkit_tsv:build",
    "benchmark_tables": "datasets_ray.benchmark_tables:build",
    "llava_json": "datasets_ray.llava_json:build",
    "pixmo": "datasets_ray.pixmo:build",
    "webdataset": "datasets_ray.webdataset:build",
    "hf_datasets": "datasets_ray.hf_datasets:build",
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
    policy, own = Policy.split(spec)
    manifest = getattr(importlib.import_module(module), function)(own, Path(out), inputs, data_root)
    return policy.hold(manifest, Path(out), own.get("rows"))
