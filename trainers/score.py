"""Stage `score`: predictions and a rule in, letters and one benchmark's numbers out. No model runs here, so another rule costs a second.

In: `{"predictions": id, "rule": NAME, "metric": "accuracy" | "mean_per_class"}`; the artefact of a predict stage.
Out: `scored.parquet` (id, label, options, answer, text, letter, valid, correct; a row a question) and `scores.json`.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from datasets_ray import metrics
from datasets_ray.answers import LETTERS, REFUSED, lettered, rule_named
from datasets_ray.errors import UserError
from trainers.context import Context


def run(spec: dict[str, Any], ctx: Context) -> dict[str, Any]:
    folder = ctx.inputs(spec["predictions"])
    table = parquet.read_table(folder / "predictions.parquet")
    made = folder / "manifest.json"
    dropped = json.loads(made.read_text()).get("dropped", {}) if made.is_file() else {}
    with ctx.working():
        scored, scores = score(table, spec["rule"], spec["metric"])
    scores["dropped"] = dropped
    write(scored, scores, ctx.out)
    return scores


def write(scored: pa.Table, scores: dict[str, Any], out: Path) -> None:
    parquet.write_table(scored, Path(out) / "scored.parquet")
    (Path(out) / "scores.json").write_text(json.dumps(scores, indent=1, sort_keys=True))


def score(predictions: pa.Table, rule: str, metric: str) -> tuple[pa.Table, dict[str, Any]]:
    """Reads every answer with `rule`.

    predictions: columns id, options, answer (the right letter), label, text. Returns the scored table and the numbers: `value`,
    `stderr` and `chance` in percentage points by `metric`; `accuracy`, `mean_per_class` and `valid` as shares in [0, 1].
    An answer that is no letter of the question's options is invalid and wrong, never redrawn.
    """
    reader, chosen = rule_named(rule), metrics.metric_named(metric)
    options, texts = predictions.column("options").to_pylist(), predictions.column("text").to_pylist()
    right = np.asarray(predictions.column("answer").to_pylist(), dtype=object)
    labels = predictions.column("label").to_pylist()
    for id, shown, answer in zip(predictions.column("id").to_pylist(), options, right):
        if answer not in LETTERS[: len(shown)] or not answer:
            raise UserError(f"question {id!r} has the right answer {answer!r} among {len(shown)} options", why="it must be a letter shown")

    letters = [reader.read(text, lettered(shown)) for text, shown in zip(texts, options)]
    counts = np.array([len(shown) for shown in options], dtype=np.int64)
    valid = np.array([letter is not None and LETTERS.index(letter) < n for letter, n in zip(letters, counts)], dtype=bool)
    correct = np.array([letter == answer for letter, answer in zip(letters, right)], dtype=bool)
    # a question without a class is a class of its own name "": mean-per-class then equals accuracy, as it should
    names = [label or "" for label in labels]
    classes = metrics.classes_of(names)
    error = chosen.error(correct, classes)
    scores = {
        "value": 100 * chosen.value(correct, classes),
        "metric": metric,
        "rule": rule,
        "rule_source": reader.source,
        "accuracy": metrics.accuracy(correct),
        "mean_per_class": metrics.mean_per_class(correct, names),
        "valid": metrics.validity(letters, options),
        "refused": int(sum(letter == REFUSED and not ok for letter, ok in zip(letters, valid))),
        "unreadable": letters.count(None),
        "n": len(letters),
        "classes": int(classes.max()) + 1,
        "stderr": None if error is None else 100 * error,
        "chance": 100 * metrics.chance(metric, counts, names),
        "given_letters": _counted(letter for letter in letters if letter is not None),
        "right_letters": _counted(right),
    }
    scored = predictions.select(["id", "label", "options", "answer", "text"])
    scored = scored.append_column("letter", pa.array(letters, pa.string()))
    return scored.append_column("valid", pa.array(valid)).append_column("correct", pa.array(correct)), scores


def _counted(letters: Any) -> dict[str, int]:
    return dict(sorted(Counter(letters).items()))
