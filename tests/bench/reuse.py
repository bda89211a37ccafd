"""What finetunings share: a study of three finetunings on one pretraining, then a second study that changes only the finetuning data.

Both run on the profile of `overhead` (tiny, base models hardly trained) and on one store. Out: how often the first one pretrains, and the
seconds of lanes that the second one spends on pretraining or on anything before it, with what each study's own stages took beside it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from grid.jsonl import read_lines
from tests.bench.figure import Figure
from tests.bench.overhead import STUDY, write_profile
from tests.bench.side import ENVIRONMENT, REPOSITORY

KEPT = ("question", "seed", "compatibility", "recipe", "templates", "axes", "base", "mining", "evaluation")
FIRST = {"mix": "llava-mix-665k", "extra": "qwen2-vl-extra", "both": "qwen2-vl-mix"}
SECOND = {"other": "other-mix"}


def write_study(path: Path, finetunings: dict[str, str]) -> None:
    """The main study's base arm, once for each finetuning data set, on one benchmark."""
    main = yaml.safe_load(STUDY.read_text())
    study = {"study": path.stem, **{key: main[key] for key in KEPT}}
    study["axes"]["finetuning"] = {name: {"finetune.data": data} for name, data in finetunings.items()}
    study["base"]["finetuning"] = next(iter(finetunings))
    study["arms"] = [{"name": name, "at": {"finetuning": name}} for name in finetunings]
    study["benchmarks"] = {"flowers": main["benchmarks"]["flowers"]}
    path.write_text(yaml.safe_dump(study, sort_keys=False))


def run(study: Path, profile: Path) -> dict[str, float]:
    """Lane seconds of the stages that the run made itself, by stage name."""
    out = study.with_suffix("")
    command = [sys.executable, "-m", "grid.run", str(study), "--profile", str(profile), "--out", str(out)]
    environment = {**os.environ, **ENVIRONMENT, "FINEGRID_STORE": str(study.parent / "store")}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the run ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    names = {stage["id"]: stage["name"] for stage in json.loads((out / "plan.json").read_text())["stages"]}
    took: dict[str, float] = {}
    began: dict[str, float] = {}
    for event in read_lines(out / "ledger.jsonl"):
        if event["event"] == "start":
            began[event["stage"]] = event["time"]
        elif event["event"] == "finish" and event["stage"] in began:
            took[names[event["stage"]]] = event["time"] - began[event["stage"]]
    return took


def measure(repeats: int) -> list[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        write_profile(here / "bench.yaml")
        profile: dict[str, Any] = yaml.safe_load((here / "bench.yaml").read_text())
        profile["data"]["other-mix"] = {**profile["data"][FIRST["mix"]], "keys": {**profile["data"][FIRST["mix"]]["keys"], "seed": 30}}
        (here / "bench.yaml").write_text(yaml.safe_dump(profile, sort_keys=False))
        made = []
        for name, finetunings in (("first", FIRST), ("second", SECOND)):
            write_study(here / f"{name}.yaml", finetunings)
            made.append(run(here / f"{name}.yaml", here / "bench.yaml"))
    first, second = made
    pretrainings = [name for name in first if name.startswith("pretrain")]
    again = [name for name in second if not name.startswith(("finetune", "predict", "score", "data other-mix"))]
    assert sum(name.startswith("finetune") for name in first) == len(FIRST) and any(name.startswith("finetune") for name in second)
    return [
        Figure("reuse: pretrainings for three finetunings", "", [float(len(pretrainings))], 1.0, note=f"of {len(first)} stages"),
        Figure(
            "reuse: second study, before finetuning", "s", [sum(second[name] for name in again)], 0.0,
            note=f"{len(second)} stages made, {sum(second.values()):.0f} s; the first study: {len(first)}, {sum(first.values()):.0f} s",
        ),
    ]  # fmt: skip
