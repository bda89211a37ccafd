"""Stage `score`: predictions and a rule in, letters and one benchmark's numbers out. No model runs here, so another rule costs a second.

In: `{"predictions": id, "rule": NAME, "metric": "accuracy" | "mean_per_class" | "circular", "method": "generate"}`; the artefact of a
predict stage. method: which of the stage's answers are scored; what others there are is told beside, under `methods`.
Out: `scored.parquet` (id, label, options, answer, text, letter, valid, correct, guess: how likely a guess is right; a row a question) and
`scores.json`.

A question without options is read by the open rule that its `meta` names (`datasets_ray.open_answers`), one that needs a judge is left
out and counted. Questions whose meta names a `group` count together, whatever the metric: a group is right when all of it is (VLMEvalKit's
circular evaluation), n is the number of groups, a row of `scored.parquet` is a group with its `members`, and the accuracies of the
questions as they stand in the original order and of all of them are told beside.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from datasets_ray import metrics
from datasets_ray.answers import LETTERS, REFUSED, lettered, rule_named
from datasets_ray.errors import UserError
from datasets_ray.invalid import explain
from datasets_ray.open_answers import JUDGED, YES_NO, judge, yes_or_no
from trainers.context import Context

PICK = "likelihood_text_raw"
"""The way of comparing likelihoods that is the value of method `likelihood`."""
NO_JUDGE, INCOMPLETE = "needs a judge model", "a rotation of its group was dropped"
Row = dict[str, Any]


def run(spec: dict[str, Any], ctx: Context) -> dict[str, Any]:
    folder = ctx.inputs(spec["predictions"])
    table = parquet.read_table(folder / "predictions.parquet")
    made = folder / "manifest.json"
    dropped = json.loads(made.read_text()).get("dropped", {}) if made.is_file() else {}
    with ctx.working():
        scored, scores = score_method(table, spec["rule"], spec["metric"], spec.get("method", "generate"))
    scores["dropped"] = dropped
    write(scored, scores, ctx.out)
    return scores


def score_method(predictions: pa.Table, rule: str, metric: str, method: str) -> tuple[pa.Table, dict[str, Any]]:
    """`score` of what one method of the predict stage answered. Where it holds more, `methods` tells each one's value, stderr, share of
    readable answers and rule; every way of comparing likelihoods is one. A greedy answer is the same by `generate` and `first_token`:
    a letter that its first token settles is that letter by any rule."""
    columns = predictions.column_names
    greedy = [name for name in ("generate", "first_token") if "text" in columns and (name == "generate" or f"{name}_letter" in columns)]
    picks = [name.removesuffix("_letter") for name in columns if name.startswith("likelihood_") and name.endswith("_letter")]
    made = [*greedy, *(["likelihood"] if picks else [])]
    if method not in made:
        raise UserError(f"these predictions hold no answers by {method!r}", hint=f"they were made by {', '.join(made)}; predict again")

    def scored_by(name: str) -> tuple[pa.Table, dict[str, Any]]:
        if name in greedy:
            return score(predictions, rule, metric)
        letters = predictions.column(f"{PICK if name == 'likelihood' else name}_letter").to_pylist()
        table = predictions.drop_columns(["text"] if "text" in columns else [])
        answers = score(table.append_column("text", pa.array([letter or "" for letter in letters], pa.string())), "strict", metric)
        pick = (PICK if name == "likelihood" else name).removeprefix("likelihood_")
        return answers[0], {**answers[1], "rule": pick, "rule_source": f"the option with the largest {pick} (trainers.likelihood)"}

    table, scores = scored_by(method)
    others = {name: scored_by(name)[1] for name in [*greedy[:1], *picks]} if len(made) > 1 or picks else {}
    told = {name: {key: one[key] for key in ("value", "stderr", "valid", "rule")} for name, one in others.items()}
    return table, {**scores, "method": method, **({"methods": told} if told else {})}


def write(scored: pa.Table, scores: dict[str, Any], out: Path) -> None:
    parquet.write_table(scored, Path(out) / "scored.parquet")
    (Path(out) / "scores.json").write_text(json.dumps(scores, indent=1, sort_keys=True))


@dataclass
class Marked:
    """Questions with what was read of their answers; all arrays have length N."""

    rows: list[Row]
    """id, label, options, answer, text; meta as a dict."""
    letters: list[str | None]
    valid: np.ndarray
    """bool[N]"""
    correct: np.ndarray
    """bool[N]"""
    guess: np.ndarray
    """float[N]: how likely a guess is right."""

    def of(self, name: str) -> list[Any]:
        return [row["meta"].get(name) for row in self.rows]


def score(predictions: pa.Table, rule: str, metric: str) -> tuple[pa.Table, dict[str, Any]]:
    """Reads every answer with `rule`, those without options with their own.

    predictions: columns id, options, answer (the right letter, or text), label, text, and meta where questions have groups or no options.
    Returns the scored table and the numbers: `value`, `stderr` and `chance` in percentage points by `metric`; `accuracy`,
    `mean_per_class` and `valid` as shares in [0, 1]; `invalid`: why answers are not valid (`datasets_ray.invalid`).
    An answer that is no letter of the options is invalid and wrong, never redrawn.
    """
    reader, chosen = rule_named(rule), metrics.metric_named(metrics.GROUPED.get(metric, metric))
    rows = _rows(predictions)
    asked = [row for row in rows if row["options"] or row["meta"].get("open") != JUDGED]
    left_out = Counter({NO_JUDGE: len(rows) - len(asked)})
    groups = metrics.Groups.of([row["meta"].get("group") or row["id"] for row in asked])
    grouped = any(row["meta"].get("group") for row in asked)
    if metric in metrics.GROUPED and not grouped:
        raise UserError(f"metric {metric!r}, and no question belongs to a group", hint="circular: true in the keys of the data set")
    if grouped:
        metric = "circular" if metric == "accuracy" else metric
        whole = [part for part in groups.members if len(part) >= max(int(asked[at]["meta"].get("rotations") or 1) for at in part)]
        left_out[INCOMPLETE] = len(groups.members) - len(whole)
        asked = [asked[at] for part in whole for at in part]
        groups = metrics.Groups.of([row["meta"].get("group") or row["id"] for row in asked])
    names = [row["label"] or "" for row in asked]
    metrics.classes_of(names)  # nothing to score is an error
    marked = _marked(asked, reader)

    first = np.array([part[0] for part in groups.members], dtype=np.int64)
    correct, guess = groups.all(marked.correct), groups.product(marked.guess)
    # a question without a class is a class of its own name "": mean-per-class then equals accuracy, as it should
    names = [names[at] for at in first]
    classes = metrics.classes_of(names)
    error = chosen.error(correct, classes)
    lettered_rows = [at for at, row in enumerate(asked) if row["options"]]
    scores = {
        "value": 100 * chosen.value(correct, classes),
        "metric": metric,
        "rule": rule,
        "rule_source": reader.source,
        "accuracy": metrics.accuracy(correct),
        "mean_per_class": metrics.mean_per_class(correct, names),
        "valid": float(np.mean(marked.valid)),
        "refused": int(sum(letter == REFUSED and not ok for letter, ok in zip(marked.letters, marked.valid))),
        "unreadable": int(sum(letter is None and not ok for letter, ok in zip(marked.letters, marked.valid))),
        "n": len(correct),
        "classes": int(classes.max()) + 1,
        "stderr": None if error is None else 100 * error,
        "chance": 100 * chosen.of(guess, classes),
        "given_letters": _counted(marked.letters[at] for at in lettered_rows if marked.letters[at] is not None),
        "right_letters": _counted(asked[at]["answer"] for at in lettered_rows),
        "invalid": _invalid(marked, lettered_rows),
        **_told(marked),
    }
    if any(left_out.values()):
        scores["left_out"] = {reason: count for reason, count in left_out.items() if count}
    if grouped:
        scores |= {"questions": len(asked), "vanilla": float(np.mean(marked.correct[first])), "vanilla_all": float(np.mean(marked.correct))}
    return _table(predictions, marked, groups, grouped), scores


def _rows(predictions: pa.Table) -> list[Row]:
    """The predictions' rows; UserError for one whose right answer can't be right."""
    names = ["id", "label", "options", "answer", "text", *(name for name in ("meta", "finished") if name in predictions.column_names)]
    rows = predictions.select(names).to_pylist()
    for row in rows:
        row["meta"] = json.loads(row.get("meta") or "{}")
        shown = len(row["options"])
        if shown and (not row["answer"] or row["answer"] not in LETTERS[:shown]):
            why = "it must be a letter shown"
            raise UserError(f"question {row['id']!r} has the right answer {row['answer']!r} among {shown} options", why=why)
        if not shown and not row["meta"].get("open"):
            why = "its meta names no rule to read an answer with"
            raise UserError(f"question {row['id']!r} has no options", why=why, hint="open: RULE in the keys of the data set")
    return sorted(rows, key=lambda row: row["meta"].get("rotation", 0)) if any("rotation" in row["meta"] for row in rows) else rows


def _marked(rows: list[Row], reader: Any) -> Marked:
    letters: list[str | None] = []
    valid, correct, guess = np.zeros(len(rows), dtype=bool), np.zeros(len(rows), dtype=bool), np.zeros(len(rows))
    for at, row in enumerate(rows):
        shown, meta = row["options"], row["meta"]
        if shown:
            letter = reader.read(row["text"], lettered(shown))
            valid[at] = letter is not None and LETTERS.index(letter) < len(shown)
            correct[at], guess[at] = letter == row["answer"], 1 / len(shown)
        else:
            letter, right = None, judge(meta["open"], row["text"], meta.get("answers") or [row["answer"]])
            valid[at], correct[at], guess[at] = right is not None, bool(right), 0.5 if meta["open"] == YES_NO else 0.0
        letters.append(letter)
    return Marked(rows, letters, valid, correct, guess)


def _invalid(marked: Marked, at: list[int]) -> dict[str, Any]:
    """Why the answers to questions with options are invalid; predictions that don't say whether a text ended are taken as whole."""
    rows = [marked.rows[index] for index in at]
    texts, options = [row["text"] for row in rows], [row["options"] for row in rows]
    finished = [row.get("finished", True) for row in rows]
    return explain(texts, options, [marked.letters[index] for index in at], marked.valid[at].tolist(), finished)


