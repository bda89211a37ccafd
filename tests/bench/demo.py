"""What the last `make demo` took: read from its summary, not run again (it is the longest of the benchmarks).

In: runs/demo/summary.json. Out: its wall time against the ten minutes, overhead an arm, memory, share of step time spent waiting for data.
"""

from __future__ import annotations

import datetime
import json

from tests.bench.figure import Figure, NotHere
from tests.bench.side import REPOSITORY

RUN = REPOSITORY / "runs" / "demo"


def measure(repeats: int) -> list[Figure]:
    path = RUN / "summary.json"
    if not path.is_file():
        raise NotHere("no run to read: make demo first")
    summary = json.loads(path.read_text())
    arms, stages = summary["arms"], summary["stages"]
    if arms["failed"] or arms["open"] or stages["skipped"] or summary["epoch"] != 1:
        raise NotHere("runs/demo was continued or isn't whole: make demo with an empty runs/demo")
    when = datetime.datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
    note = f"read from the run of {when}; {len(arms['done'])} arms, {stages['done']} stages, installation not included"
    steps, waiting = 0.0, 0.0
    for stage in json.loads((RUN / "plan.json").read_text())["stages"]:
        if stage["kind"] == "train" and stage["name"].startswith(("pretrain", "finetune")):
            seconds = json.loads((RUN / "store" / stage["id"] / "DONE.json").read_text())["summary"]["seconds"]
            steps, waiting = steps + seconds["steps"], waiting + seconds["waiting"]
    return [
        Figure("make demo, whole run", "min", [summary["wall_seconds"] / 60], 10.0, note=note),
        Figure("make demo: overhead an arm", "s", [summary["overhead_seconds_per_arm"]], 2.0),
        Figure("make demo: memory at its peak", "GiB", [summary["memory"]["peak_gib"]], 10.0),
        Figure("make demo: steps waiting for data, share", "", [waiting / steps], 0.02, note="all pretrainings and finetunings"),
    ]
