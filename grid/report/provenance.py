"""Where the numbers come from: rows lost on the way, assumptions, the budget against what the run took, and its versions.

In: `Results` of a run (stage summaries, summary.json, run.json). Out: `Table`s, each None where the run has nothing of the kind.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from grid.report.table import Cell, Column, Table, number, plain
from grid.report.tables import marks_of
from grid.results import Results
from grid.summary import group_of, rates

LOST = ("dropped", "truncated", "substituted", "skipped", "cut")
"""First words of the keys in a stage's summary that count what was not used as it is."""


def lost_table(results: Results) -> Table | None:
    """Rows dropped, truncated, substituted or skipped, by kind of stage and reason, with the stage that lost most."""
    columns = [
        Column("kind", numeric=False),
        Column("what", numeric=False),
        Column("stages"),
        Column("rows"),
        Column("of"),
        Column("most in", numeric=False),
    ]
    table = Table("lost", "Rows dropped, truncated or substituted", columns, marks=marks_of(results))
    counts: dict[tuple[str, str], list[tuple[int, int, str]]] = {}
    for stage in results.stages.values():
        summary = (stage.get("done") or {}).get("summary") or {}
        if stage["kind"] == "score":  # the rest repeats what its predictions lost
            summary = {"n": summary.get("n"), "skipped": summary.get("left_out") or {}}
        of = next((summary[k] for k in ("rows", "samples", "n") if isinstance(summary.get(k), int)), 0)
        for what, count in _lost(summary):
            counts.setdefault((stage["kind"], what), []).append((count, of, stage.get("name", stage["id"])))
    for (kind, what), found in counts.items():
        worst = max(found)
        of = sum(n for _, n, _ in found)
        most = f"{worst[2]} ({worst[0]})" if len(found) > 1 else worst[2]
        total = sum(count for count, _, _ in found)
        table.rows.append([Cell(kind), Cell(what), Cell(str(len(found))), Cell(str(total)), Cell(str(of) if of else ""), Cell(most)])
    if not table.rows and any(stage["done"] for stage in results.stages.values()):
        table.notes.append("none: every stage used every row whole")
    return table if table.rows or table.notes else None


def _lost(summary: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, int]]:
    for name, value in summary.items():
        counted = name.split("_")[0] in LOST
        if counted and isinstance(value, int) and not isinstance(value, bool) and value:
            yield prefix + name.replace("_", " "), value
        elif counted and isinstance(value, dict):
            yield from ((f"{prefix}{name}: {reason}", count) for reason, count in value.items() if isinstance(count, int) and count)
        elif isinstance(value, dict):
            yield from _lost(value, f"{prefix}{name}: ")


def subsets_table(results: Results) -> Table | None:
    """Data sets that are smaller than their published release, where the profile allows that."""
    columns = [Column("data set", numeric=False), Column("records"), Column("published"), Column("share, %")]
    table = Table("subsets", "Data sets smaller than published", columns, marks=marks_of(results))
    for name, size in (results.study.get("subsets") or {}).items():
        share = number(100 * size["found"] / size["expected"])
        table.rows.append([Cell(name), Cell(f"{size['found']:,}"), Cell(f"{size['expected']:,}"), share])
    return table if table.rows else None


