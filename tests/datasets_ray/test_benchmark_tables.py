"""Benchmarks in Parquet and JSON lines, with the columns of their releases."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from datasets_ray.benchmark_sets import split_options
from datasets_ray.errors import UserError
from datasets_ray.rows import RowTable
from datasets_ray.sources import build

DATA = Path(os.environ.get("FINEGRID_DATA") or Path(__file__).parents[2].parent / "shared" / "data")


def encoded(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 20), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


def image(shade: int) -> dict:
    return {"bytes": encoded(shade), "path": f"{shade}.png"}


def write(root: Path, name: str, records: list[dict], group: int = 2) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(records), root / name, row_group_size=group)


def make(root: Path, **spec: object) -> tuple[dict, list[dict]]:
    out = root / "out"
    manifest = build({"source": "benchmark_tables", **spec}, out, lambda _: out, str(root))
    return manifest, [{**row, "meta": json.loads(row["meta"])} for row in RowTable(out)]


def test_mmstar(tmp_path):
    text = "Which one?\nOptions: A: a suitcase, blue, B: the cat, C: B: or A:, D: none"
    common = {"question": text, "answer": "B", "category": "coarse", "l2_category": "scene"}
    write(tmp_path, "MMStar/mmstar.parquet", [{**common, "index": n, "image": encoded(n)} for n in range(5)])
    _, rows = make(tmp_path, set="mmstar")
    assert [r["id"] for r in rows] == [f"mmstar-{n}" for n in range(5)] and rows[3]["images"][0]["bytes"] == encoded(3)
    assert rows[0]["question"] == "Which one?" and rows[0]["options"] == ["a suitcase, blue", "the cat", "B: or A:", "none"]
    assert rows[0]["meta"]["category"] == "coarse" and len(make(tmp_path, set="mmstar", rows=3)[1]) == 3
    write(tmp_path, "other.parquet", [{**common, "question": "Which?", "index": 0, "image": encoded(0)}])
    with pytest.raises(UserError, match="no options in the question's text"):
        make(tmp_path, set="mmstar", file="other.parquet")


def test_options_in_a_text():
    assert split_options("q\nOptions: A: 1, B: 2.") == ("q", ["1", "2"])
    for text in ("q", "q\nOptions: 1, 2", "q\nOptions: B: 1, C: 2"):
        assert split_options(text) == (text, [])


def test_scienceqa_keeps_what_has_an_image(tmp_path):
    common = {"question": "Which?", "choices": ["x", "y"], "answer": 1, "subject": "natural science"}
    records = [{**common, "image": image(n) if n % 2 else None, "hint": f"hint {n}"} for n in range(6)]
    write(tmp_path, "ScienceQA/data/test-00000-of-00001-ab.parquet", records)
    manifest, rows = make(tmp_path, set="scienceqa")
    assert [r["hint"] for r in rows] == ["hint 1", "hint 3", "hint 5"] and manifest["filtered"] == {"no image": 3}
    assert [r["id"] for r in rows] == ["scienceqa-000001", "scienceqa-000003", "scienceqa-000005"] and rows[0]["answer"] == "B"
    _, every = make(tmp_path, set="scienceqa", text_only=True)
    assert len(every) == 6 and not every[0]["images"]
    with pytest.raises(UserError, match="ScienceQA"):
        make(tmp_path, set="scienceqa", split="train")


def test_ai2d_and_a_wrong_answer(tmp_path):
    record = {"question": "Which?", "options": ["x", "y", "z"], "answer": "2", "image": image(1)}
    write(tmp_path, "ai2d/test-0.parquet", [record])
    assert make(tmp_path, set="ai2d")[1][0]["answer"] == "C"
    write(tmp_path, "b.parquet", [record, {**record, "answer": "3"}])
    with pytest.raises(UserError, match="row 1: the answer '3' is none of the letters A to C"):
        make(tmp_path, set="ai2d", file="b.parquet")
    write(tmp_path, "c.parquet", [{**record, "answer": "two"}])
    with pytest.raises(UserError, match="'two' is no number"):
        make(tmp_path, set="ai2d", file="c.parquet")


def test_mathvista(tmp_path):
    common = {"image": "images/1.jpg", "decoded_image": image(4), "precision": None, "metadata": {"task": "chart", "source": "s"}}
    choice = {"question": "How many?", "choices": ["3", "4"], "answer": "4", "unit": None, "answer_type": "text"}
    free = {"question": "How far?", "choices": None, "answer": "1.2", "unit": "m", "answer_type": "float"}
    write(tmp_path, "MathVista/data/testmini-0.parquet", [{**common, **choice, "pid": "1"}, {**common, **free, "pid": "2"}])
    _, rows = make(tmp_path, set="mathvista")
    assert [(r["id"], r["options"], r["answer"]) for r in rows] == [("mathvista-1", ["3", "4"], "B"), ("mathvista-2", [], "1.2")]
    assert rows[1]["question"] == "How far? (Unit: m)" and rows[1]["meta"]["open"] == "number" and "open" not in rows[0]["meta"]
    assert make(tmp_path, set="mathvista", open="judged")[1][1]["meta"]["open"] == "judged"


def test_mmmu_with_several_images(tmp_path):
    none = {f"image_{n}": None for n in range(3, 8)}
    common = {**none, "subfield": "optics", "explanation": "", "image_1": image(1), "image_2": image(2)}
    choice = {"question": "<image 1>?", "options": "['<image 2>', 'it\\'s']", "answer": "A", "question_type": "multiple-choice"}
    free = {"question": "<image 1>", "options": "[]", "answer": "['24', '24.0']", "question_type": "open"}
    records = [{**common, **choice, "id": "validation_Art_1"}, {**common, **free, "id": "validation_Art_2"}]
    write(tmp_path, "MMMU/Art/validation-0.parquet", records)
    manifest, rows = make(tmp_path, set="mmmu")
    assert rows[0]["id"] == "mmmu-validation_Art_1" and rows[0]["options"] == ["<image>", "it's"]
    assert [i["bytes"] for i in rows[0]["images"]] == [encoded(1), encoded(2)]
    assert rows[1]["meta"]["open"] == "mmmu" and rows[1]["meta"]["answers"] == ["24", "24.0"]
    manifest, rows = make(tmp_path, set="mmmu", most_images=1)
    assert rows[0]["options"] == ["<image 2>", "it's"] and len(rows[0]["images"]) == 1
    assert manifest["substituted"] == {"images beyond most_images left out": 2}


@pytest.mark.skipif(not (DATA / "pope").is_dir(), reason=f"no POPE in {DATA}: set FINEGRID_DATA")
def test_popes_own_files(tmp_path):
    name = json.loads((DATA / "pope/output/coco/coco_pope_adversarial.json").read_text().splitlines()[0])["image"]
    for part in ("adversarial", "popular", "random"):
        (tmp_path / "pope/output/coco").mkdir(parents=True, exist_ok=True)
        file = f"pope/output/coco/coco_pope_{part}.json"
        (tmp_path / file).write_text((DATA / file).read_text())
    (tmp_path / "val2014").mkdir()
    (tmp_path / "val2014" / name).write_bytes(encoded(3))
    manifest, rows = make(tmp_path, set="pope", images="val2014", expect=9000, allow_subset=True)
    assert manifest["records"] == 9000 and manifest["subset"]["found"] == len(rows) == 18 and manifest["dropped"] == {"image missing": 8982}
    assert {r["meta"]["category"] for r in rows} == {"adversarial", "popular", "random"}
    assert {r["meta"]["open"] for r in rows} == {"yes_no"} and {r["answer"] for r in rows} == {"yes", "no"}


def test_pope_as_parquet_and_damage(tmp_path):
    record = {"question": "Is it?", "answer": "no", "image": image(2), "category": "random"}
    write(tmp_path, "POPE/data/test-0.parquet", [record])
    assert make(tmp_path, set="pope")[1][0]["meta"] == {"category": "random", "open": "yes_no"}
    (tmp_path / "lines.json").write_text('{"text": "Is it?", "label": "no"}\n{oops\n')
    with pytest.raises(UserError, match=r"lines\.json:2: not JSON"):
        make(tmp_path, set="pope", file="lines.json")
    (tmp_path / "lines.json").write_text('{"text": "Is it?"}\n')
    with pytest.raises(UserError, match="needs text and label"):
        make(tmp_path, set="pope", file="lines.json")
    with pytest.raises(UserError, match="Parquet and JSON lines together"):
        make(tmp_path, set="pope", file=["lines.json", "POPE/data/test-0.parquet"])


def test_the_wrong_file_and_the_wrong_word(tmp_path):
    write(tmp_path, "a.parquet", [{"question": "?"}])
    with pytest.raises(UserError, match="no column 'index'"):
        make(tmp_path, set="mmstar", file="a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1" + bytes(40))
    with pytest.raises(UserError, match="can't be read"):
        make(tmp_path, set="mmstar", file="b.parquet")
    wrong = {"did you mean 'mmstar'": {"set": "mmstars"}, "validation": {"set": "mmmu", "split": "val"}, "looked for": {"set": "ai2d"}}
    for said, spec in wrong.items():
        with pytest.raises(UserError, match=said):
            make(tmp_path, **spec)
