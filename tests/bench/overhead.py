"""What surrounds the work of an arm: a run of the grid against stock Ray Tune + `TorchTrainer`, and how long steps wait for data.

Ours: six arms of experiments/full_ablation.yaml on two lanes of the tiny profile; only its base models are hardly trained and the question
sets are half as long. Its own summary says the overhead twice (grid/summary.py). All of it: lane time from a lane's start to the last
stage's end, less the stages' work, over the arms. And of each arm after the first: what surrounds the stages that are an arm's own, with
every wait between them. The difference doesn't grow with the number of arms: what surrounds the stages that arms share (data, base models,
hard negatives), and the end of a run, where a lane finds nothing left to do; a study of few arms spreads it over few.
Waiting: the time that the steps of the arms' pretrainings and finetunings waited for batches, over the time of these steps.

The peer: a Tune trial per arm, each a `TorchTrainer` of one worker, one after the other, on the same two cores; their training function
does nothing but import what ours needs. What counts is the time from one arm's end to the next one's: the first, which starts Ray's
processes, doesn't. So it is of each arm after the first, too, without an end of the run; ours is measured beside another lane at work, the
peer with both cores to itself. It has the environment of our runs (faster health checks, no prestarted workers, no dashboard) and DeepSpeed
by our import, which leaves out what isn't needed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from tests.bench.figure import Figure
from tests.bench.side import ENVIRONMENT, REPOSITORY, Side

STUDY = REPOSITORY / "experiments" / "full_ablation.yaml"
TINY = REPOSITORY / "experiments" / "profiles" / "tiny.yaml"
ARMS = ("row-03", "row-07", "row-12", "row-14", "row-19", "row-21")
"""One encoder, two language models, each without pretraining, with short and with long captions."""
BASE_STEPS = 20
ROWS = {"web-captions-large": 2560, "web-captions-miner": 2560}
QUESTIONS = 200
PEER_ARMS = 3


def write_profile(path: Path) -> None:
    """The tiny profile with base models hardly trained and fewer questions."""
    profile = yaml.safe_load(TINY.read_text())
    for kind in ("encoders", "llms", "models"):
        for asset in profile[kind].values():
            for stage in asset.get("trained", []):
                if "steps" in stage:
                    stage["steps"] = min(BASE_STEPS, stage["steps"])
    for name, data in profile["data"].items():
        keys = data.get("keys", {})
        if keys.get("part") in {"labelled", "questions"} and "rows" in keys:
            keys["rows"] = QUESTIONS
        if name in ROWS:
            keys["rows"] = ROWS[name]
    profile["profile"] = "bench"
    profile["resources"] |= {"dashboard": False, "budget_seconds": None}
    path.write_text(yaml.safe_dump(profile, sort_keys=False))


def run_grid(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(summary.json, the summaries of the arms' own training stages)"""
    write_profile(folder / "bench.yaml")
    command = [sys.executable, "-m", "grid.run", str(STUDY), "--profile", str(folder / "bench.yaml"), "--out", str(folder / "run")]
    environment = {**os.environ, **ENVIRONMENT, "FINEGRID_STORE": ""}
    done = subprocess.run([*command, "--arms", *ARMS], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the run ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    stages = json.loads((folder / "run" / "plan.json").read_text())["stages"]
    own = [stage["id"] for stage in stages if stage["kind"] == "train" and stage["name"].startswith(("pretrain", "finetune"))]
    trained = [json.loads((folder / "run" / "store" / id / "DONE.json").read_text())["summary"] for id in own]
    return json.loads((folder / "run" / "summary.json").read_text()), trained


def imports(config: dict[str, Any]) -> None:
    """The peer's training function: does nothing, with everything at hand."""
    entered = time.time()
    import transformers.models.clip.modeling_clip  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    from trainers.engine import load_deepspeed

    load_deepspeed("cpu")
    Path(config["folder"], f"imports-{config['arm']}").write_text(str(time.time() - entered))


def one_arm(config: dict[str, Any]) -> None:
    """The peer's trial."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    run = RunConfig(name=f"arm-{config['arm']}", storage_path=config["folder"])
    TorchTrainer(imports, train_loop_config=config, scaling_config=ScalingConfig(num_workers=1), run_config=run).fit()
    Path(config["folder"], f"end-{config['arm']}").write_text(str(time.time()))


class Stock:
    """Ray Tune over TorchTrainers, as Ray's guide writes it."""

    def run(self, folder: str) -> dict[str, list[float]]:
        import logging

        from grid.settings import Settings

        settings = Settings()
        os.environ.update(settings.environment(1, settings.ray_cpus()))
        import ray
        from ray import tune

        ray.init(
            address="local", num_cpus=settings.ray_cpus(), object_store_memory=400 << 20, include_dashboard=False, log_to_driver=False,
            logging_level=logging.ERROR,
        )  # fmt: skip
        results = tune.Tuner(
            tune.with_resources(one_arm, {"CPU": 0.01}),
            param_space={"arm": tune.grid_search(list(range(PEER_ARMS))), "folder": folder},
            tune_config=tune.TuneConfig(max_concurrent_trials=1),
            run_config=tune.RunConfig(name="peer", storage_path=folder, verbose=0),
        ).fit()
        ray.shutdown()
        assert not results.errors, results.errors
        ends = [float(Path(folder, f"end-{arm}").read_text()) for arm in range(PEER_ARMS)]
        loads = [float(Path(folder, f"imports-{arm}").read_text()) for arm in range(PEER_ARMS)]
        return {"seconds": [after - before for before, after in zip(ends, ends[1:])], "imports": loads[1:]}


def measure(repeats: int) -> list[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        begin = time.time()
        summary, trained = run_grid(Path(folder))
        took = time.time() - begin
    with tempfile.TemporaryDirectory() as folder, Side("tests.bench.overhead:Stock") as stock:
        peer = stock.ask("run", folder)
    whole, ours, lanes = summary["overhead_seconds_per_arm"], summary["overhead_seconds_each_further_arm"], summary["lanes"]
    assert whole is not None and ours is not None and len(summary["arms"]["done"]) == len(ARMS), summary["arms"]
    parts = ", ".join(f"{part} {lanes[part + '_seconds']:.1f}" for part in ("work", "loading", "closing", "idle"))
    took_up = f"start-up {summary['startup_seconds']:.0f} s, whole run {took:.0f} s"
    where = f"{parts} s (behind a lane's last stage {lanes['tail_seconds']:.1f}) of {lanes['lane_seconds']:.0f} s lane time; {took_up}"
    loads = f"of which imports {sum(peer['imports']) / len(peer['imports']):.1f} s; {PEER_ARMS - 1} arms after the first"
    shares = [one["seconds"]["waiting"] / one["seconds"]["steps"] for one in trained]
    waiting = sum(one["seconds"]["waiting"] for one in trained) / sum(one["seconds"]["steps"] for one in trained)
    return [
        Figure("overhead: ours, each arm after the first", "s", [ours], 2.0, note="what surrounds the stages that are an arm's own"),
        Figure("overhead: ours, all of it, an arm", "s", [whole], 2.0, note=f"{len(ARMS)} arms: {where}"),
        Figure("overhead: Tune + TorchTrainer, each arm after the first", "s", peer["seconds"], note=loads),
        Figure("overhead: Tune + TorchTrainer / ours, each arm after the first", "x", [s / ours for s in peer["seconds"]], 20.0, "higher"),
        Figure("overhead: Tune + TorchTrainer / ours, all of it", "x", [s / whole for s in peer["seconds"]], None, "higher"),
        Figure("steps waiting for data, share", "", [waiting], 0.02, note=f"{len(trained)} training stages; largest {max(shares):.3f}"),
    ]
