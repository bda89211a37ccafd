"""Who is trained how fast: parameter groups by part, and learning rates as a pure function of the step.

In: a model's parts, a phase's learning rates, the stage's number of steps. Out: AdamW groups and `factor(step)`. One schedule runs over
all steps of the stage: a part that joins in a later phase finds itself where the schedule is by then (LLaVA's connector stays on it).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from datasets_ray.errors import UserError, nearest


@dataclass(frozen=True)
class Phase:
    """Steps [first, last) of a stage with one set of trained parts."""

    number: int
    first: int
    last: int
    learning_rates: dict[str, float]
    """Peak rate by part; a part that isn't here is frozen."""


def plan_phases(phases: Sequence[Mapping[str, Any]], steps: int) -> list[Phase]:
    """`[{"until": share of the steps, "learning_rates"}]` → step ranges; `until` rises to 1. A phase too short for a step is left out."""
    made: list[Phase] = []
    first, before = 0, 0.0
    for number, phase in enumerate(phases):
        until = float(phase["until"])
        if not before < until <= 1.0:
            raise UserError(f"phase {number + 1} ends at {until}", why=f"`until` rises up to 1.0; the phase before ends at {before}")
        if not phase["learning_rates"]:
            raise UserError(f"phase {number + 1} trains nothing", hint="give learning_rates for at least one part")
        last = steps if until == 1.0 else math.floor(until * steps + 0.5)
        if last > first:
            made.append(Phase(number, first, last, {part: float(rate) for part, rate in phase["learning_rates"].items()}))
        first, before = last, until
    if before != 1.0:
        raise UserError(f"the last phase ends at {before}", hint="its `until` has to be 1.0")
    return made


def _cosine(progress: float) -> float:
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


SHAPES: dict[str, Callable[[float], float]] = {"cosine": _cosine, "linear": lambda p: max(0.0, 1.0 - p), "constant": lambda p: 1.0}
"""Share of the peak rate against the share of the steps after warm-up."""


def schedule(name: str, steps: int, warmup: float) -> Callable[[int], float]:
    """Factor of the peak rate at optimiser step 0, 1, ...: linear warm-up over ceil(warmup · steps) steps, then `name`.

    As Hugging Face's `get_cosine_schedule_with_warmup` with half a cycle, which starts at 0: its first step changes nothing.
    """
    if name not in SHAPES:
        raise UserError(f"unknown schedule {name!r}", hint=nearest(name, SHAPES))
    if not 0.0 <= warmup < 1.0:
        raise UserError(f"warmup is {warmup}", why="it is the share of all steps that warm up", hint="0.03 for 3 %")
    warm = math.ceil(warmup * steps)

    def factor(step: int) -> float:
        return step / warm if step < warm else SHAPES[name]((step - warm) / max(1, steps - warm))

    return factor


def parameter_groups(parts: Mapping[str, nn.Module], learning_rates: Mapping[str, float], weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups, by part in the model's order, none of them empty or frozen: `params`, `lr`, `weight_decay`, `part`.

    Vectors and scalars (biases, norms, scales) never decay, as in Hugging Face's Trainer and open_clip; they are a group of
    their own only where there is decay at all. A weight shared between parts belongs to the first one.
    """
    groups: list[dict[str, Any]] = []
    seen: set[int] = set()
    for part, module in parts.items():
        if part not in learning_rates:
            continue
        params = [p for p in module.parameters() if p.requires_grad and id(p) not in seen]
        seen.update(id(p) for p in params)
        if not params:
            raise UserError(f"part {part!r} has no parameters of its own to train")
        matrices, rest = [p for p in params if p.ndim > 1], [p for p in params if p.ndim <= 1]
        for decay, kept in [(weight_decay, matrices), (0.0, rest)] if weight_decay else [(0.0, params)]:
            if kept:
                groups.append({"params": kept, "lr": learning_rates[part], "weight_decay": decay, "part": part})
    return groups
