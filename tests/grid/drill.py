"""A drill on real stages: a run left alone, and one whose workers and drivers are killed at seeded points; equal artefacts or exit 1.

    python -m tests.grid.drill experiments/full_ablation.yaml DIR --arms row-14 [--seed 0]

In: a study, an empty directory. Out: DIR/calm, DIR/killed (run directories) and a list of what was killed where; exit 0 when every stage's
files (weights, choices, predictions, scores) have the same SHA-256 in both. Base models and data sets are made once and taken over.
Takes minutes, so it is run by hand and its outcome noted in experiments/LOG.md; tests/grid/test_run.py does the same on toy stages.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from grid.jsonl import read_lines

KEPT = ("dataset",)
KILLS = ("embed", "pretrain phase 1", "pretrain phase 2", "driver in finetune", "finetune checkpoint", "predict", "driver in predict")
"""In this order; a study without pretraining has none of those. `phase`: before or after 20 % of the steps, where `full` adds the language
model. `checkpoint`: while one is being written."""
PHASES = {"phase 1": (0.0, 0.2), "phase 2": (0.25, 1.0)}


def driver(study: str, out: Path, more: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "FINEGRID_STORE": ""}
    with (out.parent / f"{out.name}.log").open("a") as log:
        command = [sys.executable, "-m", "grid.run", study, "--out", str(out), *more]
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def base(plan: dict) -> set[str]:
    """Stages taken over: data sets, and what is trained before any arm's own stages."""
    own = ("pretrain", "finetune")
    return {s["id"] for s in plan["stages"] if s["kind"] in KEPT or (s["kind"] == "train" and not s["name"].startswith(own))}


def target(what: str) -> str:
    """First word of the stages a kill waits for."""
    return what.split()[-1] if what.startswith("driver") else what.split()[0]


def under_way(out: Path) -> list[dict]:
    """Start events of stages that have not ended."""
    found: dict[str, dict] = {}
    for event in read_lines(out / "ledger.jsonl"):
        found.pop(event["stage"], None)
        if event["event"] == "start":
            found[event["stage"]] = event
    return list(found.values())


def writing(store: Path, stage: str) -> bool:
    """Whether a checkpoint is half written (trainers.checkpoint names it so until it is whole)."""
    return any((store / ".work" / stage).rglob(".step-*.partial"))


def strike(what: str, process: subprocess.Popen, out: Path, stages: dict[str, dict], wait: float, seconds: float) -> str | None:
    """Waits for the moment, then kills; returns what was killed. None: the run ended first."""
    store, deadline = out / "store", time.monotonic() + seconds
    wanted, phase = target(what), PHASES.get(what.partition(" ")[2])
    while process.poll() is None and time.monotonic() < deadline:
        for event in under_way(out):
            stage = event["stage"]
            lease = store / ".lease" / f"{stage}.json"
            if not stages[stage]["name"].startswith(wanted) or not lease.exists() or (store / stage / "DONE.json").exists():
                continue
            if "checkpoint" in what and not writing(store, stage):
                continue
            if phase is not None:
                done = progress(out, stages[stage])
                if not phase[0] < done < phase[1]:
                    continue
                what = f"{what} ({done:.0%} of its steps)"
            else:
                time.sleep(0.0 if "checkpoint" in what else wait)
            if what.startswith("driver"):
                process.kill()
            else:
                try:
                    os.kill(json.loads(lease.read_text())["pid"], signal.SIGKILL)
                except ProcessLookupError:
                    continue
            return f"{what}: killed during {stages[stage]['name']}"
        time.sleep(0.01)
    return None


def progress(out: Path, stage: dict) -> float:
    """Share of a training stage's steps that its metrics show."""
    lines = [line for line in (read_lines(out / "metrics" / f"{stage['id']}.jsonl")) if "train/loss" in line]
    return lines[-1]["step"] / stage["cost"]["steps"] if lines else 0.0


def digests(out: Path, plan: dict) -> dict[str, dict[str, str]]:
    found = {}
    for stage in plan["stages"]:
        done = json.loads((out / "store" / stage["id"] / "DONE.json").read_text())
        found[stage["name"]] = {name: entry["sha256"] for name, entry in done["files"].items()}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--arms", nargs="+", required=True)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng = random.Random(given.seed)
    more = ["--arms", *given.arms, *(part for entry in given.set for part in ("--set", entry))]
    given.directory.mkdir(parents=True, exist_ok=True)
    calm, killed = given.directory / "calm", given.directory / "killed"
    code = driver(given.study, calm, more).wait()
    if code:
        print(f"the undisturbed run ended with {code}; see {calm}.log")
        return 1
    plan = json.loads((calm / "plan.json").read_text())
    stages = {stage["id"]: stage for stage in plan["stages"]}
    (killed / "store").mkdir(parents=True)
    shutil.copy(calm / "run.json", killed / "run.json")  # the same study; the driver that follows is its next epoch
    for stage in base(plan):
        shutil.copytree(calm / "store" / stage, killed / "store" / stage)
    process, struck = driver(given.study, killed, more), []
    for what in KILLS:
        if not any(stage["name"].startswith(target(what)) for stage in stages.values()):
            continue
        happened = strike(what, process, killed, stages, rng.uniform(0.0, 3.0) if "embed" not in what else 0.05, 900)
        struck.append(happened or f"{what}: never came up")
        print(struck[-1], flush=True)
        if process.poll() is not None or what.startswith("driver"):
            process.wait()
            process = driver(given.study, killed, more)
    code = process.wait()
    first, second = digests(calm, plan), digests(killed, plan)
    different = [f"{stage}/{file}" for stage in first for file in first[stage] if first[stage][file] != second[stage].get(file)]
    print(f"exit code {code}; {sum(len(f) for f in first.values())} files of {len(first)} stages compared, {len(different)} different")
    for name in different:
        print(f"  differs: {name}")
    return 1 if different or code else 0


if __name__ == "__main__":
    sys.exit(main())
