"""What the person sees while a run goes on: live lines with time left on a terminal, plain lines elsewhere.

In: snapshots of the ledger. Out: text on a stream. NO_COLOR and TERM=dumb are honoured; nothing is repeated that hasn't changed.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, TextIO

from grid.priority import seconds_of

PLAIN_SECONDS = 30.0


class Display:
    def __init__(self, plan: dict[str, Any], lanes: int, stream: TextIO | None = None, clock: Callable[[], float] = time.time) -> None:
        self.stream, self.clock, self.lanes = stream or sys.stderr, clock, max(1, lanes)
        self.stages = {stage["id"]: stage for stage in plan["stages"]}
        self.live = self.stream.isatty() and os.environ.get("TERM") != "dumb"
        self.color = self.live and not os.environ.get("NO_COLOR")
        self.drawn = 0
        self.start = clock()
        self.seen: dict[str, str] = {}
        self.began: dict[str, float] = {}
        self.took: dict[str, list[tuple[float, float]]] = {}
        self.told: set[str] = set()
        self.last_plain = clock()

    def say(self, line: str) -> None:
        self._erase()
        print(line, file=self.stream, flush=True)

    def finished(self, plan: dict[str, Any], done: Iterable[str]) -> None:
        """Arms that were done before this run are not told again."""
        known = set(done)
        self.told |= {arm["name"] for arm in [*plan["arms"], *plan.get("references", [])] if set(arm["stages"]) <= known}

    def update(self, snapshot: dict[str, Any]) -> None:
        for notice in snapshot["notices"]:
            if notice not in self.told:
                self.told.add(notice)
                self.say(f"  {self._paint(notice, 33)}")
        self._learn(snapshot)
        for name, arm in snapshot["arms"].items():
            if name not in self.told and arm["state"] in {"done", "failed"} and not arm["open"]:
                self.told.add(name)
                if arm["state"] == "done":
                    self.say(f"{self._clock()} {self._paint('done', 32)}    {name}  ({self._progress(snapshot)})")
                else:
                    self.say(f"{self._clock()} {self._paint('failed', 31)}  {name}: {arm['reason'].splitlines()[0]}")
        if self.live:
            self._draw(snapshot)
        elif self.clock() - self.last_plain > PLAIN_SECONDS:
            self.last_plain = self.clock()
            running = ", ".join(entry["name"] for entry in snapshot["running"])
            self.say(f"{self._clock()} {self._progress(snapshot)}; now: {running or 'nothing'}")

    def seconds_left(self, snapshot: dict[str, Any]) -> float | None:
        """From what stages of the same kind took per unit of planned cost so far; None before the first has ended."""
        every = [pair for pairs in self.took.values() for pair in pairs]
        if not every:
            return None
        left = 0.0
        for stage, state in snapshot["state"].items():
            if state in {"waiting", "running"}:
                pairs = self.took.get(self.stages[stage]["kind"], every)
                rate = sum(t for t, _ in pairs) / max(1e-12, sum(c for _, c in pairs))
                expected = rate * seconds_of(self.stages[stage])
                gone = self.clock() - self.began[stage] if state == "running" and stage in self.began else 0.0
                left += max(0.0, expected - gone)
        return left / self.lanes

    def close(self) -> None:
        self._erase()

    def _learn(self, snapshot: dict[str, Any]) -> None:
        for entry in snapshot["running"]:
            self.began.setdefault(entry["stage"], entry["since"])
        for stage, state in snapshot["state"].items():
            if state == "done" and self.seen.get(stage, "done") != "done" and stage in self.began:
                kind = self.stages[stage]["kind"]
                self.took.setdefault(kind, []).append((self.clock() - self.began[stage], seconds_of(self.stages[stage])))
            self.seen[stage] = state

    def _progress(self, snapshot: dict[str, Any]) -> str:
        counts = snapshot["counts"]
        left = self.seconds_left(snapshot)
        total = sum(counts.values())
        return f"{counts['done']} of {total} stages" + (f", about {duration(left)} left" if left is not None else "")

    def _draw(self, snapshot: dict[str, Any]) -> None:
        counts = snapshot["counts"]
        total, width = max(1, sum(counts.values())), 30
        filled = width * counts["done"] // total
        lines = [f"[{'#' * filled}{'.' * (width - filled)}] {self._progress(snapshot)}, {duration(self.clock() - self.start)} gone"]
        for entry in sorted(snapshot["running"], key=lambda e: e["lane"]):
            step = f"  step {entry['step']}" + (f"/{entry['steps']}" if "steps" in entry else "") if "step" in entry else ""
            again = f"  attempt {entry['attempt']}" if entry["attempt"] > 1 else ""
            lines.append(f"  {entry['lane']}  {entry['name']}  {duration(self.clock() - entry['since'])}{step}{again}")
        self._erase()
        columns = shutil.get_terminal_size((120, 24)).columns
        self.stream.write("".join(line[: columns - 1] + "\n" for line in lines))
        self.stream.flush()
        self.drawn = len(lines)

    def _erase(self) -> None:
        if self.drawn:
            self.stream.write(f"\x1b[{self.drawn}A\x1b[J")
            self.drawn = 0

    def _paint(self, text: str, code: int) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self.color else text

    def _clock(self) -> str:
        return f"{duration(self.clock() - self.start):>8}"


def duration(seconds: float) -> str:
    """`48 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
