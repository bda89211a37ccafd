"""One play of a plan under a virtual clock: stage times and lanes in; when everything is done and where the lanes' time went, out.

Who makes which stage is decided by the run's own ledger (grid.ledger). Nodes fail as independent Poisson processes: a node takes down
every lane that has a worker on it, and the lane's stage goes back to its last checkpoint. The attempt counts, as in a run.
"""

from __future__ import annotations

import itertools
import random
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

from grid.jsonl import Journal
from grid.ledger import RUNNING, WAITING, LedgerCore
from grid.priority import model_stages
from grid.simulated_times import Assumptions, Times

DAY = 86400.0
PARTS = ("work", "loading", "saving", "lost", "down", "idle")
"""Where a lane's time goes after it is up: stages' own work that counted, what surrounds it, checkpoints, what a failure undid, until a
lane was back, nothing to do."""


class Unwritten(Journal):
    """Nothing is kept of a simulation but its result."""

    def write(self, name: str, record: dict[str, Any]) -> None:
        pass


class VirtualLedger(LedgerCore):
    """The run's ledger without its files, quick with a hundred thousand stages and a thousand lanes of one size.

    `claim` is LedgerCore's, shown only stages that can win. Stages of the same models are equally warm for a lane, so the first of them
    in rank stands for all; of models in some lane's hands, and of those in nobody's, only the best matters to a lane that has neither.
    At the end the longest path wins, whatever the models.
    """

    def __init__(self, plan: dict[str, Any], folder: Path, attempts: int, clock: Callable[[], float]) -> None:
        super().__init__(plan, (), folder, attempts=attempts, clock=clock)
        self.journal = Unwritten(folder)
        order = {i: number for number, i in enumerate(self.stages)}
        self.models = {i: frozenset(model_stages(stage["spec"])) for i, stage in self.stages.items()}
        self.latest: dict[str, set[frozenset[str]]] = {}
        """Sets of models by the one of them that is made last: they are in nobody's hands without it."""
        for models in set(self.models.values()):
            if models:
                self.latest.setdefault(max(models, key=order.__getitem__), set()).add(models)
        self.behind: dict[str, list[str]] = {i: [] for i in self.stages}
        self.unmet = {i: len(stage["needs"]) for i, stage in self.stages.items()}
        for i, stage in self.stages.items():
            for need in stage["needs"]:
                self.behind[need].append(i)
        self.open: dict[frozenset[str], list[tuple[Any, str]]] = {}
        """Stages that may be claimed, by their models: heaps by rank."""
        self.hands: dict[frozenset[str], int] = {}
        """Lanes that have these models in hand."""
        self.holds: dict[str, list[frozenset[str]]] = {}
        self.best: tuple[list[tuple[Any, str]], list[tuple[Any, str]]] = [], []
        """Firsts of `open` whose models nobody, and somebody, has in hand: heaps by rank, with entries that no longer hold."""
        self.longest: list[tuple[float, Any, str]] = []
        """Stages of long paths that may be claimed, longest first, with entries that no longer hold."""
        for i in self.stages:
            self.offer(i)

    def offer(self, stage: str) -> None:
        """A stage that may be claimed now, if it may."""
        if self.state[stage] == WAITING and not self.unmet[stage]:
            heappush(self.open.setdefault(self.models[stage], []), (self._rank[stage], stage))
            self._show(self.models[stage])
            if stage in self._long:
                heappush(self.longest, (-self._path[stage], self._rank[stage], stage))

    def claim(self, lane: str) -> dict[str, Any] | None:
        self._look()  # at all of them
        while self.longest and self.state[self.longest[0][2]] != WAITING:
            heappop(self.longest)
        stages, own = self.stages, [self.open[models][0][1] for models in self.holds.get(lane, ()) if models in self.open]
        best = [self.longest[0][2]] if self.ending and self.longest else [*own, self._first(False), self._first(True)]
        self.stages = {i: stages[i] for i in best if i is not None}
        try:
            grant = super().claim(lane)
        finally:
            self.stages = stages
        if grant is not None:
            models = self.models[grant["stage"]["id"]]
            heap = self.open[models]
            while heap and self.state[heap[0][1]] != WAITING:  # the granted one, which need not be the first
                heappop(heap)
            if not heap:
                del self.open[models]
            self._show(models)
        return grant

    def finish(self, lane: str, stage: str, report: dict[str, Any]) -> None:
        super().finish(lane, stage, report)
        self._rewarm(lane)
        for other in self.behind[stage]:
            self.unmet[other] -= 1
            self.offer(other)

    def lane_up(self, lane: str, world: int) -> None:
        super().lane_up(lane, world)
        self._rewarm(lane)

    def warm(self, stage: str, lane: str) -> bool:
        """Whether the lane has the stage's model in hand."""
        return self._warmth(stage, lane) == 0

    def _warmth(self, stage: str, lane: str) -> int:
        """LedgerCore's, without asking every lane."""
        models = self.models[stage]
        if not models:
            return 1
        return 0 if models <= self.lanes[lane]["warm"] else 2 if self.hands.get(models) else 1

    def _rewarm(self, lane: str) -> None:
        """What is in the lane's hands has changed."""
        warm = self.lanes[lane]["warm"]
        now = [models for i in warm for models in self.latest.get(i, ()) if models <= warm]
        for models, change in [*((models, -1) for models in self.holds.get(lane, ())), *((models, 1) for models in now)]:
            self.hands[models] = self.hands.get(models, 0) + change
            self._show(models)
        self.holds[lane] = now

    def _show(self, models: frozenset[str]) -> None:
        if models in self.open:
            heappush(self.best[bool(self.hands.get(models))], self.open[models][0])

    def _first(self, held: bool) -> str | None:
        heap = self.best[held]
        while heap:
            models = self.models[heap[0][1]]
            if models in self.open and self.open[models][0] == heap[0] and bool(self.hands.get(models)) == held:
                return heap[0][1]
            heappop(heap)
        return None