def assumptions_table(results: Results) -> Table | None:
    """The methods paragraph: what the source leaves open and was chosen, and what differs from the code it is compatible with."""
    given = results.study.get("assumptions") or []
    table = Table(
        "assumptions",
        "Assumptions",
        [Column("key", numeric=False), Column("value", numeric=False), Column("why", numeric=False)],
        marks=marks_of(results),
    )
    table.rows = [[Cell(str(a.get("key", ""))), Cell(_value(a.get("value", ""))), Cell(str(a.get("text", "")))] for a in given]
    named = results.study.get("compatibility")
    if named:
        differs = list(results.study.get("notices") or []) or ["nothing known"]
        table.title = "Methods: assumptions and differences"
        table.notes.append(f"Unless the study says otherwise, templates, pixels, masks, order and clipping are {named}'s. Still different:")
        table.notes += differs
    return table if table.rows or table.notes else None


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def time_table(results: Results) -> Table | None:
    """The plan's estimate, the stages' own seconds and training's MFU by kind; the notes give the run's budget, overhead and memory."""
    columns = [Column("stages of kind", numeric=False), Column("planned"), Column("finished"), Column("estimate, s"), Column("took, s")]
    columns += [Column("MFU, %"), Column("of data sheet, %")]
    caption = "seconds in a lane, summed over stages; MFU: model FLOPs over the device's measured and its data sheet's rate"
    table = Table("time", "Budget and what it took", columns, marks=marks_of(results), caption=caption)
    groups: dict[str, list[dict[str, Any]]] = {}
    for stage in results.stages.values():
        groups.setdefault(f"train: {group_of(stage)}" if stage["kind"] == "train" else stage["kind"], []).append(stage)
    for kind, stages in groups.items():
        finished = [stage for stage in stages if stage["done"] is not None]
        estimates = [b for stage in stages if (b := _estimate(stage)) is not None]
        estimate = number(sum(estimates) if estimates else None, reason="no estimate in the plan")
        took = number(sum(float(stage["done"].get("seconds", 0.0)) for stage in finished))
        found = rates((stage["done"].get("summary") or {}).get("compute") or {} for stage in finished)
        shares = [number(100 * found[key]) if key in found else Cell("") for key in ("mfu", "mfu_datasheet")]
        table.rows.append([Cell(kind), Cell(str(len(stages))), Cell(str(len(finished))), estimate, took, *shares])
    table.notes += _summary(results.run.get("summary", {}))
    return table if table.rows else None


def _estimate(stage: dict[str, Any]) -> float | None:
    cost = stage.get("cost") or {}
    if cost.get("seconds") is not None:
        return float(cost["seconds"])
    return None if cost.get("gpu_hours") is None else 3600.0 * float(cost["gpu_hours"])


def _summary(summary: dict[str, Any]) -> list[str]:
    """summary.json in sentences: wall time, its budget, overhead, memory."""
    notes = []
    if summary.get("wall_seconds") is not None:
        budget = summary.get("budget_seconds")
        notes.append(f"wall time {plain(summary['wall_seconds'])} s" + (f" of {plain(budget)} s budgeted" if budget else ""))
    for entry in summary.get("budget", []):
        spent = f"{plain(entry['took'])} core-seconds of {plain(entry['budget'])} budgeted"
        notes.append(f"{entry['what']}: {entry['stages']} stages took {spent}")
    if summary.get("overhead_seconds_per_arm") is not None:
        notes.append(f"overhead (lane time outside the stages' own work): {plain(summary['overhead_seconds_per_arm'], digits=2)} s an arm")
    if (summary.get("memory") or {}).get("peak_gib") is not None:
        notes.append(f"memory: {plain(summary['memory']['peak_gib'], digits=2)} GiB at the peak, proportional set size of all processes")
    return notes


def versions_table(results: Results) -> Table | None:
    """Who ran it, when and with what: the facts of run.json that are plain values."""
    table = Table("versions", "This run", [Column("what", numeric=False), Column("value", numeric=False)], marks=marks_of(results))
    facts: dict[str, Any] = {k: results.study.get(k) for k in ("name", "profile", "profile_reason", "seed")}
    drivers = results.run.get("drivers") or [{}]
    facts.update({key: results.run.get(key) for key in ("epoch", "state")} | {"command": " ".join(drivers[-1].get("command", []))})
    facts.update({k: v for k, v in drivers[-1].items() if k in ("host", "python", "versions")})
    table.rows = [[Cell(name), Cell(str(value))] for name, value in _flat(facts) if value not in (None, "")]
    return table if table.rows else None


def _flat(facts: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in facts.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name} ")
        elif isinstance(value, (str, int, float, bool)):
            yield prefix + name.replace("_", " "), value
