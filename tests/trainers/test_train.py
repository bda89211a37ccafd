"""The train stage: resuming is never having stopped, a torn checkpoint is passed over, unfreezing moves weights and keeps moments, the
artefact is what was trained, and the tiny recipe's loss curve is the golden one."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch

from datasets_ray.errors import UserError
from tests.trainers import training_kit as kit
from trainers import checkpoint, models, optim, train
from trainers.context import Context, Interrupted, LeaseLost
from trainers.engine import Engine
from trainers.meter import Diverged

STEPS, SWITCH = 20, 4
GOLDEN = Path(__file__).parent.parent / "golden" / "full_recipe_loss.json"


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return kit.write_captions(tmp_path_factory.mktemp("rows"), 60)


@pytest.fixture(scope="module")
def uninterrupted(rows, tmp_path_factory) -> tuple[dict, Path]:
    """(summary, folder) of the `full` recipe in one go, without ZeRO."""
    folder = tmp_path_factory.mktemp("whole")
    return train.run(kit.train_spec(), kit.context(folder, rows)), folder


def metrics(folder: Path) -> list[dict]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if "train/loss" in record]


def stop_after(ctx: Context, step: int) -> Context:
    ctx.stopping = lambda done: done == step
    return ctx


def interrupt(folder: Path, rows: Path, step: int, **runtime) -> None:
    with pytest.raises(Interrupted):
        train.run(kit.train_spec(), stop_after(kit.context(folder, rows, **runtime), step))


@pytest.mark.parametrize("zero", [0, 1, 2])
@pytest.mark.parametrize("stop", [2, SWITCH, 11], ids=["connector alone", "between the phases", "with the language model"])
def test_resuming_is_never_having_stopped(tmp_path, rows, uninterrupted, stop, zero):
    interrupt(tmp_path, rows, stop, zero=zero)
    resumed = train.run(kit.train_spec(), kit.context(tmp_path, rows, zero=zero))
    whole = uninterrupted[0] if zero == 0 else train.run(kit.train_spec(), kit.context(tmp_path / "whole", rows, zero=zero))
    assert resumed["sha256"] == whole["sha256"] and resumed["loss"] == whole["loss"] and resumed["data"] == whole["data"]
    assert resumed["notes"] == [f"went on from step {stop}"]


def test_zero_3_resumes_from_shards(tmp_path, rows):
    more = {"zero": 3, "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 1500}}}
    whole = train.run(kit.train_spec(steps=10), kit.context(tmp_path / "whole", rows, **more))
    with pytest.raises(Interrupted):
        train.run(kit.train_spec(steps=10), stop_after(kit.context(tmp_path, rows, **more), 6))
    assert train.run(kit.train_spec(steps=10), kit.context(tmp_path, rows, **more))["sha256"] == whole["sha256"]


def test_resuming_at_another_zero_stage_goes_on_all_the_same(tmp_path, rows, uninterrupted):
    interrupt(tmp_path, rows, 11, zero=2)
    resumed = train.run(kit.train_spec(), kit.context(tmp_path, rows, zero=0))
    assert resumed["loss"]["last"] == pytest.approx(uninterrupted[0]["loss"]["last"], rel=1e-5)


def test_a_kill_loses_nothing_but_the_steps_since_the_last_checkpoint(tmp_path, rows, uninterrupted):
    class Killed(BaseException):
        pass

    ctx = kit.context(tmp_path, rows, checkpoint_steps=3)

    def killed(done: int) -> bool:
        if done == 14:
            raise Killed
        return False

    ctx.stopping = killed
    with pytest.raises(Killed):
        train.run(kit.train_spec(), ctx)
    assert [path.name for path in checkpoint.complete(ctx.work)] == ["step-00000009", "step-00000012"]
    assert train.run(kit.train_spec(), kit.context(tmp_path, rows, checkpoint_steps=3))["sha256"] == uninterrupted[0]["sha256"]


def truncate(directory: Path) -> None:
    file = directory / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def flip(directory: Path) -> None:
    file = directory / "rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


TEARS = {
    "cut short": truncate,
    "a bit flipped": flip,
    "file missing": lambda d: (d / "rank-00000.safetensors").unlink(),
    "marker cut short": lambda d: (d / checkpoint.MARKER).write_text('{"files": '),
    "never renamed": lambda d: d.rename(d.parent / f".{d.name}.partial"),
    "no marker": lambda d: (d / checkpoint.MARKER).unlink(),
}


@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_checkpoint_falls_back_to_the_one_before(tmp_path, rows, uninterrupted, tear):
    interrupt(tmp_path, rows, 9, checkpoint_steps=4)
    TEARS[tear](tmp_path / "work" / "step-00000009")
    resumed = train.run(kit.train_spec(), kit.context(tmp_path, rows, checkpoint_steps=4))
    assert resumed["sha256"] == uninterrupted[0]["sha256"]
    assert resumed["notes"][0] == "went on from step 8"
    assert len(resumed["notes"]) == (2 if tear in {"cut short", "a bit flipped", "file missing", "marker cut short"} else 1)


def test_checkpoints_hold_no_frozen_weights_and_are_fenced(tmp_path, rows):
    interrupt(tmp_path, rows, 2)
    saved = checkpoint.latest(tmp_path / "work", 0, 1)
    assert {name.split(".")[1] for name in saved.steps} == {"connector"}

    ctx = stop_after(kit.context(tmp_path / "lost", rows), 2)

    def lost() -> None:
        raise LeaseLost

    ctx.guard = lost
    with pytest.raises(LeaseLost):
        train.run(kit.train_spec(), ctx)
    assert not checkpoint.complete(ctx.work) and not list(ctx.out.iterdir())


def test_unfreezing_moves_the_language_model_and_keeps_the_connectors_moments(tmp_path, rows):
    """The connector's trajectory through a change of engine is that of a plain loop with one AdamW."""
    spec = kit.train_spec(steps=10, phases=[
        {"until": 0.4, "learning_rates": {"connector": 3e-3}},
        {"until": 1.0, "learning_rates": {"connector": 3e-3, "llm": 0.0}},
    ])  # fmt: skip
    one = kit.train_spec(steps=10, phases=[{"until": 1.0, "learning_rates": {"connector": 3e-3}}])
    for zero in (0, 2):
        two_phases = train.run(spec, kit.context(tmp_path / f"two-{zero}", rows, zero=zero))
        one_phase = train.run(one, kit.context(tmp_path / f"one-{zero}", rows, zero=zero))
        assert two_phases["sha256"]["connector.safetensors"] == one_phase["sha256"]["connector.safetensors"]


