"""bf16 with fp32 accumulation and reduction, and the optimiser's state in host memory.

After the first step AdamW's first moment is (1 - beta1) times the gradient it was given, in fp32. What it should be: every micro-batch's
16-bit gradient by plain autograd, added up in fp32.

    python -m tests.trainers.test_precision JOBS.json RANK WORLD STORE     one rank of a multi-process run (a test starts these)
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.trainers import training_kit as kit
from trainers import engine, models, optim, train
from trainers.batch import to_device
from trainers.context import Interrupted
from trainers.engine import Engine
from trainers.objectives import load_objective

RATES = {"connector": 1e-3, "llm": 1e-3}
CAPACITY, SAMPLES = 30, 24


def built(folder: Path) -> Any:
    model = kit.vlm(folder).to(torch.bfloat16)
    models.train_parts(model, set(RATES))
    return model


def batches_of(rank: int, world: int, same_modules: bool = False) -> list[Any]:
    rows = kit.steps_of_samples(1, SAMPLES, seed=3)[0]
    return [to_device(b, "cpu", kit.FILLER, same_modules) for b in kit.micro_batches(rows, ["text"], CAPACITY, rank, world)]


def wanted(folder: Path, world: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """float[numel] by parameter: the step's gradient, its micro-batches' 16-bit gradients added up in `dtype`."""
    model, objective = built(folder), load_objective({"name": "next_token"})
    total = {name: torch.zeros_like(p, dtype=dtype) for name, p in model.named_parameters() if p.requires_grad}
    for rank in range(world):
        for batch in batches_of(rank, world):
            (objective.forward(model, batch).loss_sum / batch.valid_tokens).backward()
            for name, p in model.named_parameters():
                if p.grad is not None:
                    total[name] += p.grad.to(dtype)
                    p.grad = None
    return {name: tensor.float().flatten() for name, tensor in total.items()}


def first_moments(folder: Path, zero: int, rank: int = 0, world: int = 1, offload: bool = False) -> dict[str, tuple[int, torch.Tensor]]:
    """By parameter (start, this rank's piece of exp_avg) after one step."""
    model, objective = built(folder), load_objective({"name": "next_token"})
    one = Engine(
        model, objective, optim.parameter_groups(model.parts, RATES, 0.0), {}, zero=zero, precision="bf16", rank=rank, world=world,
        offload=offload,
    )  # fmt: skip
    batches = batches_of(rank, world, one.same_modules)
    for number, batch in enumerate(batches):
        loss, _ = one.forward(batch)
        one.backward(loss / batch.valid_tokens, last=number + 1 == len(batches))
    one.step(RATES)
    found = {name: (f.start, f.moments["exp_avg"].clone()) for name, f in one.fragments().items() if f.master.numel()}
    assert {moment.dtype for _, moment in found.values()} == {torch.float32}
    one.destroy()
    return found


@contextlib.contextmanager
def linear_of(zero: int) -> Generator[None]:
    """The linear map that an engine of this stage computes with: ZeRO 3 has its own, whose 16-bit roundings differ."""
    before = torch.nn.functional.linear
    try:
        if zero == 3:
            engine.load_deepspeed("cpu")
            from deepspeed.runtime.zero.linear import zero3_linear_wrap

            torch.nn.functional.linear = zero3_linear_wrap
        yield
    finally:
        torch.nn.functional.linear = before


def off_by(found: dict[str, torch.Tensor], gradients: dict[str, torch.Tensor]) -> float:
    """Largest relative distance of any parameter's gradient."""
    assert found.keys() == gradients.keys()
    return max(float((10 * found[n] - g).norm() / g.norm().clamp(min=1e-12)) for n, g in gradients.items())


@pytest.mark.parametrize("zero, offload", [(1, False), (2, False), (3, False), (2, True), (3, True)])
def test_micro_batches_are_added_up_in_fp32(tmp_path, zero, offload):
    assert len(batches_of(0, 1)) > 5
    found = {name: moment for name, (_, moment) in first_moments(tmp_path, zero, offload=offload).items()}
    with linear_of(zero):
        assert off_by(found, wanted(tmp_path, 1, torch.float32)) < 1e-5


def test_sixteen_bits_would_show(tmp_path):
    """What the test above would find if gradients were added up at 16 bits."""
    low = wanted(tmp_path, 1, torch.bfloat16)
    assert off_by({name: g / 10 for name, g in low.items()}, wanted(tmp_path, 1, torch.float32)) > 1e-3


def test_an_engine_leaves_the_process_as_it_was(tmp_path):
    before = torch.nn.functional.linear
    first_moments(tmp_path, 3)
    assert torch.nn.functional.linear is before


@pytest.mark.slow
@pytest.mark.timeout(900)  # two processes on a busy machine wait for each other at every collective
def test_ranks_are_added_up_in_fp32(tmp_path):
    """Two processes, micro-batches on both; ZeRO 1-3, and 2 with the state in host memory."""
    jobs = {f"zero-{zero}{'-offload' * offload}": [zero, offload] for zero, offload in [(1, 0), (2, 0), (3, 0), (2, 1)]}
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "tests.trainers.test_precision", str(tmp_path / "jobs.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([*command, str(rank), "2", str(tmp_path / "store")], env=environment, stderr=(tmp_path / f"{rank}.log").open("w"))
        for rank in range(2)
    ]
    codes = [rank.wait() for rank in ranks]
    assert codes == [0, 0], "\n".join((tmp_path / f"{rank}.log").read_text()[-3000:] for rank in range(2))
    whole_steps = {}
    for zero in (2, 3):
        with linear_of(zero):
            whole_steps[zero == 3] = wanted(tmp_path, 2, torch.float32)
    for name, (zero, _) in jobs.items():
        pieces = [load_file(str(tmp_path / f"{name}-{rank}.safetensors")) for rank in range(2)]
        found: dict[str, list[tuple[int, torch.Tensor]]] = {}
        for key, moment in (item for piece in pieces for item in piece.items()):
            found.setdefault(key.rpartition("|")[0], []).append((int(key.rpartition("|")[2]), moment))
        whole = {key: torch.cat([moment for _, moment in sorted(parts, key=lambda p: p[0])]) for key, parts in found.items()}
        assert off_by(whole, whole_steps[zero == 3]) < 1e-5, name


def test_what_deepspeed_is_told():
    made = engine.config([{"params": [torch.zeros(8)]}], "bf16", 2, 1.0, offload=True)
    assert made["communication_data_type"] == "fp32" and made["data_types"] == {"grad_accum_dtype": "fp32"}
    assert made["gradient_clipping"] == 1.0 and made["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": False}
    assert engine.config([{"params": [torch.zeros(8)]}], "fp32", 0, None)["gradient_clipping"] == 0.0


def test_offloading_leaves_the_loss_curve_alone(tmp_path):
    """fp32, law 2: state on the host is where, not what."""
    job = {"objective": {"name": "next_token"}, "steps": 12, "samples": 6, "capacity": kit.VOCABULARY, "zero": 2, "clip": 0.5}
    plain = kit.run(job, tmp_path / "plain")
    for zero in (2, 3):
        moved = kit.run({**job, "zero": zero, "deepspeed": OFFLOAD}, tmp_path / f"moved-{zero}")
        assert moved["losses"] == pytest.approx(plain["losses"], rel=1e-4)
        assert moved["norms"] == pytest.approx(plain["norms"], rel=1e-3)


@pytest.mark.parametrize("zero", [2, 3])
def test_an_offloaded_stage_resumes_with_the_same_bits(tmp_path, zero):
    """`full`: the connector alone, then the language model too; interrupted in the second phase."""
    rows = kit.write_captions(tmp_path / "rows", 40)
    runtime = {"zero": zero, "offload": True}
    whole = train.run(kit.train_spec(steps=10), kit.context(tmp_path / "whole", rows, **runtime))
    ctx = kit.context(tmp_path, rows, **runtime)
    ctx.stopping = lambda done: done == 5
    with pytest.raises(Interrupted):
        train.run(kit.train_spec(steps=10), ctx)
    resumed = train.run(kit.train_spec(steps=10), kit.context(tmp_path, rows, **runtime))
    assert resumed["sha256"] == whole["sha256"] and resumed["notes"] == ["went on from step 5"]
    here = train.run(kit.train_spec(steps=10), kit.context(tmp_path / "here", rows, zero=1))
    assert whole["loss"]["last"] == pytest.approx(here["loss"]["last"], rel=1e-4)


def test_offloading_begins_at_zero_2(tmp_path):
    rows = kit.write_captions(tmp_path / "rows", 40)
    told = train.run(kit.train_spec(steps=2), kit.context(tmp_path, rows, zero=1, offload=True))["notes"]
    assert told == ["ZeRO 2 instead of 1: state is offloaded from ZeRO 2 on"]


OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": False}}}


def main() -> None:
    jobs, rank, world, store = json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", store=torch.distributed.FileStore(store, world), rank=rank, world_size=world)
    folder = Path(sys.argv[1]).parent
    for name, (zero, offload) in jobs.items():
        found = first_moments(folder / f"rank-{rank}", zero, rank, world, bool(offload))
        save_file({f"{key}|{start}": moment for key, (start, moment) in found.items()}, str(folder / f"{name}-{rank}.safetensors"))
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
