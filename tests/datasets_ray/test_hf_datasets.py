"""What Hugging Face `datasets` saves: Arrow folders, dictionaries of splits, Parquet files, and every form of an image column."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest

from datasets_ray.errors import UserError
from tests.datasets_ray.releases import BROKEN, make, parquet, picture, put, saved, turns

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SPEC = {"source": "hf_datasets", "folder": "saved"}


def captions(first: int, count: int) -> pa.Table:
    images = [{"bytes": picture(k), "path": None} for k in range(first, first + count)]
    return pa.table({"image": pa.array(images, IMAGE), "caption": [f"caption {k}" for k in range(first, first + count)]})


def chats(records: list[tuple[str, dict | None, list[dict]]]) -> pa.Table:
    return pa.table({
        "id": [r[0] for r in records], "image": pa.array([r[1] for r in records], IMAGE), "conversations": [r[2] for r in records],
        "data_source": ["x"] * len(records),
    })  # fmt: skip


def test_a_saved_folder_is_read_in_order(tmp_path):
    saved(tmp_path / "saved", [captions(0, 5), captions(5, 2)])
    manifest, rows = make({**SPEC, "text": "caption"}, tmp_path, tmp_path / "out")
    assert [r["messages"][1]["text"] for r in rows] == [f"caption {k}" for k in range(7)]
    assert [r["images"][0]["bytes"] for r in rows] == [picture(k) for k in range(7)]
    assert [r["id"] for r in rows[:2]] == ["record-0000000", "record-0000001"] and manifest["records"] == 7
    assert len(make({**SPEC, "text": "caption", "rows": 6}, tmp_path, tmp_path / "few")[1]) == 6


def test_a_dictionary_of_splits(tmp_path):
    for split, count in (("train", 3), ("test", 1)):
        saved(tmp_path / "saved" / split, [captions(0, count)])
    (tmp_path / "saved" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    for split, count in ((None, 3), ("test", 1)):
        spec = {**SPEC, "text": "caption", **({"split": split} if split else {})}
        assert len(make(spec, tmp_path, tmp_path / f"out-{split}")[1]) == count
    with pytest.raises(UserError, match="no split 'tset'.*\n.*did you mean 'test'"):
        make({**SPEC, "text": "caption", "split": "tset"}, tmp_path, tmp_path / "wrong")


def test_conversations_in_parquet_with_row_groups(tmp_path):
    image = {"bytes": picture(), "path": "a.jpg"}
    records = [(f"id-{k % 4}", image if k % 2 else None, turns("<image>\nWhat?" if k % 2 else "What?", f"answer {k}")) for k in range(9)]
    parquet(tmp_path / "data" / "train-0.parquet", chats(records[:5]), row_group_size=2)
    parquet(tmp_path / "data" / "train-1.parquet", chats(records[5:]), row_group_size=3)
    spec = {"source": "hf_datasets", "files": "data", "conversations": "conversations"}
    manifest, rows = make(spec, tmp_path, tmp_path / "out")
    assert [r["messages"][1]["text"] for r in rows] == [f"answer {k}" for k in range(9)]
    assert [len(r["images"]) for r in rows] == [k % 2 for k in range(9)]
    assert [r["id"] for r in rows[3:6]] == ["id-3", "id-0#2", "id-1#2"] and manifest["renamed"] == {"duplicate id renamed": 5}


@pytest.mark.parametrize("form", ["bytes", "path", "list", "struct path"])
def test_every_form_of_an_image_column(form, tmp_path):
    put(tmp_path / "photos" / "a.jpg", picture(1))
    column = {
        "bytes": pa.array([picture(1)]), "path": pa.array(["a.jpg"]), "struct path": pa.array([{"bytes": None, "path": "a.jpg"}], IMAGE),
        "list": pa.array([[{"bytes": picture(1), "path": None}, {"bytes": picture(2), "path": None}]], pa.list_(IMAGE)),
    }[form]  # fmt: skip
    said = [turns("<image><image>" if form == "list" else "<image>", "Yes.")]
    saved(tmp_path / "saved", [pa.table({"picture": column, "talk": said})])
    spec = {**SPEC, "image": "picture", "conversations": "talk", "images": "photos"}
    _, rows = make(spec, tmp_path, tmp_path / "out")
    held = rows[0]["images"]
    if "path" in form:
        assert held == [{"bytes": None, "path": "a.jpg"}]
    else:
        assert [image["bytes"] for image in held] == [picture(k + 1) for k in range(1 + (form == "list"))]


def test_records_that_cannot_be_used_are_dropped_by_reason(tmp_path):
    held = [{"bytes": data, "path": None} for data, _ in BROKEN.values()]
    held += [None, {"bytes": None, "path": "/etc/hosts"}, {"bytes": None, "path": "gone.jpg"}, {"bytes": picture(), "path": None}]
    told = ["a caption"] * (len(held) - 1) + [None]
    saved(tmp_path / "saved", [pa.table({"image": pa.array([*held, held[-1]], IMAGE), "caption": pa.array([*told, "fine"])})])
    manifest, rows = make({**SPEC, "text": "caption"}, tmp_path, tmp_path / "out")
    assert len(rows) == 1 and sum(manifest["dropped"].values()) == len(held)
    expected = {reason: 0 for _, reason in BROKEN.values()}
    for _, reason in BROKEN.values():
        expected[reason] += 1
    assert manifest["dropped"] == {**expected, "no image": 1, "image outside its root": 1, "image missing": 1, "no caption": 1}


@pytest.mark.parametrize(("wrong", "told"), [
    ({}, "one of `text` and `conversations`.*image, caption"), ({"text": "captions"}, "no column 'captions' .*caption: string"),
    ({"text": "image"}, "column 'image' is struct"), ({"text": "caption", "image": "caption2"}, "no column 'caption2'"),
    ({"text": "caption", "files": "x"}, "one of `folder` and `files`"), ({"text": "caption", "folder": "none"}, "no folder for 'folder'"),
    ({"text": "caption", "conversations": "caption"}, "needs one of `text`"),
])
def test_mistakes_in_a_spec_are_named(wrong, told, tmp_path):
    saved(tmp_path / "saved", [captions(0, 1)])
    with pytest.raises(UserError, match=told):
        make({**SPEC, **wrong}, tmp_path, tmp_path / "out")


def test_damaged_folders_are_errors(tmp_path):
    folder = saved(tmp_path / "saved", [captions(0, 6), captions(6, 2)])
    spec = {**SPEC, "text": "caption"}
    file = folder / "data-00000-of-00002.arrow"
    whole = file.read_bytes()
    with pa.ipc.open_stream(whole) as stream:
        batches = [batch.nbytes for batch in stream]
    assert len(batches) == 3
    for size in (len(whole) - 8, len(whole) // 2, 40):
        file.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"data-00000-of-00002\.arrow can't be read .*\n.*download it again"):
            make(spec, tmp_path, tmp_path / "out")
    file.write_bytes(BROKEN["pointer.jpg"][0])
    with pytest.raises(UserError, match="a git-LFS pointer, not the file itself\n.*git lfs pull"):
        make(spec, tmp_path, tmp_path / "out")
    file.unlink()
    with pytest.raises(UserError, match=r"has lost data-00000-of-00002\.arrow \(state\.json names it\)"):
        make(spec, tmp_path, tmp_path / "out")
    saved(folder, [captions(0, 2).rename_columns(["image", "text"]), captions(0, 1)])
    with pytest.raises(UserError, match="has other columns than the first file"):
        make({**spec, "text": "text"}, tmp_path, tmp_path / "out")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../../x.arrow"}]}))
    with pytest.raises(UserError, match=r"has lost x\.arrow"):
        make(spec, tmp_path, tmp_path / "out")
    (folder / "state.json").write_text(json.dumps({"_data_files": [], "_indices_data_files": [{"filename": "i.arrow"}]}))
    with pytest.raises(UserError, match="flatten_indices"):
        make(spec, tmp_path, tmp_path / "out")
    (folder / "state.json").unlink()
    with pytest.raises(UserError, match="not what save_to_disk writes"):
        make(spec, tmp_path, tmp_path / "out")
