"""What a stage's place in the order hangs on: a planned stage graph in; expected seconds, longest paths and ranks out.

The plan lists stages in topological order. Who decides by these numbers, and when: `grid.ledger`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Stages = Mapping[str, dict[str, Any]]
"""Stage id → the planned stage."""


def model_stages(spec: dict[str, Any]) -> set[str]:
    """Stages whose weights a spec's model is made of."""
    parts = (spec.get("model") or {}).get("parts", {})
    return {part["weights"]["stage"] for part in parts.values() if "stage" in part.get("weights", {})}


def seconds_of(stage: dict[str, Any]) -> float:
    """Seconds the plan expects; half a second for what it takes to be free."""
    return max(0.5, 3600 * float(stage.get("cost", {}).get("gpu_hours", 0.0)))


def paths(stages: Stages) -> dict[str, float]:
    """Seconds from each stage's start to the end of all that follows from it."""
    path = dict.fromkeys(stages, 0.0)
    for stage in reversed(list(stages)):
        path[stage] += seconds_of(stages[stage])
        for need in stages[stage]["needs"]:
            path[need] = max(path[need], path[stage])
    return path


def ranks(stages: Stages, arms: Mapping[str, Sequence[str]], path: Mapping[str, float]) -> dict[str, tuple[int, float, int]]:
    """By stage, least first: the arm with the longest chain of stages, then the longest path, then the plan's order."""
    chain = dict.fromkeys(stages, 0.0)  # seconds of the longest chain that ends with a stage
    for stage, entry in stages.items():
        chain[stage] = seconds_of(entry) + max((chain.get(need, 0.0) for need in entry["needs"]), default=0.0)
    first = dict.fromkeys(stages, len(arms))
    for index, arm in enumerate(sorted(arms, key=lambda name: -max((chain[i] for i in arms[name]), default=0.0))):
        for stage in arms[arm]:
            first[stage] = min(first[stage], index)
    return {stage: (first[stage], -path[stage], index) for index, stage in enumerate(stages)}
