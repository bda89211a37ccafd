"""A run directory as `Results`: what was planned, what is there, and the answers behind every number.

In: `plan.json`; `run.json`, `ledger.jsonl` and `timeline.jsonl` where they exist; and the store's finished artefacts (scores.json,
scored.parquet, DONE.json). Out: `grid.results.Results`, read-only; a run that is still going or lost arms loads as well,
each absent score with its reason.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from datasets_ray.errors import UserError
from grid.report.published import load_published, published_folder
from grid.results import PER_CLASS, Answers, Arm, Results, Score

AGREEMENT = 0.01
"""Percentage points by which a stored value may differ from the one recomputed from its rows."""


def load_run(directory: str | Path) -> Results:
    """Everything a report needs. Raises UserError where there is no plan or no readable one."""
    out = Path(directory)
    plan = _json(out / "plan.json")
    if plan is None:
        raise UserError(f"{out} is no run directory", why="plan.json is missing", hint="give the --out directory of a grid.run")
    run = _json(out / "run.json") or {}
    store = _store(out, run, plan)
    study = plan.get("study", {})
    groups = {name: tuple(members) for name, members in plan.get("groups", {}).items()}
    results = Results(
        study.get("name", out.name),
        groups,
        [],
        contrasts=list(plan.get("contrasts", [])),
        study=study,
        directory=out,
        store=store,
        run={**run, "timeline": _lines(out / "timeline.jsonl"), "totals": plan.get("totals", {})},
    )
    results.stages = {stage["id"]: {**stage, "done": _json(store / stage["id"] / "DONE.json")} for stage in plan.get("stages", [])}
    failures = _failures(out)
    for planned in [*plan.get("arms", []), *plan.get("references", [])]:
        results.arms.append(_arm(planned, results, failures))
    results.arms.sort(key=lambda arm: (arm.row is None, arm.row or 0))
    grouped = {b for members in groups.values() for b in members}
    results.extra = tuple(dict.fromkeys(b for arm in results.arms for b in (*arm.scores, *arm.missing) if b not in grouped))
    results.notices += [text for notice in study.get("notices", []) for text in [_text(notice)]]
    results.published = _published(plan.get("published"), out, study)
    if results.published is not None:
        results.steps = results.published.steps
        results.notices += results.published.notices
    return results


def _arm(planned: dict[str, Any], results: Results, failures: dict[str, str]) -> Arm:
    arm = Arm(
        planned["name"],
        {k: str(v) for k, v in planned.get("axes", {}).items()},
        planned.get("source", "trained"),
        planned.get("row"),
        _init(planned.get("init")),
        planned.get("seed"),
        stages=list(planned.get("stages", [])),
    )
    blocked = next((f"{results.stages[s]['name']}: {failures[s]}" for s in arm.stages if s in failures and s in results.stages), None)
    for benchmark, stage in planned.get("scores", {}).items():
        score = _score(stage, results, f"{arm.name} on {benchmark}")
        if score is None:
            unfinished = next((s for s in arm.stages if s in results.stages and results.stages[s]["done"] is None), None)
            waits = f"{results.stages[unfinished]['name']} has not finished" if unfinished else "not run"
            arm.missing[benchmark] = blocked or waits
        else:
            arm.scores[benchmark] = score
    for benchmark in results.benchmarks:
        if benchmark not in arm.scores and benchmark not in arm.missing:
            arm.missing[benchmark] = "not planned for this arm"
    for benchmark, stage in planned.get("controls", {}).items():
        control = _score(stage, results, f"control of {arm.name} on {benchmark}")
        if control is not None:
            arm.controls[benchmark] = control
    for benchmark, stage in planned.get("zeroshot", {}).items():
        found = _json(_artefact(results, stage) / "scores.json")
        if found is not None:
            arm.zeroshot[benchmark] = {**found, "stage": stage}
    return arm


def _score(stage: str, results: Results, what: str) -> Score | None:
    folder = _artefact(results, stage)
    found = _json(folder / "scores.json") if (folder / "DONE.json").is_file() else None
    if found is None:
        return None
    path = folder / "scored.parquet"
    answers = read_answers(path) if path.is_file() else None
    metric = found.get("metric", "accuracy")
    chance = found.get("chance")
    if answers is not None and len(answers):
        recomputed = 100 * _mean(answers.correct.astype(float), answers.labels, metric)
        if abs(recomputed - found["value"]) > AGREEMENT:
            results.notices.append(f"{what}: scores.json says {found['value']:.2f}, its rows give {recomputed:.2f}")
        if (answers.options > 0).all():
            chance = 100 * _mean(1.0 / answers.options, answers.labels, metric)
    return Score(
        float(found["value"]),
        metric,
        found.get("rule"),
        found.get("n"),
        found.get("valid"),
        found.get("stderr"),
        chance,
        answers,
        stage,
        path if answers is not None else None,
    )


def read_answers(path: Path) -> Answers:
    """The columns of scored.parquet that statistics need."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = pq.read_table(path, columns=["id", "label", "options", "valid", "correct"])
    options = table.column("options")
    if pa.types.is_list(options.type) or pa.types.is_large_list(options.type):
        counts = pc.list_value_length(options).fill_null(0).to_numpy(zero_copy_only=False)
    else:
        counts = np.array([len(json.loads(text or "[]")) for text in options.to_pylist()])
    text = {name: np.array(table.column(name).to_pylist(), dtype=np.str_) for name in ("id", "label")}
    flags = {name: table.column(name).fill_null(False).to_numpy(zero_copy_only=False).astype(bool) for name in ("valid", "correct")}
    return Answers(text["id"], text["label"], flags["correct"], flags["valid"], counts.astype(np.int64))


def _mean(values: np.ndarray, labels: np.ndarray, metric: str) -> float:
    from grid.stats import sample

    return sample(values, labels if metric == PER_CLASS else None).mean


def _failures(out: Path) -> dict[str, str]:
    """stage id → the message it failed with for good, from the run's ledger (a later success or fresh try takes it back)."""
    found: dict[str, str] = {}
    for event in _lines(out / "ledger.jsonl"):
        if event.get("event") == "fail" and event.get("final"):
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


def _init(given: Any) -> str | None:
    return None if given is None else given if isinstance(given, str) else json.dumps(given, sort_keys=True)


def _text(notice: Any) -> str:
    return notice if isinstance(notice, str) else str(notice.get("text", notice)) if isinstance(notice, dict) else str(notice)


def _json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path} is not JSON", why=str(error), hint="damaged; run the study again with the same --out") from None


def _lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; a torn last line is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records
