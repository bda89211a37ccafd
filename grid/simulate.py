"""A plan played on a cluster that isn't there: plan.json and a cluster's shape in; makespan, use of the GPUs, idle time and cost out.

python -m grid.plan STUDY.yaml --simulate 2x8 --simulate 16x8:3 [--measured RUN] [--price 2.50] [--assume start_seconds=60] [--json]

Who makes which stage is decided by the run's own ledger, under a clock that jumps from event to event (grid.simulated_run); how long
a stage takes comes from the FLOP model or from a run (grid.simulated_times). Nodes fail at random, under a seed; a stage that fails too
often fails its arms, as in a run. What isn't played: lanes that wait for each other at storage and network, a driver's death.
"""

from __future__ import annotations

import json
import math
import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets_ray.errors import UserError
from grid.plantext import hours, table
from grid.settings import Settings
from grid.simulated_run import DAY, PARTS, Simulation
from grid.simulated_times import Assumptions, Measured, Times, times_of
from grid.summary import idle_text

MOST_GPUS = 1_000_000
"""More would only take memory: each node has a rate, each worker a place."""


@dataclass(frozen=True)
class Cluster:
    """`nodes` of `gpus` each (of cores, in a profile that computes on CPUs); `failures`: of nodes a day, all of them together."""

    nodes: int
    gpus: int
    failures: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Cluster:
        found = re.fullmatch(r"\s*(\d+)\s*[xX×]\s*(\d+)\s*(?::\s*(\d+(?:\.\d*)?|\.\d+))?\s*", text)
        if found is None or not int(found[1]) or not int(found[2]):
            raise UserError(f"no cluster: {text!r}", why="it is NODESxGPUS or NODESxGPUS:FAILURES_A_DAY", hint="--simulate 4x8:0.5")
        nodes, gpus = (int(found[part][:12]) for part in (1, 2))
        if nodes * gpus > MOST_GPUS:
            raise UserError(f"a cluster of {nodes * gpus:,} GPUs", why=f"at most {MOST_GPUS:,} are played", hint="--simulate 4x8")
        return cls(nodes, gpus, float(found[3] or 0.0))

    def __str__(self) -> str:
        return f"{self.nodes}x{self.gpus}" + (f":{self.failures:g}" if self.failures else "")


