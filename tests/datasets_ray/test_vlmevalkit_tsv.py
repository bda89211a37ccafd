"""VLMEvalKit's tables: options, images in each form, circular groups, open questions, and one clear error or count for each broken row."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
from pathlib import Path

import pytest
from PIL import Image

from datasets_ray.errors import UserError
from datasets_ray.open_answers import judge
from datasets_ray.prompts import question_prompt
from datasets_ray.question_rows import place_images
from datasets_ray.rows import RowTable
from datasets_ray.sources import build

DATA = Path(os.environ.get("FINEGRID_DATA") or Path(__file__).parents[2].parent / "shared" / "data")
COLUMNS = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "split", "image"]


def encoded(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 20), (shade, shade, 0)).save(file, "JPEG")
    return file.getvalue()


def image(shade: int = 9) -> str:
    return base64.b64encode(encoded(shade)).decode()


def line(index: object, **cells: object) -> dict:
    usual = {"question": "What is it?", "A": "cat", "B": "dog", "C": "fox", "answer": "B", "category": "animals", "split": "dev"}
    return {"index": index, "image": image(), **usual, **cells}


def table(root: Path, *lines: dict, columns: list[str] = COLUMNS, name: str = "set.tsv") -> None:
    with (root / name).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t", restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def make(root: Path, **spec: object) -> tuple[dict, list[dict]]:
    out = root / "out"
    manifest = build({"source": "vlmevalkit_tsv", "file": "set.tsv", **spec}, out, lambda _: out, str(root))
    return manifest, [{**row, "meta": json.loads(row["meta"])} for row in RowTable(out)]


def test_rows_are_questions_with_their_bytes(tmp_path):
    table(
        tmp_path, line(7, question='a "quoted"\nline', hint="look", image=image(1)), line(9, C="", answer="A", split="test"),
        line(8, A="None", B="N/A", image="7", answer="A"),
    )  # fmt: skip
    manifest, rows = make(tmp_path)
    assert [r["id"] for r in rows] == ["set-7", "set-9", "set-8"] and manifest["records"] == 3 and not manifest["dropped"]
    assert rows[0]["question"] == 'a "quoted"\nline' and rows[0]["hint"] == "look" and rows[0]["options"] == ["cat", "dog", "fox"]
    assert rows[1]["options"] == ["cat", "dog"] and rows[2]["options"] == ["None", "N/A", "fox"]
    assert rows[0]["images"][0]["bytes"] == rows[2]["images"][0]["bytes"] == encoded(1) != rows[1]["images"][0]["bytes"]
    assert rows[0]["meta"] == {"index": "7", "category": "animals", "split": "dev"}
    assert [r["id"] for r in make(tmp_path, split="test")[1]] == ["set-9"] and len(make(tmp_path, rows=2)[1]) == 2


def test_a_table_is_read_the_same_in_pieces(tmp_path, monkeypatch):
    table(tmp_path, *(line(n, question=f"q{n}\n\n{'é' * n}", image=image(n)) for n in range(9)))
    whole = make(tmp_path, circular=True)[1]
    monkeypatch.setattr("datasets_ray.vlmevalkit_tsv.SHARD_ROWS", 4)
    manifest, pieces = make(tmp_path, circular=True)
    assert pieces == whole and len(whole) == 27 and len(manifest["shards"]) == 7


@pytest.mark.skipif(not (DATA / "mmbench_samples").is_dir(), reason=f"no MMBench samples in {DATA}: set FINEGRID_DATA")
def test_real_rows_of_mmbench(tmp_path):
    spec = {"source": "vlmevalkit_tsv", "file": "mmbench_samples/MMBench_samples20_EN.tsv", "expect": 20}
    manifest = build(spec, tmp_path / "a", lambda _: tmp_path, str(DATA))
    rows = list(RowTable(tmp_path / "a"))
    assert len(rows) == 20 == manifest["records"] and sorted({len(r["options"]) for r in rows}) == [3, 4]
    assert "\n" in rows[0]["options"][0] and rows[0]["answer"] == "D"
    turned = build({**spec, "circular": True}, tmp_path / "b", lambda _: tmp_path, str(DATA))
    groups: dict[str, list[dict]] = {}
    for row in RowTable(tmp_path / "b"):
        groups.setdefault(json.loads(row["meta"])["group"], []).append(row)
    assert len(groups) == 20 == turned["records"] and turned["rows"] == sum(map(len, groups.values())) > 60
    for members in groups.values():
        right = {r["options"]["ABCD".index(r["answer"])] for r in members}
        assert len(right) == 1 and (len(members) == 1 or len({r["answer"] for r in members}) == len(members[0]["options"]))


def test_circular_rotates_as_the_source_does(tmp_path):
    table(tmp_path, line(3, D="owl", answer="A"), line(4, C="", answer="B"), line(5, A="only A and B", C="neither A nor C"))
    manifest, rows = make(tmp_path, circular=True)
    first = [r for r in rows if r["meta"]["group"] == "set-3"]
    assert [r["id"] for r in first] == ["set-3", "set-1000003", "set-2000003", "set-3000003"]
    assert [r["options"] for r in first[1:]] == [["dog", "fox", "owl", "cat"], ["fox", "owl", "cat", "dog"], ["owl", "cat", "dog", "fox"]]
    assert [r["answer"] for r in first] == ["A", "D", "C", "B"] and {r["meta"]["rotations"] for r in first} == {4}
    assert [r["id"] for r in rows[4:]] == ["set-4", "set-1000004", "set-5"]
    assert rows[-1]["meta"]["rotations"] == 1 and manifest["not_rotated"] == 1 and manifest["records"] == 3
    assert [r["meta"]["group"] for r in make(tmp_path, circular=True, rows=1)[1]] == ["set-3"] * 4


def test_copies_that_the_table_holds_are_its_groups(tmp_path):
    turned = line(1_000_003, A="dog", B="fox", C="cat", answer="A", image="3")
    table(tmp_path, line(3), turned, line(4, image=image(77)))
    manifest, rows = make(tmp_path, circular=True)
    told = [(r["id"], r["meta"]["rotation"], r["meta"]["rotations"]) for r in rows]
    assert told == [("set-3", 0, 2), ("set-1000003", 1, 2), ("set-4", 0, 1)]
    assert rows[1]["options"] == ["dog", "fox", "cat"] and rows[1]["answer"] == "A"
    assert rows[0]["images"] == rows[1]["images"] and manifest["records"] == 2
    vanilla, rows = make(tmp_path)
    assert [r["id"] for r in rows] == ["set-3", "set-4"] and vanilla["rotated_copies_left_out"] == 1
    assert all("group" not in r["meta"] for r in rows)
    table(tmp_path, line(3), turned, line(1_000_004, image="3"))
    for circular, ids in ((True, ["set-3", "set-1000003"]), (False, ["set-3"])):
        manifest, rows = make(tmp_path, circular=circular)
        assert [r["id"] for r in rows] == ids and (manifest["records"], manifest["copies_without_original"]) == (1, 1)
    table(tmp_path, line(1_000_003), line(1_000_004))
    assert make(tmp_path, circular=True)[0]["records"] == 2, "without originals they are no copies"


@pytest.mark.parametrize(("option", "fixed"), [
    ("A和B都对", True), ("both A/B", True), ("A", True), ("BC", True), ("A only", False), ("a and b", False), ("AB or Z", False),
    ("CBA", False),
])  # fmt: skip
def test_an_option_that_speaks_of_letters_is_not_rotated(option, fixed, tmp_path):
    table(tmp_path, line(3, C=option))
    manifest, rows = make(tmp_path, circular=True)
    assert (manifest["not_rotated"], len(rows)) == ((1, 1) if fixed else (0, 3))


def test_images_go_where_the_text_mentions_them():
    placed = place_images(["see <image 2>", "or <image 1>?", "<image 2> again <image 7>"], 3)
    assert placed.texts == ["see <image>", "or <image>?", "<image 2> again <image 7>"] and placed.order == [2, 1, 0] and not placed.cut
    placed = place_images(["<image 1> or <image 2>"], 2, most=1)
    assert placed.texts == ["<image> or <image 2>"] and placed.order == [0] and placed.cut == 1


def test_several_images_and_open_questions(tmp_path):
    both = str([image(1), image(2)])
    table(
        tmp_path, line(1, question="<image 2> or <image 1>?", image=both), line(2, A="", B="", C="", answer="3.50", image=both),
        line(3, A="", B="", C="", answer="Yes"), line(4, A="", B="", C="", answer="['x', 'y']"),
    )  # fmt: skip
    manifest, rows = make(tmp_path)
    assert [i["bytes"] for i in rows[0]["images"]] == [encoded(2), encoded(1)]
    assert question_prompt(rows[0]).startswith("<image> or <image>?\nA. cat")
    assert [r["meta"].get("open") for r in rows] == [None, "mmmu", "yes_no", "mmmu"] and manifest["open"] == {"mmmu": 2, "yes_no": 1}
    assert rows[3]["answer"] == "x" and rows[3]["meta"]["answers"] == ["x", "y"]
    manifest, rows = make(tmp_path, most_images=1, open="exact")
    assert [len(r["images"]) for r in rows] == [1] * 4 and rows[0]["question"] == "<image 2> or <image>?"
    assert manifest["substituted"] == {"images beyond most_images left out": 2} and rows[0]["meta"]["images_cut"] == 1
    assert rows[1]["meta"]["open"] == "exact"


def test_images_beside_the_table_and_pairs(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(encoded(5))
    columns = ["index", "question", "answer", "category", "image_path"]
    asked, paths = {"question": "Is it?", "category": "count", "answer": "No"}, ["a.jpg", "a.jpg", "../set.tsv", ""]
    table(tmp_path, *({**asked, "index": at, "image_path": path} for at, path in enumerate(paths)), columns=columns)
    manifest, rows = make(tmp_path, images="photos", pair=["category", "image_path"])
    assert [r["images"] for r in rows] == [[{"bytes": None, "path": "a.jpg"}]] * 2 and manifest["dropped"] == {"image outside its root": 1}
    assert {r["meta"]["pair"] for r in rows} == {"count/a.jpg"} and manifest["filtered"] == {"no image": 1}
    assert len(make(tmp_path, images="photos", text_only=True)[1]) == 3


def test_unusable_images_are_counted(tmp_path):
    noise = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(noise, "JPEG")
    half, page = (base64.b64encode(data).decode() for data in (noise.getvalue()[:2000], b"<!doctype html>" * 9))
    table(tmp_path, line(1), line(2, image=image()[:-3]), line(3, image=half), line(4, image=page))
    manifest, rows = make(tmp_path)
    assert [r["id"] for r in rows] == ["set-1"]
    assert manifest["dropped"] == {"image cut short": 1, "image is a web page": 1, "image is not base64": 1}
    with pytest.raises(UserError, match="set-2"):
        make(tmp_path, most_dropped=0.1)


@pytest.mark.parametrize(("lines", "spec", "said"), [
    ([line(1), line(1)], {}, r"set\.tsv:3: index 1 is there twice"), ([line(1, answer="D")], {}, "'D' is none of the letters A to C"),
    ([line(1), line(2, B="", C="")], {}, r"set\.tsv:3: a question with one option"), ([line(1, A="")], {}, "option A is missing"),
    ([line(1, answer="")], {}, "without an answer"), ([line(1, question=" ")], {}, "question without text"),
    ([line("")], {}, "without an index"), ([line(1)], {"pair": "figure"}, "no column figure"),
    ([line(1)], {"split": "validation"}, r"no split 'validation' \(it has 'dev': 1\)"), ([line(1, image="99")], {}, "that of row '99'"),
    ([line(1)], {"openn": "exact"}, "did you mean 'open'"), ([line(1)], {"open": "exakt"}, "did you mean 'exact'"),
    ([line(1)], {"most_images": 0}, "most_images"), ([line(1, image="")], {}, "no question to ask"),
    ([line(1)], {"file": "none.tsv"}, "LMUData"),
])  # fmt: skip
def test_broken_rows_and_specs_are_one_error(lines, spec, said, tmp_path):
    table(tmp_path, *lines)
    with pytest.raises(UserError, match=said):
        make(tmp_path, **spec)


def test_broken_tables_are_one_error(tmp_path):
    table(tmp_path, line(1), columns=["index", "question", "image"])
    with pytest.raises(UserError, match="no column answer"):
        make(tmp_path)
    table(tmp_path, line(1), columns=["index", "question", "answer", "A", "C", "image"])
    with pytest.raises(UserError, match="without a gap"):
        make(tmp_path)
    table(tmp_path, line(1), line(2))
    whole = (tmp_path / "set.tsv").read_bytes()
    for broken, said in (
        (whole[: len(whole) // 2 + 60], r":3: not a whole line"), (whole.replace(b"What", b'"What', 1), "quotation mark left open"),
        (whole.replace(b"What", b"Wh\xff", 1), r":2: not UTF-8"), (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ):  # fmt: skip
        (tmp_path / "set.tsv").write_bytes(broken)
        with pytest.raises(UserError, match=said):
            make(tmp_path)


@pytest.mark.parametrize(("rule", "text", "answers", "right"), [
    ("yes_no", "Yes, there is.", ["yes"], True), ("yes_no", "No", ["Yes"], False), ("yes_no", "yes or no", ["yes"], None),
    ("yes_no", "maybe", ["no"], None), ("exact", " The Cat. ", ["the cat"], True), ("exact", "a cat", ["cat"], False),
    ("exact", "..", ["cat"], None), ("contains", "It says STOP\nhere", ["stop here", "go"], True), ("contains", "", ["x"], None),
    ("contains", "stop", ["stop here"], False),
    ("formula", "x ^ { 2 }\n= 4", ["x^{2} = 4"], True), ("formula", "X^{2}", ["x^{2}"], False), ("formula", " ", ["x"], None),
    ("vqa", "The dog", ["dog"], True), ("vqa", "dog", ["dog"] * 2 + ["cat"] * 8, False), ("vqa", "", ["dog"], None),
    ("number", "12 plus 3 is 15.04", ["15.0"], True), ("number", "about 1,200", ["1200"], True), ("number", "15.06", ["15.0"], False),
    ("number", "-3", ["3"], False), ("number", "none", ["3"], None),
    ("mmmu", "So the answer is 24.004", ["24"], True), ("mmmu", "We get x = 0.5\nTherefore the result is 1,024 m", ["1024"], True),
    ("mmmu", "The capital is Paris.", ["paris"], True), ("mmmu", "It is B minor", ["b"], True), ("mmmu", "absurd", ["b"], False),
    ("mmmu", "7", ["8"], False), ("mmmu", " ", ["8"], None), ("mmmu", "It is a 50% chance", ["0.5", "50"], True),
])  # fmt: skip
def test_open_answers_by_written_down_cases(rule, text, answers, right):
    assert judge(rule, text, answers) is right


def test_an_unknown_open_rule_is_named():
    with pytest.raises(UserError, match="did you mean 'exact'"):
        judge("exakt", "a", ["a"])


def test_hallusionbench_keeps_its_sets_figures_and_questions(tmp_path):
    names, bare = ["set_id", "figure_id", "question_id"], {"A": "", "B": "", "C": "", "answer": "No"}
    table(tmp_path, *(line(f"{n}_VD_illusion_1_{n % 2}_7", **bare) for n in range(3)))
    assert [[row["meta"][name] for name in names] for row in make(tmp_path)[1]] == [["1", "0", "7"], ["1", "1", "7"], ["1", "0", "7"]]
    table(tmp_path, line(1, **bare, set_id="3", figure_id="0", question_id="2"), columns=[*COLUMNS, *names])
    assert [make(tmp_path)[1][0]["meta"][name] for name in names] == ["3", "0", "2"]
    table(tmp_path, line("a_b_c", **bare))
    assert not {"set_id", "figure_questions"} & set(make(tmp_path)[1][0]["meta"])


def test_hallusionbench_keeps_how_many_questions_a_figure_and_a_pair_have_though_one_is_dropped(tmp_path):
    """Three of figure 0, one of them with a damaged image; two of figure 1; what has no image isn't asked and counts nowhere."""
    bare = {"A": "", "B": "", "C": "", "answer": "No"}
    at = {"0": [0, 1, 2], "1": [0, 1]}
    lines = [line(f"{figure}{question}_VD_illusion_1_{figure}_{question}", **bare) for figure, those in at.items() for question in those]
    lines[2] = line("02_VD_illusion_1_0_2", **bare, image="%" * 80)
    table(tmp_path, *lines, line("03_VD_illusion_1_0_3", **bare, image=""))
    manifest, rows = make(tmp_path)
    assert [row["meta"]["figure_questions"] for row in rows] == [3, 3, 2, 2] and sum(manifest["dropped"].values()) == 1
    assert [row["meta"]["pair_questions"] for row in rows] == [2, 2, 2, 2]
