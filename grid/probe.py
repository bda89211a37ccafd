"""Looks at the machine, the data, the models or a cluster in a process of its own, so that a hang, a crash or a heavy import stays there.

    python -m grid.probe machine|data|models|cluster < request.json        one JSON object on the last line of stdout

In: what the plan needs (JSON on stdin). Out: facts and failures `{"what", "why", "hint"}`. Used by grid.check.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from datasets_ray.errors import UserError

Failure = dict[str, str]
TRIED = 8
"""Rows made of a data set: one dead address at its head says nothing."""
PACKAGES = ("ray", "torch", "transformers", "deepspeed", "open_clip_torch", "mlflow", "pyarrow")


def ask(task: str, request: dict[str, Any], timeout: float) -> dict[str, Any]:
    """Runs a probe in a process of its own. A probe that dies or takes too long is a failure like any other."""
    command = [sys.executable, "-m", "grid.probe", task]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "RAY_USAGE_STATS_ENABLED": "0"}
    environment |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}  # a check downloads nothing
    root = str(Path(__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    try:
        done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, timeout=timeout, env=environment)
    except subprocess.TimeoutExpired:
        hint = "is a network drive, a cluster address or a mirror out of reach?"
        return {"failures": [{"what": f"the {task} probe took more than {timeout:g} s", "why": "", "hint": hint}]}
    lines = done.stdout.strip().splitlines()
    try:
        return json.loads(lines[-1])
    except (IndexError, ValueError):
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {
            "failures": [
                {"what": f"the {task} probe died with exit code {done.returncode}", "why": said, "hint": "run `python -m grid.probe`"}
            ]
        }


def machine(request: dict[str, Any]) -> dict[str, Any]:
    """cpus, memory_gib, gpus and package versions of this machine; of the cluster where RAY_ADDRESS names one."""
    failures: list[Failure] = []
    versions: dict[str, str] = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            failures.append({"what": f"package {package} is not installed", "why": "stages need it", "hint": "make setup"})
    memory = 0.0
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        memory = int(fields["MemAvailable"].split()[0]) / 2**20
    facts: dict[str, Any] = {"cpus": len(os.sched_getaffinity(0)), "memory_gib": memory, "gpus": _gpus(), "versions": versions}
    try:
        import ray
    except Exception as error:  # whatever keeps ray from loading is what the user has to hear
        failures.append({"what": "ray can't be imported", "why": f"{type(error).__name__}: {error}", "hint": "make setup"})
    else:
        if address := os.environ.get("RAY_ADDRESS"):
            try:
                ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
                resources = ray.cluster_resources()
                facts |= {
                    "cpus": resources.get("CPU", 0),
                    "gpus": resources.get("GPU", 0),
                    "memory_gib": resources.get("memory", 0) / 2**30,
                }
                facts["nodes"] = sum(node["Alive"] for node in ray.nodes())
            except Exception as error:  # ray raises its own, gRPC's and OS errors here
                hint = "unset RAY_ADDRESS to run on this machine alone"
                failures.append({"what": f"no Ray cluster at {address}", "why": str(error).splitlines()[0], "hint": hint})
    return {"facts": facts, "failures": failures}


def _gpus() -> int:
    """NVIDIA devices that are visible, without loading torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([entry for entry in visible.split(",") if entry.strip() not in ("", "-1")])
    if not shutil.which("nvidia-smi"):
        return 0
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    return len([line for line in done.stdout.splitlines() if line.startswith("GPU ")])


def data(request: dict[str, Any]) -> dict[str, Any]:
    """Makes the first rows of every data set: its reader, keys, folder, lists and an image are tried. request: sets, data_root."""
    from datasets_ray.negatives import distinct_labels
    from datasets_ray.sources import build

    failures: list[Failure] = []
    made: dict[str, Any] = {}
    told: dict[tuple[str, str, str], list[str]] = {}
    for name, spec in request["sets"].items():
        with tempfile.TemporaryDirectory() as directory:
            try:
                manifest = build({**spec, "rows": TRIED}, Path(directory), _no_inputs, request["data_root"])
            except UserError as error:
                told.setdefault((error.what, error.why, error.hint), []).append(name)
            except Exception as error:  # a reader that breaks is a failure of this data set, not of the check
                failures.append({"what": f"{name}: its reader broke", "why": f"{type(error).__name__}: {error}", "hint": ""})
            else:
                made[name] = {
                    **{key: manifest.get(key) for key in ("rows", "photos", "dropped")},
                    "records": _records(spec, manifest, request),
                    "classes": distinct_labels(manifest.get("classes") or []),
                }
                if not manifest["rows"]:
                    what = f"{name}: none of its first {TRIED} rows can be used"
                    failures.append({"what": what, "why": str(manifest["dropped"]), "hint": ""})
    grouped = [{"what": f"{', '.join(names)}: {what}", "why": why, "hint": hint} for (what, why, hint), names in told.items()]
    return {"facts": made, "failures": grouped + failures}


def _records(spec: dict[str, Any], manifest: dict[str, Any], request: dict[str, Any]) -> int | None:
    """How many records the whole set holds, by its lists: nothing is decoded. None where only making all rows would tell."""
    if "expect" not in spec:
        return None
    from datasets_ray.files import below

    if spec["source"] == "llava_json":
        from datasets_ray.jsonlist import records

        return sum(1 for _ in records(below(spec, "file", request["data_root"])))
    if spec["source"] == "vlmevalkit_tsv":
        from datasets_ray.tsv import Table
        from datasets_ray.vlmevalkit_tsv import Reader, arrange, scan

        file = below(spec, "file", request["data_root"], [spec["file"], f"LMUData/{spec['file']}"])
        found = scan(Reader(Table(file), spec, file.parent), {key: value for key, value in spec.items() if key != "rows"})[0]
        return arrange(found, file.stem, bool(spec.get("circular", False)))[1]["records"]  # a question's rotated copies are one record
    counts = [manifest[key] for key in ("photos", "questions", "records") if manifest.get(key)]
    return max(counts, default=None)


