"""Law 2: micro-batch, accumulation, number of workers and ZeRO stage leave the loss curve as it is (fp32, rtol 1e-4 over 50 steps), for
next-token prediction and for the toy two-stream objective with a gathered loss. Steps hold text-only samples, odd ones nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.trainers import training_kit as kit
from trainers import train

pytestmark = pytest.mark.timeout(900)  # two processes on a busy machine wait for each other at every collective

STEPS, SAMPLES, MICRO = 50, 6, 30
OBJECTIVES = {"one stream": {"name": "next_token"}, "two streams": kit.TWO_STREAMS}
STAGES = (0, 2, 3)
PARTITIONED = {"zero_optimization": {"stage3_param_persistence_threshold": 2000}}


def job(objective: str, **changes: Any) -> dict[str, Any]:
    return {
        "objective": OBJECTIVES[objective], "zero": 0, "capacity": 100_000, "steps": STEPS, "samples": SAMPLES, "text_only": True,
        "deepspeed": PARTITIONED, **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> dict[str, dict[str, list[float]]]:
    """One device, one micro-batch a step, no ZeRO."""
    return {name: kit.run(job(name), tmp_path_factory.mktemp("reference")) for name in OBJECTIVES}


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory) -> dict[str, dict[str, list[float]]]:
    """All ZeRO stages and both objectives on two processes, several micro-batches a step, some of them empty."""
    folder: Path = tmp_path_factory.mktemp("workers")
    # ZeRO-3 gathers weights in every pass of every micro-batch, so it gets fewer of them
    jobs = {
        f"{name}, ZeRO {zero}": job(name, zero=zero, capacity=2 * MICRO if zero == 3 else MICRO) for name in OBJECTIVES for zero in range(4)
    }
    # several chunks of logits, more on one rank than it has itself
    chunked = {"objective": {"name": "next_token", "most_logits": 300}}
    jobs["chunks, ZeRO 3"] = job("one stream", zero=3, capacity=2 * MICRO) | chunked
    rows = str(kit.write_captions(folder / "rows", 40))
    for zero in STAGES:
        runtime = {"zero": zero, "deepspeed": PARTITIONED}
        jobs[f"stage, ZeRO {zero}"] = {"name": f"zero-{zero}", "rows": rows, "runtime": runtime, "stop": 1 + 3 * (zero % 2)}
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.trainers.training_kit", str(folder / "jobs.json")]
    ranks = [
        subprocess.Popen([*command, str(rank), "2", str(folder / "store")], env=environment, stderr=(folder / f"{rank}.log").open("w"))
        for rank in range(2)
    ]
    codes = [rank.wait() for rank in ranks]
    assert codes == [0, 0], "\n".join((folder / f"{rank}.log").read_text()[-3000:] for rank in range(2))
    return json.loads((folder / "jobs.out.json").read_text())


def assert_same(found: dict[str, list[float]], wanted: dict[str, list[float]]) -> None:
    assert len(wanted["losses"]) == STEPS and wanted["losses"][-1] < wanted["losses"][0], "the reference has to learn something"
    assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-4)
    assert found["norms"] == pytest.approx(wanted["norms"], rel=1e-3)


@pytest.mark.parametrize("name, zero", [*(("one stream", zero) for zero in range(4)), ("two streams", 0), ("two streams", 2)])
def test_accumulation_and_zero_stage(tmp_path, reference, name, zero):
    assert_same(kit.run(job(name, zero=zero, capacity=MICRO), tmp_path), reference[name])


@pytest.mark.slow
@pytest.mark.parametrize("zero", range(4))
@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_workers(reference, two_workers, name, zero):
    assert_same(two_workers[f"{name}, ZeRO {zero}"], reference[name])


@pytest.mark.slow
def test_two_workers_split_logits_alike(reference, two_workers):
    assert_same(two_workers["chunks, ZeRO 3"], reference["one stream"])


@pytest.mark.slow
@pytest.mark.parametrize("zero", STAGES)
def test_a_train_stage_on_two_workers_resumes_bit_identical(tmp_path, two_workers, zero):
    """Stopped while the connector trains alone (step 1) or after the language model has joined (step 4): the same weights."""
    found = two_workers[f"stage, ZeRO {zero}"]
    assert found["resumed"] == found["whole"] and len(found["whole"]) == 2 and found["notes"][0].startswith("went on from step")
    alone = train.run(kit.train_spec(steps=10), kit.context(tmp_path, kit.write_captions(tmp_path / "rows", 40)))
    assert found["loss"]["last"] == pytest.approx(alone["loss"]["last"], rel=1e-4)


def test_micro_batches_differ_from_step_to_step_and_some_are_empty():
    """What the two tests above rely on."""
    steps = kit.steps_of_samples(STEPS, SAMPLES, text_only=True)
    counts = {len(kit.micro_batches(rows, ["text", "caption"], MICRO, 0, 2)) for rows in steps}
    packs = [b.streams["text"] for rows in steps for rank in range(2) for b in kit.micro_batches(rows, ["text"], MICRO, rank, 2)]
    assert len(counts) > 1
    assert {(len(p.images) > 0, len(p.ids) > 0) for p in packs} == {(True, True), (False, True), (False, False)}


def test_clipping_is_the_same_everywhere(tmp_path):
    found = [kit.run(job("one stream", steps=8, clip=0.3, zero=zero), tmp_path) for zero in (0, 1, 3)]
    unclipped = kit.run(job("one stream", steps=8), tmp_path)
    assert max(found[0]["norms"]) > 0.3 and found[0]["losses"] != pytest.approx(unclipped["losses"], rel=1e-6)
    for other in found[1:]:
        assert other["losses"] == pytest.approx(found[0]["losses"], rel=1e-4)
        assert other["norms"] == pytest.approx(found[0]["norms"], rel=1e-3)


def test_bf16_accumulates_in_fp32(tmp_path):
    """Many micro-batches give the curve of one to within bf16's forward noise, at every ZeRO stage."""
    cases = [(1, 100_000), (1, MICRO), (2, MICRO), (3, MICRO)]
    jobs = [job("one stream", steps=6, precision="bf16", zero=zero, capacity=capacity) for zero, capacity in cases]
    curves = [kit.run(each, tmp_path) for each in jobs]
    for curve in curves[1:]:
        assert curve["losses"] == pytest.approx(curves[0]["losses"], rel=5e-3)
