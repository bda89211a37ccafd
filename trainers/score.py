"""Stage `score`: predictions and a rule in, letters and one benchmark's numbers out. No model runs here, so another rule costs a second.

In: `{"predictions": id, "rule": NAME, "metric": NAME of datasets_ray.metrics, "method": "generate"}`; the artefact of a predict stage.
method: which of the stage's answers are scored; what others there are is told beside, under `methods`. With a judge, besides:
`{"judge": {"model", "prompt", "version"}, "questions": id}` (`trainers.judging.identity`), and as runtime `judge`: url, key_env and the
other fields of `trainers.judge.Judge`.
Out: `scored.parquet` (id, label, options, answer, text, letter, valid, correct, guess: how likely a guess is right; a row a question; with
metrics that are no plain share of right answers credit, share, unit and stratum, with a judge its reply) and `scores.json`.

A question without options is read by the open rule that its `meta` names (`datasets_ray.open_answers`). Where one needs a judge and there
is none, the benchmark is not run: `scores.json` says so under `not_run`, without a value. Questions whose meta names a `group` count
together: a group is right when all of it is (VLMEvalKit's circular evaluation), n is the number of groups, a row of `scored.parquet` is a
group with its `members`, and the accuracies of the questions as they stand in the original order and of all of them are told beside.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from datasets_ray import metrics
from datasets_ray.answers import REFUSED, rule_named
from datasets_ray.benchmark_metrics import Points
from datasets_ray.errors import UserError
from datasets_ray.invalid import explain
from trainers import judging, marking
from trainers.context import Context
from trainers.judge import Judge
from trainers.marking import Judging, Marked, counted

PICK = "likelihood_text_raw"
"""The way of comparing likelihoods that is the value of method `likelihood`."""
NO_JUDGE, INCOMPLETE = "needs a judge model", "a rotation of its group was dropped"
LONE, NO_OPTIONS = "the other question of its pair was dropped", "no options whose likelihoods could be compared"
NOT_RUN = "needs a judge model and none is given (evaluation: {judge: {url: ..., model: ...}}, or --judge-url and --judge-model)"


def run(spec: dict[str, Any], ctx: Context) -> dict[str, Any]:
    folder = ctx.inputs(spec["predictions"])
    table = parquet.read_table(folder / "predictions.parquet")
    made = folder / "manifest.json"
    dropped = json.loads(made.read_text()).get("dropped", {}) if made.is_file() else {}
    judged = judging_of(spec, ctx)
    with ctx.working():
        scored, scores = score_method(table, spec["rule"], spec["metric"], spec.get("method", "generate"), judged)
    scores["dropped"] = dropped
    if judged is not None and "judge" in scores:
        scores["judge"] |= spec["judge"]
    write(scored, scores, ctx.out)
    return scores


def judging_of(spec: Mapping[str, Any], ctx: Context) -> Judging | None:
    """The judge of a score's spec; UserError where its prompt is no longer the one that was planned."""
    given = spec.get("judge")
    if given is None:
        return None
    now = judging.identity(given["model"], given["prompt"])
    if now["version"] != given.get("version"):
        why = f"it is {now['version']}, the plan says {given.get('version')}"
        raise UserError(f"the judge's prompt {given['prompt']!r} has changed", why=why, hint="plan again")
    settings = {"cache": ctx.work / "judged", **{key: value for key, value in ctx.runtime.get("judge", {}).items() if value is not None}}
    questions = ctx.inputs(spec["questions"]) if spec.get("questions") else None
    return Judging.of(Judge.of({**settings, "model": given["model"]}), given["prompt"], questions)


