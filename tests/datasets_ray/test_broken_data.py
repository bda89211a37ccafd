"""Kinds of broken data: each is a clear count or one clear error, and every other row is kept."""

from __future__ import annotations

import json
import os
from collections import Counter

import numpy as np
import pytest

from datasets_ray.errors import UserError
from datasets_ray.images import decode, image_size, verdict
from datasets_ray.jsonlist import records
from datasets_ray.policy import LEAST
from datasets_ray.sources import build
from tests.datasets_ray.releases import BROKEN, FINE, captioned, llava_list, make, parquet, picture, pixmo_table, put, turns

SPEC = {"source": "llava_json", "file": "LLaVA-Pretrain/list.json"}


def photos(root, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        put(root / "LLaVA-Pretrain" / name, data)
    llava_list(root, [captioned(name, name) for name in files])


@pytest.mark.parametrize("verify", ["decode", "header"])
def test_broken_images_are_counted_and_all_others_kept(verify, tmp_path):
    photos(tmp_path, {**FINE, **{name: data for name, (data, _) in BROKEN.items()}})
    manifest, rows = make({**SPEC, "verify": verify}, tmp_path, tmp_path / "out")
    cut = {"cut.jpg", "cut.png"} if verify == "header" else set()  # a header can't tell
    assert {r["id"] for r in rows} == FINE.keys() | cut
    assert manifest["dropped"] == Counter(reason for name, (_, reason) in BROKEN.items() if name not in cut)
    assert {(d["item"], d["reason"]) for d in manifest["dropped_examples"]} == {(k, v[1]) for k, v in BROKEN.items() if k not in cut}


def test_unusual_images_decode(tmp_path):
    for name, data in FINE.items():
        image = decode({"bytes": data})
        assert image.mode == "RGB" and image.size == image_size({"bytes": data}), name
    assert decode({"bytes": FINE["one.png"]}).size == (1, 1)
    assert decode({"bytes": FINE["turned.jpg"]}).size == (12, 8)  # as stored: LLaVA doesn't turn it either
    assert decode({"bytes": FINE["animated.gif"]}).size == (9, 7)


@pytest.mark.parametrize("name", ["plain.jpg", "palette.png", "alpha.webp", "animated.gif", "deep.png", "tiff"])
def test_damage_never_escapes_as_another_error(name):
    data = picture(size=(40, 30), format="TIFF") if name == "tiff" else FINE[name]
    rng = np.random.default_rng(7)
    for _ in range(150):
        damaged = bytearray(data[: int(rng.integers(1, len(data) + 1))])
        for at in rng.integers(0, len(damaged), 6):
            damaged[at] = int(rng.integers(0, 256))
        assert isinstance(verdict({"bytes": bytes(damaged)}), str)


def test_paths_that_lead_nowhere_or_out_are_counted(tmp_path):
    folder = tmp_path / "data" / "LLaVA-Pretrain"
    put(tmp_path / "data" / "secret.jpg", picture())
    put(folder / "fine.jpg", picture())
    (folder / "out.jpg").symlink_to(tmp_path / "data" / "secret.jpg")
    (folder / "in.jpg").symlink_to("fine.jpg")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "annexed.jpg").symlink_to(".git/annex/objects/XX/SHA256E-s1--00.jpg")
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    expected = {
        "../secret.jpg": "image outside its root", str(tmp_path / "data" / "secret.jpg"): "image outside its root",
        "out.jpg": "image outside its root", "gone.jpg": "image missing", "loop.jpg": "image missing", "folder.jpg": "image missing",
        "pipe.jpg": "image missing", "nul\0.jpg": "image missing", "x" * 300 + ".jpg": "image missing", ".": "image missing",
        "annexed.jpg": "image is a git-annex pointer",
    }  # fmt: skip
    llava_list(tmp_path / "data", [captioned(path, path) for path in ["fine.jpg", "in.jpg", *expected]])
    manifest, rows = make(SPEC, tmp_path / "data", tmp_path / "out")
    assert [r["id"] for r in rows] == ["fine.jpg", "in.jpg"]
    assert manifest["dropped"] == Counter(expected.values())


