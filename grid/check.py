"""Preflight: is everything there that a run of this study needs? Numbered steps, every failure at once, each with its way out; exit 1.

    python -m grid.check STUDY.yaml [--profile NAME|FILE] [--arms GLOB ...] [--set KEY=VALUE ...] [--out DIR] [--launcher FILE]

Looks and computes, writes nothing, downloads nothing. The machine, the data and the models are looked at by processes of their own.
--launcher holds a RayJob, a `ray up` YAML or a Slurm script against the profile. Where RAY_ADDRESS names a cluster, each of its nodes is
looked at; for that, markers are written into the shared folders and removed.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets_ray.errors import UserError
from grid import disks, launchers, options, probe, towers
from grid.cost import HEADROOM
from grid.load import Loaded, load
from grid.plan import plan
from grid.profile import choose

RAY_GIB = 1.5
"""Ray's own processes, the driver and the ledger, measured on the demo."""
WORKER_GIB = 0.9
"""A worker before it holds a model: torch, transformers, deepspeed and ray imported."""
SECONDS = {"machine": 120.0, "data": 300.0, "models": 300.0, "cluster": 700.0}


class Failed(Exception):
    """A step's failures, each `{"what", "why", "hint"}`."""

    def __init__(self, failures: list[dict[str, str]]) -> None:
        self.failures = failures