def score_method(
    predictions: pa.Table, rule: str, metric: str, method: str, judged: Judging | None = None
) -> tuple[pa.Table | None, dict[str, Any]]:
    """`score` of what one method of the predict stage answered. Where it holds more, `methods` tells each one's value, stderr, share of
    readable answers and rule; every way of comparing likelihoods is one. A greedy answer is the same by `generate` and `first_token`:
    a letter that its first token settles is that letter by any rule."""
    columns = predictions.column_names
    greedy = [name for name in ("generate", "first_token") if "text" in columns and (name == "generate" or f"{name}_letter" in columns)]
    picks = [name.removesuffix("_letter") for name in columns if name.startswith("likelihood_") and name.endswith("_letter")]
    made = [*greedy, *(["likelihood"] if picks else [])]
    if method not in made:
        raise UserError(f"these predictions hold no answers by {method!r}", hint=f"they were made by {', '.join(made)}; predict again")

    def scored_by(name: str) -> tuple[pa.Table | None, dict[str, Any]]:
        if name in greedy:
            return score(predictions, rule, metric, judged)
        column = PICK if name == "likelihood" else name
        pick = column.removeprefix("likelihood_")
        told = {"rule": pick, "rule_source": f"the option with the largest {pick} (trainers.likelihood)"}
        listed = pa.array([bool(options) for options in predictions.column("options").to_pylist()], pa.bool_())
        table, bare = predictions.filter(listed), len(predictions) - listed.true_count
        if not len(table):
            return None, {"not_run": NO_OPTIONS, "metric": metric, "n": 0, "left_out": {NO_OPTIONS: bare}, **told}
        letters = [letter or "" for letter in table.column(f"{column}_letter").to_pylist()]
        table = table.drop_columns(["text"] if "text" in columns else []).append_column("text", pa.array(letters, pa.string()))
        scored, found = score(table, "strict", metric)
        if bare:
            found["left_out"] = {**found.get("left_out", {}), NO_OPTIONS: bare}
        return scored, {**found, **told}

    table, scores = scored_by(method)
    others = {name: scored_by(name)[1] for name in [*greedy[:1], *picks]} if len(made) > 1 or picks else {}
    told = {name: {key: one[key] for key in ("value", "stderr", "valid", "rule")} for name, one in others.items() if "value" in one}
    return table, {**scores, "method": method, **({"methods": told} if told else {})}


def write(scored: pa.Table | None, scores: dict[str, Any], out: Path) -> None:
    """scored: None where the benchmark was not run."""
    (Path(out) / "scored.parquet").unlink(missing_ok=True)  # of a run that had what this one lacks
    if scored is not None:
        parquet.write_table(scored, Path(out) / "scored.parquet")
    (Path(out) / "scores.json").write_text(json.dumps(scores, indent=1, sort_keys=True))


def score(predictions: pa.Table, rule: str, metric: str, judged: Judging | None = None) -> tuple[pa.Table | None, dict[str, Any]]:
    """Reads every answer with `rule`, those without options with their own, or lets a judge read them.

    predictions: columns id, options, answer (the right letter, or text), label, text, and meta where questions have groups or no options.
    Returns the scored table and the numbers: `value`, `stderr` and `chance` in percentage points by `metric` (`chance` is None where there
    is nothing to guess among: `no_chance` says so); `accuracy`, `mean_per_class` and `valid` as shares in [0, 1]; `invalid`: why answers
    are not valid (`datasets_ray.invalid`). An answer that is no letter of the options is invalid and wrong, never redrawn. (None,
    `not_run`) where a question needs a judge and there is none.
    """
    reader = rule_named(rule)
    metrics.known(metric)
    rows = marking.rows_of(predictions)
    if (unread := judging.must_judge(rows)) and (judged is None or judged.prompt == "extract"):
        return None, {"not_run": NOT_RUN, "metric": metric, "rule": rule, "n": 0, "left_out": {NO_JUDGE: unread}}
    groups = metrics.Groups.of([row["meta"].get("group") or row["id"] for row in rows])
    grouped, left_out = any(row["meta"].get("group") for row in rows), Counter[str]()
    if metric in metrics.GROUPED and not grouped:
        raise UserError(f"metric {metric!r}, and no question belongs to a group", hint="circular: true in the keys of the data set")
    if grouped:
        if metric in metrics.SETS:
            raise UserError(f"metric {metric!r} knows no groups of rotated questions", hint="circular: false in the keys of the data set")
        metric = "circular" if metric == "accuracy" else metric
        whole = [part for part in groups.members if len(part) >= max(int(rows[at]["meta"].get("rotations") or 1) for at in part)]
        left_out[INCOMPLETE] = len(groups.members) - len(whole)
        rows = [rows[at] for part in whole for at in part]
        groups = metrics.Groups.of([row["meta"].get("group") or row["id"] for row in rows])
    if metric == "mme":
        pairs = Counter(row["meta"].get("pair") for row in rows)
        left_out[LONE] = sum(pairs[row["meta"].get("pair")] == 1 for row in rows)
        rows = [row for row in rows if pairs[row["meta"].get("pair")] != 1]
        groups = metrics.Groups.of([row["id"] for row in rows])
    metrics.classes_of([row["label"] or "" for row in rows])  # nothing to score is an error
    marked = marking.mark(rows, reader, metric, judged)
    points = metrics.SETS[metric](marked.marks()) if metric in metrics.SETS else None
    left_out.update({} if points is None else points.left_out)
    scores: dict[str, Any] = {"metric": metric, "rule": rule, "rule_source": reader.source}
    scores |= _values(marked, groups, metric) if points is None else _values_of(points, marked, groups)
    scores |= _counts(marked)
    if any(left_out.values()):
        scores["left_out"] = {reason: count for reason, count in left_out.items() if count}
    if grouped:
        first = np.array([part[0] for part in groups.members], dtype=np.int64)
        scores |= {"questions": len(rows), "vanilla": float(np.mean(marked.correct[first])), "vanilla_all": float(np.mean(marked.correct))}
    if marked.replies is not None:
        scores["judge"] = marked.judged
    return _table(predictions, marked, groups, grouped, points), scores