def _told(marked: Marked) -> dict[str, Any]:
    """Numbers of parts: what each open rule made of its questions, yes/no questions, pairs, and categories where there are some."""
    told: dict[str, Any] = {}
    kinds = ["" if row["options"] else row["meta"]["open"] for row in marked.rows]
    if any(kinds):
        told["open"] = {kind: _part(marked, [at for at, one in enumerate(kinds) if one == kind]) for kind in sorted(set(kinds) - {""})}
    asked = [row for row, kind in zip(marked.rows, kinds) if kind == YES_NO]
    if asked:
        said = [yes_or_no(row["text"]) for row in asked]
        truth = [row["answer"].strip().lower() == "yes" for row in asked]
        told["yes_no"] = metrics.yes_no(truth, [None if one is None else one == "yes" for one in said])
    if any(marked.of("pair")):
        told["pairs"] = _part(marked, range(len(marked.rows)))["pairs"]
    categories = marked.of("category")
    if any(categories):
        wanted = sorted({one for one in categories if one})
        told["by_category"] = {name: _part(marked, [at for at, one in enumerate(categories) if one == name]) for name in wanted}
    return told


def _part(marked: Marked, at: Any) -> dict[str, Any]:
    """n, accuracy and share of readable answers of these questions; with pairs, the share of pairs that are right as a whole."""
    chosen = np.array(list(at), dtype=np.int64)
    correct, valid = marked.correct[chosen], marked.valid[chosen]
    part: dict[str, Any] = {"n": len(chosen), "accuracy": float(np.mean(correct)), "valid": float(np.mean(valid))}
    pairs = [marked.rows[index]["meta"].get("pair") for index in chosen]
    if all(pairs):
        whole = metrics.Groups.of(pairs).all(correct)
        part["pairs"] = {"n": len(whole), "accuracy": float(np.mean(whole))}
    return part


