"""Confusions: counted by hand on a few rows, shown with links that lead to the rows, small for many classes."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from datasets_ray.rows import RowTable, row, write_rows
from grid import report
from grid.report import confusions
from grid.report.load import load_run
from grid.results import Answers, Arm, Results, Score
from tests.grid.pages import Page
from tests.grid.synthetic_run import make_run, small_plan

LETTERS = "ABC"


def scored(path: Path, answers: list[tuple[str, list[str], str | None]]) -> Score:
    """A scored.parquet of (label, options, letter) and its Score."""
    labels, options, letters = ([list(column) for column in zip(*answers)]) if answers else ([], [], [])
    right = [LETTERS[shown.index(label)] if label in shown else "A" for label, shown in zip(labels, options)]
    ids = [f"q{k}" for k in range(len(labels))]
    correct = [letter == answer for letter, answer in zip(letters, right)]
    valid = [letter is not None for letter in letters]
    table = {"id": ids, "label": labels, "options": options, "answer": right, "text": [x or "" for x in letters], "letter": letters}
    pq.write_table(pa.table({**table, "valid": valid, "correct": correct}), path)
    known = Answers(np.array(ids), np.array(labels), np.array(correct), np.array(valid), np.full(len(ids), 3), np.array(ids))
    return Score(100 * float(np.mean(correct)), n=len(ids), answers=known, path=path)


@pytest.fixture
def results(tmp_path: Path) -> Results:
    """Two arms, four questions: cat, cat, dog, fox."""
    three, other = ["cat", "dog", "fox"], ["dog", "cat", "fox"]
    first = [("cat", three, "B"), ("cat", other, "B"), ("dog", three, "A"), ("fox", three, None)]
    second = [("cat", three, "B"), ("cat", other, "A"), ("dog", three, "B"), ("fox", three, "C")]
    arms = [Arm("one", {}, scores={"pets": scored(tmp_path / "1.parquet", first)})]
    arms.append(Arm("two", {}, scores={"pets": scored(tmp_path / "2.parquet", second)}))
    return Results("toy", {"fine": ("pets",)}, arms)


def test_counts_by_hand(results: Results) -> None:
    made = confusions.count(results, "pets")
    assert made is not None and made.classes == ["cat", "dog", "fox"]
    assert made.counts.tolist() == [[1, 3, 0], [1, 1, 0], [0, 0, 1]]
    assert made.shown.tolist() == [[4, 4, 4], [2, 2, 2], [2, 2, 2]] and made.invalid.tolist() == [0, 0, 1]
    assert confusions.top(made, made.confused, 9) == [(0, 1), (1, 0)]
    assert made.by_arm["one"].tolist() == [[1, 1, 0], [1, 0, 0], [0, 0, 0]]
    rows, true, taken = made.wrong["two"]
    assert (rows.tolist(), true.tolist(), taken.tolist()) == ([0, 1], [0, 0], [1, 1])


def test_options_that_are_no_classes_have_no_confusions(results: Results, tmp_path: Path) -> None:
    general = [("", ["1", "2", "3"], "A"), ("", ["4", "5", "6"], "B")]
    results.arms[0].scores["counts"] = scored(tmp_path / "c.parquet", general)
    assert confusions.count(results, "counts") is None and confusions.count(results, "nobody") is None


def test_families_come_from_the_rows_and_join_their_classes(results: Results, tmp_path: Path) -> None:
    kinds = {"cat": "feline", "dog": "canine", "fox": "canine"}
    shown = [row(f"q{k}", label=label, meta={"category": kinds[label]}) for k, label in enumerate(("cat", "cat", "dog", "fox"))]
    write_rows(shown, tmp_path / "rows")
    table, made = RowTable(tmp_path / "rows"), confusions.count(results, "pets")
    assert made is not None and confusions.families(table) == kinds
    text = confusions.render(results, made, table, None, set(), 500, "index.html")
    assert "0.0 % of all confusions stay inside a family" in text and 'title="feline → canine: 3">75<' in text
    write_rows([row("q0", label="cat", meta={"category": "x"}), row("q1", label="dog")], tmp_path / "some")
    assert confusions.families(RowTable(tmp_path / "some")) == {} == confusions.families(None)


def test_a_report_leads_from_a_benchmark_to_confusions_to_their_rows(tmp_path: Path) -> None:
    out = make_run(tmp_path / "run", small_plan())
    report.write(out)
    page = out / "report" / "confusions" / "pets.html"
    text = page.read_text()
    assert "confusions/pets.html" in Page((out / "report" / "index.html").read_text()).links
    assert "../../confusions/pets.html" in Page((out / "report" / "rows" / "row-13" / "pets.html").read_text()).links
    made = confusions.count(load_run(out), "pets")
    assert made is not None
    pair = confusions.top(made, made.confused, 1)[0]
    true, taken, times = made.classes[pair[0]], made.classes[pair[1]], made.confused[pair]
    assert f'<tr><td>{true}</td><td>{taken}</td><td class="number"><a href="../answers/pets.html">{times}</a></td>' in text
    link = re.search(r'<a class="example" href="../rows/([^"]+)/pets.html#r(\d+)"', text)
    assert link is not None
    scored = pq.read_table(load_run(out).named(link[1]).scores["pets"].path).to_pylist()[int(link[2])]  # type: ignore[union-attr]
    assert scored["label"] == true and scored["options"]["ABCDE".index(scored["letter"])] == taken


def test_many_classes_are_a_picture_and_the_most_confused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = [f"class {k:03d}" for k in range(300)]
    answers = []
    for k in range(1500):
        label = names[k % 300]
        shown = [label, *rng.choice([n for n in names if n != label], 2, replace=False).tolist()]
        answers.append((label, shown, LETTERS[int(rng.integers(3))]))
    arm = Arm("one", {}, scores={"big": scored(tmp_path / "big.parquet", answers)})
    results = Results("toy", {"fine": ("big",)}, [arm])
    made = confusions.count(results, "big")
    assert made is not None
    text = confusions.render(results, made, None, None, set(), 500, "index.html")
    assert f"the {confusions.SUBSET} of 300 classes in the most confusions" in text and "All 300 classes" in text
    assert f"The {confusions.LISTED} most frequent of {int((made.confused > 0).sum())} confusions." in text
    picture = re.search(r"data:image/png;base64,([^\"]+)", text)
    assert picture is not None and Image.open(io.BytesIO(base64.b64decode(picture[1]))).size == (300, 300)
    assert len(text) < 150_000 and json.dumps(text)
