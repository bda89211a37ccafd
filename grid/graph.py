"""The stage graph: stages added one by one, equal ones once. Identities are contents all the way down."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from grid.identity import canonical, identify


@dataclass
class Stage:
    """One unit of work (the JSON of plan.json without `arms`, which the graph adds)."""

    id: str
    kind: str
    name: str
    """Shown to people; no part of the identity. The first who asked for the stage named it."""
    spec: dict[str, Any]
    needs: list[str]
    rows: int
    """Rows that it writes (dataset, choices) or reads; for batch arithmetic."""
    facts: dict[str, Any] = field(default_factory=dict)
    """For the cost estimate only: tokens, images, megabytes, shapes."""
    arms: list[str] = field(default_factory=list)
    runtime: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    index: int = 0
    """Position in topological order."""

    def plain(self) -> dict[str, Any]:
        return {
            "id": self.id, "kind": self.kind, "name": self.name, "spec": self.spec, "needs": self.needs, "arms": self.arms,
            "runtime": self.runtime, "cost": self.cost,
        }  # fmt: skip


class Graph:
    """Stages in the order in which they were first needed, which is topological: what a stage needs is added before it."""

    def __init__(self) -> None:
        self.stages: dict[str, Stage] = {}
        self._texts: dict[int, tuple[Any, str]] = {}

    def add(self, kind: str, spec: dict[str, Any], name: str, needs: Iterable[str], rows: int, **facts: Any) -> str:
        """The stage's id. Adding an equal stage again changes nothing."""
        id = identify(kind, self.text(spec))
        if id not in self.stages:
            needed = sorted(set(needs), key=lambda n: self.stages[n].index)
            self.stages[id] = Stage(id, kind, name, spec, needed, rows, facts, index=len(self.stages))
        return id

    def text(self, spec: dict[str, Any]) -> str:
        """Canonical JSON of a spec; its model, which several stages share, is rendered once."""
        model = spec.get("model")
        if model is not None:
            self.share(model)
        return canonical(spec, self._texts)

    def share(self, value: Any) -> Any:
        """The value, kept and rendered once from now on: for objects that stand in many specs and no longer change."""
        if id(value) not in self._texts:
            self._texts[id(value)] = value, canonical(value, self._texts)
        return value

    def closure(self, targets: Iterable[str]) -> list[str]:
        """The targets and everything they need, in topological order."""
        found: set[str] = set()
        waiting = list(targets)
        while waiting:
            id = waiting.pop()
            if id not in found:
                found.add(id)
                waiting += self.stages[id].needs
        return sorted(found, key=lambda n: self.stages[n].index)

    def __getitem__(self, id: str) -> Stage:
        return self.stages[id]
