"""Estimates: a planned stage in; steps, FLOPs by part, GPU-hours, memory and disk out. From shapes alone, assumptions said.

FLOPs (Kaplan et al. 2020, section 2.1): a frozen part costs its forward pass, 2N a token, and 2N more where a gradient passes through
it; a trained part costs 6N, one with adapters 4N and their own 6N. Attention terms are counted beside. Activation recomputation is no
model FLOP. Memory is grid.footprint's; `auto` in a stage's runtime becomes the fastest setting that fits a device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from grid import devices, fit, shapes
from grid.fit import HEADROOM
from grid.footprint import Adapter
from grid.graph import Graph, Stage
from grid.profile import Profile
from grid.shapes import Shape
from grid.study import PaperCost

GIB = 2.0**30


class Estimator:
    """Fills `stage.cost` and resolves `auto` in `stage.runtime`."""

    def __init__(self, graph: Graph, profile: Profile) -> None:
        self.graph, self.profile = graph, profile
        self.bytes = 2 if profile.precision == "bf16" else 4
        device = profile.device
        self.tflops, memory, host = devices.resolve(device.name, profile.precision, device.tflops, device.memory_gib, device.host_gib)
        self.room = fit.Room(self.bytes, memory, host, fused=self.bytes == 2 and profile.resources.device == "cuda")
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
            shape = self.released.get(weights["checkpoint"])
            return shape.get(name, shape) if shape else None
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
        family, parts = model["family"], model["parts"]
        found: dict[str, Shape] = {}
        if family == "existing":  # what its checkpoint is made of is its own affair; nothing is estimated
            return found
        for name, part in parts.items():
            config = self.config(name, part)
            if config is None:
                continue
            key = (family, name, part["builder"], id(config))
            if key not in self._parts:
                self._parts[key] = config, shapes.of(family, name, part["builder"], config)
            if (shape := self._parts[key][1]) is not None:
                found[name] = shape
        if "connector" not in found and "connector" in parts and {"encoder", "llm"} <= found.keys():
            depth = parts["connector"]["config"].get("depth", 1 if parts["connector"]["builder"] == "linear" else 2)
            found["connector"] = shapes.connector(depth, found["encoder"].width, found["llm"].width)
        return found

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
        cost["gpu_hours"] = cost["flops"] / (self.tflops * 1e12 * self.profile.device.mfu) / 3600
        stage.cost = cost
        for knob, off in (("zero", 0), ("activation_checkpointing", False), ("offload", False), ("micro_tokens", fit.MICRO)):
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
        adapters = fit.adapters_of(spec)
        for phase in spec["phases"]:
            share, begun = phase["until"] - begun, phase["until"]
            for part, flops in self.sample_flops(model, set(phase["learning_rates"]), images, patches, length, adapters).items():
                by_part[part] += share * samples * flops
        trained = {part for phase in spec["phases"] for part in phase["learning_rates"]}
        sizes = {part: self.params(model, part) for part in model["parts"]}
        memory = fit.fit(stage, self.memory_of(model), trained, sizes, self.mix(model, images, patches, length), self.room)
        found = self.shapes(model)
        beside = {part: adapter.params(found[part]) for part, adapter in adapters.items() if part in trained & found.keys()}
        learned = {part: beside.get(part, sizes[part]) for part in sorted(trained)}
        kept = sum(sizes[part] for part in trained) * self.bytes + sum(beside.values()) * self.bytes
        return {
            "flops": sum(by_part.values()), "flops_by_part": by_part, "rows": rows, "steps": steps,
            "samples": int(samples), "tokens": samples * length,
            "parameters": sizes, "trainable": sorted(trained), "learned": learned, "memory_gib": memory["total"], "memory": memory,
            "disk_gib": kept / GIB, "work_gib": 2 * sum(learned.values()) * 12 / GIB,
        }  # fmt: skip

    def sample_flops(
        self, model: dict[str, Any], trained: set[str], images: float, patches: float, length: float,
        adapters: dict[str, Adapter] | None = None,
    ) -> dict[str, float]:  # fmt: skip
        """FLOPs of one sample by part, forward and backward. trained: parts that learn; empty: forward only. adapters: of which parts."""
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
            adapter = (adapters or {}).get(part) if part in trained else None
            flops[part] = once * (2 if adapter else 3 if part in trained else 2 if below else 1)
            flops[part] += 6.0 * adapter.params(shape) * length if adapter else 0
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

    def memory_of(self, model: dict[str, Any]) -> dict[str, Any]:
        """What grid.footprint asks of a model: family and shapes, a clip's text tower among them."""
        found = dict(self.shapes(model))
        if model["family"] == "clip":
            config = self.config("encoder", model["parts"]["encoder"]) or {}
            if "text_cfg" in config:
                found["text"] = shapes.text_tower(config["text_cfg"], config["embed_dim"])
        return {"family": model["family"], "shapes": found}

    def mix(self, model: dict[str, Any], images: float, patches: float, length: float) -> fit.Mix:
        """What a token of a micro-batch carries on average."""
        if model["family"] == "clip":  # two streams side by side
            whole = max(1.0, length + images * patches)
            return fit.Mix(length / whole, images * (patches + 1) / whole, 0.0)
        return fit.Mix(1.0, images * patches / length, min(1.0, images * self._visual(model, patches) / length))

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
    flops = {stage.id: stage.cost["flops"] for stage in stages}
    largest, device = max((stage.cost["memory_gib"] for stage in stages), default=0.0), profile.device
    tflops, memory_gib, host_gib = devices.resolve(device.name, profile.precision, device.tflops, device.memory_gib, device.host_gib)
    host = max((stage.cost.get("memory", {}).get("host", 0.0) for stage in stages), default=0.0)
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
        "host_gib": host,
        "fits": largest <= memory_gib * HEADROOM and (not host or not host_gib or host <= host_gib * HEADROOM),
        "device": {"name": device.name, "tflops": tflops, "mfu": device.mfu, "memory_gib": memory_gib},
    }
    if paper is not None:
        made["paper"] = {
            "devices": paper.devices, "device": paper.device, "hours": paper.hours,
            "gpu_hours_at_most": math.prod([made["arms"], paper.devices, paper.hours]),
        }  # fmt: skip
        if (known := devices.specs(paper.device)) is not None:
            rate = known.bf16 * 1e12 * device.mfu * 3600
            each = {entry["name"]: sum(flops[id] for id in entry["stages"]) / rate for entry in entries if entry["source"] == "trained"}
            made["paper"] |= {
                "planned": made["flops"] / rate, "planned_each": sum(each.values()), "planned_longest_arm": max(each.values(), default=0.0),
            }  # fmt: skip
    return made