def _values(marked: Marked, groups: metrics.Groups, metric: str) -> dict[str, Any]:
    """Of a share of right questions or groups."""
    chosen = metrics.metric_named(metrics.GROUPED.get(metric, metric))
    correct, guess = groups.all(marked.correct), groups.product(marked.guess)
    # a question without a class is a class of its own name "": mean-per-class then equals accuracy, as it should
    names = [marked.rows[part[0]]["label"] or "" for part in groups.members]
    classes = metrics.classes_of(names)
    error = chosen.error(correct, classes)
    return {
        "value": 100 * chosen.value(correct, classes), "stderr": None if error is None else 100 * error,
        "chance": 100 * chosen.of(guess, classes), "n": len(correct), "classes": int(classes.max()) + 1,
        "accuracy": metrics.accuracy(correct), "mean_per_class": metrics.mean_per_class(correct, names),
    }  # fmt: skip


def _values_of(points: Points, marked: Marked, groups: metrics.Groups) -> dict[str, Any]:
    """Of a metric that is no plain share: its numbers instead of `_values`', the same keys."""
    found = {**_values(marked, groups, "accuracy"), **points.told}
    error, chance = points.error, points.chance
    found |= {"value": 100 * points.value, "stderr": None if error is None else 100 * error}
    found["chance"] = None if chance is None else 100 * chance
    return found if chance is not None else {**found, "no_chance": points.no_chance}


def _counts(marked: Marked) -> dict[str, Any]:
    """Letters, and why the answers to questions with options are invalid; a text that isn't said to be cut is taken as whole."""
    at = [index for index, row in enumerate(marked.rows) if row["options"]]
    rows, letters, valid = [marked.rows[index] for index in at], [marked.letters[index] for index in at], marked.valid[at].tolist()
    finished = [row.get("finished", True) for row in rows]
    return {
        "valid": float(np.mean(marked.valid)),
        "refused": int(sum(letter == REFUSED and not ok for letter, ok in zip(marked.letters, marked.valid))),
        "unreadable": int(sum(letter is None and not ok for letter, ok in zip(marked.letters, marked.valid))),
        "given_letters": counted(letter for letter in letters if letter is not None),
        "right_letters": counted(row["answer"] for row in rows),
        "invalid": explain([row["text"] for row in rows], [row["options"] for row in rows], letters, valid, finished),
        **marking.told(marked),
    }  # fmt: skip


def _table(predictions: pa.Table, marked: Marked, groups: metrics.Groups, grouped: bool, points: Points | None) -> pa.Table:
    """A row a question, or a row a group: its original's text and letter, valid and correct when all are, and all of them as `members`."""
    types = [(name, predictions.schema.field(name).type) for name in ("id", "label", "options", "answer", "text")]
    types += [("letter", pa.string()), ("valid", pa.bool_()), ("correct", pa.bool_()), ("guess", pa.float64())]
    told = zip(marked.rows, marked.letters, marked.valid.tolist(), marked.correct.tolist(), marked.guess.tolist())
    every = [{**row, "letter": letter, "valid": ok, "correct": right, "guess": guess} for row, letter, ok, right, guess in told]
    more: dict[str, tuple[pa.DataType, Any]] = {}
    if points is not None:
        more = {"credit": (pa.float64(), marked.credit.tolist()), "share": (pa.float64(), points.share.tolist())}
        more |= {name: (pa.string(), list(given)) for name, given in (("unit", points.unit), ("stratum", points.stratum)) if len(given)}
    if marked.replies is not None:
        more["judged"] = pa.string(), marked.replies
    for name, (kind, values) in more.items():
        types.append((name, kind))
        every = [{**row, name: value} for row, value in zip(every, values)]
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