def _no_inputs(id: str) -> Path:
    raise UserError(f"{id} is made of other rows", why="only sources are tried")


def models(request: dict[str, Any]) -> dict[str, Any]:
    """Tokenizers load, hold their template's tokens and fit their model's vocabulary; own objectives load; checkpoints are at hand.
    request: tokenizers [{name, template, vocabulary}], checkpoints [{checkpoint, revision, fed [{at, said, mean, std}],
    towers [{at, builder, config}]}], objectives [{name, ...}]."""
    from datasets_ray.tokens import load_tokenizer, require
    from grid import towers

    failures: list[Failure] = []
    for wanted in request["tokenizers"]:
        try:
            tokenizer = load_tokenizer(wanted["name"])
            if wanted["template"]:
                require(wanted["template"], tokenizer)
        except UserError as error:
            failures.append({"what": error.what, "why": error.why, "hint": error.hint})
            continue
        if wanted["vocabulary"] is not None and len(tokenizer) > wanted["vocabulary"]:
            what = f"tokenizer {wanted['name']!r} has {len(tokenizer)} tokens, its model's vocabulary {wanted['vocabulary']}"
            failures.append({"what": what, "why": "some ids would have no embedding", "hint": f"vocab_size: {len(tokenizer)} or more"})
    for wanted in request.get("objectives", []):
        from trainers.objectives import load_objective

        try:
            load_objective(wanted)
        except UserError as error:
            failures.append({"what": error.what, "why": error.why, "hint": error.hint})
    notes: list[str] = []
    for wanted in request["checkpoints"]:
        path = _at_hand(wanted["checkpoint"], wanted["revision"])
        if path is None:
            name = wanted["checkpoint"]
            hint = (
                f"huggingface-cli download {name}, or name a local directory" if name.count("/") == 1 else "correct its path in the profile"
            )
            failures.append({"what": f"checkpoint {name} is not on this machine", "why": "", "hint": hint})
            continue
        for tower in wanted.get("towers", []):
            if (refused := towers.of_files(tower["builder"], tower["config"], path)) is not None:
                what, why, hint = refused
                failures.append({"what": f"{tower['at']}: {what}", "why": why, "hint": hint})
        for fed in wanted.get("fed", []):
            told, hint = _other_pixels(path, fed)
            if told and fed["said"]:
                notes.append(told)
            elif told:
                failures.append({"what": told, "why": "another model's pixels are none of this one's", "hint": hint})
    return {"facts": {"notes": notes}, "failures": failures}


def _other_pixels(path: Path, fed: dict[str, Any]) -> tuple[str, str]:
    """(what, hint) where a checkpoint's own files normalise pixels otherwise than the plan does; else empty."""
    from grid import normalisation

    try:
        found = normalisation.of_files(path, defaults=not fed["said"])
    except (OSError, ValueError) as error:
        return f"{fed['at']}: what {path} says of its pixels can't be read: {str(error).splitlines()[0]}", "download it again"
    if found is None:
        return "", ""
    file, (mean, std) = found
    if all(abs(a - b) < 1e-3 for a, b in zip([*mean, *std], [*fed["mean"], *fed["std"]])):
        return "", ""
    what = f"{fed['at']}: mean {fed['mean']}, std {fed['std']}, but its {file} says {list(mean)}, {list(std)}"
    return what, f"{fed['at']}: {{mean: {list(mean)}, std: {list(std)}}}"


def _at_hand(checkpoint: str, revision: str | None) -> Path | None:
    """Where it is: a local directory, or a hub repository with a weights file in the local cache. Nothing is downloaded."""
    if os.path.isdir(checkpoint):
        return Path(checkpoint)
    from huggingface_hub import snapshot_download

    try:
        path = Path(snapshot_download(checkpoint, revision=revision, local_files_only=True))
    except Exception:  # the hub client has a dozen exceptions for "not there"
        return None
    return path if any(path.glob("*.safetensors")) or any(path.glob("*.bin")) else None


def cluster(request: dict[str, Any]) -> dict[str, Any]:
    """Every node of the cluster at RAY_ADDRESS: see grid/probe_cluster.py."""
    from grid.probe_cluster import probe

    address = os.environ.get("RAY_ADDRESS")
    try:
        import ray

        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except Exception as error:  # ray raises its own, gRPC's and OS errors here
        hint = "is RAY_ADDRESS right, and RAY_AUTH_TOKEN_PATH the cluster's token?"
        return {"facts": {}, "failures": [{"what": f"no Ray cluster at {address}", "why": str(error).splitlines()[0], "hint": hint}]}
    return probe(ray, request)


TASKS = {"machine": machine, "data": data, "models": models, "cluster": cluster}


def main(argv: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if len(words) != 1 or words[0] not in TASKS:
        raise UserError(f"python -m grid.probe {' '.join(words)}", hint=f"one of {', '.join(TASKS)}, with the request on stdin")
    text = "" if sys.stdin.isatty() else sys.stdin.read()
    print(json.dumps(TASKS[words[0]](json.loads(text or "{}"))))
    return 0


if __name__ == "__main__":
    from grid import options

    options.run(main)
