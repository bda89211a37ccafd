"""A run directory as `Results`: what was planned, what is there, and the answers behind every number.

In: `plan.json`; `run.json`, `summary.json` and `ledger.jsonl` where they exist; and the store's finished artefacts (scores.json,
scored.parquet, DONE.json). Out: `grid.results.Results`, read-only; a run that is still going or lost arms loads as well,
each absent score with its reason.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from datasets_ray.errors import UserError
from grid.jsonl import read_lines
from grid.report.published import load_published, published_folder
from grid.results import NOT_RUN, Answers, Arm, Results, Score
from grid.rundir import read_plan
from grid.stats import sample

TRIFLE = 0.01
"""Share of a benchmark's rows that may be lost (and is counted) before its numbers are those of a subset."""
DAMAGED = "damaged; run the study again with the same --out"
AGREEMENT = 0.01
"""Percentage points by which a stored value may differ from the one recomputed from its rows."""


def load_run(directory: str | Path) -> Results:
    """Everything a report needs. Raises UserError where there is no plan or no readable one."""
    out = Path(directory)
    if not (out / "plan.json").is_file():
        why = "plan.json is missing" if out.is_dir() else "there is no such folder"
        raise UserError(f"{out} is no run directory", why=why, hint="give the --out directory of a grid.run")
    plan = read_plan(out / "plan.json")
    run = _json(out / "run.json") or {}
    store = _store(out, run, plan)
    study = plan["study"]
    groups = {name: tuple(members) for name, members in plan.get("groups", {}).items()}
    results = Results(study.get("name", out.name), groups, [], contrasts=list(plan.get("contrasts", [])), study=study, directory=out)
    results.store, results.run = store, {**run, "summary": _json(out / "summary.json") or {}}
    results.stages = {stage["id"]: {**stage, "done": _json(store / stage["id"] / "DONE.json")} for stage in plan["stages"]}
    results.study = {**study, "subsets": _subsets(results)}
    failures = _failures(out)
    for planned in [*plan["arms"], *plan.get("references", [])]:
        results.arms.append(_arm(planned, results, failures))
    results.arms.sort(key=lambda arm: (arm.row is None, arm.row or 0))
    grouped = {b for members in groups.values() for b in members}
    results.extra = tuple(dict.fromkeys(b for arm in results.arms for b in (*arm.scores, *arm.missing) if b not in grouped))
    results.notices += [_text(notice) for notice in study.get("notices", [])]
    results.published = _published(plan.get("published"), out, study)
    if results.published is not None:
        results.steps = results.published.steps
        results.notices += results.published.notices
    return results


def _arm(planned: dict[str, Any], results: Results, failures: dict[str, str]) -> Arm:
    axes = {axis: str(value) for axis, value in planned.get("axes", {}).items()}
    arm = Arm(planned["name"], axes, planned.get("source", "trained"), planned.get("row"), _init(planned), bool(planned.get("stands_in")))
    arm.seed, arm.stages = planned.get("seed"), list(planned.get("stages", []))
    for benchmark, stage in planned.get("scores", {}).items():
        score = _score(stage, results, f"{arm.name} on {benchmark}")
        if isinstance(score, str):
            arm.missing[benchmark] = f"{NOT_RUN}: {score}"
            arm.not_run.add(benchmark)
        elif score is None:
            arm.missing[benchmark] = _why(stage, results, failures)
        else:
            arm.scores[benchmark] = score
    for benchmark in results.benchmarks:
        if benchmark not in arm.scores and benchmark not in arm.missing:
            arm.missing[benchmark] = "not planned for this arm"
    for benchmark, stage in planned.get("predictions", {}).items():
        rows = results.stages.get(stage, {}).get("spec", {}).get("questions")
        if rows and (_artefact(results, rows) / "manifest.json").is_file():
            results.questions.setdefault(benchmark, _artefact(results, rows))
            partial = _partial(rows, results)
            if partial:
                results.partial[benchmark] = partial
    for benchmark, stage in planned.get("controls", {}).items():
        control = _score(stage, results, f"control of {arm.name} on {benchmark}")
        if isinstance(control, Score):
            arm.controls[benchmark] = control
    for benchmark, stage in planned.get("zeroshot", {}).items():
        found = _json(_artefact(results, stage) / "scores.json")
        if found is not None:
            arm.zeroshot[benchmark] = {**found, "stage": stage}
    return arm


