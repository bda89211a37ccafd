"""Hard negatives: FOCI's choice and order, ties and duplicates decided aloud, files read and written back without a difference."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from datasets_ray.choices import build_from_annotations, build_from_foci, build_from_similarities, main, shown_order, to_foci
from datasets_ray.errors import UserError
from datasets_ray.foci_files import foci_json, read_foci, write_foci
from datasets_ray.negatives import from_annotations, from_similarities, hardest
from datasets_ray.rows import RowTable, row, write_rows

CLASSES = [f"species {i}" for i in range(12)]


def foci_reference(similarities: np.ndarray, truth: int, top_k: int, kind: Literal["quicksort", "stable"] = "quicksort") -> list[int]:
    """FOCI's selection for one image, as `options_generation.py` words it (numpy's default sort)."""
    top = np.argsort(similarities, kind=kind)[-top_k:].tolist()
    return [truth, *top[1:]] if truth not in top else [truth, *(i for i in top if i != truth)]


@pytest.fixture()
def similar() -> tuple[np.ndarray, list[str]]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((200, len(CLASSES))).astype(np.float32), [CLASSES[i] for i in rng.integers(0, len(CLASSES), 200)]


@pytest.fixture()
def mined(tmp_path: Path, similar: tuple[np.ndarray, list[str]]) -> tuple[Path, Path]:
    matrix, labels = similar
    rows, made = tmp_path / "rows", tmp_path / "similarities"
    images = [{"bytes": bytes([i]), "path": f"{i}.png"} for i in range(len(labels))]
    write_rows([row(f"r{i}", images=[images[i]], label=label, meta={"i": i}) for i, label in enumerate(labels)], rows, classes=CLASSES)
    made.mkdir()
    np.save(made / "similarities.npy", matrix)
    facts = {"ids": [f"r{i}" for i in range(len(labels))], "classes": CLASSES, "model": "ViT-tiny", "template": "a photo of a {}"}
    (made / "manifest.json").write_text(json.dumps(facts))
    return made, rows


@pytest.mark.parametrize("k", [2, 4, 5, len(CLASSES)])
def test_the_choice_and_order_are_focis(k: int, similar: tuple[np.ndarray, list[str]]) -> None:
    matrix, labels = similar
    chosen = from_similarities(matrix, CLASSES, labels, k)
    for similarities, label, options in zip(matrix, labels, chosen.options):
        assert options == [CLASSES[i] for i in foci_reference(similarities, CLASSES.index(label), k)]
        assert options[0] == label and len(set(options)) == k
        rising = [similarities[CLASSES.index(name)] for name in options[1:]]
        assert rising == sorted(rising)
    assert (chosen.ties_at_the_cut, chosen.ties_in_order) == (0, 0)


@pytest.mark.parametrize("k", [2, 4, 5, len(CLASSES)])
def test_ties_are_ordered_as_focis_sort_made_stable(k: int, similar: tuple[np.ndarray, list[str]]) -> None:
    matrix, labels = np.round(similar[0]), similar[1]
    chosen = from_similarities(matrix, CLASSES, labels, k)
    for similarities, label, options in zip(matrix, labels, chosen.options):
        assert options == [CLASSES[i] for i in foci_reference(similarities, CLASSES.index(label), k, "stable")]
    assert chosen.ties_at_the_cut > 0 or k == len(CLASSES)


def test_a_larger_k_only_adds_easier_negatives(similar: tuple[np.ndarray, list[str]]) -> None:
    four, five = (from_similarities(*[similar[0], CLASSES, similar[1]], k).options for k in (4, 5))
    assert all(b[2:] == a[1:] for a, b in zip(four, five))


def test_ties_go_to_the_later_label_and_are_counted() -> None:
    level = np.zeros((1, 6))
    chosen, cut, order = hardest(level, np.array([2]), 4)
    assert chosen.tolist() == [[3, 4, 5]]  # 5 is the hardest of equals, so last
    assert cut.tolist() == [True] and order.tolist() == [True]
    steps = np.array([[0.9, 0.5, 0.4, 0.4, 0.1]])
    chosen, cut, order = hardest(steps, np.array([0]), 3)
    assert chosen.tolist() == [[3, 1]] and cut.tolist() == [True] and order.tolist() == [False]
    # the truth's own similarity decides nothing
    chosen, cut, order = hardest(np.array([[0.5, 0.5, 0.4, 0.3]]), np.array([0]), 3)
    assert chosen.tolist() == [[2, 1]] and not cut[0] and not order[0]
    # all labels taken: there is no cut
    assert not hardest(level, np.array([0]), 6)[1][0]


def test_duplicate_class_names_are_one_label() -> None:
    """CLIP's ImageNet list says `missile` and `sunglasses` twice."""
    classes = ["cat", "missile", "dog", "Missile ", "fox"]
    matrix = np.array([[0.1, 0.9, 0.2, 0.9, 0.3], [0.1, 0.9, 0.2, 0.9, 0.3]])
    chosen = from_similarities(matrix, classes, ["cat", "Missile "], 3)
    assert chosen.options == [["cat", "fox", "missile"], ["Missile ", "dog", "fox"]]
    assert chosen.duplicate_classes == {"missile": 2} and chosen.duplicate_rows == 1
    with pytest.raises(UserError, match="4 distinct labels"):
        from_similarities(matrix, classes, ["cat", "cat"], 5)


