"""Estimates: a planned stage in; steps, FLOPs by part, GPU-hours, memory and disk out. From shapes alone, assumptions said.

FLOPs (Kaplan et al. 2020, section 2.1): a frozen part costs its forward pass, 2N a token, and 2N more where a gradient passes through
it; a trained part costs 6N. Attention terms are counted beside. Activation recomputation is no model FLOP.
Memory: weights, gradients (accumulated in fp32) and Adam's state by ZeRO stage (Rajbhandari et al. 2020, figure 1), activations
34 * tokens * width bytes a layer at 16 bits with fused attention (Korthikanti et al. 2022, equation 2 without its softmax term).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from grid import shapes
from grid.graph import Graph, Stage
from grid.profile import Profile
from grid.shapes import Shape
from grid.study import PaperCost

GIB = 2.0**30
ORDER = ((0, False), (1, False), (2, False), (1, True), (2, True), (3, False), (3, True))
"""(ZeRO stage, activation checkpointing) from fastest to leanest: what `auto` tries."""
HEADROOM = 0.9
"""Share of a device's memory that a plan may fill; the rest is workspace and fragmentation."""


class Estimator:
    """Fills `stage.cost` and resolves `auto` in `stage.runtime`."""

    def __init__(self, graph: Graph, profile: Profile) -> None:
        self.graph, self.profile = graph, profile
        self.bytes = 2 if profile.precision == "bf16" else 4
        self.released = self._released()
        self._parts: dict[Any, tuple[Any, Shape | None]] = {}
        self._equal: dict[Any, dict[str, Shape]] = {}
        self._predictions: dict[Any, dict[str, Any]] = {}
        self._models: dict[int, tuple[Any, dict[str, Shape]]] = {}

    def _released(self) -> dict[str, dict[str, Any]]:
        """Checkpoint → shape numbers that the profile gives."""
        assets = [*self.profile.encoders.values(), *self.profile.llms.values(), *self.profile.models.values()]
        return {asset.checkpoint: asset.shape for asset in assets if asset.checkpoint and asset.shape}

    # shapes

    def config(self, name: str, part: dict[str, Any]) -> dict[str, Any] | None:
        """Architecture numbers of a part: its config, or what the profile says of the checkpoint that it comes from."""
        config = part["config"]
        if config and set(config) - {"name", "tokenizer", "layer", "depth"}:
            return config
        weights = part["weights"]
        if "checkpoint" in weights:
            return self.released.get(weights["checkpoint"])
        if "stage" in weights:
            origin = self.graph[weights["stage"]].spec["model"]["parts"].get(weights.get("part", name))
            return self.config(name, origin) if origin else None
        return None

    def shapes(self, model: dict[str, Any]) -> dict[str, Shape]:
        """Part → shape; a part whose numbers nobody gave is missing. Models of equal shapes get the same dictionary."""
        known = self._models.get(id(model))
        if known is None:
            found = self._shapes(model)
            same = tuple((name, shape) for name, shape in found.items())
            known = self._models[id(model)] = model, self._equal.setdefault(same, found)
        return known[1]

    def _shapes(self, model: dict[str, Any]) -> dict[str, Shape]:
        family, parts, found = model["family"], model["parts"], {}
        for name, part in parts.items():
            config = self.config(name, part)
            if config is None:
                continue
            key = (family, name, part["builder"], id(config))
            if key not in self._parts:
                self._parts[key] = config, self._shape(family, name, part["builder"], config)
            if (shape := self._parts[key][1]) is not None:
                found[name] = shape
        if "connector" not in found and "connector" in parts and {"encoder", "llm"} <= found.keys():
            depth = parts["connector"]["config"].get("depth", 1 if parts["connector"]["builder"] == "linear" else 2)
            found["connector"] = shapes.connector(depth, found["encoder"].width, found["llm"].width)
        return found

    def _shape(self, family: str, name: str, builder: str, config: dict[str, Any]) -> Shape | None:
        if builder == "qwen2_vl" or "vision_config" in config:
            return shapes.qwen2_vl(config)[name]
        if name == "llm":
            return shapes.language_model(config)
        if name == "encoder":
            if builder == "transformers_vision":
                return shapes.transformers_tower(config)
            if family == "clip":
                return shapes.vision_tower(config["vision_cfg"], config["embed_dim"])
            return shapes.vision_tower(config["vision_cfg"], skip=1)
        return None

    def params(self, model: dict[str, Any], part: str) -> int:
        """All parameters of a part; a clip's are both towers."""
        shape = self.shapes(model).get(part)
        if shape is None:
            return 0
        if model["family"] == "clip":
            config = self.config(part, model["parts"][part]) or {}
            return shapes.clip_params(config) if "text_cfg" in config else shape.params
        return shape.params

    # stages

    def fill(self, stage: Stage) -> None:
        make = {"train": self._train, "predict": self._predict, "embeddings": self._embed}.get(stage.kind)
        cost = {"flops": 0.0, "gpu_hours": 0.0, "memory_gib": 0.0, "disk_gib": 0.0, "steps": 0, "samples": stage.rows, "tokens": 0.0}
        if stage.kind == "dataset":
            cost["disk_gib"] = stage.rows * stage.facts.get("megabytes", 0.0) / 1000 / 1024
        elif stage.kind in ("similarities", "zeroshot", "score", "choices"):
            cost["disk_gib"] = stage.rows * 500 / GIB
        if make is not None:
            cost |= make(stage)
        cost["gpu_hours"] = cost["flops"] / (self.profile.device.tflops * 1e12 * self.profile.device.mfu) / 3600
        stage.cost = cost
        for knob, off in (("zero", 0), ("activation_checkpointing", False)):
            if stage.runtime.get(knob) == "auto":
                stage.runtime[knob] = off

    def tokens(self, stage: Stage, limit: float) -> tuple[float, float, float]:
        """(images, patches an image, tokens of a sample in the language model) on average."""
        recipe = stage.spec.get("image") or stage.spec.get("data", {}).get("image")
        images = stage.facts.get("images", 1.0) if recipe else 0.0
        patches, visual = shapes.image_tokens(recipe) if recipe else (0.0, 0.0)
        return images, patches, min(limit, stage.facts.get("tokens", 32.0) + images * visual)

    def _train(self, stage: Stage) -> dict[str, Any]:
        from grid.plan import steps as count

        spec, rows = stage.spec, stage.rows
        steps = count(rows, spec["batch"], spec.get("epochs"), spec.get("steps"))
        samples = float(spec["epochs"] * rows if spec.get("epochs") is not None else steps * spec["batch"])
        images, patches, length = self.tokens(stage, spec["data"]["max_tokens"])
        model, by_part, begun = spec["model"], dict.fromkeys(spec["model"]["parts"], 0.0), 0.0
        for phase in spec["phases"]:
            share, begun = phase["until"] - begun, phase["until"]
            for part, flops in self.sample_flops(model, set(phase["learning_rates"]), images, patches, length).items():
                by_part[part] += share * samples * flops
        trained = {part for phase in spec["phases"] for part in phase["learning_rates"]}
        sizes = {part: self.params(model, part) for part in model["parts"]}
        memory = self._fit(stage, model, trained, sizes)
        kept = sum(sizes[part] for part in trained) * self.bytes
        return {
            "flops": sum(by_part.values()), "flops_by_part": by_part, "rows": rows, "steps": steps,
            "samples": int(samples), "tokens": samples * length,
            "parameters": sizes, "trainable": sorted(trained), "memory_gib": memory["total"], "memory": memory,
            "disk_gib": kept / GIB, "work_gib": 2 * sum(sizes[part] for part in trained) * (self.bytes + 12) / GIB,
        }  # fmt: skip

    def sample_flops(self, model: dict[str, Any], trained: set[str], images: float, patches: float, length: float) -> dict[str, float]:
        """FLOPs of one sample by part, forward and backward. trained: parts that learn; empty: forward only."""
        found, flops = self.shapes(model), {}
        if model["family"] == "clip":
            config = self.config("encoder", model["parts"]["encoder"]) or {}
            once = found["encoder"].forward(patches, images) if "encoder" in found else 0.0
            if "text_cfg" in config and "encoder" in trained:
                once += shapes.text_tower(config["text_cfg"], config["embed_dim"]).forward(length)
            return {"encoder": once * (3 if trained else 1)}
        below = False  # whether a part nearer the input learns, so that a gradient has to pass
        for part in ("encoder", "connector", "llm"):
            if part not in model["parts"]:
                continue
            shape = found.get(part)
            if shape is None:
                flops[part] = 0.0
                continue
            if part == "encoder":
                once = shape.forward(patches, images)
            elif part == "connector":
                once = 2.0 * shape.matmul * images * self._visual(model, patches)
            else:
                once = shape.forward(length) + 2.0 * shape.head * self._learned(length, images, patches)
            flops[part] = once * (3 if part in trained else 2 if below else 1)
            below |= part in trained
        return flops

    def _visual(self, model: dict[str, Any], patches: float) -> float:
        if model["family"] == "qwen2_vl":
            config = self.config("encoder", model["parts"]["encoder"]) or {}
            return patches / config.get("vision_config", {}).get("spatial_merge_size", 2) ** 2
        return patches

    @staticmethod
    def _learned(length: float, images: float, patches: float) -> float:
        """Tokens that meet the vocabulary: at most those of the text (images, prompts never do)."""
        return max(1.0, length - images * patches)

    def _fit(self, stage: Stage, model: dict[str, Any], trained: set[str], sizes: dict[str, int]) -> dict[str, float]:
        """Memory of one device in GiB; resolves `auto` to the fastest setting that fits."""
        runtime, limit = stage.runtime, self.profile.device.memory_gib * HEADROOM
        choices = [
            (zero, again)
            for zero, again in ORDER
            if runtime["zero"] in ("auto", zero) and runtime["activation_checkpointing"] in ("auto", again)
        ] or [(runtime["zero"] if runtime["zero"] != "auto" else 0, runtime["activation_checkpointing"] is True)]
        for zero, again in choices:
            memory = self.memory(model, trained, sizes, runtime["world"], zero, again, runtime["micro_tokens"])
            if memory["total"] <= limit:
                break
        runtime["zero"], runtime["activation_checkpointing"] = zero, again
        return memory

    def memory(
        self, model: dict[str, Any], trained: set[str], sizes: dict[str, int], world: int, zero: int, again: bool, micro_tokens: int
    ) -> dict[str, float]:
        """GiB of one device by weights, gradients, optimizer, activations. again: activations are recomputed."""
        learned, total = sum(sizes[part] for part in trained), sum(sizes.values())
        weights = total * self.bytes / (world if zero >= 3 else 1)
        gradients = learned * 4 / (world if zero >= 2 else 1)
        state = (8 if self.bytes == 4 else 12) * learned / (world if zero >= 1 else 1)
        found, activations, below = self.shapes(model), 0.0, False
        for part in ("encoder", "connector", "llm"):
            if (shape := found.get(part)) is not None:
                below |= part in trained
                layer = 34 * micro_tokens * shape.width * self.bytes / 2
                if below and shape.layers:
                    activations += 2 * micro_tokens * shape.width * shape.layers * self.bytes / 2 + layer if again else layer * shape.layers
                else:
                    activations = max(activations, layer)
        if "llm" in found:
            activations += 2 * 4 * min(1 << 26, micro_tokens * found["llm"].head // max(1, found["llm"].width))
        parts = {"weights": weights, "gradients": gradients, "optimizer": state, "activations": activations}
        return {**{key: value / GIB for key, value in parts.items()}, "total": sum(parts.values()) / GIB}

    def _predict(self, stage: Stage) -> dict[str, Any]:
        images, patches, length = self.tokens(stage, 1e9)
        model = stage.spec["model"]
        batch = stage.runtime.get("eval_batch", 1)
        key = (id(self.shapes(model)), model["family"], stage.rows, images, patches, length, batch)
        if key not in self._predictions:
            self._predictions[key] = self._prediction(model, stage.rows, images, patches, length, batch)
        return self._predictions[key]

    def _prediction(self, model: dict[str, Any], rows: int, images: float, patches: float, length: float, batch: int) -> dict[str, Any]:
        one = self.sample_flops(model, set(), images, patches, length)
        shape = self.shapes(model).get("llm")
        decode = 2 * 2 * (shape.matmul + shape.head) if shape else 0.0  # the letter and the end token
        sizes = {part: self.params(model, part) for part in model["parts"]}
        weights = sum(sizes.values()) * self.bytes
        cache = 0.0 if shape is None else 2 * shape.layers * shape.attention_width * length * batch * self.bytes
        return {
            "flops": rows * (sum(one.values()) + decode), "tokens": rows * length, "memory_gib": (weights + cache) / GIB,
            "disk_gib": rows * 1000 / GIB,
        }  # fmt: skip

    def _embed(self, stage: Stage) -> dict[str, Any]:
        _, patches, _ = self.tokens(stage, 1e9)
        model = stage.spec["model"]
        shape = self.shapes(model).get("encoder")
        flops = stage.rows * shape.forward(patches) if shape else 0.0
        width = shape.out if shape else 512
        return {
            "flops": flops, "tokens": stage.rows * patches, "memory_gib": self.params(model, "encoder") * self.bytes / GIB,
            "disk_gib": stage.rows * width * 4 / GIB,
        }  # fmt: skip


def totals(stages: Sequence[Stage], entries: Sequence[dict[str, Any]], profile: Profile, paper: PaperCost | None) -> dict[str, Any]:
    """Sums over the stages, each once; `without_sharing`: what the arms would cost one by one."""
    kinds: dict[str, int] = {}
    for stage in stages:
        kinds[stage.kind] = kinds.get(stage.kind, 0) + 1
    hours = {stage.id: stage.cost["gpu_hours"] for stage in stages}
    largest = max((stage.cost["memory_gib"] for stage in stages), default=0.0)
    device = profile.device
    made: dict[str, Any] = {
        "arms": sum(entry["source"] == "trained" for entry in entries),
        "references": sum(entry["source"] == "released" for entry in entries),
        "stages": len(stages),
        "by_kind": kinds,
        "flops": sum(stage.cost["flops"] for stage in stages),
        "gpu_hours": sum(hours.values()),
        "gpu_hours_without_sharing": sum(hours[id] for entry in entries for id in entry["stages"]),
        "tokens": sum(stage.cost["tokens"] for stage in stages if stage.kind == "train"),
        "disk_gib": sum(stage.cost["disk_gib"] for stage in stages),
        "work_gib": max((stage.cost.get("work_gib", 0.0) for stage in stages), default=0.0),
        "memory_gib": largest,
        "fits": largest <= device.memory_gib * HEADROOM,
        "device": {"name": device.name, "tflops": device.tflops, "mfu": device.mfu, "memory_gib": device.memory_gib},
    }
    if paper is not None:
        made["paper"] = {
            "devices": paper.devices, "device": paper.device, "hours": paper.hours,
            "gpu_hours_at_most": math.prod([made["arms"], paper.devices, paper.hours]),
        }  # fmt: skip
    return made
