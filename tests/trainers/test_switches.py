"""Law: every optimisation, turned off by its switch, gives the same loss, gradient and answers; and the switch turns it off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import parquet
from torch.optim import adam

from datasets_ray.errors import UserError
from datasets_ray.pixels_cache import PixelStore
from tests.trainers import evaluation_kit, tiny_models
from tests.trainers import training_kit as kit
from trainers import models, predict, switches, train
from trainers.batch import to_device
from trainers.context import Context
from trainers.models import attention, lean, short_attention, written_out
from trainers.objectives import next_token
from trainers.objectives.next_token import NextToken

WITNESSES: dict[str, tuple[Any, str, tuple[str, ...]]] = {
    "segments": (attention.Segments, "_bucketed", ("layers",)),
    "logits": (next_token, "token_loss_sum", ()),
    "lean": (lean, "_rotate", ("layers",)),
    "layers": (written_out, "run", ()),
    "products": (short_attention, "_scores", ()),
}
"""Switch → what runs only with the optimisation, as (where, name), and what has to be off for it to be seen."""


def calls(monkeypatch: pytest.MonkeyPatch, where: Any, name: str) -> list[int]:
    """Grows by one whenever the function is called."""
    seen: list[int] = []
    real = getattr(where, name)

    def counted(*args: Any, **more: Any) -> Any:
        seen.append(1)
        return real(*args, **more)

    monkeypatch.setattr(where, name, counted)
    return seen


def passed(folder: Path, off: tuple[str, ...], capacity: int = 1000) -> dict[str, torch.Tensor]:
    """Loss and gradients of a step of six samples, two of text alone, from fresh weights."""
    with switches.without(off):
        model = kit.vlm(folder)
        models.train_parts(model, {"connector", "llm"})
        objective, (rows, *_) = NextToken(), kit.steps_of_samples(1, 6)
        loss = torch.zeros(())
        for batch in kit.micro_batches(rows, ["text"], capacity, 0, 1):
            share = objective.forward(model, to_device(batch)).loss_sum / batch.valid_tokens
            share.backward()
            loss += share.detach()
    return {"loss": loss, **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys() and len(wanted) > 20
    for name, value in wanted.items():
        off = float((found[name] - value).abs().max())
        assert off <= 1e-6 + 2e-5 * float(value.abs().max()), f"{name}: {off}"


@pytest.mark.parametrize("name", WITNESSES)
def test_loss_and_gradient_are_the_plain_path_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    where, function, also = WITNESSES[name]
    seen = calls(monkeypatch, where, function)
    wanted = passed(tmp_path, also)
    assert seen, "the optimisation runs"
    seen.clear()
    assert_same(passed(tmp_path, (*also, name)), wanted)
    assert not seen, "and not without it"


def test_all_of_them_together(tmp_path: Path) -> None:
    assert_same(passed(tmp_path, ("all",), capacity=1), passed(tmp_path, ()))


def test_a_frozen_part_changes_no_other_s_gradient(tmp_path: Path) -> None:
    """What is frozen keeps no gradient of its weights; the recipe is its switch."""
    gradients = {}
    for trained in (("connector",), ("connector", "llm", "encoder")):
        model = kit.vlm(tmp_path)
        models.train_parts(model, set(trained))
        (rows, *_) = kit.steps_of_samples(1, 6)
        (batch,) = kit.micro_batches(rows, ["text"], 1000, 0, 1)
        NextToken().forward(model, to_device(batch)).loss_sum.backward()
        assert model.parts["connector"][0].weight.grad is not None
        assert (model.parts["llm"].lm_head.weight.grad is None) == ("llm" not in trained)
        gradients[trained] = {name: p.grad for name, p in model.parts["connector"].named_parameters()}
    for frozen, learning in zip(*(one.values() for one in gradients.values()), strict=True):
        torch.testing.assert_close(frozen, learning, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["vlm", "qwen2_vl"])
def test_text_alone_needs_no_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    spec = tiny_models.vlm_spec() if family == "vlm" else tiny_models.qwen2_vl_spec()
    model = models.build(spec, tiny_models.context(tmp_path))
    models.train_parts(model, {"connector", "llm"})
    seen = calls(monkeypatch, type(model.parts["encoder"]), "forward")
    found = {}
    for off in ((), ("images",)):
        with switches.without(off):
            model.zero_grad()
            features = model.embed_images(None, None) if family == "qwen2_vl" else model.embed_images(None)
            assert len(features) == 0
            features.sum().backward()
            found[off] = (len(seen), [p.grad.clone() for p in model.parts["connector"].parameters()])
    assert found[()][0] == 0 and found[("images",)][0] == 1
    assert all(not gradient.any() for _, gradients in found.values() for gradient in gradients)


def test_the_fused_step_is_the_plain_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = calls(monkeypatch, adam, "_fused_adam")
    job = {"objective": {"name": "next_token"}, "capacity": 1000, "steps": 8, "samples": 4, "zero": 0}
    wanted = kit.run(job, tmp_path)
    assert len(seen) == 16, "two groups"
    with switches.without(["fused"]):
        found = kit.run(job, tmp_path)
    assert len(seen) == 16, "two groups"
    assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
    assert found["losses"][-1] < found["losses"][0]


def test_a_train_stage_does_without_what_its_profile_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of training by the plain path, as `resources.disable: [all]` has it."""
    rows, made = kit.write_captions(tmp_path / "rows", 40), {}
    spec = kit.train_spec(steps=10)
    most: list[int] = []
    real = train.to_device

    def counted(batch: Any, *more: Any) -> Any:
        most.append(max(len(pack.sample) for pack in batch.streams.values()))
        return real(batch, *more)

    monkeypatch.setattr(train, "to_device", counted)
    for plain in ([], ["all"]):
        ctx = kit.context(tmp_path / str(len(plain)), rows, disable=plain)
        ctx.pixels = PixelStore(1 << 24, str(tmp_path / "pixels"))
        most.clear()
        summary = train.run(spec, ctx)
        records = [json.loads(line) for line in (tmp_path / str(len(plain)) / "metrics.jsonl").read_text().splitlines()]
        made[bool(plain)] = [record["train/loss"] for record in records if "train/loss" in record]
        assert (max(most) == 1) == bool(plain), "samples share micro-batches, or don't"
        assert (summary["pixels"] is None) == bool(plain)
    assert len(made[True]) == 10 and made[True] == pytest.approx(made[False], rel=1e-4)
    assert switches.on("packs"), "the switch is the stage's"


