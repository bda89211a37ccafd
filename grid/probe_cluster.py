"""Looks at every node of a running Ray cluster: is it one machine in many places, as a study needs it to be?

In: a connected ray and what the plan needs. Out: facts and failures `{"what", "why", "hint"}`. On each node a task without CPUs writes a
marker into the shared folders, then looks for everybody's, says how much disk is free, which versions it has, and tries tokenizers and
checkpoints; then the markers are removed. Used by `grid.probe cluster`.
"""

from __future__ import annotations

import os
import platform
import shutil
import uuid
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

Failure = dict[str, str]
NODE_SECONDS = 180.0
"""Longest wait for the nodes in each round."""
PACKAGES = ("ray", "torch", "transformers", "deepspeed", "pyarrow")
MARK = ".finegrid-check"


def write_marks(paths: dict[str, str], token: str, node: str) -> dict[str, str]:
    """Leaves this node's marker in each folder; returns name → why it couldn't."""
    wrong = {}
    for name, path in paths.items():
        try:
            Path(path).mkdir(parents=True, exist_ok=True)
            (Path(path) / f"{MARK}-{token}-{node}").write_text(node)
        except OSError as error:
            wrong[name] = f"{type(error).__name__}: {error.strerror or error}"
    return wrong


def read_marks(paths: dict[str, str], token: str) -> dict[str, list[str]]:
    """Name → the nodes whose markers this node sees in that folder."""
    seen = {}
    for name, path in paths.items():
        found = list(Path(path).glob(f"{MARK}-{token}-*")) if Path(path).is_dir() else []
        seen[name] = sorted(mark.name.removeprefix(f"{MARK}-{token}-") for mark in found)
    return seen


def remove_marks(paths: dict[str, str], token: str, node: str) -> None:
    for path in paths.values():
        (Path(path) / f"{MARK}-{token}-{node}").unlink(missing_ok=True)


def look(request: dict[str, Any], token: str, node: str) -> dict[str, Any]:
    """What this node has: markers seen, folders that are missing, free GiB by folder, versions, failures of tokenizers and checkpoints."""
    from grid.probe import models

    written, read = request["writable"], request["readable"]
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "missing"
    found = {
        "marks": read_marks(written, token),
        "missing": [name for name, path in read.items() if not os.access(path, os.R_OK | os.X_OK)],
        "free_gib": {name: shutil.disk_usage(path).free / 2**30 for name, path in written.items() if Path(path).is_dir()},
        "versions": versions,
        "failures": models(request["models"])["failures"],
    }
    return found


def probe(ray: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Asks every node. request: writable and readable {name: folder}, need_gib {name: GiB}, workers, gpus_per_worker, models (as
    `grid.probe.models` takes it)."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    token = uuid.uuid4().hex[:12]
    nodes = [
        {"name": node["NodeManagerAddress"], "id": node["NodeID"], "cpus": node["Resources"].get("CPU", 0.0),
         "gpus": node["Resources"].get("GPU", 0.0)}
        for node in ray.nodes() if node["Alive"]
    ]  # fmt: skip

    def ask(work: Any, *arguments: Any) -> list[Any]:
        """The work's answer on each node, or its error."""
        calls = [
            ray.remote(work).options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["id"], soft=False), max_retries=0)
            .remote(*arguments, node["id"][:8])
            for node in nodes
        ]  # fmt: skip
        ray.wait(calls, num_returns=len(calls), timeout=NODE_SECONDS)
        answers = []
        for call in calls:
            try:
                answers.append(ray.get(call, timeout=0.1))
            except Exception as error:  # ray wraps whatever a node can fail with
                answers.append(error)
        return answers

    for node, wrong in zip(nodes, ask(write_marks, request["writable"], token)):
        node["unwritable"] = wrong
    for node, found in zip(nodes, ask(look, request, token)):
        node["found"] = found
    ask(remove_marks, request["writable"], token)  # when all have looked
    facts = {"nodes": len(nodes), "gpus": sum(node["gpus"] for node in nodes), "cpus": sum(node["cpus"] for node in nodes)}
    return {"facts": facts, "failures": judge(nodes, request)}


