"""Images: sizes and pixels agree with the peers' processors, limits hold, the layout is what comes out."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets_ray.errors import UserError
from datasets_ray.images import (
    CLIP_MEAN,
    ImageError,
    NativeRecipe,
    SquareRecipe,
    decode,
    image_size,
    layout,
    pixels,
    recipe_from_json,
    recipe_to_json,
)

SIZES = [(40, 40), (97, 41), (33, 120), (64, 31), (200, 199)]


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng([width, height])
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


def encoded(image: Image.Image, format: str = "PNG") -> dict:
    file = io.BytesIO()
    image.save(file, format)
    return {"bytes": file.getvalue(), "path": None}


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_crop_is_clip_image_processor(width, height):
    transformers = pytest.importorskip("transformers")
    processor = transformers.models.clip.image_processing_pil_clip.CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_normalize=False, do_rescale=False
    )
    ours = SquareRecipe(size=32, patch=8).fit(noise(width, height))
    theirs = np.asarray(processor(noise(width, height))["pixel_values"][0]).transpose(1, 2, 0)
    assert np.array_equal(ours, theirs.astype(np.uint8))


def test_crop_is_a_resize_and_a_crop_whatever_is_left_out():
    """Columns that are cropped aren't resized: byte for byte what resizing all of them gives."""
    rng = np.random.default_rng(0)
    for size in (1, 16, 32, 70):
        for width, height in [*SIZES, *rng.integers(2, 150, (12, 2)).tolist()]:
            other = int(size * max(width, height) / min(width, height))
            wide, high = (size, other) if width <= height else (other, size)
            whole = noise(width, height).resize((wide, high), Image.Resampling.BICUBIC)
            left, top = (wide - size) // 2, (high - size) // 2
            expected = np.asarray(whole.crop((left, top, left + size, top + size)))
            assert np.array_equal(SquareRecipe(size=size, patch=1).fit(noise(width, height)), expected), (size, width, height)


def test_a_jpeg_is_decoded_as_it_is_converted():
    data = encoded(noise(33, 20), "JPEG")
    expected = np.asarray(Image.open(io.BytesIO(data["bytes"])).convert("RGB"))
    assert np.array_equal(np.asarray(decode(data)), expected)


@pytest.mark.parametrize(("width", "height"), [s for s in SIZES if s[0] != s[1]])
def test_pad_keeps_the_whole_image_on_the_mean_colour(width, height):
    side = max(width, height)
    out = SquareRecipe(size=side, patch=1, fit_by="pad").fit(noise(width, height))  # no resize, so pixels survive
    left, top = (side - width) // 2, (side - height) // 2
    assert np.array_equal(out[top : top + height, left : left + width], np.asarray(noise(width, height)))
    outside = np.ones((side, side), dtype=bool)
    outside[top : top + height, left : left + width] = False
    assert (out[outside] == [122, 116, 104]).all()  # int(mean * 255) as LLaVA's expand2square


def test_squash_is_a_plain_resize():
    expected = np.asarray(noise(97, 41).resize((16, 16), Image.Resampling.BICUBIC))
    assert np.array_equal(SquareRecipe(size=16, patch=4, fit_by="squash").fit(noise(97, 41)), expected)


def test_native_size_is_qwen2_vls_smart_resize():
    smart_resize = pytest.importorskip("transformers.models.qwen2_vl.image_processing_qwen2_vl").smart_resize
    recipe = NativeRecipe(patch=8, merge=2, min_pixels=32 * 32, max_pixels=96 * 96)
    rng = np.random.default_rng(0)
    for width, height in [*SIZES, *rng.integers(16, 400, (60, 2)).tolist()]:
        high, wide = smart_resize(height, width, factor=16, min_pixels=32 * 32, max_pixels=96 * 96)
        shape = layout(width, height, recipe)
        assert (shape.grid_h * 8, shape.grid_w * 8) == (high, wide)
        assert shape.tokens == shape.grid_h * shape.grid_w // 4