def test_a_broken_image_among_several_takes_its_record_only(tmp_path):
    photos(tmp_path, {"a.jpg": picture(1), "b.jpg": b"", "c.jpg": picture(2)})
    said = turns("<image><image> Which?", "The first.")
    llava_list(tmp_path, [{"id": "ab", "image": ["a.jpg", "b.jpg"], "conversations": said},
                          {"id": "ac", "image": ["a.jpg", "c.jpg"], "conversations": said}])  # fmt: skip
    manifest, rows = make(SPEC, tmp_path, tmp_path / "out")
    assert [r["id"] for r in rows] == ["ac"] and manifest["dropped"] == {"image is empty": 1}


LIST = json.dumps([captioned(str(k), "a.jpg", "é" * 40) for k in range(4)], ensure_ascii=False).encode()


@pytest.mark.parametrize(("data", "told"), [
    (LIST[:-200], r"no whole JSON list \(record 3, byte \d+: .*\n.*download it again"),
    (LIST[:-1], r"no whole JSON list \(record 4, byte \d+: the list has no end"),
    (LIST[:-1].rstrip(b"}") + b"]", "record 3, byte"),
    (LIST.replace(b'}, {"id"', b'} {"id"', 1), "record 1, byte .*a comma were expected"),
    (b"[" + LIST[1:-1] + b",]", "record 4, byte"),
    (b'["a", "b"]', "record 0, byte 1: a record"),
    (LIST.replace(b"\n", b"") + LIST, "goes on after its list"),
    (b'{"id": 1}\n{"id": 2}\n', r"not a JSON list .*\n.*one list"),
    (BROKEN["pointer.jpg"][0], r"a git-LFS pointer, not the file itself\n.*git lfs pull"),
    (BROKEN["page.jpg"][0], "is a web page, not the file itself"),
    (b"", "is empty"),
    (LIST[:60] + b"\xff" + LIST[60:], "not UTF-8 .byte 60"),
    (b"[" + b'{"a":' * 100_000, "record 0, byte 1"),
])  # fmt: skip
def test_a_broken_list_is_one_clear_error(data, told, tmp_path):
    put(tmp_path / "LLaVA-Pretrain" / "a.jpg", picture())
    put(tmp_path / "LLaVA-Pretrain" / "list.json", data)
    with pytest.raises(UserError, match=told):
        make(SPEC, tmp_path, tmp_path / "out")
    assert len(list(records(put(tmp_path / "whole.json", LIST)))) == 4


def many(root, missing: int = 0, cut: int = 0, count: int = 120) -> None:
    names = [f"{k:03d}.jpg" for k in range(count)]
    photos(root, {name: picture(k % 3) for k, name in enumerate(names)})
    for name in names[:missing]:
        (root / "LLaVA-Pretrain" / name).unlink()
    for name in names[missing : missing + cut]:
        put(root / "LLaVA-Pretrain" / name, BROKEN["cut.jpg"][0])


def test_the_releases_count_is_held(tmp_path):
    many(tmp_path, missing=2)
    assert make({**SPEC, "expect": 120}, tmp_path, tmp_path / "same")[0]["rows"] == 118
    with pytest.raises(UserError, match=r"has 120 records, its release has 558,128 \(cut short\)\n.*allow_subset: true"):
        make({**SPEC, "expect": 558_128}, tmp_path, tmp_path / "less")
    with pytest.raises(UserError, match=r"has 120 records, its release has 100 \(more than"):
        make({**SPEC, "expect": 100}, tmp_path, tmp_path / "more")
    manifest, _ = make({**SPEC, "expect": 558_128, "allow_subset": True}, tmp_path, tmp_path / "subset")
    assert manifest["subset"] == {"expected": 558_128, "found": 118} and manifest["records"] == 120
    whole, _ = make({**SPEC, "expect": 120, "allow_subset": True}, tmp_path, tmp_path / "images")
    assert whole["subset"] == {"expected": 120, "found": 118}  # the list is whole, two images aren't there
    manifest, _ = make({**SPEC, "expect": 558_128, "rows": 5}, tmp_path, tmp_path / "rows")
    assert "subset" not in manifest and manifest["dropped"] == {"image missing": 2}


