"""One measured figure with its spread and its goal, repetitions in turn, and the table that `make bench` prints."""

from __future__ import annotations

import importlib.metadata
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

PACKAGES = ("torch", "transformers", "ray", "deepspeed", "accelerate", "open_clip_torch", "torchvision", "pillow", "numpy", "pyarrow")


class NotHere(Exception):
    """A benchmark needs something that this machine doesn't have; the message says what."""


@dataclass
class Figure:
    """What was measured, min / median / max over the repetitions, against which goal. No values: not measured, the note says why."""

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
        if self.goal is None or not self.values:
            return ""
        return "yes" if (self.median <= self.goal) == (self.better == "lower") or self.median == self.goal else "NO"

    def as_dict(self) -> dict[str, object]:
        return {**asdict(self), "median": self.median if self.values else None, "met": self.met}


def repeat(times: int, measure: Callable[[], float]) -> list[float]:
    """One warm-up that isn't counted, then `times` measurements."""
    measure()
    return [measure() for _ in range(times)]


def in_turn(times: int, *measures: Callable[[], float]) -> list[list[float]]:
    """For each of the measures its `times` values: one of each, then the next of each, so that what disturbs one disturbs all.

    Every other round goes backwards: none always follows the same neighbour.
    """
    values: list[list[float]] = [[] for _ in measures]
    for turn in range(times):
        for at in range(len(measures))[:: -1 if turn % 2 else 1]:
            values[at].append(measures[at]())
    return values


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """above / below, of each round."""
    return [one / other for one, other in zip(above, below, strict=True)]


def versions() -> dict[str, str]:
    """Of what is measured and what it is measured against."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def table(figures: Sequence[Figure]) -> str:
    """Markdown: figure, min / median / max, unit, goal, met."""
    lines = ["| figure | min | median | max | unit | goal | met | note |", "|---|---:|---:|---:|---|---|---|---|"]
    for f in figures:
        sign = "" if f.goal is None else f"{'≤' if f.better == 'lower' else '≥'} {f.goal:g}"
        spread = " | ".join(f"{value:.3g}" for value in (min(f.values), f.median, max(f.values))) if f.values else "| not measured |"
        lines.append(f"| {f.name} | {spread} | {f.unit} | {sign} | {f.met} | {f.note} |")
    return "\n".join(lines)
