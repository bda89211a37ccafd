"""Checkpoints of an unfinished training stage: whole or not there.

In: an engine's fragments and everything else that a step depends on. Out: `<work>/step-00000120/`, readable at any world size
and ZeRO stage.

    rank-00000.safetensors   this rank's shards of masters and moments by parameter, `<kind>|<name>|<start>`, and its random state
    COMPLETE.json            written last: the state's scalars, and bytes and sha256 of every file

All is written under a temporary name and renamed once the marker lies in it; a directory whose files don't match its marker is torn,
and the one before is used. Frozen parameters are never written: they come from where the stage got them. Resuming with the same world size
and ZeRO stage gives the same bits as never stopping.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainers import rng
from trainers.engine import MOMENTS, Engine, Fragment
from trainers.store import sha256, sync

MARKER = "COMPLETE.json"
KEPT = 2


@dataclass
class Progress:
    """Scalars of a stage under way; everything in it is JSON."""

    step: int = 0
    """Optimiser steps done."""
    phase: int = 0
    """Phase that the last of them belonged to."""
    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    valid_tokens: int = 0
    samples: int = 0
    data: dict[str, Any] = field(default_factory=dict)
    """What happened to the rows so far (`datasets_ray.encoding.Stats`)."""


def save(
    work: Path, progress: Progress, engine: Engine, parked: dict[str, Fragment], guard: Callable[[], None]
) -> Path:
    """Writes a checkpoint; all ranks call it, all return when it is whole. Returns its directory.

    parked: fragments of parameters that the stage has trained and the current phase doesn't. guard: raises if another driver
    owns the stage.
    """
    final = work / f"step-{progress.step:08d}"
    partial = work / f".{final.name}.partial"
    guard()
    if engine.rank == 0:
        for left in work.glob(".step-*.partial"):  # by an attempt that was killed while it wrote
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
    _barrier(engine.world)
    path = partial / f"rank-{engine.rank:05d}.safetensors"
    # without ZeRO every rank holds the same
    tensors, steps = _tensors({**parked, **engine.fragments()} if engine.zero or engine.rank == 0 else {})
    tensors |= {f"rng|{kind}|0": state for kind, state in rng.capture(engine.device).items()}
    save_file(tensors, str(path), metadata={"steps": json.dumps(steps)})
    files = _collect({path.name: _sealed(path)}, engine.world)
    if engine.rank == 0:
        marker = {"progress": vars(progress), "world": engine.world, "zero": engine.zero, "files": files}
        (partial / MARKER).write_text(json.dumps(marker))
        sync(partial / MARKER)
        guard()
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        sync(work)
        for old in complete(work)[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    _barrier(engine.world)
    return final


def _tensors(fragments: dict[str, Fragment]) -> tuple[dict[str, Tensor], dict[str, float]]:
    tensors: dict[str, Tensor] = {}
    for name, fragment in fragments.items():
        for kind, tensor in {"master": fragment.master, **fragment.moments}.items():
            tensors[f"{kind}|{name}|{fragment.start}"] = tensor.detach().to("cpu", copy=True).contiguous()
    return tensors, {name: fragment.step for name, fragment in fragments.items()}


def _sealed(path: Path) -> dict[str, Any]:
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _barrier(world: int) -> None:
    if world > 1:
        dist.barrier()


def _collect(mine: dict[str, Any], world: int) -> dict[str, Any]:
    """The union of what all ranks say, on every rank."""
    if world == 1:
        return mine
    said: list[Any] = [None] * world
    dist.all_gather_object(said, mine)
    return {key: value for part in said for key, value in part.items()}


def complete(work: Path) -> list[Path]:
    """Directories that claim to be whole, oldest first."""
    return sorted(path for path in Path(work).glob("step-*") if (path / MARKER).is_file())


def torn(directory: Path, rank: int = 0, world: int = 1) -> str | None:
    """Why a checkpoint can't be used, None if it can. With several ranks each looks at its share of the files."""
    try:
        files = json.loads((directory / MARKER).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"{MARKER}: {error}"
    for number, (name, seal) in enumerate(sorted(files.items())):
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != seal["bytes"]:
            return f"{name} has {path.stat().st_size} bytes, not {seal['bytes']}"
        if number % world == rank and sha256(path) != seal["sha256"]:
            return f"{name} isn't what was written"
    return None


@dataclass
class Checkpoint:
    """One that can be resumed from."""

    directory: Path
    progress: Progress
    world: int
    zero: int
    passed_over: list[str]
    """Newer ones that were torn, with the reason."""

    def __post_init__(self) -> None:
        self.pieces: dict[str, list[tuple[int, str, Path]]] = {}
        """`<kind>|<name>` → (start, key, file), ascending."""
        self.steps: dict[str, float] = {}
        for path in sorted(self.directory.glob("rank-*.safetensors")):
            with safe_open(str(path), framework="pt") as opened:
                self.steps |= json.loads(opened.metadata()["steps"])
                for key in opened.keys():  # noqa: SIM118  (not a dict)
                    kind, name, start = key.split("|")
                    if kind != "rng":
                        self.pieces.setdefault(f"{kind}|{name}", []).append((int(start), key, path))
        for pieces in self.pieces.values():
            pieces.sort(key=lambda piece: piece[0])

    def whole(self, kind: str, name: str) -> Tensor | None:
        """float[numel] of a parameter: its shards from all ranks end to end (each rank kept the same whole without ZeRO)."""
        made: list[Tensor] = []
        have = 0
        for start, key, path in self.pieces.get(f"{kind}|{name}", []):
            with safe_open(str(path), framework="pt") as opened:
                tensor = opened.get_tensor(key)
            if start == have and len(tensor):
                made.append(tensor)
                have += len(tensor)
        return torch.cat(made) if made else None

    def find(self, name: str, start: int = 0, numel: int | None = None) -> Fragment | None:
        """Elements [start, start + numel) of a parameter's master and moments, in whatever shards they were written."""
        master = self.whole("master", name)
        if master is None:
            return None
        moments = {kind: whole for kind in MOMENTS if (whole := self.whole(kind, name)) is not None}
        return Fragment(0, master, moments, self.steps[name]).part(start, len(master) if numel is None else numel)

    def load_weights(self, model: torch.nn.Module) -> None:
        """Sets every parameter that the stage has trained so far, before an engine is made over it."""
        with torch.no_grad():
            for name, param in model.named_parameters():
                if (master := self.whole("master", name)) is not None:
                    param.copy_(master.view_as(param))

    def load_rng(self, rank: int) -> None:
        """This rank's random state; with another world size ranks beyond the old ones keep the one they have."""
        path = self.directory / f"rank-{rank:05d}.safetensors"
        if path.is_file():
            with safe_open(str(path), framework="pt") as opened:
                keys = [key for key in opened.keys() if key.startswith("rng|")]  # noqa: SIM118
                rng.restore({key.split("|")[1]: opened.get_tensor(key) for key in keys})


def latest(work: Path, rank: int, world: int) -> Checkpoint | None:
    """The newest whole checkpoint, agreed upon by all ranks; None: start from the beginning."""
    passed_over: list[str] = []
    for directory in reversed(complete(work)):
        reasons = _collect({f"{rank}": torn(directory, rank, world)}, world)
        broken = [reason for reason in reasons.values() if reason]
        if not broken:
            marker = json.loads((directory / MARKER).read_text())
            return Checkpoint(directory, Progress(**marker["progress"]), marker["world"], marker["zero"], passed_over)
        passed_over.append(f"{directory.name}: {broken[0]}")
    return None
