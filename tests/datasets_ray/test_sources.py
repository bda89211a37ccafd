"""Sources of photographs against the real data where it lies, and against small broken folders made here."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets_ray.errors import UserError
from datasets_ray.rows import RowTable, row, write_rows
from datasets_ray.sources import SOURCES, build

DATA = Path(os.environ.get("FINEGRID_DATA") or Path(__file__).parents[2].parent / "shared" / "data")
real = pytest.mark.skipif(not (DATA / "grocery_store").is_dir(), reason=f"no photographs in {DATA}: set FINEGRID_DATA")


def make(spec: dict, out: Path, root: Path = DATA) -> tuple[dict, list[dict]]:
    manifest = build(spec, out, lambda _: out, str(root))
    return manifest, list(RowTable(out))


@real
@pytest.mark.parametrize(("source", "train", "test", "classes"), [
    ("grocery", 324, 243, 81), ("pets", 296, 100, 37), ("food101", 150, 100, 10), ("cub", 150, 145, 10),
])
def test_official_parts_are_read_and_disjoint(source, train, test, classes, tmp_path):
    paths = []
    for split, expected in (("train", train), ("test", test)):
        manifest, rows = make({"source": source, "part": "labelled", "split": split}, tmp_path / split)
        assert len(rows) == manifest["rows"] == expected and len(manifest["classes"]) == classes and not manifest["dropped"]
        assert all(r["label"] in manifest["classes"] and "_" not in r["label"] for r in rows)
        paths.append({r["images"][0]["path"] for r in rows})
    assert not paths[0] & paths[1]


@real
@pytest.mark.parametrize("source", ["grocery", "pets", "food101", "cub"])
def test_instructions_ask_about_training_photos_with_siblings(source, tmp_path):
    _, trained = make({"source": source, "part": "labelled"}, tmp_path / "labelled")
    _, rows = make({"source": source, "part": "instructions", "rows": 80, "seed": 3}, tmp_path / "instructions")
    known = {r["images"][0]["path"] for r in trained}
    assert 0 < sum(not r["images"] for r in rows) < 40
    for r in rows:
        assert all(i["path"] in known for i in r["images"])
        question, answer = (m["text"] for m in r["messages"])
        if "\nA. " in question:
            options = {line[0]: line[3:] for line in question.split("\n") if line[1:3] == ". "}
            assert len(set(options.values())) == 5 and options[answer] == r["label"]


@real
def test_written_captions_are_peoples(tmp_path):
    _, birds = make({"source": "cub", "part": "captions", "rows": 20}, tmp_path / "cub")
    folder = DATA / "cub_200_2011_first10" / "text_c10"
    for r in birds:
        file = folder / Path(r["images"][0]["path"]).relative_to("images").with_suffix(".txt")
        assert r["messages"][1]["text"] in {line.strip() for line in file.read_text().splitlines()}
    _, scenes = make({"source": "coco", "split": "val", "per_image": True}, tmp_path / "coco")
    assert len(scenes) == 50 and all(r["messages"][1]["text"] for r in scenes)
    _, goods = make({"source": "grocery", "part": "captions", "rows": 20}, tmp_path / "grocery")
    assert all(len(r["messages"][1]["text"]) > 10 for r in goods)


@real
@pytest.mark.parametrize("name", ["oxford_pet", "food101"])
def test_foci_questions_are_shuffled(name, tmp_path):
    manifest, rows = make({"source": "foci", "set": name}, tmp_path)
    assert len(rows) == 100 and not manifest["dropped"]
    assert {r["answer"] for r in rows} == set("ABCD")
    assert all(r["options"]["ABCD".index(r["answer"])] == r["label"] for r in rows)


def pets_folder(root: Path, names: list[str]) -> Path:
    folder = root / "oxford-iiit-pet"
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    for part in ("trainval", "test"):
        (folder / "annotations" / f"{part}.txt").write_text("".join(f"{name} 1 {1 + name[0].islower()} 1\n" for name in names))
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for name in names:
        if "/" not in name:
            Image.fromarray(pixels).save(folder / "images" / f"{name}.jpg")
    return folder


def test_unusable_images_are_quarantined_and_counted(tmp_path):
    outside = tmp_path / "secret.jpg"
    folder = pets_folder(tmp_path, ["Bengal_1", "Bengal_2", "pug_1", "pug_2", "../../secret_1"])
    images = folder / "images"
    Image.new("RGB", (8, 8)).save(outside)
    outside.rename(tmp_path / "secret_1.jpg")
    (images / "Bengal_2.jpg").unlink()
    (images / "pug_1.jpg").write_text("<!DOCTYPE html><html>not found</html>")
    data = (images / "pug_2.jpg").read_bytes()
    (images / "pug_2.jpg").write_bytes(data[: len(data) // 2])
    manifest, rows = make({"source": "pets", "part": "labelled"}, tmp_path / "out", tmp_path)
    assert [r["label"] for r in rows] == ["Bengal"]
    assert manifest["dropped"] == {"image missing": 1, "image outside its root": 1, "image is a web page": 1, "image cut short": 1}
    assert {d["item"] for d in manifest["dropped_examples"]} >= {"images/pug_1.jpg", "images/Bengal_2.jpg"}


def test_missing_folders_and_lists_are_named(tmp_path):
    with pytest.raises(UserError, match="data_root"):
        build({"source": "pets", "part": "labelled"}, tmp_path, lambda _: tmp_path, None)
    with pytest.raises(UserError, match="oxford-iiit-pet"):
        build({"source": "pets", "part": "labelled"}, tmp_path, lambda _: tmp_path, str(tmp_path))
    folder = pets_folder(tmp_path, ["Bengal_1"])
    (folder / "annotations" / "test.txt").unlink()
    with pytest.raises(UserError, match=r"annotations/test\.txt"):
        build({"source": "pets", "part": "labelled", "split": "test"}, tmp_path / "o", lambda _: tmp_path, str(tmp_path))
    with pytest.raises(UserError, match="leads out"):
        (tmp_path / "base").mkdir()
        build({"source": "pets", "part": "labelled", "folder": ".."}, tmp_path / "o", lambda _: tmp_path, str(tmp_path / "base"))


@pytest.mark.parametrize("wrong", [
    {"source": "petz"}, {"source": "pets", "part": "label"}, {"source": "pets", "part": "labelled", "splt": "test"},
    {"source": "coco", "split": "test"}, {"source": "foci", "set": "pets"}, {"source": "concat", "inputs": []},
])
def test_mistakes_in_a_spec_are_named(wrong, tmp_path):
    with pytest.raises(UserError):
        build(wrong, tmp_path / "out", lambda _: tmp_path, str(tmp_path))


def test_every_source_can_be_imported():
    import importlib

    for target in SOURCES.values():
        module, function = target.split(":")
        assert callable(getattr(importlib.import_module(module), function))


def question_rows(prefix: str, count: int) -> list[dict]:
    return [row(f"{prefix}{i}", images=[{"path": f"{prefix}{i}.png"}], question="?", options=["x", "y"], answer="A") for i in range(count)]


def test_concat_keeps_order_and_rebases_images(tmp_path):
    for name in ("a", "b"):
        write_rows(question_rows(name, 3), tmp_path / name, root=str(tmp_path / "photos" / name), classes=[name])
    manifest = build({"source": "concat", "inputs": ["a", "b"]}, tmp_path / "out", lambda i: tmp_path / i, None)
    rows = list(RowTable(tmp_path / "out"))
    assert [r["id"] for r in rows] == ["a0", "a1", "a2", "b0", "b1", "b2"]
    assert manifest["root"] == str(tmp_path / "photos") and rows[0]["images"][0]["path"] == "a/a0.png" and manifest["classes"] == ["a", "b"]


@pytest.mark.parametrize("count", [2, 3, 40])
def test_permuted_moves_every_image_and_nothing_else(count, tmp_path):
    write_rows(question_rows("q", count), tmp_path / "in")
    build({"source": "permuted", "input": "in", "seed": 5}, tmp_path / "out", lambda i: tmp_path / i, None)
    before, after = list(RowTable(tmp_path / "in")), list(RowTable(tmp_path / "out"))
    assert [{**r, "images": None} for r in before] == [{**r, "images": None} for r in after]
    moved = [r["images"][0]["path"] for r in after]
    assert sorted(moved) == sorted(r["images"][0]["path"] for r in before)
    assert all(a["images"] != b["images"] for a, b in zip(before, after))