def test_unfreezing_without_effect_is_an_error(tmp_path, rows, monkeypatch):
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda self, rates: step(self, {**rates, "llm": 0.0} if "llm" in rates else rates))
    with pytest.raises(RuntimeError, match="weights don't move: llm"):
        train.run(kit.train_spec(), kit.context(tmp_path, rows))


def test_what_was_trained_and_nothing_else_is_in_the_artefact(uninterrupted, rows, tmp_path):
    summary, folder = uninterrupted
    assert {path.name for path in (folder / "out").iterdir()} == {"connector.safetensors", "llm.safetensors", "model.json"}
    after = json.loads((folder / "out" / "model.json").read_text())
    assert after["parts"]["llm"]["weights"] == {"stage": "train-test"} and after["parts"]["encoder"]["weights"] == {"fresh": 1}
    loaded = models.build(after, Context.local(tmp_path, {"id": "x", "spec": {}}, {"train-test": folder / "out"}))
    before = models.build(kit.train_spec()["model"], Context.local(tmp_path, {"id": "x", "spec": {}}))
    moved = {name.split(".")[1] for (name, a), b in zip(loaded.named_parameters(), before.parameters()) if not torch.equal(a, b)}
    assert moved == {"connector", "llm"}
    trained = [(row["phase"], row["part"]) for row in summary["frozen"] if row["trainable"]]
    assert trained == [(0, "connector"), (1, "connector"), (1, "llm")]
    assert summary["steps"] == STEPS and summary["samples"] == STEPS * 8 and summary["valid_tokens"] == summary["data"]["learned"]


