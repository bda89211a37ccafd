"""Makes the rows of a source in shards, with Ray Data when Ray runs and in a plain loop otherwise: the files are the same bytes.

Flows in: how many items there are and `make(start, stop) -> Made` (rows of a range, and what was dropped there and why).
Flows out: shard files and `manifest.json` in the artefact's directory. Every dropped item is counted by reason and a few are named.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets_ray.rows import write_manifest, write_shard

SHARD = 1024
"""Items per shard: the unit of parallel work."""
TASK_CPUS = 0.5
NAMED = 20
"""How many dropped items a manifest names; all are counted."""


@dataclass
class Made:
    """Rows of one range; `dropped` holds (item, reason) of what was left out."""

    rows: list[dict[str, Any]]
    dropped: list[tuple[str, str]] = field(default_factory=list)


class _Task:
    """One shard as Ray Data sees it: makes its rows, writes its file, returns the manifest entry."""

    def __init__(self, count: int, make: Callable[[int, int], Made], out: str) -> None:
        self.count, self.make, self.out = count, make, out

    def __call__(self, record: dict[str, Any]) -> dict[str, bytes]:
        return {"entry": pickle.dumps(self.shard(int(record["id"])))}

    def shard(self, index: int) -> dict[str, Any]:
        made = self.make(index * SHARD, min(self.count, (index + 1) * SHARD))
        entry = write_shard(made.rows, Path(self.out), f"rows-{index:05d}.arrow")
        return {"index": index, "entry": entry, "dropped": made.dropped}


def _ray_is_up() -> bool:
    import sys

    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def write_sharded(count: int, make: Callable[[int, int], Made], out: Path, **facts: Any) -> dict[str, Any]:
    """Writes all shards and the manifest (with `facts`); returns the manifest. `make` must be picklable."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    task = _Task(count, make, str(out))
    shards = -(-count // SHARD)
    if _ray_is_up() and shards > 1:
        import ray

        taken = ray.data.range(shards, override_num_blocks=shards).map(task, num_cpus=TASK_CPUS).take_all()
        done = sorted((pickle.loads(r["entry"]) for r in taken), key=lambda d: d["index"])
    else:
        done = [task.shard(i) for i in range(shards)]
    dropped = [item for d in done for item in d["dropped"]]
    counts = dict(sorted(Counter(reason for _, reason in dropped).items()))
    named = [{"item": item, "reason": reason} for item, reason in dropped[:NAMED]]
    return write_manifest(out, [d["entry"] for d in done], dropped=counts, dropped_examples=named, **facts)
