"""A hollow run: every arm built at its true size on no device, its sizes and memory held against the plan, example rows walked through it.

    python -m grid.run STUDY.yaml --profile cluster --set hollow=true [--out DIR]

In: a loaded study and its plan. Out: a table of parameters by part for every arm, `hollow.json` in `--out`, and exit code 1 with every
mismatch if there is one. Nothing is downloaded and no weight exists: architectures come from the profile (`shape`, `config`) or from the
libraries. The work is done by a process of its own (`trainers.hollow`), so that planning stays light.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from datasets_ray.errors import UserError
from grid.load import Loaded
from grid.plan import plan
from grid.plantext import table
from grid.profile import Profile

Spec = dict[str, Any]
SECONDS = 900.0
"""Longest wait for the process; 22 arms take well under two minutes of one core."""
GIB = 2.0**30
NOTHING_SAID = {"name", "tokenizer", "layer", "depth"}
"""Config keys that tell no architecture."""
CLOSE = 1e-3
"""Relative difference of two counts of bytes that rounding shards explains."""


class Request:
    """What `trainers.hollow` is asked: the plan's distinct models, trainings and ways of rows, each once."""

    def __init__(self, planned: dict[str, Any], profile: Profile) -> None:
        self.stages = {stage["id"]: stage for stage in planned["stages"]}
        assets = [*profile.encoders.values(), *profile.llms.values(), *profile.models.values()]
        self.released = {asset.checkpoint: asset.shape for asset in assets if asset.checkpoint and asset.shape}
        self.models: dict[str, Spec] = {}
        self.keys: dict[str, str] = {}
        """Stage → key of its model."""
        self.trainings: list[Spec] = []
        self.sets: dict[str, Spec] = {}
        self.ways: dict[str, dict[str, Spec]] = {"walks": {}, "asked": {}, "seen": {}}
        for stage in planned["stages"]:
            self._add(stage)

    def json(self) -> dict[str, Any]:
        ways = {kind: list(found.values()) for kind, found in self.ways.items()}
        models = {key: {"spec": held["spec"], "image": held["image"]} for key, held in self.models.items()}
        return {"models": models, "trainings": self.trainings, "sets": self.sets, **ways}

    def _add(self, stage: Spec) -> None:
        spec, kind = stage["spec"], stage["kind"]
        if kind not in ("train", "predict", "embeddings") or spec["model"]["family"] == "existing":
            return  # an existing model's architecture is its checkpoint's own affair
        if kind == "embeddings" and spec["model"]["parts"]["encoder"]["builder"] != "open_clip":
            return  # so is a SigLIP's text tower
        image = spec["data"]["image"] if kind == "train" else spec["image"]
        key = self.keys[stage["id"]] = self._model(spec["model"], image)
        if kind == "train":
            phases = [sorted(phase["learning_rates"]) for phase in spec["phases"]]
            self.trainings.append({
                "id": stage["id"], "name": stage["name"], "model": key, "phases": phases, "adapters": spec.get("adapters"),
            })  # fmt: skip
            data = spec["data"]
            for source in self._sources(data["rows"]):
                how = {
                    "image": image,
                    "template": data["template"] or "plain",
                    "max_tokens": data["max_tokens"],
                    "objective": spec["objective"],
                }
                self._way("walks", stage, key, source, how)
        elif kind == "predict":
            for source in self._sources([spec["questions"]]):
                how = {"image": image, "template": spec["model"]["template"], "suffix": spec["suffix"]}
                self._way("asked", stage, key, source, how)
        else:
            for source in self._sources([spec["rows"]]):
                self._way("seen", stage, key, source, {"image": image})

    def _way(self, kind: str, stage: Spec, key: str, source: str, how: Spec) -> None:
        told = json.dumps([key, source, how], sort_keys=True)
        name = f"{self.stages[source]['name']}, {stage['name']}"
        self.ways[kind].setdefault(told, {"id": stage["id"], "name": name, "model": key, "data": source, **how})

    def _sources(self, ids: list[str]) -> list[str]:
        """The data sets behind these rows that a reader makes; made questions and controls are of rows that are walked already."""
        found = []
        for id in ids:
            stage = self.stages[id]
            if stage["kind"] == "dataset" and stage["spec"]["source"] == "concat":
                found += self._sources(stage["spec"]["inputs"])
            elif stage["kind"] == "dataset" and stage["spec"]["source"] != "permuted":
                self.sets[id] = {**stage["spec"], "name": stage["name"]}
                found.append(id)
        return found

    def _model(self, model: Spec, image: Spec | None) -> str:
        """The key of a model's architecture."""
        parts = {name: self._part(name, part) for name, part in model["parts"].items()}
        size = {key: value for key, value in (image or {}).items() if key in ("kind", "size", "patch", "merge")}
        key = json.dumps({"family": model["family"], "parts": parts, "image": size}, sort_keys=True)
        known = next((name for name, held in self.models.items() if held["told"] == key), None)
        if known is None:
            known = f"model-{len(self.models)}"
            whole = {"family": model["family"], "tokenizer": model.get("tokenizer"), "template": model.get("template"), "parts": parts}
            self.models[known] = {"told": key, "spec": whole, "image": image}
        return known

    def _part(self, name: str, part: Spec) -> Spec:
        """The part with its whole config and no weights."""
        config = self.config(name, part)
        if config is None:
            checkpoint = part["weights"].get("checkpoint", "its checkpoint")
            why, hint = "nothing is downloaded in a hollow run", "give its architecture as `shape:` in the profile"
            raise UserError(f"no architecture of part {name!r} of {checkpoint}", why=why, hint=hint)
        return {"builder": part["builder"], "config": config, "weights": {"fresh": 0}}

    def config(self, name: str, part: Spec) -> Spec | None:
        """A part's own config, what the library knows under its name, or what the profile says of the checkpoint it comes from."""
        config, weights = part["config"], part["weights"]
        if part["builder"] in ("mlp", "linear") or "name" in config or set(config) - NOTHING_SAID:
            return config
        if "checkpoint" in weights:
            shape = self.released.get(weights["checkpoint"])  # of the whole, or of each of its parts
            return {**shape.get(name, shape), **config} if shape else None
        if "stage" in weights:
            origin = self.stages[weights["stage"]]["spec"]["model"]["parts"].get(weights.get("part", name))
            return self.config(name, origin) if origin else None
        return None