def test_metrics_say_what_happened(uninterrupted):
    records = metrics(uninterrupted[1])
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert all("train/lr/llm" in record for record in records[SWITCH:]) and "train/lr/llm" not in records[SWITCH - 1]
    assert {"train/loss", "train/tokens_per_second", "train/valid_tokens", "data/wait_share", "train/grad_norm"} <= set(records[0])
    factor = optim.schedule("cosine", STEPS, 0.1)
    assert [record["train/lr/connector"] for record in records] == pytest.approx([3e-3 * factor(step) for step in range(STEPS)])


def test_the_tiny_recipes_loss_curve_is_golden(uninterrupted):
    """Rises in IDENTITY_VERSION go with new golden files: FINEGRID_GOLDEN=write rewrites this one."""
    losses = [record["train/loss"] for record in metrics(uninterrupted[1])]
    if os.environ.get("FINEGRID_GOLDEN") == "write":
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps({"tolerance": 1e-4, "losses": [round(loss, 6) for loss in losses]}, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    assert losses == pytest.approx(golden["losses"], rel=golden["tolerance"])


def test_a_loss_that_is_no_number_names_its_step(tmp_path, rows):
    spec = kit.train_spec(phases=[{"until": 1.0, "learning_rates": {"llm": 1e20}}], warmup=0.0)
    with pytest.raises(Diverged, match=r"step \d+ of 20"):
        train.run(spec, kit.context(tmp_path, rows))
    assert not list((tmp_path / "out").iterdir())


def test_mistakes_in_a_recipe(tmp_path, rows):
    mistakes = {
        "no part 'lm'": {"phases": [{"until": 1.0, "learning_rates": {"lm": 1e-3}}]},
        "`until` rises": {"phases": [{"until": 0.5, "learning_rates": {"llm": 1.0}}, {"until": 0.4, "learning_rates": {"llm": 1.0}}]},
        "the last phase ends at 0.5": {"phases": [{"until": 0.5, "learning_rates": {"llm": 1e-3}}]},
        "trains nothing": {"phases": [{"until": 1.0, "learning_rates": {}}]},
        "unknown schedule": {"schedule": "cosin"},
        "unknown optimizer": {"optimizer": {"name": "sgd"}},
    }
    for said, changes in mistakes.items():
        with pytest.raises(UserError, match=said):
            train.run(kit.train_spec(**changes), kit.context(tmp_path, rows))


def test_schedule_is_hugging_faces():
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = get_cosine_schedule_with_warmup(optimizer, math.ceil(0.03 * 150), 150)
    ours = optim.schedule("cosine", 150, 0.03)
    for step in range(150):
        assert ours(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_phases_cover_all_steps_once():
    for steps in (1, 2, 3, 7, 20, 2181):
        phases = optim.plan_phases(kit.train_spec()["phases"], steps)
        covered = [step for phase in phases for step in range(phase.first, phase.last)]
        assert covered == list(range(steps))


def test_groups_are_by_part_and_never_empty_or_frozen(tmp_path):
    model = kit.vlm(tmp_path)
    models.train_parts(model, {"connector", "llm"})
    groups = optim.parameter_groups(model.parts, {"connector": 1e-3, "llm": 1e-4}, 0.1)
    assert [(g["part"], g["weight_decay"]) for g in groups] == [("connector", 0.1), ("connector", 0.0), ("llm", 0.1), ("llm", 0.0)]
    assert all(p.ndim > 1 for g in groups for p in g["params"] if g["weight_decay"])
    assert sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in model.parameters())


def test_an_engine_that_is_collected_late_leaves_its_successor_alone(tmp_path):
    """DeepSpeed destroys an engine again when it is garbage-collected; the next engine's masters must stay linked."""
    import gc

    model = kit.vlm(tmp_path)
    models.train_parts(model, {"connector"})
    rates = {"connector": 1e-3}

    def engine() -> Engine:
        return Engine(model, kit.load_objective({"name": "next_token"}), optim.parameter_groups(model.parts, rates, 0.0), {}, zero=2)

    first = engine()
    inner = first.engine  # keeps it alive until after the second is made
    first.destroy()
    second = engine()
    inner.__del__()
    del inner, first
    gc.collect()
    assert len(second.fragments()) == second.owned == 4
    second.destroy()
