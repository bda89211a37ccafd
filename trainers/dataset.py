"""Stage `dataset`: a source's name and keys in, a rows artefact out. What each source takes is in `datasets_ray.sources`."""

from __future__ import annotations

from typing import Any

from datasets_ray.sources import build
from trainers.context import Context

TOLD = ("records", "subset", "substituted", "renamed", "filtered")
"""What else a manifest counts, where there is any: records of the source, published and found ones, and rows that were mended."""


def run(spec: dict[str, Any], ctx: Context) -> dict[str, Any]:
    with ctx.working():
        manifest = build(spec, ctx.out, ctx.inputs, ctx.data_root)
    told = {key: manifest[key] for key in TOLD if manifest.get(key)}
    return {"rows": manifest["rows"], "classes": len(manifest["classes"]), "dropped": manifest["dropped"], **told}
