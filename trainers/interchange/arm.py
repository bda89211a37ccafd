"""A finished arm on disk: what it is, where its weights lie, how it is asked, what it was made of.

In: `RUN_DIR/ARM` (or `RUN_DIR/arms/ARM`) of a grid run, or the artefact directory of a train stage. Out: `Arm`. Only files are read:
plan.json and run.json of the run, and the finished stages of its store.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets_ray.errors import UserError, nearest
from datasets_ray.files import json_object
from trainers.evaluate import read_model, recipe_of

FAMILIES = ("vlm", "qwen2_vl")


@dataclass
class Arm:
    """model: its ModelSpec after all training; image: the ImageRecipe that it is asked with; inputs: where each stage of it lies."""

    name: str
    model: dict[str, Any]
    image: dict[str, Any]
    precision: str
    inputs: dict[str, Path]
    suffix: str = ""
    max_new_tokens: int | None = None
    planned: dict[str, Any] = field(default_factory=dict)
    """The arm's entry in plan.json; empty for a stage's artefact."""
    study: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Every stage of the plan by id."""
    store: Path | None = None
    versions: dict[str, str] = field(default_factory=dict)

    def read(self, stage: str, file: str) -> dict[str, Any]:
        """A JSON file of a finished stage; {} where there is none."""
        path = None if self.store is None else self.store / stage / file
        return json_object(path) if path is not None and path.is_file() else {}


def open_arm(path: Path, recipe: str | None = None, precision: str | None = None) -> Arm:
    """The arm that a path names. recipe, precision: as trainers.evaluate takes them; a run's arm brings its own.

    Raises UserError: no such run or arm, an arm that isn't finished or answers no questions.
    """
    if (path / "model.json").is_file():
        model, inputs = read_model(path)
        arm = Arm(path.resolve().name, model, recipe_of(model, recipe) or {}, precision or "fp32", inputs)
    else:
        arm = _of_run(path)
        arm.precision = precision or arm.precision
        if recipe is not None:
            arm.image = recipe_of(arm.model, recipe) or {}
    if arm.model["family"] not in FAMILIES:
        raise UserError(f"{arm.name} is of family {arm.model['family']!r}", why="only models that see and answer are exported")
    return arm


def _of_run(path: Path) -> Arm:
    run, name = _split(path)
    plan, about = json_object(run / "plan.json"), json_object(run / "run.json") if (run / "run.json").is_file() else {}
    entries = {entry["name"]: entry for entry in [*plan.get("arms", []), *plan.get("references", [])]}
    if name not in entries:
        what = f"no arm {name!r} in {run}" if name else f"{run} holds {len(entries)} arms"
        raise UserError(what, hint=nearest(name, entries) if name else f"name one: {run}/{next(iter(entries), 'ARM')}")
    entry, stages = entries[name], {stage["id"]: stage for stage in plan.get("stages", [])}
    asked = next((stages[id]["spec"] for id in entry.get("predictions", {}).values() if id in stages), None)
    if asked is None or asked.get("image") is None:
        raise UserError(f"arm {name!r} is asked no questions about images", why="how it is asked is part of what is exported")
    store = next((Path(place) for place in (about.get("store"), run / "store") if place and Path(place).is_dir()), run / "store")
    inputs = {}
    for part, spec in asked["model"]["parts"].items():
        id = spec["weights"].get("stage")
        if id is None:
            continue
        if not (store / id / "DONE.json").is_file():
            done = stages.get(id, {}).get("name", id)
            why, hint = f"its {part} comes from {done!r}, which isn't finished in {store}", "run grid.run again: it goes on from there"
            raise UserError(f"arm {name!r} isn't finished", why=why, hint=hint)
        inputs[id] = store / id
    drivers = about.get("drivers") or [{}]
    return Arm(
        name, asked["model"], asked["image"], asked.get("precision", "fp32"), inputs, asked.get("suffix", ""), asked.get("max_new_tokens"),
        entry, plan.get("study", {}), stages, store, drivers[-1].get("versions", {}),
    )  # fmt: skip


def _split(path: Path) -> tuple[Path, str]:
    """(run directory, arm's name or nothing)."""
    if (path / "plan.json").is_file():
        return path, ""
    if (path.parent / "plan.json").is_file():
        return path.parent, path.name
    if path.parent.name == "arms" and (path.parent.parent / "plan.json").is_file():
        return path.parent.parent, path.name
    raise UserError(f"{path} is no arm of a run", why="no plan.json above it, no model.json in it", hint="RUN_DIR/ARM")
