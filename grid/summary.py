"""What a run took: wall time, its budget, overhead per arm, memory. Written to summary.json and printed at the end.

In: timeline.jsonl, the ledger's last snapshot, the plan, what training stages say they computed. Out: a JSON-able dict, and `render` for
people.
Overhead: lane time from the moment a lane is up until the last stage ends, less the stages' own work
(first batch asked for → last step or last prediction written). A stage that marks no work counts from call to return. It has parts that
grow with the number of arms (what surrounds the stages that are an arm's own) and parts that don't: what surrounds stages that arms
share, and the tail, where a lane finds nothing left to do while others still work.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from grid.display import duration

# the tiny profile's budget, core-seconds for each
BUDGET = {"base": 35.0, "pretrain": 12.0, "finetune": 20.0, "predict": 1.0}
MEMORY_LIMIT_GIB = 10.0
OVERHEAD_LIMIT = 2.0


def group_of(stage: dict[str, Any]) -> str:
    """Budget line of a stage: training by what it trains (base, pretrain, finetune), the rest by kind."""
    if stage["kind"] != "train":
        return stage["kind"]
    word = stage["name"].split()[0]
    return word if word in BUDGET else "base"


def lane_times(timeline: list[dict[str, Any]], epoch_events: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of lane time and where they went: work, loading (claim → work), closing (work → committed), idle; `tail`: of the idle ones,
    behind each lane's last stage."""
    ups: dict[str, float] = {}
    for event in timeline:
        if event["event"] == "lane_up":
            ups[event["lane"]] = event["time"]
    end = max([event["end"] for event in epoch_events], default=0.0)
    lane_seconds = sum(max(0.0, end - up) for up in ups.values())
    work = loading = closing = 0.0
    for event in epoch_events:
        begin = event.get("begin") or event.get("claimed") or event["end"]
        work_begin, work_end = event.get("work_begin", begin), event.get("work_end", event["end"])
        work += event.get("work_seconds", work_end - work_begin)
        loading += work_begin - begin
        closing += event["end"] - work_end
    idle = max(0.0, lane_seconds - work - loading - closing)
    last = ups | {event["lane"]: event["end"] for event in sorted(epoch_events, key=lambda event: event["end"]) if event["lane"] in ups}
    tail = sum(max(0.0, end - time) for time in last.values())
    parts = {"work": work, "loading": loading, "closing": closing, "idle": idle, "tail": min(tail, idle), "lane": lane_seconds}
    return {f"{part}_seconds": seconds for part, seconds in parts.items()}


