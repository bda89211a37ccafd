"""Run directories that were torn, edited or made by something else: a report and a status say what can't be read, or do without it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from datasets_ray.errors import UserError
from grid.report.build import as_json, build
from grid.report.load import load_run
from grid.simulated_times import Measured
from grid.status import status
from tests.grid.synthetic_run import make_run, small_plan


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), small_plan())


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of a finished run with a store of its own."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    said = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**said, "store": str(out / "store")}))
    return out


def scores(run: Path) -> Path:
    return next(iter(sorted((run / "store").glob("score-*/scores.json"))))


def changed(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "scores that are a list": (lambda run: scores(run).write_text("[]"), "scores.json holds no object"),
    "torn scores": (lambda run: scores(run).write_text('{"a'), "scores.json is not JSON"),
    "scores without a value": (lambda run: changed(scores(run), value=None), "scores.json: value is None"),
    "a value that is a word": (lambda run: changed(scores(run), value="high"), "scores.json: value is 'high'"),
    "a value that is no number": (lambda run: changed(scores(run), value=float("nan")), "scores.json: value is nan"),
    "torn answers": (lambda run: scores(run).with_name("scored.parquet").write_bytes(b"PAR1"), "scored.parquet can't be read"),
    "no answers": (lambda run: scores(run).with_name("scored.parquet").write_bytes(b""), "scored.parquet can't be read"),
    "a marker that is a list": (lambda run: scores(run).with_name("DONE.json").write_text("[]"), "DONE.json holds no object"),
    "a summary of bytes": (lambda run: (run / "summary.json").write_bytes(b"\xff"), "summary.json is not JSON"),
    "a summary that is a folder": (lambda run: folder(run / "summary.json"), "summary.json can't be read"),
    "no arms": (lambda run: changed(run / "plan.json", arms=None), "its 'arms' can't be read"),
    "stages without names": (lambda run: changed(run / "plan.json", stages=[{"id": "a"}]), "its 'stages' can't be read"),
    "groups that are a list": (lambda run: changed(run / "plan.json", groups=[]), "its 'groups' can't be read"),
    "a study of no name": (lambda run: changed(run / "plan.json", study={}), "its 'study' can't be read"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_what_is_damaged_is_named_with_a_way_out(kind: str, run: Path) -> None:
    damage, says = DAMAGED[kind]
    damage(run)
    with pytest.raises(UserError) as told:
        load_run(run)
    assert says in str(told.value) and str(run) in str(told.value) and told.value.hint
    if "plan.json" in str(told.value):
        with pytest.raises(UserError, match="was not written by grid.run"):
            status(run)


def test_a_report_does_without_what_is_not_there(run: Path) -> None:
    """No store, no summary, no state: arms and why they have no scores; a file in the store's place is no store."""
    shutil.rmtree(run / "store")
    (run / "store").write_text("x")
    (run / "summary.json").unlink()
    (run / "run.json").unlink()
    document = as_json(build(load_run(run)))
    assert len(document["arms"]) == 5
    assert all(value is None for arm in document["arms"] for name, value in arm["metrics"].items() if name in ("pets", "imagenet"))


def test_lines_that_are_no_records_are_passed_over(run: Path) -> None:
    """In the journal, the metrics of a stage and the timeline: torn, of another kind, of bytes."""
    junk = b'{"event": "fa\n3\nnull\n[]\n{}\n{"event": "start"}\n{"event": "stage"}\n\xff\xfe\n' + b"[" * 5000 + b"\n"
    failed = next(stage["id"] for stage in small_plan()["stages"] if stage["name"] == "finetune row-06")
    fail = {"event": "fail", "stage": failed, "kind": "deterministic", "message": "it broke", "final": True}
    (run / "ledger.jsonl").write_bytes(junk + json.dumps(fail).encode() + b"\n" + junk)
    (run / "metrics").mkdir(exist_ok=True)
    for stage in small_plan()["stages"]:
        (run / "metrics" / f"{stage['id']}.jsonl").write_bytes(junk)
    assert status(run)["stages"]["failed"] == 1 and len(as_json(build(load_run(run)))["arms"]) == 5
    (run / "timeline.jsonl").write_bytes(junk)
    with pytest.raises(UserError, match="has no stage that finished"):
        Measured.read(run)