def test_questions_are_answered_alike_without(tmp_path: Path) -> None:
    asked = evaluation_kit.questions(tmp_path / "asked", 40)
    model = evaluation_kit.talkative(tmp_path / "talkative")
    found, read = {}, {}
    for plain in ((), ("offsets",), ("prefixes",), ("all",)):
        spec: dict[str, Any] = {
            "model": model, "questions": "asked", "image": evaluation_kit.IMAGE, "suffix": evaluation_kit.SUFFIX,
            "method": ["first_token", "likelihood"], "max_new_tokens": 4, "precision": "fp32",
        }  # fmt: skip
        inputs = {"asked": asked, "talkative": tmp_path / "talkative"}
        ctx = Context.local(tmp_path / "-".join(("p", *plain)), {"id": "p", "spec": spec, "runtime": {"disable": list(plain)}}, inputs)
        summary = predict.run(spec, ctx)
        read[plain] = summary["read_tokens"]
        table = parquet.read_table(ctx.out / "predictions.parquet").to_pydict()
        found[plain] = {name: table[name] for name in ("text", "likelihood_text_raw_letter", "likelihood_letter_raw_letter")}
    assert found[()] == found[("offsets",)] == found[("prefixes",)] == found[("all",)]
    assert read[()] == read[("offsets",)] < read[("prefixes",)] == read[("all",)] == summary["prompt_tokens"]


def test_a_misspelt_switch_says_which_one_is_meant() -> None:
    with pytest.raises(UserError, match="no optimisation is called 'segmets'") as caught, switches.without(["segmets"]):
        pass
    assert "segments" in caught.value.hint
    with switches.without(["lean"]), switches.without(["packs"]):
        assert not switches.on("lean") and not switches.on("packs") and switches.on("fused")
    assert all(switches.on(name) for name in switches.SWITCHES)


LAWS = {
    "segments": "test_loss_and_gradient_are_the_plain_path_s", "logits": "test_loss_and_gradient_are_the_plain_path_s",
    "lean": "test_loss_and_gradient_are_the_plain_path_s", "layers": "test_loss_and_gradient_are_the_plain_path_s",
    "products": "test_loss_and_gradient_are_the_plain_path_s", "images": "test_text_alone_needs_no_encoder",
    "fused": "test_the_fused_step_is_the_plain_one", "packs": "test_a_train_stage_does_without_what_its_profile_names",
    "pixels": "test_a_train_stage_does_without_what_its_profile_names", "features": "test_train_features",
    "offsets": "test_questions_are_answered_alike_without", "prefixes": "test_questions_are_answered_alike_without",
}  # fmt: skip
"""Switch → the test that turns it off, or the file whose tests do."""


def test_every_switch_has_its_law() -> None:
    assert LAWS.keys() == switches.SWITCHES.keys()
    assert {name for name, law in LAWS.items() if "plain_path_s" in law} == WITNESSES.keys()
    assert all(law in globals() or (Path(__file__).parent / f"{law}.py").is_file() for law in LAWS.values())
