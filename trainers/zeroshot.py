"""Stage `zeroshot`: what the contrastive model itself makes of the images, over all classes and among the choices shown.

In: `{"similarities": id, "rows": id, "choices": id | null, "metric": "accuracy" | "mean_per_class"}`.
Out: `scores.json`: `value` and `stderr` by the metric in percentage points; top1, top5, mean_per_class, among_choices as shares;
`scored.parquet`: a row an image with text (the most similar class of all), correct (whether it is right), rank (of the right class, from
0) and, where it was asked about, options, answer and letter (the most similar option).

Maths as CLIP_benchmark's `zeroshot_classification.py`: top-k over the similarities, mean over the classes present. Where similarities
tie, the earlier class is ranked first; the ties are counted. A class name that occurs twice is one label: either column is right.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from datasets_ray import metrics
from datasets_ray.answers import LETTERS
from datasets_ray.choices import read_similarities, rows_of
from datasets_ray.errors import UserError
from datasets_ray.negatives import merge_duplicates, truth_of
from datasets_ray.rows import open_rows
from trainers.context import Context


def run(spec: dict[str, Any], ctx: Context) -> dict[str, Any]:
    matrix, made = read_similarities(ctx.inputs(spec["similarities"]))
    rows = open_rows(str(ctx.inputs(spec["rows"])))
    every = rows.column("label")
    labels = [every[index] for index in rows_of(made["ids"], rows, spec["similarities"])]
    with ctx.working():
        scores = over_all_classes(np.asarray(matrix), made["classes"], labels)
        asked: dict[str, tuple[list[str], str]] = {}
        if spec.get("choices"):
            questions = open_rows(str(ctx.inputs(spec["choices"])))
            columns = (questions.column(name) for name in ("id", "options", "label"))
            scores |= among_choices(np.asarray(matrix), made["classes"], made["ids"], *columns)
            shown = (questions.column(name) for name in ("id", "options", "answer"))
            asked = {id: (list(options), answer) for id, options, answer in zip(*shown)}
        parquet.write_table(answers(np.asarray(matrix), made["classes"], made["ids"], labels, asked), ctx.out / "scored.parquet")
    metric = spec["metric"]
    metrics.metric_named(metric)
    share = {"accuracy": "top1"}.get(metric, metric)
    error = scores["errors"][share]
    scores |= {
        "metric": metric,
        "value": 100 * scores[share],
        "stderr": None if error is None else 100 * error,
        "model": made.get("model"),
        "template": made.get("template"),
    }
    (ctx.out / "scores.json").write_text(json.dumps(scores, indent=1, sort_keys=True))
    return scores


def ranked(similarities: np.ndarray, classes: list[str], labels: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(columns int[K] of the distinct classes, similarities float[N, K] to them, rank int[N] of the right one from 0)"""
    owner, _ = merge_duplicates(classes)
    columns = np.unique(owner)
    distinct = similarities[:, columns]
    truth = np.searchsorted(columns, owner[truth_of(labels, classes)])
    at = np.arange(len(truth))
    own = distinct[at, truth][:, None]
    earlier = np.arange(len(columns))[None] < truth[:, None]
    return columns, distinct, ((distinct > own) | ((distinct == own) & earlier)).sum(axis=1)


def answers(
    similarities: np.ndarray, classes: list[str], ids: list[str], labels: list[str], asked: dict[str, tuple[list[str], str]]
) -> pa.Table:
    """The rows behind the shares. asked: id → (options, right letter) of the images that were asked about."""
    columns, distinct, rank = ranked(similarities, classes, labels)
    column_of = {name: index for index, name in reversed(list(enumerate(classes)))}
    rows = []
    for at, (id, label) in enumerate(zip(ids, labels)):
        options, answer = asked.get(id, ([], ""))
        among = [similarities[at, column_of[name]] for name in options]
        taken = classes[columns[int(distinct[at].argmax())]]
        letter = LETTERS[among.index(max(among))] if among else None
        rows.append((id, label, options, answer, taken, letter, True, bool(rank[at] == 0), int(rank[at])))
    names = ["id", "label", "options", "answer", "text", "letter", "valid", "correct", "rank"]
    text, flag = pa.string(), pa.bool_()
    types = [text, text, pa.list_(text), text, text, text, flag, flag, pa.int64()]
    return pa.table([pa.array(column, kind) for column, kind in zip(zip(*rows), types)], names=names)


def over_all_classes(similarities: np.ndarray, classes: list[str], labels: list[str]) -> dict[str, Any]:
    """similarities float[N, C] → shares top1, top5 (None below five classes), mean_per_class; ties at the top counted."""
    columns, distinct, rank = ranked(similarities, classes, labels)
    right = rank == 0
    top = distinct.max(axis=1, keepdims=True)
    return {
        "n": len(rank),
        "classes": len(columns),
        "top1": metrics.accuracy(right),
        "top5": metrics.accuracy(rank < 5) if len(columns) >= 5 else None,
        "mean_per_class": metrics.mean_per_class(right, labels),
        "ties": int(((distinct == top).sum(axis=1) > 1).sum()),
        "chance": 100.0 / len(columns),
        "errors": {
            "top1": metrics.standard_error("accuracy", right, labels),
            "mean_per_class": metrics.standard_error("mean_per_class", right, labels),
        },
    }


def among_choices(
    similarities: np.ndarray, classes: list[str], ids: list[str], asked: list[str], options: list[list[str]], labels: list[str]
) -> dict[str, Any]:
    """Share of questions whose most similar option is the right one. asked, options, labels: the questions' columns."""
    row_of = {id: index for index, id in enumerate(ids)}
    missing = [id for id in asked if id not in row_of]
    if missing:
        raise UserError(f"{len(missing)} questions have no similarities, first {missing[0]!r}", why="they were made of other rows")
    column_of = {name: index for index, name in reversed(list(enumerate(classes)))}
    values = [[similarities[row_of[id], column_of[name]] for name in shown] for id, shown in zip(asked, options)]
    right, ties = [], 0
    for among, shown, label in zip(values, options, labels):
        best = max(among)
        ties += among.count(best) > 1
        right.append(shown[among.index(best)] == label)
    correct = np.array(right, dtype=bool)
    return {
        "among_choices": metrics.accuracy(correct),
        "among_choices_mean_per_class": metrics.mean_per_class(correct, labels),
        "among_choices_ties": ties,
        "among_choices_n": len(right),
    }
