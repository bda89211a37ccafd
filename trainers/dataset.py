"""Stage `dataset`: a source's name and keys in, a rows artefact out. What each source takes is in `datasets_ray.sources`."""

from __future__ import annotations

from typing import Any

from datasets_ray.sources import build
from trainers.context import Context


def run(spec: dict[str, Any], ctx: Context) -> dict[str, Any]:
    with ctx.working():
        manifest = build(spec, ctx.out, ctx.inputs, ctx.data_root)
    return {"rows": manifest["rows"], "classes": len(manifest["classes"]), "dropped": manifest["dropped"]}
