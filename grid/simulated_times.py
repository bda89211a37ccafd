"""How long a stage takes where it isn't run: a planned stage in; seconds of its parts out, from the FLOP model or as a run measured them.

The FLOP model's seconds are `stage.cost.gpu_hours` (grid.cost, at the profile's assumed MFU) shared by the workers of a collective stage;
reading and writing weights, data and checkpoints is bytes over a rate. A measured run gives each stage that has its identity (else its
name) what that took in its lane, whatever was in it; stages the run didn't have are scaled by what their group took over its estimate.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from datasets_ray.errors import UserError, nearest
from grid.jsonl import read_lines
from grid.summary import group_of
from trainers.stages import KINDS

GIB = 2.0**30
HOST = ("dataset", "choices", "score")
"""Kinds that leave a GPU alone."""


@dataclass(frozen=True)
class Assumptions:
    """What a plan doesn't say; `--assume KEY=VALUE` changes one."""

    start_seconds: float = 40.0
    """From the start of a run until its lanes are up (33-43 s measured with two lanes on one machine)."""
    restart_seconds: float = 300.0
    """From a node's failure until its lanes are up again: noticing, a node in its place, the workers' start."""
    stage_seconds: float = 0.5
    """Around every stage, whatever it does: claim, lease, commit (0.1-0.7 s measured)."""
    gib_per_second: float = 1.0
    """At which a lane reads and writes weights, checkpoints and data."""
    seed: int = 0
    """Of the failures."""

    @classmethod
    def read(cls, given: Sequence[str]) -> Assumptions:
        """From `KEY=VALUE`s. Raises UserError for another key, and for a value that is no number or makes no sense."""
        made: dict[str, Any] = {}
        known: dict[str, Any] = {field.name: int if field.name == "seed" else float for field in fields(cls)}
        for text in given:
            key, _, value = text.partition("=")
            if key not in known:
                raise UserError(f"no assumption {key!r}", hint=nearest(key, known))
            try:
                made[key] = known[key](value)
            except ValueError:
                made[key] = math.nan
            if not 0 <= made[key] < math.inf or (key == "gib_per_second" and not made[key]):
                raise UserError(f"{key}: {value!r}", why="a number that isn't negative is expected", hint=f"--assume {key}=1")
        return cls(**made)


@dataclass(frozen=True)
class Times:
    """Seconds of one stage in its lane."""

    seconds: float
    """Its own work, whole."""
    fixed: float = 0.0
    """Before that, always."""
    load: float = 0.0
    """Before that, unless the lane has the model in hand."""
    close: float = 0.0
    """After that: writing what it made."""
    chunk: float = math.inf
    """Work between two checkpoints; inf: none is written."""
    save: float = 0.0
    """One checkpoint."""
    restore: float = 0.0
    """Reading one back."""
    devices: int = 1
    """GPUs that its work keeps busy."""

    def saves(self, saved: float = 0.0) -> int:
        """Checkpoints that an attempt writes which begins with so much work done."""
        return max(0, math.ceil((self.seconds - saved) / self.chunk - 1e-9) - 1)

    @property
    def least(self) -> float:
        """With the model in hand and nothing failing."""
        return self.fixed + self.seconds + self.saves() * self.save + self.close


def estimate(stage: Mapping[str, Any], workers: int, each: int, assume: Assumptions, device: str) -> Times:
    """From the plan's numbers. workers: of a lane; each: GPUs of a worker; device: of the profile, `cpu` or `cuda`."""
    cost, runtime, spec = stage.get("cost", {}), stage.get("runtime", {}), stage["spec"]
    world = min(workers, runtime.get("world", 1))
    seconds = 3600.0 * cost.get("gpu_hours", 0.0) / world
    width = 2 if spec.get("precision") == "bf16" else 4
    weights = sum(cost["parameters"].values()) * width / GIB if "parameters" in cost else cost.get("memory_gib", 0.0)
    made = Times(
        seconds, assume.stage_seconds, weights / assume.gib_per_second, cost.get("disk_gib", 0.0) / assume.gib_per_second,
        devices=0 if device == "cuda" and stage["kind"] in HOST else world * each,
    )  # fmt: skip
    if stage["kind"] == "train" and cost.get("steps") and runtime.get("checkpoint_steps"):
        one = cost.get("work_gib", 0.0) / 2 / assume.gib_per_second  # the plan counts the two that are kept
        return replace(made, chunk=_share(seconds, runtime["checkpoint_steps"], cost["steps"]), save=one, restore=one)
    if stage["kind"] == "predict" and cost.get("samples"):  # finished batches of answers stay
        return replace(made, chunk=_share(seconds, runtime.get("eval_batch", 1), cost["samples"]))
    return made


