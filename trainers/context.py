"""What a stage function sees of the world: where its inputs are, where it writes, whom it reports to.

A stage is `run(spec: dict, ctx: Context) -> dict` (a small JSON summary). It runs on every rank of a worker group when its
kind is collective, else on rank 0 only. It never names a store path itself, never sleeps on another stage, never logs to a tracker.
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets_ray.pixels_cache import PixelStore


class LeaseLost(Exception):
    """This worker group no longer owns the stage (another driver took it over): stop, write nothing."""


class Interrupted(Exception):
    """The run was asked to stop and the stage saved what it had: it goes on from there next time, no attempt is counted."""


class Cache:
    """Per-process least-recently-used cache by content identity: models, decoded questions. Bounded in bytes."""

    def __init__(self, limit_bytes: int = 1 << 30) -> None:
        self.limit_bytes = limit_bytes
        self._items: OrderedDict[str, tuple[Any, int]] = OrderedDict()

    def get(self, key: str, make: Callable[[], Any], size: Callable[[Any], int] = lambda _: 0) -> Any:
        if key in self._items:
            self._items.move_to_end(key)
            return self._items[key][0]
        value = make()
        self._items[key] = (value, size(value))
        while len(self._items) > 1 and sum(n for _, n in self._items.values()) > self.limit_bytes:
            self._items.popitem(last=False)
        return value

    def drop(self, prefix: str = "", keep: str | None = None) -> int:
        """Forgets what is under this prefix, but for the key `keep`; how many."""
        dropped = [k for k in self._items if k.startswith(prefix) and k != keep]
        for key in dropped:
            del self._items[key]
        return len(dropped)


@dataclass
class Context:
    """One attempt at one stage on one rank."""

    stage: dict[str, Any]
    """The planned stage: id, kind, name, spec, runtime, needs."""
    out: Path
    """Empty directory; what rank 0 leaves here becomes the artefact."""
    work: Path
    """Survives attempts: checkpoints live here, shared by all ranks."""
    inputs: Callable[[str], Path]
    """Stage id → directory of that finished artefact."""
    rank: int = 0
    world: int = 1
    device: str = "cpu"
    data_root: str | None = None
    """Where the user's datasets lie; absent in profiles that draw their own."""
    report: Callable[[dict[str, Any]], None] = lambda metrics: None
    """Appends one metrics record (keys `step`, `train/loss`, ...) to the stage's local file. Rank 0's counts."""
    guard: Callable[[], None] = lambda: None
    """Raises LeaseLost if another driver owns the stage now. Called before every durable write."""
    stopping: Callable[[int], bool] = lambda step: False
    """Training calls it on every rank after every optimiser step with the steps done so far. True, at the same step on all
    ranks, once the run was asked to stop: save a checkpoint and raise Interrupted."""
    cache: Cache = field(default_factory=Cache)
    pixels: PixelStore | None = None
    """Where decoded images are kept on this machine; None: nowhere. Training's batches are the same."""
    features: PixelStore | None = None
    """Where encoder outputs are kept on this machine, for stages whose runtime asks for it; None: nowhere."""
    marks: dict[str, float] = field(default_factory=dict)

    @property
    def runtime(self) -> dict[str, Any]:
        """Knobs that can't change the result: zero, offload, micro_tokens, checkpoint_steps, activation_checkpointing, eval_batch,
        device_tflops (of the data sheet), features (whether encoder outputs are kept), disable (`trainers.switches`)."""
        return self.stage.get("runtime", {})

    @contextmanager
    def working(self):
        """Encloses the stage's own work (first batch asked for → last step or prediction); the rest counts as overhead."""
        start = time.time()
        self.marks.setdefault("work_begin", start)
        try:
            yield
        finally:
            self.marks["work_end"] = time.time()
            self.marks["work_seconds"] = self.marks.get("work_seconds", 0.0) + self.marks["work_end"] - start

    @classmethod
    def local(cls, directory: Path, stage: dict[str, Any], inputs: dict[str, Path] | None = None, **more: Any) -> Context:
        """A context without a grid around it: tests, notebooks and the `python -m trainers.*` commands."""
        out, work = Path(directory) / "out", Path(directory) / "work"
        out.mkdir(parents=True, exist_ok=True)
        work.mkdir(parents=True, exist_ok=True)
        known = inputs or {}

        def report(metrics: dict[str, Any]) -> None:
            with (Path(directory) / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(metrics) + "\n")

        return cls(stage=stage, out=out, work=work, inputs=lambda i: Path(known[i]), report=report, **more)