def run(loaded: Loaded, out: str | Path | None) -> int:
    """Builds, checks, prints, writes; 0 if everything fits. Raises UserError before anything is built."""
    began = time.time()
    planned = plan(loaded)
    request = Request(planned, loaded.profile)
    answer = ask(request.json())
    failures = [*answer["failures"], *mismatches(planned, request, answer, 2 if loaded.profile.precision == "bf16" else 4)]
    arms = [_arm(entry, request, answer) for entry in [*planned["arms"], *planned["references"]]]
    folder = Path(out) if out else Path("runs") / f"{planned['study']['name']}-{planned['study']['profile']}-hollow"
    folder.mkdir(parents=True, exist_ok=True)
    study = planned["study"]
    said = {
        "study": study["name"], "profile": study["profile"], "batch_scale": study["batch_scale"], "allow_subset": study["allow_subset"],
        "tokenizers": "tiny-llama, tiny-qwen2", "arms": arms, "walks": answer["walks"], "notes": answer["notes"], "failures": failures,
        "seconds": round(time.time() - began, 1),
    }  # fmt: skip
    (folder / "hollow.json").write_text(json.dumps(said, indent=1))
    print(loaded.headline)
    print(render(said))
    print(f"written: {folder / 'hollow.json'}")
    return 1 if failures else 0


def ask(request: dict[str, Any]) -> dict[str, Any]:
    """The answer of a `trainers.hollow` process. Raises UserError when it dies or takes too long."""
    root = str(Path(__file__).resolve().parent.parent)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "trainers.hollow"]
    try:
        done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, timeout=SECONDS, env=environment)
    except subprocess.TimeoutExpired:
        raise UserError(f"the hollow run took more than {SECONDS:g} s", hint="fewer arms: --arms GLOB") from None
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"the hollow run's process ended with exit code {done.returncode}", why=said) from None


def mismatches(planned: dict[str, Any], request: Request, answer: dict[str, Any], width: int) -> list[str]:
    """Where the plan's counts of parameters or bytes aren't those of the modules. width: bytes of a weight."""
    wrong = []
    for stage in planned["stages"]:
        training, sizes = answer["trainings"].get(stage["id"]), answer["models"].get(request.keys.get(stage["id"], ""))
        if stage["kind"] != "train" or training is None or sizes is None:
            continue
        cost, name = stage["cost"], stage["name"]
        for part, count in sizes.items():
            if cost["parameters"].get(part) != count:
                wrong.append(f"{name}: {part} has {count:,} parameters, the plan counts {cost['parameters'].get(part, 0):,}")
        counted = held(training["total"], training["learned"], width, stage["runtime"])
        for kind, size in counted.items():
            said = cost["memory"].get(kind)
            if said is not None and not math.isclose(said * GIB, size, rel_tol=CLOSE, abs_tol=1 << 20):
                wrong.append(f"{name}: {kind} take {size / GIB:.3f} GiB of a device, the plan says {said:.3f}")
    return wrong


