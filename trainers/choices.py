"""Stage `choices`: similarities of labelled rows in, k-way questions with the hardest negatives out (`datasets_ray.choices`).

In: `{"similarities": id, "rows": id, "k": 5, "seed": 0, "question": "..."}`. Out: a rows artefact of questions.
"""

from __future__ import annotations

from typing import Any

from datasets_ray.choices import build_from_similarities
from trainers.context import Context


def run(spec: dict[str, Any], ctx: Context) -> dict[str, Any]:
    with ctx.working():
        manifest = build_from_similarities(
            ctx.inputs(spec["similarities"]), ctx.inputs(spec["rows"]), ctx.out, k=spec["k"], seed=spec["seed"], question=spec["question"]
        )
    shown = ("rows", "k", "seed", "model", "template", "ties_at_the_cut", "ties_in_order", "duplicate_classes", "right_letters", "dropped")
    return {name: manifest[name] for name in shown}
