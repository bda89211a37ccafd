"""LLaVA's lists: turns, marks, images, ids, and reading a list a window at a time."""

from __future__ import annotations

import json

import pytest

from datasets_ray import jsonlist, shards
from datasets_ray.errors import UserError
from tests.datasets_ray.releases import CAPTION, animated, captioned, llava_list, make, picture, put, turns

LIST = {"source": "llava_json", "file": "LLaVA-Pretrain/list.json"}
MIX = {"source": "llava_json", "file": "llava_v1_5_mix665k.json"}


def texts(row: dict) -> list[str]:
    return [m["text"] for m in row["messages"]]


def test_captions_are_rows_in_the_lists_order(tmp_path):
    records = [captioned(f"{k:09d}", f"{k % 2:05d}/{k:09d}.jpg", f"caption {k}") for k in range(5)]
    for k in range(5):
        put(tmp_path / "LLaVA-Pretrain" / f"{k % 2:05d}" / f"{k:09d}.jpg", picture(k))
    llava_list(tmp_path, records)
    manifest, rows = make(LIST, tmp_path, tmp_path / "out")
    assert [r["id"] for r in rows] == [r["id"] for r in records]
    assert [r["images"][0]["path"] for r in rows] == [r["image"] for r in records] and not any(r["images"][0]["bytes"] for r in rows)
    assert texts(rows[3]) == [f"{CAPTION}\n<image>", "caption 3"] and [m["role"] for m in rows[3]["messages"]] == ["user", "assistant"]
    assert json.loads(rows[3]["meta"]) == {"id": "000000003", "file": "00001/000000003.jpg"}
    assert manifest["root"] == str(tmp_path / "LLaVA-Pretrain") and manifest["records"] == manifest["rows"] == 5
    assert not manifest["dropped"] and not manifest["renamed"] and not manifest["substituted"]


def test_images_lie_in_a_folder_of_that_name_or_where_the_spec_says(tmp_path):
    put(tmp_path / "LLaVA-Pretrain" / "images" / "00000" / "a.jpg", picture(1))
    put(tmp_path / "elsewhere" / "00000" / "a.jpg", picture(2))
    llava_list(tmp_path, [captioned("a", "00000/a.jpg")])
    assert make(LIST, tmp_path, tmp_path / "usual")[0]["root"] == str(tmp_path / "LLaVA-Pretrain" / "images")
    manifest, rows = make({**LIST, "images": "elsewhere"}, tmp_path, tmp_path / "named")
    assert manifest["root"] == str(tmp_path / "elsewhere") and len(rows) == 1
    with pytest.raises(UserError, match=r"no folder for 'images'.*\n.*images: PATH"):
        make({**LIST, "images": "nowhere"}, tmp_path, tmp_path / "wrong")


def mix(root, **images) -> None:
    for path, data in {"coco/train2017/1.jpg": picture(1), "vg/VG_100K_2/2.jpg": picture(2), **images}.items():
        put(root / path, data)


def test_a_mark_may_stand_anywhere_and_is_put_first_where_it_is_missing(tmp_path):
    mix(tmp_path)
    coco = "coco/train2017/1.jpg"
    asked = [["<image>\nWhat?", "A cat."], ["What is <image> this?", "A cat."], ["What?\n<image>", "A cat."],
             ["Hello.", "Hello!", "And <image>?", "A cat."], ["What?", "A cat.", "Which?", "A Birman."]]  # fmt: skip
    records = [{"id": str(k), "image": coco, "conversations": turns(*said)} for k, said in enumerate(asked)]
    records.append({"id": "two", "image": [coco, "vg/VG_100K_2/2.jpg"], "conversations": turns("<image>\nWhich differs?", "The second.")})
    llava_list(tmp_path, records, MIX["file"])
    manifest, rows = make(MIX, tmp_path, tmp_path / "out")
    assert [texts(r) for r in rows[:4]] == asked[:4]
    assert texts(rows[4]) == ["<image>\nWhat?", "A cat.", "Which?", "A Birman."]
    assert texts(rows[5])[0] == "<image>\n<image>\nWhich differs?" and len(rows[5]["images"]) == 2
    assert manifest["substituted"] == {"image that no <image> marks put first": 2}


def test_text_only_rows_keep_their_words(tmp_path):
    said = ["What does <image> mean in HTML?", "<image>", "Thanks.", "You're welcome."]
    llava_list(tmp_path, [{"id": "wgByO4Y_0", "model": "", "conversations": turns(*said)}, {"conversations": turns("1", "2")}], MIX["file"])
    _, rows = make(MIX, tmp_path, tmp_path / "out")
    assert [r["images"] for r in rows] == [[], []] and texts(rows[0]) == said
    assert rows[1]["id"] == "record-0000001"


