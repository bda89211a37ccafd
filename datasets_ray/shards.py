"""Makes the rows of a source in shards, with Ray Data when Ray runs and in a plain loop otherwise: the files are the same bytes.

Flows in: how many items there are and `make(start, stop) -> Made` (rows of a range, and what was dropped there and why).
Flows out: shard files and `manifest.json` in the artefact's directory. Every dropped item is counted by reason and a few are named.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets_ray.errors import UserError
from datasets_ray.rows import write_manifest, write_shard

SHARD = 1024
"""Items per shard: the unit of parallel work."""
TASK_CPUS = 0.5
NAMED, FEW = 20, 5
"""How many dropped items a manifest names, and of each reason at least; all are counted."""


@dataclass
class Made:
    """Rows of one range; `dropped` holds (item, reason) of what was left out, `substituted` of what is used in another form."""

    rows: list[dict[str, Any]]
    dropped: list[tuple[str, str]] = field(default_factory=list)
    substituted: list[tuple[str, str]] = field(default_factory=list)


class _Task:
    """One shard as Ray Data sees it: makes its rows, writes its file, returns the manifest entry."""

    def __init__(self, count: int, make: Callable[[int, int], Made], out: str, size: int) -> None:
        self.count, self.make, self.out, self.size = count, make, out, size

    def __call__(self, record: dict[str, Any]) -> dict[str, bytes]:
        try:
            return {"entry": pickle.dumps(self.shard(int(record["id"])))}
        except UserError as error:  # as a value: Ray would wrap it and try again
            return {"entry": pickle.dumps(str(error))}

    def shard(self, index: int) -> dict[str, Any]:
        made = self.make(index * self.size, min(self.count, (index + 1) * self.size))
        entry = write_shard(made.rows, Path(self.out), f"rows-{index:05d}.arrow")
        return {"index": index, "entry": entry, "dropped": made.dropped, "substituted": made.substituted}


def _ray_is_up() -> bool:
    import sys

    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def write_sharded(count: int, make: Callable[[int, int], Made], out: Path, size: int | None = None, **facts: Any) -> dict[str, Any]:
    """Writes all shards and the manifest (with `facts`); returns the manifest. `make` must be picklable.

    size: items per shard (SHARD); fewer where a row holds the bytes of its images, since a task has a shard in memory.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    size = size or SHARD
    task = _Task(count, make, str(out), size)
    shards = -(-count // size)
    if _ray_is_up() and shards > 1:
        import ray

        taken = ray.data.range(shards, override_num_blocks=shards).map(task, num_cpus=TASK_CPUS).take_all()
        made = [pickle.loads(r["entry"]) for r in taken]
        if failed := [entry for entry in made if isinstance(entry, str)]:
            raise UserError(failed[0])
        done = sorted(made, key=lambda d: d["index"])
    else:
        done = [task.shard(i) for i in range(shards)]
    for what in ("dropped", "substituted"):
        found = [item for d in done for item in d[what]]
        facts |= {what: counted(found), f"{what}_examples": examples(found)}
    return write_manifest(out, [d["entry"] for d in done], **facts)


def counted(found: Sequence[tuple[str, str]]) -> dict[str, int]:
    """How many (item, reason) there are of each reason."""
    return dict(sorted(Counter(reason for _, reason in found).items()))


def examples(found: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """A few of each reason, in the order found."""
    share = max(FEW, NAMED // max(1, len(counted(found))))
    shown: Counter[str] = Counter()
    named = []
    for item, reason in found:
        if shown[reason] < share:
            shown[reason] += 1
            named.append({"item": item, "reason": reason})
    return named
