"""Every benchmark of experiments/benchmarks, from a small release in its layout through its own file to numbers worked out by hand."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from datasets_ray import benchmarks
from datasets_ray.answers import LETTERS
from datasets_ray.choices import build_from_similarities
from datasets_ray.rows import RowTable
from datasets_ray.sources import build
from tests.datasets_ray.small_benchmarks import CASES
from trainers import score, similarities


def asked(name: str, root: Path) -> RowTable:
    """The benchmark's questions; mined ones have two options, by similarities in which the next class is the nearest."""
    CASES[name].write(root)
    made = benchmarks.load(name)
    build(made.spec(allow_subset=True), root / "rows", lambda _: root, str(root))
    rows = RowTable(root / "rows")
    if made.negatives != "mined":
        return rows
    classes, labels = rows.manifest["classes"], rows.column("label")
    matrix = np.zeros((len(labels), len(classes)))
    for at, label in enumerate(labels):
        matrix[at, classes.index(label)], matrix[at, (classes.index(label) + 1) % len(classes)] = 1.0, 0.5
    (root / "near").mkdir()
    similarities.write(matrix, root / "near", ids=rows.column("id"), classes=classes, template="a {}", model="by hand", truncated=0)
    build_from_similarities(root / "near", root / "rows", root / "questions", k=2, seed=0)
    return RowTable(root / "questions")


def said(answer: str, right: str, options: list[str]) -> str:
    """`+` and `-` as letters."""
    if answer not in "+-":
        return answer
    return right if answer == "+" else LETTERS[(LETTERS.index(right) + 1) % len(options)]


@pytest.mark.parametrize("name", benchmarks.names())
def test_a_benchmark_scores_as_its_file_says(name: str, tmp_path: Path) -> None:
    case, made = CASES[name], benchmarks.load(name)
    rows = asked(name, tmp_path)
    table = rows.table.select(["id", "options", "answer", "label", "meta"])
    answers = [said(text, row["answer"], row["options"]) for text, row in zip(case.answers, table.to_pylist(), strict=True)]
    table = table.append_column("text", pa.array(answers, pa.string()))
    assert made.rule is not None
    scores = score.score(table, made.rule, made.metric)[1]
    for key, value in case.expected.items():
        assert scores[key] == (pytest.approx(value) if isinstance(value, float) else value), key
    for path, value in case.told.items():
        found = functools.reduce(lambda tree, key: tree[key], path.split("."), scores)
        assert found == pytest.approx(value), path
    assert ("not_run" in scores) == (name == "mm_vet")
