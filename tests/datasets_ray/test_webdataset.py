"""WebDataset archives: samples, captions from text and JSON, conversations, and archives that are cut or damaged."""

from __future__ import annotations

import io
import json
import tarfile

import pytest

from datasets_ray.errors import UserError
from datasets_ray.images import decode
from tests.datasets_ray.releases import BROKEN, make, picture, put, tar, turns

SPEC = {"source": "webdataset", "files": "cc3m"}


def caption_tars(root, counts=(3, 2)) -> None:
    for number, count in enumerate(counts):
        members = []
        for k in range(count):
            suffix, data = [("jpg", picture(k)), ("PNG", picture(k, format="PNG")), ("webp", picture(k, format="WEBP"))][k % 3]
            members += [(f"{k:05d}.{suffix}", data), (f"{k:05d}.txt", f"caption {number}-{k}\n".encode()),
                        (f"{k:05d}.json", json.dumps({"caption": f"told {k}", "width": 12}).encode())]  # fmt: skip
        tar(root / "cc3m" / f"{number:05d}.tar", members)


def told(row: dict) -> str:
    return row["messages"][1]["text"]


def test_samples_of_all_archives_in_order_with_their_bytes(tmp_path):
    caption_tars(tmp_path)
    manifest, rows = make(SPEC, tmp_path, tmp_path / "out")
    assert [r["id"] for r in rows] == ["00000/00000", "00000/00001", "00000/00002", "00001/00000", "00001/00001"]
    assert [told(r) for r in rows] == [f"caption {n}-{k}" for n, k in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]]
    assert rows[0]["images"][0]["bytes"] == picture(0) and all(decode(r["images"][0]).size == (12, 8) for r in rows)
    assert manifest["records"] == 5 and manifest["root"] is None and not manifest["dropped"]
    _, same = make({**SPEC, "files": ["cc3m/00001.tar", "cc3m/*.tar"]}, tmp_path, tmp_path / "listed")
    assert [r["id"] for r in same] == ["00001/00000", "00001/00001", "00000/00000", "00000/00001", "00000/00002"]


def test_captions_and_conversations_from_json(tmp_path):
    caption_tars(tmp_path)
    _, rows = make({**SPEC, "text": "json"}, tmp_path, tmp_path / "out")
    assert told(rows[2]) == "told 2"
    chats = {"a": turns("<image>\nWhat?", "A cat."), "b": turns("No image here.", "None.")}
    members = [("a.jpg", picture()), *[(f"{key}.json", json.dumps({"conversations": chat}).encode()) for key, chat in chats.items()]]
    tar(tmp_path / "chat.tar", members)
    spec = {"source": "webdataset", "files": "chat.tar", "text": "json", "field": "conversations"}
    _, rows = make(spec, tmp_path, tmp_path / "chats")
    assert [len(r["images"]) for r in rows] == [1, 0] and [told(r) for r in rows] == ["A cat.", "None."]


def test_samples_that_cannot_be_used_are_dropped_by_reason(tmp_path):
    text = b"a caption"
    members = [
        ("fine.jpg", picture()), ("fine.txt", text), ("__notes__.txt", b"skipped"),
        ("mute.jpg", picture()), ("blind.txt", text), ("twice.jpg", picture()), ("twice.png", picture(format="PNG")), ("twice.txt", text),
        ("again.jpg", picture()), ("again.txt", text), ("again.txt", text), ("empty.jpg", picture()), ("empty.txt", b" \n"),
        ("../out.jpg", picture()), ("../out.txt", text), ("latin.jpg", picture()), ("latin.txt", b"\xe9t\xe9"),
        ("page.jpg", BROKEN["page.jpg"][0]), ("page.txt", text), ("cut.jpg", BROKEN["cut.jpg"][0]), ("cut.txt", text),
    ]  # fmt: skip
    tar(tmp_path / "cc3m" / "0.tar", members)
    with tarfile.open(tmp_path / "cc3m" / "0.tar", "a") as archive:
        link = tarfile.TarInfo("linked.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    manifest, rows = make(SPEC, tmp_path, tmp_path / "out")
    assert [r["id"] for r in rows] == ["0/fine"]
    assert manifest["dropped"] == {
        "no text": 1, "no image": 1, "two images": 1, "two members of one name": 1, "no caption": 1, "a member is no plain file": 1,
        "its name leads out of the archive": 1, "text is no UTF-8": 1, "image is a web page": 1, "image cut short": 1,
    }  # fmt: skip
    assert manifest["records"] == 11


def test_a_field_that_is_not_there_is_a_reason(tmp_path):
    samples = {"a": b'{"caption": "fine"}', "b": b'{"title": "x"}', "c": b"[1]", "d": b"{", "e": b'{"caption": 3}'}
    tar(tmp_path / "cc3m" / "0.tar", [m for k, text in samples.items() for m in ((f"{k}.jpg", picture()), (f"{k}.json", text))])
    manifest, rows = make({**SPEC, "text": "json"}, tmp_path, tmp_path / "out")
    assert len(rows) == 1 and manifest["dropped"] == {"no 'caption' in its JSON": 2, "text is no JSON": 1, "no caption": 1}


@pytest.mark.parametrize("how", ["in data", "between members", "in a header", "damaged"])
def test_a_torn_archive_is_an_error_with_its_byte(how, tmp_path):
    caption_tars(tmp_path)
    file = tmp_path / "cc3m" / "00000.tar"
    data = file.read_bytes()
    with tarfile.open(file) as archive:
        second = archive.getmembers()[3]
    cut = {"in data": second.offset_data + 40, "between members": second.offset, "in a header": second.offset + 100}
    if how == "damaged":
        file.write_bytes(data[: second.offset] + b"\x07" * 512 + data[second.offset + 512 :])
    else:
        file.write_bytes(data[: cut[how]])
    with pytest.raises(UserError, match=r"00000\.tar is cut short or damaged \(byte \d+: .*\)\n.*download it again"):
        make(SPEC, tmp_path, tmp_path / "out")


def test_what_is_no_tar_says_so(tmp_path):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz"):
        pass
    for data, why in [(packed.getvalue(), "no uncompressed tar"), (b"", "is empty"), (BROKEN["pointer.jpg"][0], "git lfs pull")]:
        put(tmp_path / "cc3m" / "0.tar", data)
        with pytest.raises(UserError, match=why):
            make(SPEC, tmp_path, tmp_path / "out")
    for files, why in [("none/*.tar", "no file matches"), ("../*.tar", "leads out"), (["cc3m", "cc4m"], "no file matches files: cc4m")]:
        with pytest.raises(UserError, match=why):
            make({**SPEC, "files": files}, tmp_path, tmp_path / "out")


def test_rows_opens_no_further_archive(tmp_path):
    caption_tars(tmp_path)
    put(tmp_path / "cc3m" / "00001.tar", b"torn")
    manifest, rows = make({**SPEC, "rows": 2}, tmp_path, tmp_path / "out")
    assert [told(r) for r in rows] == ["caption 0-0", "caption 0-1"]