def test_too_much_lost_is_an_error_with_reasons_examples_and_the_way_out(tmp_path):
    many(tmp_path, missing=9, cut=4)
    assert make({**SPEC, "most_dropped": 0.11}, tmp_path, tmp_path / "fine")[0]["rows"] == 107
    with pytest.raises(UserError) as caught:
        make({**SPEC, "most_dropped": 0.1}, tmp_path, tmp_path / "out")
    told = str(caught.value)
    assert "13 of 120 records (10.8 %) can't be used, 10 % may be (most_dropped)" in told
    assert "image missing 9, image cut short 4; for example 000.jpg (image missing), 009.jpg (image cut short), 001.jpg" in told
    assert told.count(".jpg (image ") == 5 and "raise `most_dropped`" in told and "put the images where the list says" in told
    assert make({**SPEC, "most_dropped": 0.04, "allow_subset": True}, tmp_path, tmp_path / "subset")[0]["rows"] == 107
    with pytest.raises(UserError, match=r"4 of 120 records \(3\.3 %\)"):
        make({**SPEC, "most_dropped": 0.03, "allow_subset": True}, tmp_path, tmp_path / "corrupt")
    with pytest.raises(UserError, match="has 120 records(.|\n)*13 of 120"):
        make({**SPEC, "most_dropped": 0.1, "expect": 121}, tmp_path, tmp_path / "both")
    assert make({**SPEC, "most_dropped": 0.0, "rows": LEAST - 1}, tmp_path, tmp_path / "tried")[0]["rows"] == LEAST - 14
    with pytest.raises(UserError, match="13 of 110"):
        make({**SPEC, "most_dropped": 0.1, "rows": 110}, tmp_path, tmp_path / "limited")


def test_nothing_left_is_an_error_by_itself(tmp_path):
    many(tmp_path, missing=5, count=5)
    for more in ({}, {"allow_subset": True}):
        with pytest.raises(UserError, match=r"all 5 records can't be used \(image missing 5; for example 000\.jpg"):
            make({**SPEC, **more}, tmp_path, tmp_path / "out")
    manifest, rows = make({**SPEC, "rows": 1}, tmp_path, tmp_path / "tried")
    assert not rows and manifest["dropped"] == {"image missing": 1}


def test_the_policy_holds_for_every_source(tmp_path):
    spec = {"source": "specimens", "part": "corpus", "rows": 4, "set": "flowers"}
    assert build({**spec, "most_dropped": 0.0}, tmp_path / "a", lambda _: tmp_path, None)["rows"] == 4
    parquet(tmp_path / "pixmo-cap" / "data" / "0.parquet", pixmo_table(["http://a.example/1"] * 3))
    (tmp_path / "pixmo-cap" / "images").mkdir()
    with pytest.raises(UserError, match="all 3 records.*not downloaded 3(.|\n)*downloader"):
        make({"source": "pixmo"}, tmp_path, tmp_path / "out")


@pytest.mark.parametrize("wrong", [{"expect": 0}, {"expect": "558K"}, {"most_dropped": 5}, {"most_dropped": True}, {"allow_subset": "yes"}])
def test_mistakes_in_the_policy_are_named(wrong, tmp_path):
    with pytest.raises(UserError, match=next(iter(wrong))):
        make({**SPEC, **wrong}, tmp_path, tmp_path / "out")


@pytest.mark.slow
def test_by_ray_the_files_are_the_same_and_errors_stay_clear(tmp_path, monkeypatch):
    from datasets_ray import shards
    from datasets_ray.download import download
    from datasets_ray.fetch import Limits

    monkeypatch.setattr(shards, "SHARD", 16)
    many(tmp_path, missing=9, cut=4, count=60)
    plain, _ = make(SPEC, tmp_path, tmp_path / "plain")
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    try:
        spread, rows = make(SPEC, tmp_path, tmp_path / "spread")
        assert spread == plain and len(plain["shards"]) == 4 and len(rows) == 47
        with pytest.raises(UserError, match="shard 2 is damaged$"):
            shards.write_sharded(60, Damaged(), tmp_path / "damaged")
        lost = download([f"file:///{k}" for k in range(600)], tmp_path / "images", Limits(retries=0), workers=32)
        assert len(lost) == 600 and {r["reason"] for r in lost.values()} == {"not an http address"}
    finally:
        ray.shutdown()


class Damaged:
    def __call__(self, start: int, stop: int):
        from datasets_ray.shards import Made

        if start == 32:
            raise UserError("shard 2 is damaged")
        return Made([])