def _share(seconds: float, part: float, whole: float) -> float:
    return seconds * part / whole if seconds and part < whole else math.inf


@dataclass(frozen=True)
class Taken:
    """What a stage took in a run's lane. `lane`: seconds from claim to end; `work`: of them its own; `world`: workers of that lane."""

    lane: float
    work: float
    world: int


@dataclass(frozen=True)
class Measured:
    """A run's stages by identity and by name; `turnaround`: seconds from a stage's end to its lane's next claim."""

    folder: Path
    stages: Mapping[str, Taken]
    turnaround: float

    @classmethod
    def read(cls, folder: Path) -> Measured:
        """From a run directory's timeline.jsonl. Raises UserError where no stage has finished."""
        path = folder / "timeline.jsonl"
        if not path.is_file():
            raise UserError(f"{folder} holds no timeline.jsonl", why="it is no run's directory", hint="--measured runs/NAME")
        world: dict[str, int] = {}
        ended: dict[str, float] = {}
        found: dict[str, Taken] = {}
        gaps: list[float] = []
        for event in read_lines(path):
            lane = event.get("lane", "")
            if event.get("event") != "stage":
                world[lane] = event.get("world", 1)
                ended.pop(lane, None)
                continue
            if not event.keys() >= {"stage", "name", "end", "status"}:
                continue
            begin = event.get("claimed") or event.get("begin")
            if begin is not None and lane in ended:
                gaps.append(max(0.0, begin - ended[lane]))
            ended[lane] = event["end"]
            if event["status"] != "done" or begin is None:
                continue
            whole = event["end"] - begin
            taken = Taken(whole, min(whole, event.get("work_seconds", whole)), world.get(lane, 1))
            found |= {event["stage"]: taken, event["name"]: taken}
        if not found:
            raise UserError(f"{path} has no stage that finished", hint="let the run make a stage first")
        return cls(folder, found, statistics.median(gaps) if gaps else 0.0)

    def of(self, stage: Mapping[str, Any]) -> Taken | None:
        return self.stages.get(stage["id"]) or self.stages.get(stage["name"])


def times_of(
    plan: Mapping[str, Any], workers: int, each: int, assume: Assumptions, measured: Measured | None = None
) -> tuple[dict[str, Times], dict[str, int]]:
    """(every stage's times by id, how many of them were measured, scaled from measured ones, and estimated)."""
    device = plan.get("run", {}).get("device", "cpu")
    times = {stage["id"]: estimate(stage, workers, each, assume, device) for stage in plan["stages"]}
    sources = {"measured": 0, "scaled": 0, "estimated": len(times)}
    if measured is None:
        return times, sources
    groups: dict[str, list[tuple[float, float]]] = {}
    rest = []
    for stage in plan["stages"]:
        one, taken = times[stage["id"]], measured.of(stage)
        if taken is None:
            rest.append(stage)
            continue
        collective = stage["kind"] in KINDS and KINDS[stage["kind"]].collective
        work = taken.work * (taken.world / workers if collective else 1.0)
        groups.setdefault(group_of(dict(stage)), []).append((work, one.seconds))
        around = taken.lane - taken.work + measured.turnaround
        times[stage["id"]] = replace(_stretched(one, work), fixed=around, load=0.0, close=0.0)
        sources["measured"] += 1
    for stage in rest:
        known = groups.get(group_of(dict(stage)), [])
        if known:
            estimated, took = sum(pair[1] for pair in known), sum(pair[0] for pair in known)
            one = times[stage["id"]]
            # without an estimate to scale, what the group's stages took on average
            times[stage["id"]] = _stretched(one, one.seconds * took / estimated if estimated and one.seconds else took / len(known))
            sources["scaled"] += 1
    sources["estimated"] -= sources["measured"] + sources["scaled"]
    return times, sources


def _stretched(times: Times, seconds: float) -> Times:
    """The same stage with another amount of work; what is between two checkpoints keeps its share."""
    chunk = times.chunk * seconds / times.seconds if times.seconds and math.isfinite(times.chunk) else times.chunk
    return replace(times, seconds=seconds, chunk=chunk if chunk else math.inf)