def _table(predictions: pa.Table, marked: Marked, groups: metrics.Groups, grouped: bool) -> pa.Table:
    """A row a question, or a row a group: its original's text and letter, valid and correct when all are, and all of them as `members`."""
    types = [(name, predictions.schema.field(name).type) for name in ("id", "label", "options", "answer", "text")]
    types += [("letter", pa.string()), ("valid", pa.bool_()), ("correct", pa.bool_()), ("guess", pa.float64())]
    told = zip(marked.rows, marked.letters, marked.valid.tolist(), marked.correct.tolist(), marked.guess.tolist())
    every = [{**row, "letter": letter, "valid": ok, "correct": right, "guess": guess} for row, letter, ok, right, guess in told]
    if not grouped:
        return pa.Table.from_pylist(every, schema=pa.schema(types))
    kept = ("id", "answer", "text", "letter", "valid", "correct")
    types.append(("members", pa.list_(pa.struct([(name, kind) for name, kind in types if name in kept]))))
    valid, correct, guess = groups.all(marked.valid), groups.all(marked.correct), groups.product(marked.guess)
    rows = []
    for part, ok, right, by_luck in zip(groups.members, valid.tolist(), correct.tolist(), guess.tolist()):
        members = [{name: every[at][name] for name in kept} for at in part]
        rows.append({**every[part[0]], "valid": ok, "correct": right, "guess": by_luck, "members": members})
    return pa.Table.from_pylist(rows, schema=pa.schema(types))


def _counted(letters: Any) -> dict[str, int]:
    return dict(sorted(Counter(letters).items()))
