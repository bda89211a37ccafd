"""The benchmarks' own arithmetic: spreads, goals and FLOPs. Speeds are never tested."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.bench import gpu_step
from tests.bench.figure import Figure, in_turn, ratios, table
from tests.bench.side import Side


def test_a_goal_is_met_by_the_median():
    assert Figure("a", "s", [1.0, 2.0, 9.0], goal=2.0).met == "yes"
    assert Figure("a", "s", [1.0, 2.1, 2.2], goal=2.0).met == "NO"
    assert Figure("a", "x", [1.9, 2.1, 2.2], goal=2.0, better="higher").met == "yes"
    assert Figure("a", "x", [], goal=2.0).met == Figure("a", "x", [1.0]).met == ""


def test_the_table_shows_spread_goal_and_what_was_not_measured():
    lines = table([Figure("fast", "x", [3.0, 1.0, 2.0], 1.5, "higher", "why"), Figure("absent", "", note="no GPU")]).splitlines()
    assert lines[2] == "| fast | 1 | 2 | 3 | x | ≥ 1.5 | yes | why |"
    assert "not measured" in lines[3] and "no GPU" in lines[3] and lines[3].count("|") == lines[2].count("|")


def test_sides_take_turns_and_neither_always_goes_first():
    order: list[str] = []
    values = in_turn(3, lambda: order.append("a") or 1.0, lambda: order.append("b") or 2.0)
    assert order == ["a", "b", "b", "a", "a", "b"] and values == [[1.0] * 3, [2.0] * 3]
    assert ratios([4.0, 9.0], [2.0, 3.0]) == [2.0, 3.0]


def test_a_side_answers_in_its_own_process_and_says_why_it_ended():
    with Side("collections:Counter", ours=2) as side:
        assert side.ask("get", "ours") == 2 and side.ask("total") == 2
        with pytest.raises(RuntimeError, match="no attribute 'train'"):
            side.ask("train")


@pytest.mark.parametrize("stage", gpu_step.STAGES)
def test_model_flops_are_the_matrix_products_that_are_done(stage):
    """Of the maps; attention is counted by rows and done in buckets. The encoder reads no gradient, so the first map of the connector
    has none to pass on: the arithmetic counts it as if it had."""
    from trainers import models, switches
    from trainers.objectives.next_token import NextToken
    from trainers.step import train_step

    sizes, trained = gpu_step.SIZES["tiny"], gpu_step.STAGES[stage]
    model = gpu_step.build(sizes, "cpu", False, "fp32")
    models.train_parts(model, trained)
    objective = NextToken()
    (batches, rows), *_ = gpu_step.steps_of(sizes, gpu_step.rows_of(sizes, stage, 40), 128, 2, "cpu")
    engine = gpu_step.OneDevice(model, objective, "cpu")
    # layers as on a GPU: torch's counter knows no product that adds to what is there
    with switches.without(["layers"]), FlopCounterMode(display=False) as counter:
        train_step(engine, objective, batches, {})
    done = sum(count for op, count in counter.get_flop_counts()["Global"].items() if "mm" in str(op))
    parts = gpu_step.flops_of(sizes, rows, trained)
    tower = gpu_step.shapes.transformers_tower(sizes.vision)
    images = sum(len(row.images) for row in rows)
    stem = 2 * tower.stem * sizes.image_tokens * images  # a convolution
    across = 4 * (sizes.image_tokens + 1) ** 2 * tower.width * tower.layers * images  # the encoder's attention
    first = 2.0 * tower.width * sizes.text["hidden_size"] * images * sizes.image_tokens
    expected = parts["encoder"] - stem - across + parts["connector"] - first + parts["llm"] + parts["logits"]
    assert done == pytest.approx(expected, rel=1e-6)


def test_it_learns_as_the_optimiser_says():
    """bf16 weights follow fp32 masters, gradients are added up over micro-batches and cleared."""
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    model = torch.nn.ParameterList([weight])
    engine = gpu_step.OneDevice(model, None, "cpu")
    for _ in range(2):
        engine.backward((weight.float() * 3).sum(), last=True)
    assert weight.grad is None and engine.masters[0].grad.tolist() == [6.0] * 4
    engine.step({})
    assert engine.masters[0].grad.tolist() == [0.0] * 4
    assert torch.equal(weight, engine.masters[0].bfloat16()) and not torch.equal(engine.masters[0], torch.ones(4))


def test_without_a_gpu_it_says_so_and_the_small_shapes_run(capsys):
    if not torch.cuda.is_available():
        assert gpu_step.main([]) == 1
        assert "no GPU here" in capsys.readouterr().err
    assert gpu_step.main(["--shape", "tiny", "--device", "cpu", "--micro-tokens", "128", "--per-step", "2", "--steps", "2"]) == 0
    said = capsys.readouterr().out
    assert "finetune:" in said and "pretrain:" in said and "MFU" in said


def test_it_needs_neither_ray_nor_deepspeed():
    blocked = "import sys; sys.modules.update(dict.fromkeys(('ray', 'deepspeed', 'mlflow', 'open_clip', 'peft', 'accelerate')));"
    run = "from tests.bench.gpu_step import main; sys.exit(main('--shape tiny --device cpu --micro-tokens 128 --steps 1'.split()))"
    done = subprocess.run([sys.executable, "-c", blocked + run], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