@dataclass
class Lane:
    name: str
    nodes: frozenset[int]
    up: bool = False
    serial: int = 0
    """Rises with every event that makes earlier plans for this lane void."""
    stage: str | None = None
    since: float = 0.0
    """When the stage was claimed; of a lane that is down: when it went down."""
    loading: float = 0.0
    """Of the stage under way: seconds before its work begins."""
    tally: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))


class Simulation:
    """times: every stage's; lanes: the nodes that each lane has workers on; failures: of each node, a second."""

    def __init__(
        self, plan: dict[str, Any], times: Mapping[str, Times], lanes: Sequence[frozenset[int]], workers: int, assume: Assumptions,
        failures: Sequence[float] = (),
    ) -> None:  # fmt: skip
        self.plan, self.times, self.workers, self.assume, self.rates = plan, times, workers, assume, failures
        self.now = 0.0
        self.lanes = [Lane(f"lane-{n}", nodes, since=assume.start_seconds) for n, nodes in enumerate(lanes)]
        self.idle: OrderedDict[int, None] = OrderedDict()
        """Lanes that are up and have nothing to do, longest first."""
        self.saved: dict[str, float] = {}
        """Seconds of a stage's work that its last checkpoint holds."""
        self.failures = self.killed = 0
        self.busy = 0.0
        """Device seconds of work that counted."""
        self._events: list[tuple[float, int, str, int, int]] = []
        self._count = itertools.count()
        self._dice = [random.Random(f"{assume.seed} {node}") for node in range(len(failures))]

    def run(self) -> float:
        """Plays to the end; returns the makespan, in seconds from the start."""
        attempts = self.plan.get("run", {}).get("attempts", 5)
        with tempfile.TemporaryDirectory() as folder:
            self.core = VirtualLedger(self.plan, Path(folder), attempts, lambda: self.now)
        self.left = len(self.core.stages)
        for number in range(len(self.lanes)):
            self._at(self.assume.start_seconds, "up", number, 0)
        for node in range(len(self.rates)):
            self._next_failure(node)
        while self.left:
            self.now, _, what, number, serial = heappop(self._events)
            if what == "failure":
                self._node_failed(number)
            elif serial == self.lanes[number].serial:
                self._up(number) if what == "up" else self._done(number)
            self._hand_out()
        for lane in self.lanes:
            if not lane.up:
                lane.tally["down"] += max(0.0, self.now - lane.since)
            lane.tally["idle"] = max(0.0, self.now - sum(lane.tally.values()) - self.assume.start_seconds)
        return self.now

    def _at(self, time: float, what: str, number: int, serial: int) -> None:
        heappush(self._events, (time, next(self._count), what, number, serial))

    # ---- what happens

    def _hand_out(self) -> None:
        while self.idle:
            number = next(iter(self.idle))
            lane = self.lanes[number]
            grant = self.core.claim(lane.name)
            if grant is None:  # lanes are of one size: what isn't there for one isn't for another
                return
            del self.idle[number]
            stage = grant["stage"]["id"]
            times, saved = self.times[stage], self.saved.get(stage, 0.0)
            lane.stage, lane.since = stage, self.now
            lane.loading = times.fixed + (0.0 if self.core.warm(stage, lane.name) else times.load) + (times.restore if saved else 0.0)
            total = lane.loading + times.seconds - saved + times.saves(saved) * times.save + times.close
            self._at(self.now + total, "done", number, lane.serial)

    def _done(self, number: int) -> None:
        lane = self.lanes[number]
        stage, lane.stage = lane.stage, None
        assert stage is not None
        times, saved = self.times[stage], self.saved.pop(stage, 0.0)
        lane.tally["work"] += times.seconds - saved
        lane.tally["loading"] += lane.loading + times.close
        lane.tally["saving"] += times.saves(saved) * times.save
        self.busy += (times.seconds - saved) * times.devices
        self.core.finish(lane.name, stage, {})
        self.left -= 1
        self.idle[number] = None

    def _up(self, number: int) -> None:
        lane = self.lanes[number]
        if lane.serial:  # not its first start
            lane.tally["down"] += self.now - lane.since
        lane.up, self.idle[number] = True, None
        self.core.lane_up(lane.name, self.workers)
        stage, lane.stage = lane.stage, None
        if stage is not None:
            self.core.offer(stage)
            if self.core.state[stage] != WAITING:  # it was the last of its attempts, and blocks what needs it
                self.left = sum(state in {WAITING, RUNNING} for state in self.core.state.values())

    def _next_failure(self, node: int) -> None:
        if self.rates[node]:
            self._at(self.now + self._dice[node].expovariate(self.rates[node]), "failure", node, 0)

    def _node_failed(self, node: int) -> None:
        self.failures += 1
        self._next_failure(node)
        for number, lane in enumerate(self.lanes):
            if node not in lane.nodes:
                continue
            if lane.up and lane.stage is not None:
                self._kill(lane, lane.stage)
            if lane.up:
                lane.since = self.now
            lane.up = False
            lane.serial += 1
            self.idle.pop(number, None)
            self._at(max(self.assume.start_seconds, self.now + self.assume.restart_seconds), "up", number, lane.serial)

    def _kill(self, lane: Lane, stage: str) -> None:
        """The stage goes back to its last checkpoint; the ledger hears of it when the lane is up again, as in a run."""
        self.killed += 1
        times, saved, elapsed = self.times[stage], self.saved.get(stage, 0.0), self.now - lane.since
        worked = elapsed - lane.loading
        whole = min(times.saves(saved), int(worked / (times.chunk + times.save))) if worked > 0 else 0
        if whole:
            self.saved[stage] = saved + whole * times.chunk
            lane.tally["work"] += whole * times.chunk
            lane.tally["saving"] += whole * times.save
            self.busy += whole * times.chunk * times.devices
            elapsed -= whole * (times.chunk + times.save)
        lane.tally["lost"] += elapsed