def layout(plan: dict[str, Any], cluster: Cluster) -> tuple[list[frozenset[int]], int, int]:
    """(nodes of every lane, workers of a lane, GPUs of a worker): as grid.settings cuts a machine, a worker whole on one node."""
    settings = Settings.read(plan.get("run", {}))
    each = max(1, settings.gpus_per_worker)
    slots = cluster.gpus // each
    if not slots:
        raise UserError(f"a worker needs {each} GPUs, a node of {cluster} has {cluster.gpus}", hint="lower resources.gpus_per_worker")
    usable = float(cluster.nodes * slots * each)
    shape = settings.shape(plan, usable, usable)
    last = cluster.nodes - 1
    lanes = [
        frozenset(min(last, (lane * shape.workers + worker) // slots) for worker in range(shape.workers)) for lane in range(shape.lanes)
    ]
    return lanes, shape.workers, each


def simulate(
    plan: dict[str, Any], cluster: Cluster, assume: Assumptions | None = None, measured: Measured | None = None, price: float | None = None
) -> dict[str, Any]:
    """JSON-able result of one play. price: of a GPU-hour. Raises UserError where nothing would ever finish."""
    assume = assume or Assumptions()
    lanes, workers, each = layout(plan, cluster)
    times, sources = times_of(plan, workers, each, assume, measured)
    most = max(len(nodes) for nodes in lanes)
    if cluster.failures * most / cluster.nodes / DAY * assume.restart_seconds >= 1:
        why = f"it comes back after {assume.restart_seconds:g} s and has workers on {most} of {cluster.nodes} nodes"
        raise UserError(f"a lane of {cluster} fails more often than it starts", why=why, hint="fewer failures a day, or smaller lanes")
    rates = [cluster.failures / cluster.nodes / DAY] * cluster.nodes
    play = Simulation(plan, times, lanes, workers, assume, rates)
    end = play.run()
    arms = {name: play.core.arm(name) for name in play.core.arms}
    paid = cluster.nodes * cluster.gpus * end / 3600
    seconds = {part: sum(lane.tally[part] for lane in play.lanes) for part in PARTS}
    return {
        "cluster": str(cluster), "nodes": cluster.nodes, "gpus_per_node": cluster.gpus, "failures_per_day": cluster.failures,
        "lanes": {"count": len(lanes), "workers": workers, "gpus": workers * each},
        "unused_gpus": max(0, cluster.nodes * cluster.gpus - len(lanes) * workers * each),
        "makespan_seconds": end, "gpu_hours": paid, "busy_gpu_hours": play.busy / 3600,
        "utilisation": play.busy / 3600 / paid if paid else 0.0, "cost": None if price is None else price * paid,
        "lane_seconds": {**seconds, "start": len(lanes) * min(end, assume.start_seconds)},
        "idle_seconds": {lane.name: lane.tally["idle"] for lane in play.lanes},
        "at_least": {"longest_chain_seconds": longest_chain(plan, times), "shared_out_seconds": _shared_out(times, len(lanes))},
        "failures": {"nodes": play.failures, "stages_killed": play.killed},
        "stages": {"count": len(times), **sources},
        "arms": {"done": sum(arm["state"] == "done" for arm in arms.values()),
                 "failed": {name: arm["reason"] for name, arm in arms.items() if arm["state"] == "failed"}},
    }  # fmt: skip


def longest_chain(plan: dict[str, Any], times: Mapping[str, Times]) -> float:
    """Seconds that no number of lanes can beat: stages that wait for each other, models in hand, nothing failing."""
    ends: dict[str, float] = {}
    for stage in plan["stages"]:
        begin = max((ends[need] for need in stage["needs"]), default=0.0)
        ends[stage["id"]] = begin + times[stage["id"]].least
    return max(ends.values(), default=0.0)


def _shared_out(times: Mapping[str, Times], lanes: int) -> float:
    """Seconds if every lane were always at work."""
    return math.fsum(one.least for one in times.values()) / lanes


def render(results: Sequence[Mapping[str, Any]], assume: Assumptions, measured: Measured | None) -> str:
    """The plays for people, a line each; idle time of every lane where they are few."""
    rows = []
    for one in results:
        lanes, seconds = one["lanes"], one["lane_seconds"]
        whole = sum(seconds.values()) or 1.0
        row = [one["cluster"], f"{lanes['count']} of {lanes['gpus']}", hours(one["makespan_seconds"] / 3600), f"{one['utilisation']:.1%}"]
        row += [f"{one['gpu_hours']:,.1f}", "-" if one["cost"] is None else f"{one['cost']:,.2f}"]
        row += [f"{seconds[part] / whole:.1%}" for part in PARTS]
        failed = len(one["arms"]["failed"])
        row += [one["failures"]["nodes"], f"{one['arms']['done']:,}" + (f" ({failed:,} failed)" if failed else "")]
        rows.append(row)
    source = f"measured in {measured.folder}" if measured else "from the FLOP model"
    counted = {kind: results[0]["stages"][kind] for kind in ("measured", "scaled", "estimated") if results[0]["stages"][kind]}
    head = ["cluster", "lanes of GPUs", "makespan", "GPUs used", "GPU-hours", "cost", *PARTS, "nodes failed", "arms done"]
    lines = [
        f"Simulated; stage times {source} ({', '.join(f'{count:,} {kind}' for kind, count in counted.items())}), scheduled as a run does.",
        f"Assumed: {', '.join(f'{key}={value:g}' for key, value in asdict(assume).items())}. Shares are of all lane time.",
        table(head, rows),
    ]
    for one in results:
        least = one["at_least"]
        lines.append(
            f"  {one['cluster']}: no less than {hours(least['longest_chain_seconds'] / 3600)} (longest chain of stages) and "
            f"{hours(least['shared_out_seconds'] / 3600)} (all stages shared out evenly); idle {idle_text(one['idle_seconds'])}"
            + (f"; {one['unused_gpus']} GPUs in no lane" if one["unused_gpus"] else "")
        )
        for name, reason in list(one["arms"]["failed"].items())[:5]:
            lines.append(f"    failed {name}: {reason}")
    return "\n".join(lines)


def command(plan: dict[str, Any], given: Namespace) -> str:
    """What `grid.plan --simulate` prints."""
    clusters = [Cluster.parse(text) for text in given.simulate]
    assume = Assumptions.read(given.assume)
    measured = Measured.read(Path(given.measured)) if given.measured else None
    results = [simulate(plan, cluster, assume, measured, given.price) for cluster in clusters]
    if given.json:
        head = {"study": plan["study"]["name"], "profile": plan["study"]["profile"], "assumptions": asdict(assume)}
        return json.dumps({**head, "measured": measured and str(measured.folder), "simulations": results}, indent=1)
    return render(results, assume, measured)
