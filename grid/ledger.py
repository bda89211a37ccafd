"""The stage ledger: who makes which stage, who waits, how often it was tried. `LedgerCore` is plain Python; grid/ledger_actor.py serves it.

In: the plan's stage graph, what the store already holds, reports of the lanes. Out: grants, the state of every arm, and two
append-only files it alone writes: `ledger.jsonl` (attempts; they survive the driver) and `timeline.jsonl` (where lane time went).

A stage goes to one lane at a time. Order: stages whose model the lane has just in hand, then arms by their longest chain of stages
(equal ones as the study lists them), so that no lane ends alone on a long chain; within an arm the longest path of work behind. Towards
the end the longest path goes first whatever the arm, and short stages fill what is left between the lanes.
A failed stage fails the arms that need it and no others; what those arms have beside it still runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from grid.jsonl import Journal, mend, read_lines
from grid.priority import model_stages, paths, ranks, seconds_of

WAITING, RUNNING, DONE, FAILED, BLOCKED = "waiting", "running", "done", "failed", "blocked"
UNCOUNTED = {"interrupted", "lost", "busy", "damaged", "full"}
LANE_STARTS = 3
PAUSE, LONGEST_PAUSE = 15.0, 600.0
"""Seconds that nothing new starts after a disk was found full; twice as long each time until a stage finishes again."""
END = 3.5
"""The end begins when lanes have this many times the longest path before them: less, and too few short stages are left to fill it; more,
and arms that could be finished wait for others."""
SHORT = 0.1
"""A path of less than this share of the plan's longest can wait for the end."""


