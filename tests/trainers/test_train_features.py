"""Law: kept encoder outputs change nothing that is trained. Losses and weights are, bit for bit, those of a stage that encodes each image
alone, whatever was found, made, damaged or interrupted; within rounding those of a stage that encodes a micro-batch at a time."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from datasets_ray import features_cache, fitted, pixels_cache
from datasets_ray.features_cache import FeatureCache
from datasets_ray.images import recipe_from_json
from datasets_ray.kept import Kept
from datasets_ray.pixels_cache import PixelStore
from tests.trainers import tiny_models
from tests.trainers import training_kit as kit
from trainers import features, models, train
from trainers.context import Context, Interrupted

STEPS = 6


@pytest.fixture(autouse=True)
def nothing_open(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(fitted, "PIXELS", Kept(0))
    yield
    features_cache.forget()
    pixels_cache.forget()


def spec_of(seed: int = 0, **changes: Any) -> dict[str, Any]:
    """A stage whose encoder's last bits depend on what else is in its batch (width 96)."""
    spec = kit.train_spec(steps=STEPS, **changes)
    config = {**kit.CLIP, "vision_cfg": {**kit.VISION, "width": 96, "layers": 3, "head_width": 32}}
    spec["model"]["parts"]["encoder"] = {"builder": "open_clip", "config": config, "weights": {"fresh": seed}}
    return spec


def stage(folder: Path, rows: Path, kept: bool = True, spec: Any = None, **runtime: Any) -> tuple[dict[str, Any], list[float]]:
    """(summary, losses) of a stage; its features lie beside `folder`."""
    summary = train.run(spec or spec_of(), context(folder, rows, kept, **runtime))
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return summary, [record["train/loss"] for record in records if "train/loss" in record]


def context(folder: Path, rows: Path, kept: bool = True, **runtime: Any) -> Context:
    ctx = kit.context(folder, rows, features=kept, **runtime)
    ctx.features = PixelStore(1 << 24, str(folder.parent / "features"))
    return ctx


def test_weights_and_losses_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = kit.write_captions(tmp_path / "rows", 40)
    alone, curve = stage(tmp_path / "alone", rows, False, disable=["packs"])
    batched, batched_curve = stage(tmp_path / "batched", rows, False)
    assert alone["features"] is batched["features"] is None
    images = alone["data"]["images"]

    one, one_curve = stage(tmp_path / "one", rows, disable=["packs"])
    assert one["sha256"] == alone["sha256"] and one_curve == curve, "an image a micro-batch: bit for bit what isn't kept"
    made = one["features"]["made"]  # batches are made ahead: an image asked for twice meanwhile is encoded twice
    assert made >= 30 and one["features"] == {"found": images - made, "made": made, "passed": 0, "damaged": 0}

    for path in (tmp_path / "features").iterdir():
        path.rename(path.with_name("0" * 24))
    features_cache.forget()
    first, first_curve = stage(tmp_path / "first", rows)
    assert first["features"]["made"] > 0 and sum(first["features"].values()) == images
    assert first_curve == pytest.approx(batched_curve, rel=1e-4)

    monkeypatch.setattr(fitted, "fresh", lambda *_: pytest.fail("found features need no pixels"))
    later, later_curve = stage(tmp_path / "later", rows)
    assert later["features"] == {"found": images, "made": 0, "passed": 0, "damaged": 0}
    assert later["sha256"] == first["sha256"] and later_curve == first_curve and later["data"] == first["data"]
    assert first["compute"]["tflops"]["encoder"] > later["compute"]["tflops"]["encoder"] == 0.0
    assert all(later["compute"]["tflops"][part] == batched["compute"]["tflops"][part] > 0 for part in ("connector", "llm"))


def test_half_of_them_lost_or_damaged(tmp_path: Path) -> None:
    rows, spec = kit.write_captions(tmp_path / "rows", 40), spec_of()
    first, curve = stage(tmp_path / "first", rows)
    ctx = context(tmp_path / "model", rows)
    store = features.store_of(models.build(spec["model"], ctx), ctx)
    assert store is not None
    cache = FeatureCache(store, str(rows), recipe_from_json(spec["data"]["image"]))
    written = [number for number, entry in enumerate(cache.entries) if entry["written"]]
    assert len(written) == 30 <= first["features"]["made"]
    cache.entries["written"][written[::3]] = 0
    cache.entries["check"][written[1::3]] += 1
    second, again = stage(tmp_path / "second", rows)
    assert second["features"]["made"] >= len(written[::3]) and second["features"]["damaged"] >= len(written[1::3])
    assert second["sha256"] == first["sha256"] and again == curve
    assert cache.entries["written"][written].all()