def idle_times(timeline: list[dict[str, Any]], epoch_events: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of each lane between its being up and the run's last stage in which it had no stage."""
    end = max([event["end"] for event in epoch_events], default=0.0)
    idle = {event["lane"]: max(0.0, end - event["time"]) for event in timeline if event["event"] == "lane_up"}
    for event in epoch_events:
        if event["lane"] in idle:
            idle[event["lane"]] -= event["end"] - (event.get("begin") or event.get("claimed") or event["end"])
    return {lane: max(0.0, seconds) for lane, seconds in sorted(idle.items())}


def around(timeline: list[dict[str, Any]], epoch_events: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of lane time by stage, all attempts: from the end of the lane's stage before (or its start) to this one's, less the work."""
    free = {event["lane"]: event["time"] for event in timeline if event["event"] == "lane_up"}
    spent: dict[str, float] = {}
    for event in sorted(epoch_events, key=lambda event: event["end"]):
        begin = event.get("begin") or event.get("claimed") or event["end"]
        work = event.get("work_seconds", event.get("work_end", event["end"]) - event.get("work_begin", begin))
        since = min(begin, free.get(event["lane"], begin))
        spent[event["stage"]] = spent.get(event["stage"], 0.0) + max(0.0, event["end"] - since - work)
        free[event["lane"]] = event["end"]
    return spent


def each_further(stages: Mapping[str, Mapping[str, Any]], spent: Mapping[str, float]) -> float | None:
    """Seconds around the stages that are one arm's own, a mean over the arms but for the one whose own stages came first (that is where
    first times fall). None with fewer than two such arms. spent: from `around`, in the order of the stages' ends."""
    own: dict[str, float] = {}
    for stage, seconds in spent.items():
        if len(arms := stages[stage]["arms"]) == 1:
            own[arms[0]] = own.get(arms[0], 0.0) + seconds
    further = list(own.values())[1:]
    return sum(further) / len(further) if further else None


def rates(computed: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Of several training stages' `compute` (trainers.meter): model TFLOPs, and shares of what their devices could have done meanwhile."""
    stages = [one for one in computed if one.get("tflops")]
    spent = [sum(one["tflops"].values()) for one in stages]
    made = {"tflops": sum(spent)} if stages else {}
    for share, rate in (("mfu", "measured_tflops_per_second"), ("mfu_datasheet", "datasheet_tflops_per_second")):
        known = [(tflops, one["seconds"] * one["devices"] * one[rate]) for tflops, one in zip(spent, stages) if one.get(rate)]
        if possible := sum(most for _, most in known):
            made[share] = sum(tflops for tflops, _ in known) / possible
    return made


def summarise(
    plan: dict[str, Any], timeline: list[dict[str, Any]], snapshot: dict[str, Any], *, epoch: int, began: float, ended: float,
    workers: int, skipped: int, memory: dict[str, Any], budget_seconds: float | None,
    computed: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The summary of one driver's epoch. `workers`: processes per lane, for core-seconds of collective stages; `computed`: training stage →
    its summary's `compute`."""
    stages = {stage["id"]: stage for stage in plan["stages"]}
    lanes = [event for event in timeline if event.get("epoch", epoch) == epoch and event["event"] != "stage" and event["time"] >= began]
    events = [event for event in timeline if event["event"] == "stage" and event["epoch"] == epoch and event["stage"] in stages]
    groups: dict[str, dict[str, float]] = {}
    for event in events:
        empty = {"attempts": 0, "done": 0, "work_seconds": 0.0, "other_seconds": 0.0}
        entry = groups.setdefault(group_of(stages[event["stage"]]), empty)
        begin = event.get("begin") or event.get("claimed") or event["end"]
        work = event.get("work_seconds", event.get("work_end", event["end"]) - event.get("work_begin", begin))
        entry["attempts"] += 1
        entry["done"] += event["status"] in {"done", "found"}
        entry["work_seconds"] += work
        entry["other_seconds"] += event["end"] - begin - work
    made = dict.fromkeys(event["stage"] for event in events if event["status"] == "done")
    for name, entry in groups.items():
        entry |= rates((computed or {}).get(stage, {}) for stage in made if group_of(stages[stage]) == name)
    times = lane_times(lanes, events)
    arms = snapshot["arms"]
    done = [name for name, arm in arms.items() if arm["state"] == "done"]
    ups = [event["time"] for event in lanes if event["event"] == "lane_up"]
    overhead = times["lane_seconds"] - times["work_seconds"]
    budget = []
    if plan["study"].get("miniature"):
        for name, seconds in BUDGET.items():
            if name in groups:
                cores = groups[name]["work_seconds"] * (workers if name != "predict" else 1)
                budget.append({"what": name, "stages": groups[name]["done"], "budget": seconds * groups[name]["done"], "took": cores})
    return {
        "study": plan["study"]["name"], "profile": plan["study"].get("profile"), "miniature": bool(plan["study"].get("miniature")),
        "batch_scale": plan["study"].get("batch_scale", 1.0), "allow_subset": plan["study"].get("allow_subset", []),
        "epoch": epoch, "wall_seconds": ended - began, "budget_seconds": budget_seconds,
        "startup_seconds": max(ups) - began if ups else None,
        "arms": {"done": done, "failed": {n: a["reason"] for n, a in arms.items() if a["state"] == "failed"},
                 "open": [n for n, a in arms.items() if a["state"] not in {"done", "failed"}]},
        "stages": {**snapshot["counts"], "skipped": skipped, "attempts": len(events)},
        "failed_stages": snapshot["failed"],
        "groups": groups, "budget": budget, "lanes": times, "idle_seconds": idle_times(lanes, events),
        "overhead_seconds_per_arm": overhead / len(arms) if events and arms else None,
        "overhead_seconds_each_further_arm": each_further(stages, around(lanes, events)),
        "memory": memory, "notices": snapshot["notices"],
    }  # fmt: skip


def render(summary: dict[str, Any]) -> str:
    """The end of a run, for people."""
    arms, lines = summary["arms"], []
    total = len(arms["done"]) + len(arms["failed"]) + len(arms["open"])
    head = f"{len(arms['done'])} of {total} arms done in {duration(summary['wall_seconds'])}"
    if summary["budget_seconds"]:
        head += f" (budget {duration(summary['budget_seconds'])})"
    lines.append(head + (f", {len(arms['failed'])} failed" if arms["failed"] else ""))
    for name, reason in arms["failed"].items():
        lines.append(f"  failed  {name}: {reason.splitlines()[0] if reason else ''}")
    for entry in summary["budget"]:
        took = f"{entry['took']:>7.0f} core-seconds of {entry['budget']:.0f} in the budget"
        lines.append(f"  {entry['what']:<9} {entry['stages']:>4} stages  {took}")
    times = summary["lanes"]
    if summary["overhead_seconds_per_arm"] is not None:
        parts = ", ".join(f"{part} {times[part + '_seconds']:.1f} s" for part in ("loading", "closing", "idle"))
        parts += f" ({times['tail_seconds']:.1f} s behind a lane's last stage)"
        each = f"{summary['overhead_seconds_per_arm']:.2f} s an arm (limit {OVERHEAD_LIMIT:g})"
        lines.append(f"  overhead  {each}: {parts} of {times['lane_seconds']:.0f} s lane time")
        if (further := summary["overhead_seconds_each_further_arm"]) is not None:
            lines.append(f"            {further:.2f} s for each arm after the first, without what arms share and the end of the run")
    if idle := summary.get("idle_seconds"):
        lines.append(f"  idle      {idle_text(idle)}")
    for name, entry in summary.get("groups", {}).items():
        if "mfu" in entry:
            sheet = f", {entry['mfu_datasheet']:.1%} of the data sheet's" if "mfu_datasheet" in entry else ""
            lines.append(f"  MFU       {name}: {entry['mfu']:.1%} of the device's measured matmul rate{sheet}")
    if summary["startup_seconds"] is not None:
        lines.append(f"  start-up  {summary['startup_seconds']:.0f} s until all lanes were up")
    if summary["memory"].get("samples"):
        lines.append(f"  memory    {summary['memory']['peak_gib']:.2f} GiB at the peak, all processes (limit {MEMORY_LIMIT_GIB:g})")
    return "\n".join(lines)


def idle_text(seconds: Mapping[str, float]) -> str:
    """Idle time of every lane where they are few, else its spread."""
    if len(seconds) <= 16:
        return ", ".join(f"{name} {duration(value)}" for name, value in seconds.items())
    values = sorted(seconds.values())
    return f"{duration(values[0])} to {duration(values[-1])} a lane, {duration(values[len(values) // 2])} in the middle"
