"""The ledger as a Ray actor: one place that lanes, trials and the driver talk to, by name.

In: method calls. Out: grants and states; waiting costs nothing here (one coroutine each) and nothing at the caller's side.
Started by `start(...)` from grid/run.py; `hold` exists to be seen: the dashboard's task view shows one running task per stage, by its name.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from grid.ledger import DONE, FAILED, RUNNING, LedgerCore

NAME, NAMESPACE = "finegrid-ledger", "finegrid"


class LedgerActor:
    """Every method is a coroutine on one event loop, so the core's state needs no lock."""

    def __init__(self, plan: dict[str, Any], done: list[str], folder: str, epoch: int, attempts: int) -> None:
        self.core = LedgerCore(plan, done, Path(folder), epoch, attempts)
        self.changed = asyncio.Condition()

    async def _tell(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def _wait(self, seconds: float) -> None:
        """Until something changed, or `seconds` passed (a stage held back becomes due without an event)."""
        try:
            async with self.changed:
                await asyncio.wait_for(self.changed.wait(), seconds)
        except TimeoutError:
            return

    # ---- lanes

    async def claim(self, lane: str) -> dict[str, Any] | None:
        starts = self._starts(lane)
        while starts == self._starts(lane):  # else its worker is gone, and another one asks for itself
            grant = self.core.claim(lane)
            if grant is not None:
                await self._tell()
                return grant
            if self.core.closed or self.core.stop or self.core.lanes.get(lane, {}).get("dead"):
                return None
            await self._wait(0.5)
        return None

    def _starts(self, lane: str) -> int:
        """How often a worker group of this lane has started."""
        return self.core.lanes.get(lane, {}).get("starts", 0)

    async def finish(self, lane: str, stage: str, report: dict[str, Any]) -> None:
        self.core.finish(lane, stage, report)
        await self._tell()

    async def fail(self, lane: str, stage: str, failure: dict[str, Any]) -> None:
        self.core.fail(lane, stage, failure)
        await self._tell()

    async def busy(self, lane: str, stage: str, message: str, seconds: float) -> None:
        self.core.busy(lane, stage, message, seconds)
        await self._tell()

    async def lane_up(self, lane: str, world: int) -> None:
        self.core.lane_up(lane, world)
        await self._tell()

    async def lane_failed(self, lane: str, failure: dict[str, Any]) -> bool:
        dead = self.core.lane_failed(lane, failure)
        await self._tell()
        return dead

    async def lane_lost(self, lane: str, message: str) -> None:
        self.core.lane_lost(lane, message)
        await self._tell()

    async def beat(self, lane: str, progress: dict[str, Any]) -> dict[str, Any]:
        return self.core.beat(lane, progress)

    async def hold(self, stage: str, lane: str) -> str:
        """Runs as long as this lane works on the stage; called with `.options(name=<the stage's name>)`."""
        while self.core.lane_of.get(stage) == lane and self.core.state[stage] == RUNNING:
            await self._wait(30.0)
        return self.core.state[stage]

    # ---- trials

    async def arm(self, name: str) -> dict[str, Any]:
        """Waits until nothing of this arm is left to do, or the run stops."""
        while True:
            arm = self.core.arm(name)
            if arm["state"] in {DONE, FAILED} and not arm["open"]:
                return arm
            if self.core.stop or self.core.closed:
                return {**arm, "reason": arm["reason"] or "the run was stopped"}
            await self._wait(30.0)

    # ---- the driver

    async def snapshot(self) -> dict[str, Any]:
        return self.core.snapshot()

    async def ask_stop(self) -> None:
        self.core.stop = True
        await self._tell()

    async def abandon(self) -> None:
        self.core.abandon()
        await self._tell()

    async def close(self) -> None:
        self.core.closed = True
        await self._tell()


def start(plan: dict[str, Any], done: list[str], folder: Path, epoch: int, attempts: int) -> Any:
    """The actor on this node (it writes files beside the driver's), taking no CPU."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"name": NAME, "namespace": NAMESPACE, "num_cpus": 0, "max_concurrency": 4096, "scheduling_strategy": here}
    remote: Any = ray.remote(LedgerActor)
    actor = remote.options(**options).remote(plan, done, str(folder), epoch, attempts)
    ray.get(actor.snapshot.remote())
    return actor
