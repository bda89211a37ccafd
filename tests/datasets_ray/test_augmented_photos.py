"""Seeded croppings of photographs, and the shares of kinds among instructions, on small folders made here."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets_ray.errors import UserError
from datasets_ray.photos import augmented
from datasets_ray.rows import RowTable
from datasets_ray.sources import build

NAMES = ["Bengal_1", "Bengal_2", "pug_1", "boxer_1", "beagle_1", "Birman_1"]
CAPTIONS = {"source": "pets", "part": "captions", "seed": 3}


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    folder = tmp_path / "oxford-iiit-pet"
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    for part in ("trainval", "test"):
        (folder / "annotations" / f"{part}.txt").write_text("".join(f"{name} 1 {1 + name[0].islower()} 1\n" for name in NAMES))
    for seed, name in enumerate(NAMES):
        coarse = np.random.default_rng(seed).integers(0, 255, (6, 9, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((120, 80)).save(folder / "images" / f"{name}.jpg")
    return tmp_path


def made(root: Path, out: Path, **keys: object) -> tuple[dict, list[dict]]:
    manifest = build({**CAPTIONS, **keys}, out, lambda _: out, str(root))
    return manifest, list(RowTable(out))


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(float)


def test_an_augmented_row_differs_from_the_plain_one_only_in_its_image(pets, tmp_path):
    plain, before = made(pets, tmp_path / "plain", rows=18)
    manifest, after = made(pets, tmp_path / "augmented", rows=18, augment=24)
    assert [{**r, "images": 0} for r in before] == [{**r, "images": 0} for r in after]
    assert all(r["images"][0]["path"] is None and decoded(r["images"][0]["bytes"]).shape == (24, 24, 3) for r in after)
    assert len({r["images"][0]["bytes"] for r in after}) == 18
    assert manifest["photos"] == plain["photos"] == len(NAMES) and manifest["rows"] == 18


def test_a_row_is_the_same_whatever_stands_around_it(pets, tmp_path):
    _, few = made(pets, tmp_path / "few", rows=7, augment=24)
    _, many = made(pets, tmp_path / "many", rows=20, augment=24)
    _, other = made(pets, tmp_path / "other", rows=7, augment=24, seed=4)
    assert few == many[:7]
    assert {r["images"][0]["bytes"] for r in few}.isdisjoint(r["images"][0]["bytes"] for r in other)


def test_crops_are_squares_of_the_photo_in_its_own_light():
    ramp = np.zeros((40, 80, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.linspace(40, 200, 80)[None].astype(np.uint8), np.linspace(40, 200, 40)[:, None].astype(np.uint8)
    flips, lights, lefts = [], [], []
    for seed in range(60):
        pixels = decoded(augmented(Image.fromarray(ramp), 16, np.random.default_rng(seed)))
        across, down = pixels[8, -1, 0] - pixels[8, 0, 0], pixels[-1, 8, 1] - pixels[0, 8, 1]
        # a side of 20 to 40 of 80 pixels across, of 40 down, times the light
        assert 0.85 * 160 * (19 / 79) * 0.85 < abs(across) < 1.15 * 160 * (40 / 79) * 1.1
        assert 0.85 * 160 * (19 / 39) * 0.85 < down < 1.15 * 160 * 1.1
        flips.append(across < 0)
        lights.append(down / abs(across))
        lefts.append(min(pixels[8, 0, 0], pixels[8, -1, 0]))
    assert 15 < sum(flips) < 45
    assert np.allclose(lights, 79 / 39, rtol=0.25)  # squares: the ramp down is as much steeper as the photo is wider
    assert max(lefts) - min(lefts) > 40


def test_a_photo_that_cannot_be_read_is_counted(pets, tmp_path):
    (pets / "oxford-iiit-pet" / "images" / "pug_1.jpg").write_bytes(b"")
    manifest, rows = made(pets, tmp_path / "out", rows=12, augment=24)
    assert manifest["dropped"] == {"image is empty": 2} and len(rows) == 10


def test_shares_of_short_answers_and_of_questions_without_a_photo(pets, tmp_path):
    def kinds(**keys: float) -> tuple[float, float, float]:
        _, rows = made(pets, tmp_path / str(keys), part="instructions", rows=300, **keys)
        asked = [r["messages"][0]["text"] for r in rows]
        texts = sum(not r["images"] for r in rows)
        short = sum("single word or phrase" in text for text in asked)
        return short / 300, texts / 300, 1 - (short + texts) / 300

    assert kinds(short=1, text_only=0) == (1, 0, 0)
    assert kinds(short=0, text_only=1)[1] == 1
    assert kinds(short=0.5, text_only=0.25) == pytest.approx((0.5, 0.25, 0.25), abs=0.09)
    assert kinds() == kinds(short=0.1, text_only=0.2) == pytest.approx((0.1, 0.2, 0.7), abs=0.07)


@pytest.mark.parametrize(("wrong", "told"), [
    ({"augment": 24, "part": "labelled"}, "part 'labelled' can't be augmented"),
    ({"augment": 24, "split": "test"}, "test part are never augmented"),
    ({"augment": True}, "augment: True"), ({"augment": 4}, "8 to 1024"), ({"augment": 2000}, "8 to 1024"),
    ({"part": "instructions", "short": 1.5}, "short: 1.5"), ({"part": "instructions", "text_only": "some"}, "text_only: 'some'"),
    ({"part": "instructions", "short": 0.6, "text_only": 0.6}, "exceed 1"),
])
def test_mistakes_are_named(wrong, told, pets, tmp_path):
    with pytest.raises(UserError, match=told):
        made(pets, tmp_path / "out", **wrong)
