"""Toy plans: arms made of toy stages, in the shape of plan.json; `python -m tests.grid.toy_plan PLAN.json OUT` runs one as a driver."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

KINDS = {
    "toy": {"target": "tests.grid.toy_stages:run", "collective": True, "makes": "toy"},
    "toyone": {"target": "tests.grid.toy_stages:run", "collective": False, "makes": "toy"},
}


def stage(identity: str, needs: list[str] | None = None, kind: str = "toy", world: int = 1, **spec: Any) -> dict[str, Any]:
    return {
        "id": identity, "kind": kind, "name": identity.replace("-", " "), "spec": spec, "needs": needs or [], "arms": [],
        "runtime": {"world": world}, "cost": {"gpu_hours": spec.get("steps", 1) / 3600},
    }  # fmt: skip


def plan(stages: list[dict[str, Any]], arms: dict[str, list[str]], **run: Any) -> dict[str, Any]:
    for entry in stages:
        entry["arms"] = [name for name, ids in arms.items() if entry["id"] in ids]
    study = {"name": "toys", "profile": "tiny", "profile_reason": "a test", "miniature": True, "seed": 0, "notices": []}
    more = {"row": None, "source": "trained", "scores": {}}
    return {
        "study": study, "groups": {}, "arms": [{"name": n, "axes": {"llm": n}, "stages": ids, **more} for n, ids in arms.items()],
        "stages": stages, "totals": {}, "kinds": KINDS,
        "run": {"dashboard": False, "object_store_mb": 80, "grace_seconds": 10.0, **run},
    }  # fmt: skip


def shared(arms: int, world: int, **more: Any) -> dict[str, Any]:
    """`arms` arms on one base stage; each has a training and a small stage of its own."""
    stages = [stage("base", kind="toyone", steps=2)]
    names = {}
    for index in range(arms):
        stages.append(stage(f"train-{index}", ["base"], world=world, steps=3, seconds=0.05))
        stages.append(stage(f"score-{index}", [f"train-{index}"], kind="toyone"))
        names[f"arm-{index}"] = ["base", f"train-{index}", f"score-{index}"]
    return plan(stages, names, **more)


if __name__ == "__main__":
    from grid.run import run

    os.environ["TOY_DRIVER"] = str(os.getpid())  # inherited by the workers: a toy stage may kill its driver
    sys.exit(run(json.loads(Path(sys.argv[1]).read_text()), out=sys.argv[2], fresh=False, command=sys.argv))
