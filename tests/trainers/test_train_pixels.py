"""Kept pixels change nothing that is trained: loss curve and weights bit for bit, in the first pass and in later ones."""

from __future__ import annotations

import json
from pathlib import Path

from datasets_ray import fitted, pixels_cache
from datasets_ray.kept import Kept
from datasets_ray.pixels_cache import PixelStore
from tests.trainers import training_kit as kit
from trainers import train


def losses(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["train/loss"] for record in records if "train/loss" in record]


def test_weights_and_losses_are_those_of_the_plain_path(tmp_path, monkeypatch):
    monkeypatch.setattr(fitted, "PIXELS", Kept(0))
    rows = kit.write_captions(tmp_path / "rows", 40)
    spec = kit.train_spec(steps=8, data={**kit.train_spec()["data"], "order": "modality_grouped"})
    store, made = PixelStore(1 << 24, str(tmp_path / "pixels")), {}
    for name in ("off", "first", "later"):
        ctx = kit.context(tmp_path / name, rows)
        ctx.pixels = None if name == "off" else store
        made[name] = train.run(spec, ctx)
    pixels_cache.forget()
    assert made["off"]["pixels"] is None
    images = made["off"]["data"]["images"]
    assert made["first"]["pixels"]["made"] == 30
    assert sum(made["first"]["pixels"].values()) == images
    assert made["later"]["pixels"] == {"found": images, "made": 0, "passed": 0, "damaged": 0}
    for name in ("first", "later"):
        assert made[name]["sha256"] == made["off"]["sha256"]
        assert made[name]["data"] == made["off"]["data"]
        assert losses(tmp_path / name) == losses(tmp_path / "off")
