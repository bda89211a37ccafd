"""Toy stage kinds for tests of the run: they sleep, fail, count, kill. A plan registers them with
`"kinds": {"toy": {"target": "tests.grid.toy_stages:run", "collective": true, "makes": "toy"}}`.
"""

from __future__ import annotations

import json
import os
import signal
import time
from typing import Any

from datasets_ray.errors import UserError
from trainers.context import Context, Interrupted


def run(spec: dict[str, Any], ctx: Context) -> dict[str, Any]:
    """Adds 1 to a counter `steps` times, with a checkpoint after each; `do` maps a step to what happens there, `once` says only once."""
    saved = ctx.work / "count.json"
    count = json.loads(saved.read_text())["count"] if saved.exists() else 0
    start = count
    with ctx.working():
        for step in range(count + 1, spec.get("steps", 1) + 1):
            time.sleep(spec.get("seconds", 0.0))
            count = step
            if ctx.world > 1:
                count = meet(step)
            act(spec.get("do", {}).get(str(step)), spec, ctx)
            if ctx.rank == 0:
                ctx.guard()
                temporary = ctx.work / "count.tmp"
                temporary.write_text(json.dumps({"count": count}))
                os.replace(temporary, saved)
            ctx.report({"step": step, "train/loss": 1.0 / step})
            if ctx.stopping(step):
                raise Interrupted(f"stopped after step {step}")
    inputs = [json.loads((ctx.inputs(need) / "value.json").read_text())["value"] for need in ctx.stage["needs"]]
    if ctx.rank == 0:
        (ctx.out / "value.json").write_text(json.dumps({"value": count + sum(inputs)}))
    return {"value": count + sum(inputs), "resumed_at": start}


def meet(step: int) -> int:
    """A collective: every rank must be at the same step."""
    import torch
    import torch.distributed as dist

    steps = torch.tensor([float(step)])
    dist.all_reduce(steps)
    assert steps.item() == step * dist.get_world_size(), "ranks met at different steps"
    return step


def act(what: str | None, spec: dict[str, Any], ctx: Context) -> None:
    if what is None:
        return
    if what.startswith("once:"):
        marker = ctx.work / f"did-{what[5:]}-{ctx.rank}"
        if marker.exists():
            return
        marker.write_text("")
        what = what[5:]
    if what == "fail":
        raise UserError("this toy fails on purpose", hint="nothing helps")
    if what == "fail-one-rank" and ctx.rank == ctx.world - 1:
        raise ValueError("only the last rank fails")
    if what == "network":
        raise ConnectionError("the toy's network is down")
    if what == "kill" and ctx.rank == ctx.world - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "kill-driver" and ctx.rank == 0:
        os.kill(int(os.environ["TOY_DRIVER"]), signal.SIGKILL)
        time.sleep(60)
