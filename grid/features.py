"""Whether it pays to keep what frozen encoders make of images. In: a planned graph; out: the arithmetic of each (encoder, rows, recipe).

    saves   images read again x the encoder's FLOPs of an image / the device's rate
    costs   bytes written once and read again / RATE, IMAGE_SECONDS for each image of both, LAYER_SECONDS a layer for each that is written

Images are read once for each epoch of each stage that has the same encoder, rows and recipe. What is kept of an image is a token a patch,
as wide as the encoder. Both figures are a device's seconds, as if one machine made all stages and nothing else were done while features are
read; kept pixels cost the same either way and aren't counted. Only for encoders that no phase trains and images of one size. Stages under
ZeRO 3 on several ranks keep none, as all ranks run the encoder together: they have an entry of their own, which never pays.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from grid import shapes
from grid.cost import Estimator
from grid.graph import Graph, Stage

RATE = 1e9
"""Bytes a second that a process writes, or reads and checks: a drive's. From memory it reads 3.4e9 (measured, 1.2 MB an image)."""
IMAGE_SECONDS = 1e-4
"""What an image costs besides: it is looked up, stamped and read in a call of its own."""
LAYER_SECONDS = 1.5e-4
"""An image that is kept is encoded alone (`trainers.features`), and a device waits so long for each layer (measured: 3 layers of width 64,
0.5 ms more than in a batch; a GPU's dozen kernels a layer take as long to start)."""
MB = 1 << 20


@dataclass
class Group:
    """Stages whose frozen encoder reads the same images in the same way."""

    encoder: str
    rows: str
    image: dict[str, Any]
    images: float
    image_flops: float
    image_bytes: float
    layers: int
    together: bool = False
    stages: list[Stage] = field(default_factory=list)
    readings: float = 0.0

    def plain(self, rate: float) -> dict[str, Any]:
        """The entry of plan.json. rate: FLOP/s of a device; saves and costs in its seconds."""
        first = self.images * min(1.0, self.readings)
        again = self.images * self.readings - first
        saves = again * self.image_flops / rate
        costs = (first + again) * (self.image_bytes / RATE + IMAGE_SECONDS) + first * self.layers * LAYER_SECONDS
        whole = sum(stage.cost["flops"] for stage in self.stages)
        seen = sum(stage.cost["flops_by_part"]["encoder"] for stage in self.stages)
        return {
            "encoder": self.encoder, "rows": self.rows, "image": self.image, "stages": [stage.id for stage in self.stages],
            "flops_share": seen / whole if whole else 0.0, "images": round(self.images), "bytes": round(self.images * self.image_bytes),
            "readings": self.readings, "saves": saves, "costs": costs, "together": self.together,
            "pays": saves > costs and not self.together, "kept": False,
        }  # fmt: skip


def groups(graph: Graph, estimator: Estimator) -> list[dict[str, Any]]:
    """One entry for each encoder, rows and recipe that stages of the plan share (two where some run it together), whose stages' costs are
    filled in."""
    found: dict[tuple[str, str, str, bool], Group] = {}
    texts: dict[int, tuple[Any, str]] = {}

    def text(value: Any) -> str:
        if id(value) not in texts:
            texts[id(value)] = value, graph.text({"value": value})
        return texts[id(value)][1]

    for stage in graph.stages.values():
        if not stage.arms or not _frozen(stage):
            continue
        model, image = stage.spec["model"], stage.spec["data"]["image"]
        shape = estimator.shapes(model).get("encoder")
        if shape is None:
            continue
        part, (patches, _), together = model["parts"]["encoder"], shapes.image_tokens(image), _together(stage)
        for rows in (graph[name] for name in stage.spec["data"]["rows"]):
            key = (text(part), rows.id, text(image), together)
            if key not in found:
                images, size = rows.rows * rows.facts.get("images", 1.0), patches * shape.width * estimator.bytes
                name = _name(part, graph, estimator)
                flops = shape.forward(patches)
                found[key] = Group(name, rows.name.removeprefix("data "), image, images, flops, size, shape.layers, together)
            found[key].stages.append(stage)
            found[key].readings += stage.cost["samples"] / stage.rows
    rate = estimator.tflops * 1e12 * estimator.profile.device.mfu
    made = [group.plain(rate) for group in found.values() if group.images]
    _keep(graph, made, estimator.profile.resources.features_mb * MB)
    return made


def _frozen(stage: Stage) -> bool:
    """Whether features of the stage's images could be kept."""
    if stage.kind != "train" or stage.spec["model"]["family"] != "vlm":
        return False
    image = stage.spec["data"]["image"]
    trained = {part for phase in stage.spec["phases"] for part in phase["learning_rates"]}
    return image is not None and image["kind"] == "square" and "encoder" not in trained


def _together(stage: Stage) -> bool:
    """Whether all ranks run the encoder together (`trainers.features.why_not`)."""
    return stage.runtime["zero"] == 3 and stage.runtime["world"] > 1


def _keep(graph: Graph, made: list[dict[str, Any]], room: int) -> None:
    """Gives the room to what saves most a byte; a stage keeps features if all of its rows have room."""
    chosen: list[dict[str, Any]] = []
    for entry in sorted(made, key=lambda one: (one["costs"] - one["saves"]) / max(1, one["bytes"])):
        if entry["pays"] and entry["bytes"] <= room:
            room -= entry["bytes"]
            chosen.append(entry)
    without = {id for entry in made if entry not in chosen for id in entry["stages"]}
    for entry in chosen:
        on = [id for id in entry["stages"] if id not in without]
        entry["kept"] = bool(on)
        for id in on:
            graph[id].runtime["features"] = True


def _name(part: dict[str, Any], graph: Graph, estimator: Estimator) -> str:
    """What people call an encoder: its name in the profile, else its checkpoint's."""
    weights = part["weights"]
    if "stage" in weights:
        return graph[weights["stage"]].name.removeprefix("encoder ")
    if "checkpoint" not in weights:
        return f"fresh ({weights['fresh']})"
    named = (name for name, asset in estimator.profile.encoders.items() if asset.checkpoint == weights["checkpoint"])
    return next(named, str(weights["checkpoint"]))
