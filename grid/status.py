"""How a run stands: `python -m grid.status DIR [--json]`. Reads files only; the run may be alive, ended or killed.

In: plan.json, run.json, ledger.jsonl, the store's finished stages, the last metrics line of stages under way. Out: text or JSON
{"study", "state", "epoch", "stages": {...}, "arms": [{"name", "state", "done", "stages", "reason"}], "running": [...]}.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets_ray.errors import UserError
from grid import options
from grid.display import duration
from grid.jsonl import read_lines
from grid.rundir import alive, read_json, read_plan


def status(directory: Path) -> dict[str, Any]:
    """The run's state. Raises UserError when there is no run."""
    if not (directory / "plan.json").is_file() or not (directory / "run.json").is_file():
        raise UserError(f"{directory} is not a run directory", why="no plan.json in it", hint="give the --out of a grid.run")
    plan = read_plan(directory / "plan.json")
    run = read_json(directory / "run.json", "state", "epoch")
    store = Path(run.get("store", directory / "store"))
    names = {stage["id"]: stage["name"] for stage in plan["stages"]}
    done = {identity for identity in names if (store / identity / "DONE.json").is_file()}
    under_way, failed = journal(directory / "ledger.jsonl")
    living = alive(directory)
    running = []
    for identity, event in under_way.items():
        if living and event["epoch"] == run["epoch"] and identity not in done and identity in names:
            last = (read_lines(directory / "metrics" / f"{identity}.jsonl") or [{}])[-1]
            entry = {"stage": identity, "name": names[identity], "lane": event["lane"], "attempt": event["attempt"]}
            running.append({**entry, "seconds": time.time() - event["time"], **({"step": last["step"]} if "step" in last else {})})
    busy = {entry["stage"] for entry in running}
    arms = []
    for arm in [*plan["arms"], *plan.get("references", [])]:
        broken = next((i for i in arm["stages"] if i in failed), None)
        count = sum(i in done for i in arm["stages"])
        state = "done" if count == len(arm["stages"]) else "failed" if broken else "running" if busy & set(arm["stages"]) else "waiting"
        reason = f"{names[broken]}: {failed[broken]}" if broken and state == "failed" else ""
        arms.append({"name": arm["name"], "state": state, "done": count, "stages": len(arm["stages"]), "reason": reason})
    state = run["state"] if run["state"] != "running" or living else "killed"
    return {
        "study": plan["study"]["name"], "state": state, "epoch": run["epoch"],
        "directory": str(directory), "store": str(store), "arms": arms, "running": running,
        "stages": {"done": len(done), "failed": len(failed), "running": len(running), "total": len(names)},
    }  # fmt: skip


def journal(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """(start events of stages not ended, message by stage that failed for good)."""
    under_way: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    for event in read_lines(path):
        identity, kind = event.get("stage"), event.get("event")
        if identity is None:
            continue
        under_way.pop(identity, None)
        failed.pop(identity, None)
        if kind == "start" and event.keys() >= {"epoch", "lane", "attempt", "time"}:
            under_way[identity] = event
        if kind == "fail" and event.get("final"):
            failed[identity] = str(event.get("message", ""))
    return under_way, failed


def render(found: dict[str, Any]) -> str:
    counts = found["stages"]
    lines = [f"{found['study']}: {found['state']}, {counts['done']} of {counts['total']} stages done ({found['directory']})"]
    for entry in found["running"]:
        step = f", step {entry['step']}" if "step" in entry else ""
        lines.append(f"  {entry['lane']}  {entry['name']}  {duration(entry['seconds'])}{step}")
    width = max([len(arm["name"]) for arm in found["arms"]], default=0)
    for arm in found["arms"]:
        lines.append(f"  {arm['name']:<{width}}  {arm['state']:<8} {arm['done']:>3} of {arm['stages']}  {arm['reason']}".rstrip())
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = options.parser("grid.status", __doc__)
    parser.add_argument("directory", type=Path, metavar="DIR", help="a run directory (the --out of a grid.run)")
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    arguments = parser.parse_args(argv)
    found = status(arguments.directory)
    print(json.dumps(found, indent=1) if arguments.json else render(found))
    return 0


if __name__ == "__main__":
    options.run(main)