def _why(stage: str, results: Results, failures: dict[str, str]) -> str:
    """Why a score stage has nothing: what failed among the stages it needs, else the first that has not finished."""
    needed: list[str] = []
    waiting = [stage]
    while waiting:
        one = waiting.pop()
        if one in results.stages and one not in needed:
            needed.append(one)
            waiting += results.stages[one].get("needs", [])
    order = {one: k for k, one in enumerate(results.stages)}
    open_ = sorted((one for one in needed if results.stages[one]["done"] is None), key=lambda one: order[one])
    for one in open_:
        if one in failures:
            return f"{results.stages[one]['name']} failed: {failures[one]}"
    return f"{results.stages[open_[0]]['name']} has not finished" if open_ else "not run"


def _partial(rows: str, results: Results) -> str:
    """How a questions stage falls short of its source: a limit on rows, or more than a trifle dropped on the way."""
    said, waiting = [], [rows]
    while waiting:
        stage = results.stages.get(waiting.pop())
        if stage is None or stage["kind"] not in ("dataset", "choices"):
            continue
        waiting += stage.get("needs", [])
        summary = (stage["done"] or {}).get("summary") or {}
        lost, kept = sum((summary.get("dropped") or {}).values()), int(summary.get("rows") or 0)
        if stage["spec"].get("rows") and stage["kind"] == "dataset" and stage["spec"].get("source") != "specimens":
            said.append(f"limited to {stage['spec']['rows']} rows")
        if lost > TRIFLE * (lost + kept):
            said.append(f"{kept} of {lost + kept} rows")
    return ", ".join(said)


def _subsets(results: Results) -> dict[str, dict[str, int]]:
    """Data set → {"expected", "found"} records, for those that are smaller than published."""
    found = {}
    for id, stage in results.stages.items():
        if stage["kind"] == "dataset" and stage["done"] is not None and stage["spec"].get("allow_subset"):
            short = (_json(_artefact(results, id) / "manifest.json") or {}).get("subset")
            if short and short["found"] < short["expected"]:
                found[stage["name"].removeprefix("data ")] = {"expected": int(short["expected"]), "found": int(short["found"])}
    return found


def _score(stage: str, results: Results, what: str) -> Score | str | None:
    """The score; why it was not run; None where its stage has not finished."""
    folder = _artefact(results, stage)
    found = _json(folder / "scores.json") if (folder / "DONE.json").is_file() else None
    if found is None:
        return None
    if "not_run" in found:
        return str(found["not_run"])
    asked = results.stages.get(results.stages.get(stage, {}).get("spec", {}).get("predictions", ""), {})
    path = folder / "scored.parquet"
    answers = read_answers(path) if path.is_file() else None
    metric = found.get("metric", "accuracy")
    chance = found.get("chance")
    value = found.get("value")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"{folder / 'scores.json'}: value is {value!r}", why="a number is expected", hint=DAMAGED)
    score = Score(
        float(value),
        metric,
        found.get("rule"),
        found.get("n"),
        found.get("valid"),
        found.get("stderr"),
        chance,
        answers,
        stage,
        path if answers is not None else None,
        found.get("method", "generate"),
        bool(asked.get("spec", {}).get("listed", True)),
        found.get("invalid") or {},
        found,
    )
    points = score.points
    if answers is None or points is None or not len(answers):
        return score
    recomputed = 100 * sample(points.values, points.strata).mean
    if abs(recomputed - score.value) > AGREEMENT:
        results.notices.append(f"{what}: scores.json says {score.value:.2f}, its rows give {recomputed:.2f}")
    return score if answers.share is not None else replace(score, chance=100 * sample(answers.guess, points.strata).mean)