def test_more_options_than_labels_name_the_similarities(tmp_path: Path) -> None:
    made = tmp_path / "similarities"
    made.mkdir()
    np.save(made / "similarities.npy", np.zeros((0, 3), np.float32))
    (made / "manifest.json").write_text(json.dumps({"ids": [], "classes": ["cat", "dog", "Cat "], "model": "x", "template": "{}"}))
    with pytest.raises(UserError, match="similarities: k = 5 options from 2 distinct labels") as told:
        build_from_similarities(made, tmp_path, tmp_path / "out", k=5, seed=0)
    assert "--set mining.k=2" in told.value.hint


def test_mistakes_are_named(similar: tuple[np.ndarray, list[str]]) -> None:
    matrix, labels = similar
    with pytest.raises(UserError, match="did you mean 'species 3'"):
        from_similarities(matrix, CLASSES, ["specie 3", *labels[1:]], 4)
    with pytest.raises(UserError, match="shape"):
        from_similarities(matrix[:, 1:], CLASSES, labels, 4)
    for k in (0, 1, 27):
        with pytest.raises(UserError, match=f"k = {k}"):
            from_similarities(matrix, CLASSES, labels, k)
    holed = matrix.copy()
    holed[7, 3] = np.nan
    with pytest.raises(UserError, match="row 7"):
        from_similarities(holed, CLASSES, labels, 4)


@pytest.mark.parametrize("k", [4, 5])
def test_questions_keep_their_order_and_say_how_they_were_made(k: int, mined: tuple[Path, Path], tmp_path: Path) -> None:
    made, rows = mined
    manifest = build_from_similarities(made, rows, tmp_path / "q", k=k, seed=3)
    asked, source = RowTable(tmp_path / "q"), RowTable(rows)
    assert asked.table.schema == source.table.schema and len(asked) == len(source)
    for question, labelled in zip(asked, source):
        negatives = json.loads(question["meta"])["negatives"]
        assert question["options"]["ABCDE".index(question["answer"])] == question["label"] == labelled["label"]
        assert sorted(question["options"]) == sorted([question["label"], *negatives]) and len(question["options"]) == k
        assert question["images"] == labelled["images"] and question["id"] == labelled["id"]
        assert json.loads(question["meta"])["i"] == json.loads(labelled["meta"])["i"]
    assert (manifest["k"], manifest["seed"], manifest["model"], manifest["template"]) == (k, 3, "ViT-tiny", "a photo of a {}")
    assert sum(manifest["right_letters"].values()) == manifest["rows"] == 200
    again = build_from_similarities(made, rows, tmp_path / "again", k=k, seed=3)
    assert again["shards"][0]["sha256"] == manifest["shards"][0]["sha256"]
    other = build_from_similarities(made, rows, tmp_path / "other", k=k, seed=4)
    assert other["shards"][0]["sha256"] != manifest["shards"][0]["sha256"]


def test_the_order_shown_is_uniform_and_each_rows_own() -> None:
    options = list("vwxyz")
    orders = [shown_order(0, str(i), options) for i in range(4000)]
    first = Counter(order.index("v") for order in orders)
    assert all(abs(first[p] - 800) < 5 * np.sqrt(4000 * 0.2 * 0.8) for p in range(5))
    assert shown_order(0, "7", options) == shown_order(0, "7", options[::-1])
    assert [o for o in shown_order(0, "7", options) if o != "v"] == shown_order(0, "7", options[1:])
    assert len({tuple(shown_order(s, "7", options)) for s in range(50)}) > 20


def test_other_rows_similarities_are_refused(mined: tuple[Path, Path], tmp_path: Path) -> None:
    write_rows([row("x", label=CLASSES[0])], tmp_path / "strange", classes=CLASSES)
    with pytest.raises(UserError, match="was not made of"):
        build_from_similarities(mined[0], tmp_path / "strange", tmp_path / "q", k=4, seed=0)