def held(total: int, learned: int, width: int, runtime: dict[str, Any]) -> dict[str, float]:
    """Bytes of one device for weights, gradients and the optimiser's state by ZeRO's shards (Rajbhandari et al. 2020, section 5).

    total, learned: parameters. At 16 bits the engine shards from ZeRO 1 on, offloaded from 2 on; gradients are accumulated in fp32; the
    state is a master copy and two moments in fp32, without the master at fp32 and ZeRO 0.
    """
    world, offload = runtime["world"], bool(runtime.get("offload"))
    zero = max(runtime["zero"], 2 if offload else 1 if width < 4 else 0)
    share = math.ceil(learned / world)
    gradients = 0 if offload and zero == 3 else 4 * (share if zero >= 2 else learned)
    optimizer = 0 if offload else 8 * learned if zero == 0 else 12 * share
    return {"weights": width * (math.ceil(total / world) if zero == 3 else total), "gradients": gradients, "optimizer": optimizer}


def _arm(entry: Spec, request: Request, answer: dict[str, Any]) -> Spec:
    """An arm's parameters by part and what its own trainings train."""
    asked = next((id for id in entry["predictions"].values()), None)
    sizes = answer["models"].get(request.keys.get(asked or "", "")) or {}
    trainings = []
    for id in entry["stages"]:
        stage = request.stages[id]
        found = answer["trainings"].get(id)
        if stage["kind"] == "train" and found is not None and stage["name"].split()[0] in ("pretrain", "finetune"):
            cost, runtime = stage["cost"], stage["runtime"]
            trainings.append({
                "stage": id, "name": stage["name"], "phases": found["phases"], "zero": runtime["zero"],
                "activation_checkpointing": runtime["activation_checkpointing"], "memory_gib": cost["memory_gib"],
            })  # fmt: skip
    return {"name": entry["name"], "parameters": sizes, "total": sum(sizes.values()), "trainings": trainings}


def render(said: dict[str, Any]) -> str:
    """What people read: parameters by part of every arm, what its stages train, the ways of the example rows, what is wrong."""
    parts = list(dict.fromkeys(part for arm in said["arms"] for part in arm["parameters"]))
    rows = []
    for arm in said["arms"]:
        told = {training["name"].split()[0]: _trains(training) for training in arm["trainings"]}
        sizes = [f"{arm['parameters'].get(part, 0):,}" for part in parts]
        most = max(arm["trainings"], key=lambda training: training["memory_gib"], default=None)
        memory = "-" if most is None else f"{most['memory_gib']:.1f}"
        rows.append([arm["name"], *sizes, f"{arm['total']:,}", told.get("pretrain", "-"), told.get("finetune", "-"), memory])
    lines = [f"Hollow: {len(rows)} arms and references at their true size, without weights, devices or network. Parameters by part:"]
    lines += [table(["arm", *parts, "all", "pretraining trains", "finetuning trains", "GiB each"], rows)]
    counts = [sum(walk[key] for walk in said["walks"]) for key in ("rows", "tokens", "images")]
    lines.append(
        f"Rows: {len(said['walks'])} ways of example rows (data set, template, image recipe, model), {counts[0]} rows, {counts[1]} tokens "
        f"and {counts[2]} images in all, encoded with small committed tokenizers ({said['tokenizers']}), packed, passed through the models."
    )
    lines += [f"note: {note}" for note in said["notes"]]
    if said["failures"]:
        return "\n".join([*lines, f"{len(said['failures'])} WRONG:", *(f"  - {failure}" for failure in said["failures"])])
    fits = "Sizes, trainable parts, memory plan and shapes are as planned"
    return "\n".join([*lines, f"{fits} ({said['seconds']:.0f} s)."])


def _trains(training: Spec) -> str:
    """`connector 20,979,712`, one after the other where phases differ."""
    told = ["+".join(f"{part} {count:,}" for part, count in phase.items() if count) for phase in training["phases"]]
    return ", then ".join(told)
