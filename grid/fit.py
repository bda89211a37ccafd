"""The fastest setting that fits: a planned training stage and a device in; ZeRO stage, recomputation, offload and micro-batch out.

Every knob that a profile leaves `auto` is chosen here from grid.footprint's bytes. Accumulation follows: a step's samples are packed into
micro-batches of so many tokens, as many as it takes. None of it can change a result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grid.footprint import Adapter, Load, footprint
from grid.graph import Stage

GIB = 2.0**30
HEADROOM = 0.9
"""Share of a device's memory (and of a host's) that a plan may fill; the rest is workspace of kernels, collectives and fragmentation."""
KNOBS = ("zero", "activation_checkpointing", "offload")
ORDER = (
    (0, False, False), (1, False, False), (2, False, False), (1, True, False), (2, True, False), (3, False, False), (3, True, False),
    (2, True, True), (3, True, True),
)  # fmt: skip
"""KNOBS from fastest to leanest: what `auto` tries. Recomputing costs a third more, ZeRO 3 gathers weights in every pass of every
micro-batch, and offloading moves the optimiser's step to the host."""
MICRO = 8192
MOST_MICRO = 1 << 15
"""Tokens of a micro-batch beyond which a larger one is hardly faster."""


@dataclass(frozen=True)
class Room:
    """What a device offers."""

    width: int
    """Bytes an element of weights and activations."""
    memory_gib: float
    host_gib: float
    """Of its share of the host; 0: unknown, and then nothing is offloaded unless the profile says so."""
    fused: bool
    """Attention is one kernel over the pack."""

    def holds(self, memory: Mapping[str, float], asked: bool) -> bool:
        """Whether the device and its host do. asked: the profile itself wants offloading."""
        host = self.host_gib * HEADROOM if self.host_gib or not asked else math.inf
        return memory["total"] <= self.memory_gib * HEADROOM and memory["host"] <= host


@dataclass(frozen=True)
class Mix:
    """What a token of a stage's micro-batches carries on average."""

    text: float
    """Positions of the language model (or text tower)."""
    patches: float
    """Of the encoder."""
    visual: float
    """Positions that images fill."""

    def load(self, tokens: int, fused: bool = True) -> Load:
        """A micro-batch of so many tokens, of whose text all may be learned."""
        text, visual = math.ceil(tokens * self.text), math.ceil(tokens * self.visual)
        return Load(text, max(1, text - visual), math.ceil(tokens * self.patches), visual, fused)


def fit(
    stage: Stage, model: Mapping[str, Any], trained: set[str], sizes: Mapping[str, int], mix: Mix, room: Room
) -> dict[str, float]:  # fmt: skip
    """Resolves `auto` in the stage's runtime; returns GiB of one device by kind. Where nothing fits, the leanest setting stays.

    model: {"family", "shapes"}; sizes: part → parameters; trained: parts that learn.
    """
    runtime, adapters = stage.runtime, adapters_of(stage.spec)
    fixed = [runtime.get(knob, False) for knob in KNOBS]
    choices = [choice for choice in ORDER if all(value in ("auto", chosen) for value, chosen in zip(fixed, choice))]
    if not choices:
        choices = [(0 if fixed[0] == "auto" else fixed[0], fixed[1] is True, fixed[2] is True)]
    micro = micro_batches(stage) if runtime["micro_tokens"] == "auto" else [runtime["micro_tokens"]]
    memory, choice, tokens = {}, choices[-1], micro[-1]
    for choice, tokens in ((choice, tokens) for choice in choices for tokens in micro):
        zero, again, offload = choice
        memory = footprint(
            model, trained, sizes, mix.load(tokens, room.fused), width=room.width, world=runtime["world"], zero=zero, again=again,
            offload=offload, adapters=adapters,
        )  # fmt: skip
        memory = {kind: value / GIB for kind, value in memory.items()}
        if room.holds(memory, fixed[2] is True):
            break
    runtime |= {**dict(zip(KNOBS, choice)), "micro_tokens": tokens}
    if room.width == 2 and runtime["zero"] == 0:
        runtime["zero"] = 1  # what the engine makes of it: fp32 accumulation begins there
    return memory


def micro_batches(stage: Stage) -> list[int]:
    """Sizes that `micro_tokens: auto` tries, largest first: powers of two, at least one whole sample, at most what a rank has of a step."""
    longest = _power_of_two(stage.spec["data"]["max_tokens"])
    share = _power_of_two(stage.spec["batch"] * stage.spec["data"]["max_tokens"] / stage.runtime["world"])
    top = max(longest, min(MOST_MICRO, share))
    return [1 << n for n in range(top.bit_length() - 1, longest.bit_length() - 2, -1)]


def _power_of_two(number: float) -> int:
    """The nearest at or above."""
    return 1 << math.ceil(math.log2(max(1.0, number)))


def adapters_of(spec: Mapping[str, Any]) -> dict[str, Adapter]:
    """Part → its adapters, of a train spec."""
    return {
        part: Adapter(int(one["rank"]), None if one["targets"] == "all-linear" else one["targets"])
        for part, one in (spec.get("adapters") or {}).items()
    }