def test_annotated_mistakes_become_negatives(tmp_path: Path) -> None:
    lines = [
        {"id": "1", "image": "a.jpg", "label": "cat", "wrong": ["dog", "fox", "dog", "wolf"]},
        {"id": "2", "image": "b.jpg", "label": "dog", "wrong": {"cat": 2, "Dog": 9, "fox": 1}},
        {"id": "3", "image": "c.jpg", "label": "fox", "wrong": ["cat", "Cat"]},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    manifest = build_from_annotations(tmp_path / "a.jsonl", tmp_path / "q", root="images", k=3, seed=0)
    asked = list(RowTable(tmp_path / "q"))
    assert [json.loads(q["meta"])["negatives"] for q in asked] == [["fox", "dog"], ["fox", "cat"]]
    assert manifest["dropped"] == {"fewer than 2 wrong labels": 1} and manifest["root"] == "images"
    assert manifest["ties_at_the_cut"] == 1  # fox and wolf, once each
    with pytest.raises(UserError, match="no question is left"):
        build_from_annotations(tmp_path / "a.jsonl", tmp_path / "none", root=None, k=9, seed=0)
    (tmp_path / "bad.jsonl").write_text('{"id": "1", "image": "a.jpg", "label": "cat", "wrong": ["dog"]}\n{"label": 3}\n')
    with pytest.raises(UserError, match="line 2"):
        build_from_annotations(tmp_path / "bad.jsonl", tmp_path / "none", root=None, k=2, seed=0)


def test_annotation_ties_are_counted() -> None:
    found = from_annotations(["x"], [{"b": 1, "a": 1, "c": 1}], 3)
    assert found.options == [["x", "b", "a"]] and found.ties_at_the_cut == 1 and found.ties_in_order == 1


def test_foci_files_read_and_written_back_are_equal(data_root: Path, tmp_path: Path) -> None:
    files = sorted((data_root / "foci_benchmark" / "data").glob("*.json")) + sorted((data_root / "derived_foci_runnable").glob("*.json"))
    assert len(files) >= 7
    for file in files:
        questions = read_foci(file)
        assert foci_json(questions) == json.loads(file.read_text())
        write_foci(questions, tmp_path / "back.json")
        if file.parent.name == "data":
            assert (tmp_path / "back.json").read_bytes() == file.read_bytes()


def test_foci_rows_are_asked_in_a_seeded_order_and_go_back(data_root: Path, tmp_path: Path) -> None:
    file = data_root / "foci_benchmark" / "data" / "oxford_pet-ViT-L-14-laion2b_s32b_b82k-4.json"
    manifest = build_from_foci(file, tmp_path / "q", root="pets", k=4, seed=0)
    assert manifest["rows"] == 3669 and manifest["k"] == 4 and len(manifest["classes"]) == 37
    # FOCI's right option is always first; asked, it is each letter about equally often
    assert all(abs(n - 3669 / 4) < 5 * np.sqrt(3669 * 0.25 * 0.75) for n in manifest["right_letters"].values())
    write_foci(to_foci(RowTable(tmp_path / "q")), tmp_path / "back.json")
    assert (tmp_path / "back.json").read_bytes() == file.read_bytes()
    with pytest.raises(UserError, match="not 5"):
        build_from_foci(file, tmp_path / "five", root=None, k=5, seed=0)


@pytest.mark.parametrize(
    "content",
    [
        "{", "[]", '{"a": [{"image": "x"}]}', '{"a": [{"image": "x", "options": ["b", "a"], "groundtruth": "a"}]}',
        '{"a": [{"image": "x", "options": ["a", "a"], "groundtruth": "a"}]}', '{"a": [{"image": "x", "options": [], "groundtruth": "a"}]}',
    ],
)
def test_a_broken_foci_file_is_one_message(content: str, tmp_path: Path) -> None:
    (tmp_path / "f.json").write_text(content)
    with pytest.raises(UserError, match=r"f\.json"):
        read_foci(tmp_path / "f.json")


def test_commands_build_and_show(mined: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], repository: Path) -> None:
    made, rows = mined
    inputs = ["--similarities", str(made), "--rows", str(rows)]
    assert main(["build", *inputs, "--out", str(tmp_path / "q"), "--write-foci", str(tmp_path / "f.json")]) == 0
    assert json.loads(capsys.readouterr().out)["k"] == 5
    assert len(read_foci(tmp_path / "f.json")) == 200
    asked = RowTable(tmp_path / "q")[17]
    assert main(["show", str(tmp_path / "q"), "--id", "r17"]) == 0
    shown = capsys.readouterr().out
    assert f"-> {asked['answer']} ({asked['label']})" in shown and f"A. {asked['options'][0]}\nB. " in shown
    assert main(["show", str(tmp_path / "f.json"), "--rows", "2"]) == 0
    assert capsys.readouterr().out.count("->") == 2
    command = [sys.executable, "-m", "datasets_ray.choices", "show", str(tmp_path / "q"), "--id", "nobody"]
    wrong = subprocess.run(command, capture_output=True, text=True, cwd=repository)
    assert wrong.returncode == 1 and "nobody" in wrong.stderr and "Traceback" not in wrong.stderr