def test_turns_that_cannot_be_learned_are_dropped_by_reason(tmp_path):
    mix(tmp_path)
    coco = "coco/train2017/1.jpg"
    wrong = {
        "the first turn isn't the human's": {"conversations": [{"from": "gpt", "value": "Hi."}, *turns("Hi.", "Yes?")]},
        "turns don't alternate": {"conversations": [*turns("a", "b"), {"from": "gpt", "value": "c"}]},
        "no conversation": {"conversations": []},
        "nothing is answered": {"conversations": turns("Anybody?")},
        "an answer is empty": {"conversations": turns("What?", "  \n")},
        "a role is neither human nor gpt": {"conversations": [{"from": "tool", "value": "x"}]},
        "a turn has no text": {"conversations": [{"from": "human"}]},
        "a turn is no record": {"conversations": ["Hello"]},
        "more <image> marks than images": {"image": coco, "conversations": turns("<image><image>", "Two.")},
        "an image is no path": {"image": 7, "conversations": turns("<image>", "One.")},
    }
    records = [{"id": reason, **record} for reason, record in wrong.items()]
    records += [{"id": "no turns at all"}, {"id": "fine", "image": coco, "conversations": turns("<image>", "A dog.")}]
    llava_list(tmp_path, records, MIX["file"])
    manifest, rows = make(MIX, tmp_path, tmp_path / "out")
    assert [r["id"] for r in rows] == ["fine"]
    assert manifest["dropped"] == {reason: 1 + (reason == "no conversation") for reason in wrong}
    assert {(d["item"], d["reason"]) for d in manifest["dropped_examples"]} >= {(reason, reason) for reason in wrong}


def test_duplicate_ids_are_kept_under_another_name(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 2)
    names = ["000000033471", "000000033471", 7, "000000033471", "000000033471#2", 7, None]
    llava_list(tmp_path, [{"id": n, "conversations": turns("q", f"answer {k}")} for k, n in enumerate(names)], MIX["file"])
    manifest, rows = make(MIX, tmp_path, tmp_path / "out")
    assert [r["id"] for r in rows[:4]] == ["000000033471", "000000033471#2", "7", "000000033471#3"]
    assert len({r["id"] for r in rows}) == len(names) and [texts(r)[1] for r in rows] == [f"answer {k}" for k in range(len(names))]
    assert manifest["renamed"] == {"duplicate id renamed": 4}
    assert [json.loads(r["meta"])["id"] for r in rows] == names


def test_an_image_under_another_suffix_is_used_and_counted(tmp_path):
    covers = {"1.gif": animated(), "2.png": picture(format="PNG"), "a.b.jpeg": picture()}
    mix(tmp_path, **{f"ocr_vqa/images/{name}": data for name, data in covers.items()})
    records = [{"id": str(k), "image": f"ocr_vqa/images/{name}.jpg", "conversations": turns("<image>\nTitle?", "None.")}
               for k, name in enumerate(["1", "2", "a.b", "3"])]  # fmt: skip
    llava_list(tmp_path, records, MIX["file"])
    manifest, rows = make(MIX, tmp_path, tmp_path / "out")
    assert [r["images"][0]["path"] for r in rows] == [f"ocr_vqa/images/{name}" for name in covers]
    assert manifest["substituted"] == {"image found under another suffix": 3} and manifest["dropped"] == {"image missing": 1}
    assert manifest["substituted_examples"][0] == {"item": "ocr_vqa/images/1.jpg", "reason": "image found under another suffix"}


@pytest.mark.parametrize("ascii", [True, False])
@pytest.mark.parametrize("window", [16, 37, 4096])
def test_windows_of_any_size_give_the_same_records(window, ascii, tmp_path, monkeypatch):
    monkeypatch.setattr(jsonlist, "WINDOW", window)
    said = [{"id": str(k), "conversations": turns("Grüße, 世界 🌸 \\ \" ], {" * (k % 3), "]}" * k + "é")} for k in range(9)]
    file = put(tmp_path / "list.json", b"\xef\xbb\xbf \n" + json.dumps(said, ensure_ascii=ascii, indent=window % 2).encode() + b"\n\n")
    found = list(jsonlist.records(file))
    assert [record for _, _, record in found] == said
    for first in range(9):
        for last in range(first, 9):
            assert jsonlist.read(file, found[first][0], found[last][1]) == said[first : last + 1]
    assert list(jsonlist.records(put(tmp_path / "none.json", b" [ ] "))) == []


def test_rows_reads_no_further(tmp_path):
    whole = json.dumps([{"id": str(k), "conversations": turns("q", "a")} for k in range(50)])
    put(tmp_path / MIX["file"], whole[:900].encode() + b"}} broken")
    manifest, rows = make({**MIX, "rows": 3, "expect": 50}, tmp_path, tmp_path / "out")
    assert [r["id"] for r in rows] == ["0", "1", "2"] and "subset" not in manifest
    with pytest.raises(UserError, match=r"no whole JSON list \(record \d+, byte \d+"):
        make(MIX, tmp_path, tmp_path / "all")


@pytest.mark.parametrize(("wrong", "told"), [
    ({"fil": "x"}, "no key 'fil'"), ({"verify": "none"}, "no verify 'none'"), ({"rows": 0}, "rows: 0"),
    ({"file": "../x.json"}, "leads out"), ({"file": "absent.json"}, "no file for 'file'"), ({"images": ".."}, "leads out"),
])
def test_mistakes_in_a_spec_are_named(wrong, told, tmp_path):
    (tmp_path / "data").mkdir()
    llava_list(tmp_path / "data", [{"id": "1", "conversations": turns("q", "a")}], MIX["file"])
    with pytest.raises(UserError, match=told):
        make({**MIX, **wrong}, tmp_path / "data", tmp_path / "out")