@pytest.mark.parametrize(
    "recipe",
    [SquareRecipe(size=32, patch=8), SquareRecipe(size=32, patch=8, fit_by="pad"), NativeRecipe(8, 2, 32 * 32, 64 * 64)],
    ids=["crop", "pad", "native"],
)
def test_layout_foretells_the_pixels_and_json_round_trips(recipe):
    for width, height in SIZES:
        image = encoded(noise(width, height))
        shape, out = layout(*image_size(image), recipe), pixels(image, recipe)
        assert out.dtype == np.uint8
        assert out.shape == (shape.grid_h * recipe.patch, shape.grid_w * recipe.patch, 3)
    assert recipe_from_json(recipe_to_json(recipe)) == recipe


@pytest.mark.parametrize(("mode", "format"), [("L", "PNG"), ("P", "PNG"), ("CMYK", "JPEG"), ("RGBA", "PNG"), ("LA", "PNG"), ("1", "PNG")])
def test_every_mode_becomes_rgb(mode, format):
    image = decode(encoded(noise(20, 30, "L").convert(mode) if mode == "LA" else noise(20, 30).convert(mode), format))
    assert image.mode == "RGB"
    assert image.size == (20, 30)


def test_sixteen_bits_are_scaled_not_clamped():
    deep = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16))
    assert np.asarray(decode(encoded(deep)))[0, :, 0].tolist() == [0, 127, 255]


def test_what_cannot_be_used_says_why(tmp_path: Path, monkeypatch):
    (tmp_path / "root").mkdir()
    noise(8, 8).save(tmp_path / "outside.png")
    noise(8, 8).save(tmp_path / "root" / "inside.png")
    (tmp_path / "root" / "link.png").symlink_to(tmp_path / "outside.png")
    root = tmp_path / "root"
    assert decode({"bytes": None, "path": "inside.png"}, root).size == (8, 8)
    (tmp_path / "linked").symlink_to(root)
    assert decode({"bytes": None, "path": "inside.png"}, tmp_path / "linked").size == (8, 8)
    (tmp_path / "root-2").mkdir()
    noise(8, 8).save(tmp_path / "root-2" / "inside.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    reasons = {
        "image outside its root": ["../outside.png", "link.png", str(tmp_path / "outside.png"), "../root-2/inside.png"],
        "image missing": ["no.png", "", None, "loop.png", "null\0.png", "."],
    }
    for reason, paths in reasons.items():
        for path in paths:
            with pytest.raises(ImageError) as caught:
                image_size({"bytes": None, "path": path}, root)
            assert caught.value.reason == reason
    cut = encoded(noise(64, 64))["bytes"][:-3000]
    for data, reason in [(b"not an image", "image unreadable"), (cut, "image cut short"), (b"", "image is empty")]:
        with pytest.raises(ImageError) as caught:
            decode({"bytes": data, "path": None})
        assert caught.value.reason == reason
    with pytest.raises(ImageError) as caught:
        decode(encoded(noise(201 * 2, 2)))
    assert caught.value.reason == "image too narrow"
    monkeypatch.setattr("datasets_ray.images.MAX_PIXELS", 100)
    with pytest.raises(ImageError) as caught:
        decode(encoded(noise(11, 11)))
    assert caught.value.reason == "image too large"
    monkeypatch.setattr("datasets_ray.images.MAX_BYTES", 10)
    with pytest.raises(ImageError) as caught:
        decode(encoded(noise(5, 5)))
    assert caught.value.reason == "image too large"


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "round"},
        {"kind": "square", "size": 32},
        {"kind": "square", "size": 4, "patch": 5},
        {"kind": "square", "size": 32, "patch": 8, "fit": "stretch"},
        {"kind": "square", "size": 32, "patch": 8, "pool": 2},
    ],
)
def test_a_wrong_recipe_is_a_user_error(wrong):
    with pytest.raises(UserError):
        recipe_from_json(wrong)


def test_mean_defaults_to_clips():
    assert recipe_from_json({"kind": "square", "size": 32, "patch": 8}).mean == CLIP_MEAN


def test_pixels_beyond_the_last_whole_patch_make_no_token():
    """SigLIP so400m: 384 pixels in patches of 14, as its convolution takes them."""
    recipe = recipe_from_json({"kind": "square", "size": 384, "patch": 14})
    assert recipe.layout(640, 480).tokens == 27 * 27
    assert recipe.fit(Image.new("RGB", (640, 480))).shape == (384, 384, 3)
