"""One measured figure with its spread and its goal, and the table that `make bench` prints."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field


@dataclass
class Figure:
    """What was measured, min / median / max over the repetitions, against which goal."""

    name: str
    unit: str
    values: list[float] = field(default_factory=list)
    goal: float | None = None
    better: str = "lower"
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def met(self) -> str:
        if self.goal is None:
            return ""
        return "yes" if (self.median <= self.goal) == (self.better == "lower") or self.median == self.goal else "NO"

    def as_dict(self) -> dict[str, object]:
        return {**asdict(self), "median": self.median, "met": self.met}


def repeat(times: int, measure: Callable[[], float]) -> list[float]:
    """One warm-up that isn't counted, then `times` measurements."""
    measure()
    return [measure() for _ in range(times)]


def table(figures: list[Figure]) -> str:
    """Markdown: figure, min / median / max, unit, goal, met."""
    lines = ["| figure | min | median | max | unit | goal | met | note |", "|---|---:|---:|---:|---|---|---|---|"]
    for f in figures:
        sign = "" if f.goal is None else f"{'≤' if f.better == 'lower' else '≥'} {f.goal:g}"
        lines.append(f"| {f.name} | {min(f.values):.3g} | {f.median:.3g} | {max(f.values):.3g} | {f.unit} | {sign} | {f.met} | {f.note} |")
    return "\n".join(lines)