def test_a_stage_that_is_resumed_ends_alike(tmp_path: Path) -> None:
    """With features found that it left itself, in the second phase, where the encoder isn't in the checkpoint."""
    rows = kit.write_captions(tmp_path / "rows", 40)
    (tmp_path / "a").mkdir()
    whole, curve = stage(tmp_path / "a" / "whole", rows)
    ctx = context(tmp_path / "stopped", rows)
    ctx.stopping = lambda done: done == 3
    with contextlib.suppress(Interrupted):
        train.run(spec_of(), ctx)
    resumed, losses = stage(tmp_path / "stopped", rows)
    assert resumed["notes"] == ["went on from step 3"] and resumed["features"]["found"] > 0
    assert resumed["sha256"] == whole["sha256"] and losses == curve


def test_other_weights_have_features_of_their_own(tmp_path: Path) -> None:
    rows = kit.write_captions(tmp_path / "rows", 40)
    stage(tmp_path / "one", rows)
    other, _ = stage(tmp_path / "other", rows, spec=spec_of(seed=1))
    assert other["features"]["made"] > 0 and len(list((tmp_path / "features").iterdir())) == 2
    again, _ = stage(tmp_path / "again", rows, spec=spec_of(seed=1))
    assert again["features"]["made"] == 0 and len(list((tmp_path / "features").iterdir())) == 2


def test_what_decides_an_output_is_part_of_the_identity(tmp_path: Path) -> None:
    """Not only tensors: the same ones under another activation, head count or normalisation answer otherwise."""
    rows, spec = kit.write_captions(tmp_path / "rows", 4), spec_of()
    ctx, image = context(tmp_path / "stage", rows), spec["data"]["image"]

    def known(**vision: Any) -> str:
        made = spec_of()["model"]
        mean, config = vision.pop("mean", image["mean"]), made["parts"]["encoder"]["config"]
        made["parts"]["encoder"]["config"] = {**config, **{k: vision.pop(k) for k in ("quick_gelu",) if k in vision}}
        made["parts"]["encoder"]["config"]["vision_cfg"] = {**config["vision_cfg"], **vision}
        store = features.store_of(models.build(made, ctx, image={**image, "mean": mean}), ctx)
        assert store is not None
        return store.encoder

    found = [known(), known(quick_gelu=True), known(head_width=48), known(mean=[0.4, 0.5, 0.5])]
    assert len(set(found)) == 4 and known() == found[0]


def test_an_encoder_that_trains_in_any_phase_keeps_nothing(tmp_path: Path) -> None:
    rows = kit.write_captions(tmp_path / "rows", 40)
    phases = [{"until": 0.5, "learning_rates": {"connector": 1e-3}}, {"until": 1.0, "learning_rates": {"connector": 1e-3, "encoder": 1e-3}}]
    spec = spec_of(phases=phases)
    plain, curve = stage(tmp_path / "plain", rows, False, spec)
    asked, again = stage(tmp_path / "asked", rows, True, spec)
    assert asked["features"] is None and asked["notes"] == ["features aren't kept: the encoder trains"]
    assert asked["sha256"] == plain["sha256"] and again == curve and not (tmp_path / "features").exists()


def test_dropout_is_noticed(tmp_path: Path) -> None:
    class Dropping(nn.Module):
        def __init__(self, share: float) -> None:
            super().__init__()
            self.image_size, self.map, self.drop = 4, nn.Linear(3, 8), nn.Dropout(share)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.drop(self.map(images.flatten(1, 2) / 255))

    ctx = context(tmp_path / "stage", tmp_path)
    found = [features.store_of(SimpleNamespace(parts={"encoder": e}, encoder=e), ctx) for e in (Dropping(0.0).eval(), Dropping(0.5).eval())]
    assert found[1] is None and found[0] is not None
    assert (found[0].tokens, found[0].token_bytes, found[0].dtype) == (16, 32, "float32")


def test_its_switch_and_a_run_without_room_do_without(tmp_path: Path) -> None:
    rows = kit.write_captions(tmp_path / "rows", 40)
    off, _ = stage(tmp_path / "off", rows, disable=["features"])
    assert off["features"] is None and off["notes"] == []
    ctx = kit.context(tmp_path / "nowhere", rows, features=True)
    assert train.run(spec_of(), ctx)["features"] is None


def test_a_stage_that_can_not_keep_them_says_why(tmp_path: Path) -> None:
    square, native = recipe_from_json(spec_of()["data"]["image"]), recipe_from_json(tiny_models.NATIVE)
    one, two = context(tmp_path / "one", tmp_path, zero=3), context(tmp_path / "two", tmp_path, zero=3)
    two.world = 2
    assert features.why_not(spec_of(), one, square) is None
    assert "under ZeRO 3 all ranks run the encoder together" in (features.why_not(spec_of(), two, square) or "")
    assert {features.why_not(spec_of(), one, recipe) for recipe in (native, None)} == {"features are kept of images of one size only"}