def read_answers(path: Path) -> Answers:
    """The columns of scored.parquet that statistics need."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    wanted = ["id", "label", "options", "letter", "valid", "correct", "guess", "share", "unit", "stratum"]
    try:
        table = pq.ParquetFile(path).read(columns=wanted)  # absent ones are left out
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} can't be read", why=str(error).splitlines()[0], hint=DAMAGED) from None
    if missing := [name for name in wanted[:6] if name not in table.column_names]:
        raise UserError(f"{path} was not written by a score stage", why=f"it has no {missing[0]!r}", hint=DAMAGED)
    options = table.column("options")
    if pa.types.is_list(options.type) or pa.types.is_large_list(options.type):
        counts = pc.list_value_length(options).fill_null(0).to_numpy(zero_copy_only=False)
    else:
        counts = np.array([len(json.loads(text or "[]")) for text in options.to_pylist()])
    text = {name: np.array([cell or "" for cell in table.column(name).to_pylist()], dtype=np.str_) for name in ("id", "label", "letter")}
    flags = {name: table.column(name).fill_null(False).to_numpy(zero_copy_only=False).astype(bool) for name in ("valid", "correct")}
    known = (text["id"], text["label"], flags["correct"], flags["valid"], counts.astype(np.int64), text["letter"])
    guess = (table.column("guess").to_numpy(zero_copy_only=False),) if "guess" in table.column_names else ()
    named = {"unit": "units", "stratum": "strata"}
    more = {field: np.array(table.column(name).to_pylist(), dtype=np.str_) for name, field in named.items() if name in table.column_names}
    if "share" in table.column_names:
        more["share"] = table.column("share").to_numpy(zero_copy_only=False)
    return Answers(*known, *guess, **more)


def _failures(out: Path) -> dict[str, str]:
    """stage id → the message it failed with for good, from the run's ledger (a later success or fresh try takes it back)."""
    found: dict[str, str] = {}
    for event in read_lines(out / "ledger.jsonl"):
        if event.get("event") == "fail" and event.get("final") and "stage" in event:
            found[event["stage"]] = (str(event.get("message", "")).strip().splitlines() or ["failed"])[0]
        elif event.get("event") in ("finish", "reset"):
            found.pop(event.get("stage", ""), None)
    return found


def _published(given: str | None, out: Path, study: dict[str, Any]) -> Results | None:
    """The published table of the study: beside the study file, as a path, or among the packaged ones."""
    if not given:
        return None
    beside = Path(study["file"]).parent if study.get("file") else out
    for path in (Path(given), beside / given, published_folder().parents[1] / given, published_folder() / Path(given).name):
        if path.is_file():
            return load_published(path)
    return None


def _store(out: Path, run: dict[str, Any], plan: dict[str, Any]) -> Path:
    for given in (run.get("store"), plan.get("store"), out / "store", os.environ.get("FINEGRID_STORE")):
        if given and Path(given).is_dir():
            return Path(given)
    return out / "store"


def _artefact(results: Results, stage: str) -> Path:
    assert results.store is not None
    return results.store / stage


def _init(planned: dict[str, Any]) -> str | None:
    """The start, and every change of the recipe that no axis makes: arms that differ there are no matched pair."""
    more = {key: value for key, value in (planned.get("changes") or {}).items() if key not in ("init", "seed")}
    init = planned.get("init")
    return json.dumps({"init": init, **more}, sort_keys=True) if more else init


def _text(notice: Any) -> str:
    return notice if isinstance(notice, str) else str(notice.get("text", notice)) if isinstance(notice, dict) else str(notice)


def _json(path: Path) -> dict[str, Any] | None:
    """The object in a file of the run; None where there is no such file."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path} can't be read", why=error.strerror or str(error), hint=DAMAGED) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON", why=str(error), hint=DAMAGED) from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no object", why=f"it holds {str(found)[:40]!r}", hint=DAMAGED)
    return found
