"""Where the numbers come from: rows lost on the way, assumptions, the budget against what the run took, and its versions.

In: `Results` of a run (stage summaries, timeline, run.json). Out: `Table`s, each None where the run has nothing of the kind.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from grid.report.table import ABSENT, Cell, Column, Table, number, plain
from grid.report.tables import marks_of
from grid.results import Results

LOST = ("dropped", "truncated", "substituted", "skipped", "cut", "unreadable", "missing")
"""First words of the keys in a stage's summary that count what was not used as it is."""


def lost_table(results: Results) -> Table | None:
    """Every count of rows dropped, truncated, substituted or skipped, by stage and reason."""
    columns = [Column("stage", numeric=False), Column("kind", numeric=False), Column("what", numeric=False), Column("count"), Column("of")]
    table = Table("lost", "Rows dropped, truncated or substituted", columns, marks=marks_of(results))
    for stage in results.stages.values():
        summary = (stage.get("done") or {}).get("summary") or {}
        of = next((summary[k] for k in ("rows", "samples", "n") if isinstance(summary.get(k), int)), None)
        for what, count in _lost(summary):
            table.rows.append([
                Cell(stage.get("name", stage["id"])),
                Cell(stage["kind"]),
                Cell(what),
                Cell(str(count)),
                Cell("" if of is None else str(of)),
            ])
    if not table.rows and any(s["done"] for s in results.stages.values()):
        table.notes.append("none: every stage used every row whole")
        return table
    return table if table.rows else None


def _lost(summary: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, int]]:
    for name, value in summary.items():
        counted = name.split("_")[0] in LOST
        if counted and isinstance(value, int) and not isinstance(value, bool) and value:
            yield prefix + name.replace("_", " "), value
        elif counted and isinstance(value, dict):
            yield from ((f"{prefix}{name}: {reason}", count) for reason, count in value.items() if isinstance(count, int) and count)
        elif isinstance(value, dict):
            yield from _lost(value, f"{prefix}{name}: ")


def assumptions_table(results: Results) -> Table | None:
    """What the source leaves open and what was chosen, as written in the study file."""
    given = results.study.get("assumptions") or []
    table = Table(
        "assumptions", "Assumptions", [Column("key", numeric=False), Column("value", numeric=False), Column("why", numeric=False)]
    )
    table.rows = [[Cell(str(a.get("key", ""))), Cell(str(a.get("value", ""))), Cell(str(a.get("text", "")))] for a in given]
    return table if table.rows else None


def time_table(results: Results) -> Table | None:
    """The plan's budget beside what the stages took, by kind; the notes give lane overhead per arm."""
    columns = [
        Column("stages of kind", numeric=False), Column("planned"), Column("finished"), Column("made by this run"),
        Column("budget, s"), Column("took, s"), Column("of it own work, s"), Column("lost attempts, s"),
    ]  # fmt: skip
    table = Table("time", "Budget and what it took", columns, marks=marks_of(results), caption="lane seconds, summed over stages")
    spans = [event for event in results.run.get("timeline", []) if event.get("event") == "stage" and "begin" in event and "end" in event]
    for kind in dict.fromkeys(stage["kind"] for stage in results.stages.values()):
        stages = [stage for stage in results.stages.values() if stage["kind"] == kind]
        mine = [event for event in spans if event.get("kind") == kind]
        made = [event for event in mine if event["status"] == "done"]
        lost = sum(event["end"] - event["begin"] for event in mine if event["status"] not in ("done", "found"))
        budgets = [b for stage in stages if (b := _budget(stage)) is not None]
        work = sum(e.get("work_seconds", 0.0) for e in made) if spans else None
        finished = sum(s["done"] is not None for s in stages)
        took = sum(e["end"] - e["begin"] for e in made) if spans else sum((s["done"] or {}).get("seconds", 0.0) for s in stages)
        table.rows.append([
            Cell(kind), Cell(str(len(stages))), Cell(str(finished)), Cell(str(len(made)) if spans else ABSENT),
            number(sum(budgets) if budgets else None, reason="no estimate in the plan"),
            number(took), number(work, reason="no timeline"), number(lost),
        ])  # fmt: skip
    reused = sum(stage["done"] is not None for stage in results.stages.values()) - sum(e["status"] == "done" for e in spans)
    if spans and reused > 0:
        table.notes.append(f"{reused} finished stages were found in the store or made by an earlier start and cost this timeline nothing")
    table.notes += _overhead(results, spans)
    return table if table.rows else None


def _budget(stage: dict[str, Any]) -> float | None:
    cost = stage.get("cost") or {}
    if cost.get("seconds") is not None:
        return float(cost["seconds"])
    return None if cost.get("gpu_hours") is None else 3600.0 * float(cost["gpu_hours"])


def _overhead(results: Results, spans: list[dict[str, Any]]) -> list[str]:
    """Lane time outside stages' own work, from a lane's start to its last stage's end, per arm."""
    ups = [e for e in results.run.get("timeline", []) if e.get("event") in ("lane_up", "lane_restarted")]
    if not spans or not ups:
        return []
    up, work = 0.0, sum(event.get("work_seconds", 0.0) for event in spans)
    for lane in {event["lane"] for event in spans}:
        starts = sorted(event["time"] for event in ups if event["lane"] == lane and event["event"] == "lane_up")
        ends = [event["end"] for event in spans if event["lane"] == lane]
        for start, until in zip(starts, [*starts[1:], math.inf], strict=True):
            up += max((end for end in ends if start <= end < until), default=start) - start
    arms = max(1, len(results.arms))
    return [
        f"lanes were up for {plain(up)} s, {plain(work)} s of it the stages' own work: {plain((up - work) / arms, digits=2)} s overhead "
        f"an arm over {len(results.arms)} arms (loading, engine builds, start of Ray Data and idling included)"
    ]


def versions_table(results: Results) -> Table | None:
    """Who ran it, when and with what: the facts of run.json that are plain values."""
    table = Table("versions", "This run", [Column("what", numeric=False), Column("value", numeric=False)])
    facts: dict[str, Any] = {k: results.study.get(k) for k in ("name", "profile", "profile_reason", "seed")}
    facts.update({k: v for k, v in results.run.items() if k not in ("timeline", "totals")})
    table.rows = [[Cell(name), Cell(str(value))] for name, value in _flat(facts) if value not in (None, "")]
    return table if table.rows else None


def _flat(facts: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in facts.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name} ")
        elif isinstance(value, (str, int, float, bool)):
            yield prefix + name.replace("_", " "), value