@dataclass
class Preflight:
    """The steps and what they pass on to each other."""

    arguments: Any
    loaded: Loaded | None = None
    planned: dict[str, Any] | None = None
    facts: dict[str, Any] | None = None

    def steps(self) -> list[tuple[str, Callable[[], str]]]:
        steps = [
            ("study and profile", self.study), ("plan", self.plan), ("data sets", self.data), ("models and tokenizers", self.models),
            ("machine", self.machine), ("memory", self.memory), ("disk", self.disk),
        ]  # fmt: skip
        if self.arguments.launcher:
            steps.append(("launcher", self.launcher))
        if os.environ.get("RAY_ADDRESS"):
            steps.append(("nodes of the cluster", self.cluster))
        return steps

    def study(self) -> str:
        given = self.arguments
        self.loaded = load(given.study, given.profile, given.set, given.arms)
        trained = sum(arm.source == "trained" for arm in self.loaded.arms)
        return f"{trained} arms, {len(self.loaded.arms) - trained} references"

    def plan(self) -> str:
        self.planned = plan(self._need(self.loaded))
        return f"{len(self.planned['stages'])} stages, {len(self.planned['study']['assumptions'])} assumptions"

    def data(self) -> str:
        planned, profile = self._need(self.planned), self._need(self.loaded).profile
        root = profile.data_root or os.environ.get("FINEGRID_DATA")
        names = {stage["name"].removeprefix("data "): stage["spec"] for stage in planned["stages"] if stage["kind"] == "dataset"}
        sets = {name: spec for name, spec in names.items() if spec["source"] not in ("concat", "permuted")}
        if root and not Path(root).is_dir():
            failure = {"what": f"data_root {root} is no folder", "why": "", "hint": "--set data_root=DIR, or FINEGRID_DATA=DIR"}
            raise Failed([failure])
        found = self._probe("data", {"sets": sets, "data_root": root})
        failures, notes = self._sizes(sets, found)
        failures += self._mined(found)
        if failures:
            raise Failed(failures)
        notes += [
            f"{name}: {found[name]['photos']} photos, the profile says {data.rows} (estimates only)"
            for name, data in profile.data.items()
            if name in found and data.rows and found[name]["photos"] not in (None, data.rows) and "rows" not in data.keys
        ]
        return f"{len(sets)} sources make their first row" + "".join(f"\n      note: {note}" for note in notes)

    def _mined(self, found: dict[str, Any]) -> list[dict[str, str]]:
        """Failures of benchmarks whose questions are to have more options than there are classes."""
        study, failures = self._need(self.loaded).study, []
        for name, benchmark in study.benchmarks.items():
            classes = found.get(benchmark.data, {}).get("classes")
            if benchmark.negatives == "mined" and study.mining and classes is not None and classes < study.mining.k:
                what = f"benchmark {name}: mining.k is {study.mining.k}, {benchmark.data} has {classes} classes"
                hint = f"--set mining.k={classes}, or fewer" if classes > 1 else "negatives: given, where questions bring their options"
                failures.append({"what": what, "why": "every option is another class", "hint": hint})
        return failures

    @staticmethod
    def _sizes(sets: dict[str, Any], found: dict[str, Any]) -> tuple[list[dict[str, str]], list[str]]:
        """(failures, notes) of data sets whose lists don't hold as many records as their releases."""
        failures, notes = [], []
        for name, spec in sets.items():
            records, expected = found.get(name, {}).get("records"), spec.get("expect")
            if records is None or expected is None or records == expected:
                continue
            if spec.get("allow_subset"):
                notes.append(f"{name}: {records:,} of {expected:,} records, allowed")
                continue
            hint = f"get the whole release, or say `allow_subset: true`, which every table then says (--set data.{name}.allow_subset=true)"
            failures.append({"what": f"{name}: {records:,} records, its release has {expected:,}", "why": "", "hint": hint})
        return failures, notes

    def models(self) -> str:
        wanted, checkpoints = self._models()
        trained = [stage["spec"]["objective"] for stage in self._need(self.planned)["stages"] if stage["kind"] == "train"]
        outside = list({repr(one): one for one in trained if ":" in one["name"]}.values())
        facts = self._probe("models", {"tokenizers": wanted, "checkpoints": self._held(checkpoints), "objectives": outside})
        loose = sorted(name for name, revision in checkpoints if revision is None and not os.path.isdir(name))
        notes = [f"no revision pinned for {', '.join(loose)}"] * bool(loose) + facts.get("notes", [])
        return f"{len(wanted)} tokenizers fit, {len(checkpoints)} checkpoints at hand" + "".join(f"\n      note: {note}" for note in notes)

    def _held(self, checkpoints: dict[Any, Any]) -> list[dict[str, Any]]:
        """Checkpoints, each with the pixels that the profile's assets of it are fed, and how their image towers are to be built."""
        loaded = self._need(self.loaded)
        fed: dict[Any, list[dict[str, Any]]] = {}
        for path, who in loaded.normalisation.items():
            kind, _, name = path.removesuffix(".image").partition(".")
            asset = getattr(loaded.profile, kind)[name]
            pixels = {"at": path, "said": who == "profile", "mean": asset.image.mean, "std": asset.image.std}
            fed.setdefault((asset.checkpoint, asset.revision), []).append(pixels)
        built: dict[Any, list[dict[str, Any]]] = {}
        seeing: dict[str, Any] = {f"encoders.{name}": encoder for name, encoder in loaded.profile.encoders.items()}
        seeing |= {f"models.{name}": model for name, model in loaded.profile.models.items() if model.family == "vlm"}
        for path, asset in seeing.items():
            built.setdefault((asset.checkpoint, asset.revision), []).append({"at": path, **towers.request(asset)})
        return [
            {"checkpoint": name, "revision": revision, "fed": fed.get((name, revision), []), "towers": built.get((name, revision), [])}
            for name, revision in checkpoints
        ]

    def _models(self) -> tuple[list[dict[str, Any]], dict[Any, Any]]:
        """(tokenizers with their template and vocabulary, checkpoints by name and revision) of the plan."""
        tokenizers: dict[Any, None] = {}
        checkpoints: dict[Any, Any] = {}
        for stage in self._need(self.planned)["stages"]:
            model = stage["spec"].get("model")
            if model is None:
                continue
            for part in model["parts"].values():
                if "checkpoint" in part["weights"]:
                    checkpoints[part["weights"]["checkpoint"], part["weights"].get("revision")] = part["weights"]
                if "tokenizer" in part["config"]:
                    vocabulary = part["config"].get("text_cfg", {}).get("vocab_size")
                    tokenizers[part["config"]["tokenizer"], None, vocabulary] = None
            if model.get("tokenizer"):
                config = model["parts"]["llm"]["config"]
                vocabulary = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
                tokenizers[model["tokenizer"], model.get("template"), vocabulary] = None
        return [{"name": name, "template": template, "vocabulary": size} for name, template, size in tokenizers], checkpoints

    def machine(self) -> str:
        self.facts = self._probe("machine", {})
        facts, failures = self.facts, []
        versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        seen = f"{facts['cpus']:g} CPUs, {facts['gpus']:g} GPUs, {facts['memory_gib']:.1f} GiB free; {versions}"
        if self.loaded is None:
            return seen
        if self.arguments.launcher and not os.environ.get("RAY_ADDRESS"):
            return f"{seen}; the launcher's nodes compute, this machine submits"
        resources = self.loaded.profile.resources
        wanted = resources.workers * resources.gpus_per_worker
        if wanted > facts["gpus"]:
            hint = "another --profile, or --set resources.workers=N"
            failures.append({"what": f"a lane needs {wanted} GPUs, {facts['gpus']:g} are visible", "why": "", "hint": hint})
        if resources.cpus is not None and resources.cpus > facts["cpus"]:
            hint = f"--set resources.cpus={int(facts['cpus'])}"
            failures.append({"what": f"resources.cpus is {resources.cpus}, the machine has {facts['cpus']:g}", "why": "", "hint": hint})
        if failures:
            raise Failed(failures)
        return seen

    def memory(self) -> str:
        planned, profile = self._need(self.planned), self._need(self.loaded).profile
        resources, largest = profile.resources, planned["totals"]["memory_gib"]
        name = max(planned["stages"], key=lambda stage: stage["cost"]["memory_gib"])["name"]
        hint = "--set resources.micro_tokens=N (smaller), resources.zero=3 with more workers, or another profile"
        if largest > profile.device.memory_gib * HEADROOM:
            what = f"{name} needs {largest:.2f} GiB a device, {profile.device.name} has {profile.device.memory_gib:g}"
            raise Failed([{"what": what, "why": f"{HEADROOM:.0%} of it are planned", "hint": hint}])
        if resources.gpus_per_worker:
            return f"largest stage {name}: {largest:.2f} GiB of {profile.device.memory_gib:g} GiB a device"
        facts = self._need(self.facts)
        lanes = resources.lanes or max(1, int((resources.cpus or facts["cpus"]) // resources.workers))
        total = lanes * resources.workers * (largest + WORKER_GIB + resources.cache_mb / 1024) + resources.object_store_mb / 1024 + RAY_GIB
        if total > facts["memory_gib"]:
            what = f"about {total:.1f} GiB for {lanes} lane(s), {facts['memory_gib']:.1f} GiB are free"
            raise Failed([{"what": what, "why": "", "hint": f"--set resources.lanes={max(1, lanes - 1)}, or close other programs"}])
        return f"about {total:.1f} GiB for {lanes} lane(s) of {facts['memory_gib']:.1f} GiB free; largest stage {name}: {largest:.2f} GiB"

    def disk(self) -> str:
        planned, profile = self._need(self.planned), self._need(self.loaded).profile
        store = profile.store or os.environ.get("FINEGRID_STORE")
        place = Path(store) if store else Path(self.arguments.out or "runs")
        there = disks.there(place)
        if not os.access(there, os.W_OK):
            raise Failed([{"what": f"{there} can't be written", "why": "stages are kept there", "hint": "--set store=DIR"}])
        free = disks.free(there)
        need = planned["totals"]["disk_gib"] + planned["totals"]["work_gib"]
        if need > free:
            hint = "--set store=DIR on a larger disk"
            raise Failed([{"what": f"about {need:.1f} GiB needed at {there}, {free:.1f} free", "why": "", "hint": hint}])
        said, notes = disks.caches(profile.resources, there, need)
        more = "".join(f"; {one}" for one in said) + "".join(f"\n      note: {note}" for note in notes)
        return f"about {need:.2f} GiB of {free:.1f} GiB free at {there}{more}"

    def launcher(self) -> str:
        return launchers.check(self.arguments.launcher, self._need(self.loaded))

    def cluster(self) -> str:
        planned, profile = self._need(self.planned), self._need(self.loaded).profile
        store, out = profile.store or os.environ.get("FINEGRID_STORE"), self.arguments.out
        root = profile.data_root or os.environ.get("FINEGRID_DATA")
        if not store and not out:
            hint = "--set store=DIR on shared storage, or --out DIR"
            raise Failed([{"what": "no folder that all nodes share", "why": "finished stages pass between nodes", "hint": hint}])
        writable = {name: os.path.abspath(path) for name, path in (("store", store), ("out", out)) if path}
        tokenizers, checkpoints = self._models()
        need = planned["totals"]["disk_gib"] + planned["totals"]["work_gib"]
        facts = self._probe("cluster", {
            "writable": writable, "readable": {"data_root": os.path.abspath(root)} if root else {},
            "need_gib": {"store" if store else "out": need}, "workers": profile.resources.workers,
            "gpus_per_worker": profile.resources.gpus_per_worker,
            "models": {"tokenizers": tokenizers, "checkpoints": self._held(checkpoints)},
        })  # fmt: skip
        shared = " and ".join(writable)
        return (
            f"{facts['nodes']} nodes, {facts['cpus']:g} CPUs, {facts['gpus']:g} GPUs; {shared} shared; tokenizers and checkpoints on each"
        )

    def _probe(self, task: str, request: dict[str, Any]) -> dict[str, Any]:
        answer = probe.ask(task, request, SECONDS[task])
        if answer["failures"]:
            self.facts = answer.get("facts") if task == "machine" else self.facts
            raise Failed(answer["failures"])
        return answer["facts"]

    @staticmethod
    def _need(value: Any) -> Any:
        """What an earlier step should have left; without it this step can say nothing."""
        if value is None:
            raise Failed([])
        return value


def main(argv: Sequence[str] | None = None) -> int:
    parser = options.parser("grid.check", __doc__)
    options.study(parser)
    parser.add_argument("--out", metavar="DIR", help="where the run would write")
    parser.add_argument("--launcher", metavar="FILE", help="a RayJob, a cluster of `ray up` or a Slurm script that would start it")
    given = parser.parse_args(argv)
    with contextlib.suppress(UserError):  # the first step tells it
        path, reason = choose(given.profile)
        print(f"profile {path.stem} ({reason})")
    steps = Preflight(given).steps()
    failed = 0
    for number, (name, step) in enumerate(steps, 1):
        head = f"[{number}/{len(steps)}] {name} "
        try:
            print(f"{head}{'.' * max(3, 32 - len(head))} ok ({step()})")
            continue
        except UserError as error:
            told = error.render().splitlines()
        except Failed as several:
            told = [line for failure in several.failures for line in _told(failure)] or ["needs a step above"]
        failed += 1
        print(f"{head}{'.' * max(3, 32 - len(head))} FAILED")
        print("\n".join(f"      {line}" for line in told))
        sys.stdout.flush()
    print(f"check: {len(steps) - failed} of {len(steps)} ok" + (f", {failed} failed" if failed else ": ready to run"))
    return 1 if failed else 0


def _told(failure: dict[str, str]) -> list[str]:
    why = f" ({failure['why']})" if failure["why"] else ""
    return [failure["what"] + why, *([f"  hint: {failure['hint']}"] if failure["hint"] else [])]


if __name__ == "__main__":
    options.run(main)