class LedgerCore:
    """All decisions, no waiting: every method returns at once. Times come from `clock`."""

    def __init__(
        self,
        plan: dict[str, Any],
        done: Iterable[str],
        folder: Path,
        epoch: int = 1,
        attempts: int = 5,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.folder, self.epoch, self.limit, self.clock = Path(folder), epoch, attempts, clock
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("ledger.jsonl", "timeline.jsonl"):
            mend(self.folder / name)
        self.stages: dict[str, dict[str, Any]] = {stage["id"]: stage for stage in plan["stages"]}
        self.arms: dict[str, list[str]] = {arm["name"]: arm["stages"] for arm in [*plan.get("references", []), *plan["arms"]]}
        finished = set(done)
        self.state = {i: DONE if i in finished else WAITING for i in self.stages}
        self.reason: dict[str, str] = {}
        self.lane_of: dict[str, str] = {}
        self.since: dict[str, float] = {}
        self.not_before: dict[str, float] = {}
        self.paused_until, self.pause = 0.0, 0.0
        self.delay: dict[str, float] = {}
        """Stage → how long it waited after it last found a disk full."""
        self.journal = Journal(self.folder)
        self.lanes: dict[str, dict[str, Any]] = {}
        self.notices: list[str] = []
        self.closed = self.stop = False
        self._path = paths(self.stages)
        self._rank = ranks(self.stages, self.arms, self._path)
        least = SHORT * max(self._path.values(), default=0.0)
        self._long = {i for i, path in self._path.items() if path >= least}
        self.ending = False
        """Whether the longest path goes first now."""
        self._unseen = len(self.stages)
        """Stages that have finished since that was last looked at."""
        self.tried = dict.fromkeys(self.stages, 0)
        self._replay()

    # ---- lanes ask

    def claim(self, lane: str) -> dict[str, Any] | None:
        """The best stage that can start now, or None."""
        if self.closed or self.stop or self.clock() < self.paused_until:
            return None
        entry = self.lanes.setdefault(lane, {"world": 1, "warm": set(), "failures": 0, "dead": False, "progress": {}})
        self._look()
        now = self.clock()
        ready = [i for i in self.stages if self.ready(i) and self.not_before.get(i, 0) <= now and self._fits(i, entry["world"])]
        if not ready:
            return None
        chosen = min(ready, key=lambda i: self._order(i, lane))
        self.tried[chosen] += 1
        self.state[chosen], self.lane_of[chosen], self.since[chosen] = RUNNING, lane, now
        entry["progress"] = {}
        self._journal("start", chosen, lane=lane, attempt=self.tried[chosen])
        return {"stage": self.stages[chosen], "attempt": self.tried[chosen], "epoch": self.epoch}

    def finish(self, lane: str, stage: str, report: dict[str, Any]) -> None:
        if not self._mine(lane, stage):
            return
        self.state[stage] = DONE
        self.pause = 0.0
        self._unseen += 1
        self.lane_of.pop(stage)
        if models := model_stages(self.stages[stage]["spec"]):
            self.lanes[lane]["warm"] = models | {stage}
        self._journal("finish", stage, lane=lane, found=bool(report.get("found")))
        self._time(lane, stage, "found" if report.get("found") else "done", report.get("marks", {}))
        if report.get("found"):
            self.notices.append(f"{self.stages[stage]['name']}: made meanwhile by another run on this store")

    def fail(self, lane: str, stage: str, failure: dict[str, Any]) -> None:
        """`failure`: kind, message, detail, damaged (see trainers/failures.py)."""
        if not self._mine(lane, stage):
            return
        kind, name = failure["kind"], self.stages[stage]["name"]
        self.lane_of.pop(stage)
        self.lanes[lane]["warm"] = set()
        if kind in UNCOUNTED:
            self.tried[stage] -= 1
        limit = {"deterministic": 1, "memory": 2}.get(kind, self.limit)
        final = kind not in UNCOUNTED and self.tried[stage] >= limit
        self.state[stage] = FAILED if final else WAITING
        self._journal("fail", stage, lane=lane, kind=kind, message=failure["message"], detail=failure.get("detail", ""), final=final)
        self._time(lane, stage, kind, failure.get("marks", {}))
        damaged = failure.get("damaged")
        if kind == "damaged" and damaged in self.state:
            self.state[damaged] = WAITING
            self.notices.append(f"{self.stages[damaged]['name']}: its artefact was damaged ({failure['message']}) and is made again")
        elif final:
            self.reason[stage] = failure["message"]
            self._block()
        elif kind == "full":
            self._make_room(stage, failure["message"])
        elif kind not in {"interrupted", "lost"}:
            self.notices.append(f"{name}: attempt {self.tried[stage]} of {limit} failed ({kind}: {failure['message']}); it is tried again")

    def _make_room(self, stage: str, message: str) -> None:
        """A disk is full: nothing starts for a while, this stage longer each time, so that smaller ones go first. However long it takes,
        no attempt is counted."""
        if self.clock() >= self.paused_until:  # else another lane found the same
            self.pause = min(LONGEST_PAUSE, 2 * self.pause or PAUSE)
            self.paused_until = self.clock() + self.pause
            self.notices.append(f"a disk is full ({message}): make room; nothing is lost; next try in {self.pause:.0f} s")
        self.delay[stage] = min(LONGEST_PAUSE, 2 * self.delay.get(stage, 0.0) or PAUSE)
        self.not_before[stage] = max(self.paused_until, self.clock() + self.delay[stage])

    def busy(self, lane: str, stage: str, message: str, seconds: float) -> None:
        """Another live run has the lease: the lane does something else, the stage is offered again a little later."""
        if not self._mine(lane, stage):
            return
        first = stage not in self.not_before
        self.not_before[stage] = self.clock() + min(5.0, max(0.5, seconds))
        self.lane_of.pop(stage)
        self.tried[stage] -= 1
        self.state[stage] = WAITING
        self._journal("fail", stage, lane=lane, kind="busy", message=message, final=False)
        if first:
            self.notices.append(f"{self.stages[stage]['name']}: waiting, {message}")

    def lane_up(self, lane: str, world: int) -> None:
        """A worker group (re)started: whatever it had under way was lost with its processes."""
        restarted = lane in self.lanes
        self.lanes.setdefault(lane, {"failures": 0, "dead": False})
        self.lanes[lane].update(world=world, warm=set(), progress={}, starts=self.lanes[lane].get("starts", 0) + 1)
        for stage in [i for i, holder in self.lane_of.items() if holder == lane]:
            self.fail(lane, stage, {"kind": "infrastructure", "message": f"a worker of {lane} died", "marks": {"begin": self.since[stage]}})
        event = "lane_restarted" if restarted else "lane_up"
        self.journal.write("timeline.jsonl", {"event": event, "lane": lane, "world": world, "time": self.clock(), "epoch": self.epoch})

    def lane_failed(self, lane: str, failure: dict[str, Any]) -> bool:
        """A worker group could not start. True: give this lane up."""
        entry = self.lanes.setdefault(lane, {"world": 1, "warm": set(), "failures": 0, "dead": False, "progress": {}})
        entry["failures"] += 1
        self.notices.append(f"{lane} did not start: {failure['message']}")
        if entry["failures"] >= LANE_STARTS:
            self.lane_lost(lane, failure["message"])
        return entry["dead"]

    def lane_lost(self, lane: str, message: str) -> None:
        """A lane is gone for good; without any lane left nothing more can be made."""
        entry = self.lanes.setdefault(lane, {"world": 1, "warm": set(), "failures": 0, "dead": False, "progress": {}})
        if entry["dead"]:
            return
        entry["dead"] = True
        for stage in [i for i, holder in self.lane_of.items() if holder == lane]:
            self.fail(lane, stage, {"kind": "infrastructure", "message": f"{lane} ended: {message}"})
        if not self.stop and all(other["dead"] for other in self.lanes.values()):  # a run that is stopping ends its lanes itself
            for stage in [i for i in self.stages if self.state[i] == WAITING]:
                self.state[stage], self.reason[stage] = FAILED, f"no lane is left ({message})"
                self._journal("fail", stage, kind="infrastructure", message=self.reason[stage], final=True)

    def beat(self, lane: str, progress: dict[str, Any]) -> dict[str, Any]:
        if lane in self.lanes:
            self.lanes[lane]["progress"] = progress
        self.journal.flush()
        return {"stop": self.stop}

    # ---- the driver asks

    def abandon(self) -> None:
        """The run stops without waiting further: attempts under way don't count."""
        for stage, lane in list(self.lane_of.items()):
            self.fail(lane, stage, {"kind": "interrupted", "message": "the run was stopped"})

    def settled(self) -> bool:
        return not any(state in {WAITING, RUNNING} for state in self.state.values())

    def arm(self, name: str) -> dict[str, Any]:
        """{"state": waiting|running|done|failed, "done", "stages", "reason"}; an arm fails as soon as one of its stages has."""
        states = [self.state[i] for i in self.arms[name]]
        broken = [i for i in self.arms[name] if self.state[i] == FAILED]
        if broken or BLOCKED in states:
            cause = broken[0] if broken else next(i for i in self.arms[name] if self.state[i] == BLOCKED)
            state, reason = FAILED, f"{self.stages[cause]['name']}: {self.reason.get(cause, '')}"
        else:
            state = DONE if all(s == DONE for s in states) else RUNNING if RUNNING in states else WAITING
            reason = ""
        open_ = any(s in {WAITING, RUNNING} for s in states)
        return {"state": state, "open": open_, "done": states.count(DONE), "stages": len(states), "reason": reason}

    def snapshot(self) -> dict[str, Any]:
        """Everything a display or `grid.status` shows."""
        running = []
        for i, lane in self.lane_of.items():
            entry = {"stage": i, "name": self.stages[i]["name"], "lane": lane, "since": self.since[i], "attempt": self.tried[i]}
            running.append({**entry, **self.lanes[lane]["progress"]})
        counts = {state: list(self.state.values()).count(state) for state in (WAITING, RUNNING, DONE, FAILED, BLOCKED)}
        failed = {i: {"name": self.stages[i]["name"], "reason": self.reason.get(i, "")} for i, s in self.state.items() if s == FAILED}
        lanes = {name: {"world": entry["world"], "dead": entry["dead"]} for name, entry in self.lanes.items()}
        return {
            "settled": self.settled(), "counts": counts, "running": running, "failed": failed, "lanes": lanes, "notices": self.notices,
            "arms": {name: self.arm(name) for name in self.arms}, "state": self.state, "tried": {i: n for i, n in self.tried.items() if n},
        }  # fmt: skip

    # ---- inside

    def ready(self, stage: str) -> bool:
        return self.state[stage] == WAITING and all(self.state.get(need) == DONE for need in self.stages[stage]["needs"])

    def _mine(self, lane: str, stage: str) -> bool:
        return self.lane_of.get(stage) == lane  # a late word of a lane that was given up changes nothing

    def _fits(self, stage: str, world: int) -> bool:
        needed = self.stages[stage].get("runtime", {}).get("world", 1)
        return world >= needed or all(entry["world"] < needed for entry in self.lanes.values() if not entry["dead"])

    def _look(self) -> None:
        """Whether this is the end, asked again after every hundredth of the stages: it takes a look at each of them."""
        if 100 * self._unseen < len(self.state) or not self.state:
            return
        self._unseen = 0
        waiting = [i for i, state in self.state.items() if state == WAITING]
        left, longest = sum(seconds_of(self.stages[i]) for i in waiting), max((self._path[i] for i in waiting), default=0.0)
        self.ending = left <= END * longest * sum(not entry["dead"] for entry in self.lanes.values())

    def _order(self, stage: str, lane: str) -> tuple[float, ...]:
        """What is least goes first. At the end long paths do, whichever lane has their model: reading it takes less than waiting."""
        if self.ending and stage in self._long:
            return (0, -self._path[stage], *self._rank[stage])
        return (1, self._warmth(stage, lane), *self._rank[stage])

    def _warmth(self, stage: str, lane: str) -> int:
        """0: this lane has the model in hand; 1: nobody has; 2: another lane has, which will ask soon."""
        models = model_stages(self.stages[stage]["spec"])
        if not models:
            return 1
        if models <= self.lanes[lane]["warm"]:
            return 0
        return 2 if any(models <= entry["warm"] for entry in self.lanes.values() if not entry["dead"]) else 1

    def _block(self) -> None:
        """Stages behind a failed one can't run."""
        for stage, entry in self.stages.items():
            behind = [need for need in entry["needs"] if self.state[need] in {FAILED, BLOCKED}]
            if self.state[stage] == WAITING and behind:
                self.state[stage] = BLOCKED
                self.reason[stage] = self.reason.get(behind[0], "") or self.stages[behind[0]]["name"]

    def _replay(self) -> None:
        """Attempts of earlier drivers of this run. What had failed for good is tried afresh: the user asked again."""
        path, failed, opened = self.folder / "ledger.jsonl", set(), set()
        for event in read_lines(path):
            stage = event.get("stage", "")
            if stage not in self.stages:
                continue
            kind = event["event"]
            if kind == "start":
                self.tried[stage] += 1
                opened.add(stage)
            elif kind == "fail":
                opened.discard(stage)
                self.tried[stage] -= event["kind"] in UNCOUNTED
                if event["final"]:
                    failed.add(stage)
            elif kind in {"finish", "reset"}:
                opened.discard(stage)
                failed.discard(stage)
                self.tried[stage] = 0
        for stage in failed | {i for i in opened if self.tried[i] >= self.limit}:
            if self.state[stage] == WAITING:
                how = "failed" if stage in failed else "died"
                self.notices.append(f"{self.stages[stage]['name']}: {how} in an earlier run and is tried afresh")
                self._journal("reset", stage)
            self.tried[stage] = 0
        for stage in opened - failed:
            if self.state[stage] == WAITING and self.tried[stage]:
                self.notices.append(f"{self.stages[stage]['name']}: attempt {self.tried[stage]} was cut off with its driver; it goes on")

    def _journal(self, event: str, stage: str, **more: Any) -> None:
        self.journal.write("ledger.jsonl", {"event": event, "stage": stage, "time": self.clock(), "epoch": self.epoch, **more})

    def _time(self, lane: str, stage: str, status: str, marks: dict[str, float]) -> None:
        entry = self.stages[stage]
        what = {"event": "stage", "stage": stage, "name": entry["name"], "kind": entry["kind"], "lane": lane, "status": status}
        times = {"claimed": self.since.pop(stage, None), "end": self.clock(), **marks}
        self.journal.write("timeline.jsonl", {**what, "attempt": self.tried[stage], "epoch": self.epoch, **times})