def judge(nodes: Sequence[dict[str, Any]], request: dict[str, Any]) -> list[Failure]:
    """What keeps these nodes from running the study. nodes: name, id, cpus, gpus, unwritable and found (or an exception in their place)."""
    failures: list[Failure] = []

    def tell(names: Sequence[str], what: str, why: str, hint: str) -> None:
        if names:
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            failures.append({"what": f"{shown}: {what}", "why": why, "hint": hint})

    each, workers = request["gpus_per_worker"], request["workers"]
    if each:
        room = sum(int(node["gpus"] // each) for node in nodes)
        if room < workers:
            why = f"{workers} workers of {each} GPU(s) on {len(nodes)} nodes"
            failures.append({
                "what": f"the cluster has room for {room} workers",
                "why": why,
                "hint": "start more nodes, or --set resources.workers=N",
            })
        short = [node["name"] for node in nodes if node["gpus"] >= each and node["cpus"] < node["gpus"] // each + 1]
        tell(short, "fewer CPUs than workers and one", "each worker reserves one, Ray Data one", "ray start --num-cpus=N")
    silent = {node["name"]: node["found"] for node in nodes if isinstance(node["found"], Exception)}
    for name, error in silent.items():
        line = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        tell([name], "it can't run our code", line[:200], "install finegrid there, the same version as here, at a place Python finds")
    heard = [node for node in nodes if not isinstance(node["found"], Exception)]
    everybody = {node["id"][:8] for node in heard}
    for folder, path in request["writable"].items():
        refused = {
            node["name"]: node["unwritable"][folder]
            for node in heard
            if isinstance(node["unwritable"], dict) and folder in node["unwritable"]
        }
        tell(
            list(refused), f"{folder} {path} can't be written", next(iter(refused.values()), ""), "mount the shared storage there, writable"
        )
        alone = [n["name"] for n in heard if n["name"] not in refused and not everybody <= set(n["found"]["marks"].get(folder, []))]
        if not refused:
            tell(
                alone,
                f"{folder} {path} is not the others' folder",
                "what they wrote isn't seen there",
                "mount the same storage on all nodes",
            )
        need = request["need_gib"].get(folder, 0.0)
        free = min((n["found"]["free_gib"][folder] for n in heard if folder in n["found"]["free_gib"]), default=None)
        if free is not None and free < need:
            hint = f"--set {folder}=DIR on a larger file system"
            failures.append({"what": f"{folder} {path} has {free:.1f} GiB free", "why": f"about {need:.1f} GiB are needed", "hint": hint})
    for folder, path in request["readable"].items():
        tell([n["name"] for n in heard if folder in n["found"]["missing"]], f"no {folder} {path}", "", "mount the shared storage there")
    failures += _versions(heard)
    told: dict[tuple[str, str, str], list[str]] = {}
    for node in heard:
        for failure in node["found"]["failures"]:
            told.setdefault((failure["what"], failure["why"], failure["hint"]), []).append(node["name"])
    for (what, why, hint), names in told.items():
        tell(["all nodes"] if len(names) == len(heard) else names, what, why, hint)
    return failures


def _versions(nodes: Sequence[dict[str, Any]]) -> list[Failure]:
    """Packages that aren't the same everywhere."""
    failures = []
    for package in ("python", *PACKAGES):
        held: dict[str, list[str]] = {}
        for node in nodes:
            held.setdefault(node["found"]["versions"].get(package, "missing"), []).append(node["name"])
        if len(held) > 1 or "missing" in held:
            told = "; ".join(f"{version} on {', '.join(names[:3])}" for version, names in held.items())
            failures.append({
                "what": f"{package} differs between nodes: {told}",
                "why": "stages move from node to node",
                "hint": "one image for all",
            })
    return failures
