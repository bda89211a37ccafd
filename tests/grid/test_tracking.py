"""Laws of tracking: MLflow shows what the files say, once, in the same runs; without a server nothing is lost and nothing waits."""

from __future__ import annotations

import json
import socket
from types import SimpleNamespace

import pytest

from grid import mlflow_view
from grid.tracking import Tracker, Tracking, main
from trainers.store import Store

RUN = {"id": "0123456789abcdef", "epoch": 1}
SUMMARY = {
    "state": "failed", "arms": {"done": ["row-1"], "failed": {"row-2": "finetune row-2: NaN"}, "open": []}, "wall_seconds": 60.0,
    "budget_seconds": None, "budget": [], "groups": {}, "lanes": {},
    "overhead_seconds_per_arm": None, "startup_seconds": None, "memory": {},
}  # fmt: skip


def small_plan():
    def train(identity, name, needs=()):
        return {"id": identity, "kind": "train", "name": name, "needs": list(needs), "spec": {"data": {"rows": ["dataset-d"]}}}

    def arm(name, llm, *own):
        stages = ["dataset-d", "train-base", *own, f"score-{name}-a", f"score-{name}-b"]
        scores = {"a": f"score-{name}-a", "b": f"score-{name}-b"}
        return {"name": name, "row": 1, "source": "trained", "axes": {"llm": llm}, "init": "fresh", "stages": stages, "scores": scores}

    stages = [
        {"id": "dataset-d", "kind": "dataset", "name": "data captions", "needs": [], "spec": {}},
        train("train-base", "llm vicuna"),
        train("train-p", "pretrain row-1", ["train-base"]),
        train("train-f1", "finetune row-1", ["train-p"]),
        train("train-f2", "finetune row-2", ["train-base"]),
        *({"id": i, "kind": "score", "name": i, "needs": [], "spec": {}} for i in (f"score-row-{n}-{b}" for n in (1, 2) for b in "ab")),
    ]
    return {
        "study": {"name": "small", "profile": "tiny", "miniature": True, "seed": 0}, "groups": {"fine_grained": ["a", "b"]},
        "arms": [arm("row-1", "vicuna", "train-p", "train-f1"), arm("row-2", "qwen", "train-f2")], "references": [], "stages": stages,
    }  # fmt: skip


@pytest.fixture
def made(tmp_path):
    """A run directory with metrics of every training stage and row-1's scores."""
    out, store = tmp_path / "out", Store(tmp_path / "out" / "store")
    (out / "metrics").mkdir(parents=True)
    (out / "plan.json").write_text(json.dumps(small_plan()))
    for stage in ("train-base", "train-p", "train-f1"):
        write_metrics(out, stage, range(1, 4))
    for benchmark, value in {"a": 40.0, "b": 60.0}.items():
        folder = store.path(f"score-row-1-{benchmark}")
        folder.mkdir(parents=True)
        (folder / "scores.json").write_text(json.dumps({"value": value}))
        (folder / "scored.parquet").write_bytes(b"rows")
        (folder / "DONE.json").write_text("{}")
    return SimpleNamespace(out=out, store=store)


def write_metrics(out, stage, steps, token=1):
    with (out / "metrics" / f"{stage}.jsonl").open("a") as file:
        for step in steps:
            record = {"time": 1000.0 + step + token, "token": token, "step": step, "train/loss": 1.0 / step, "train/mfu": 0.1}
            file.write(json.dumps(record) + "\n")


def tracker(made, uri=None):
    return Tracker(small_plan(), made.out, RUN, made.store.root, uri)


def shown(made, uri=None):
    """{arm or "": (run, {metric: [(step, value)]})} as MLflow has it."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri or f"sqlite:///{made.out / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("small")
    runs = {}
    for run in client.search_runs([experiment.experiment_id]):
        history = {key: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, key)] for key in run.data.metrics}
        assert run.data.tags.get("finegrid.arm", "") not in runs, "one run per arm"
        runs[run.data.tags.get("finegrid.arm", "")] = run, history
    return experiment, runs


def test_runs_parameters_series_and_finals(made):
    tracker(made).finish(SUMMARY)
    experiment, runs = shown(made)
    assert experiment.tags["mlflow.experiment.primaryMetric.name"] == "final/fine_grained"
    assert set(runs) == {"", "row-1", "row-2"}
    parent, parent_series = runs[""]
    row, series = runs["row-1"]
    assert row.data.params["axis.llm"] == "vicuna" and row.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert series["train/loss"] == series["pretrain/train/loss"] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert parent_series["weights/llm vicuna/train/loss"][0] == (1, 1.0)
    assert (series["final/a"], series["final/b"], series["final/fine_grained"]) == ([(0, 40.0)], [(0, 60.0)], [(0, 50.0)])
    assert row.info.status == "FINISHED" and parent.info.status == "FAILED"
    assert runs["row-2"][0].info.status == "FAILED" and "NaN" in runs["row-2"][0].data.tags["status_reason"]
    assert {entry.dataset.name for entry in row.inputs.dataset_inputs} == {"data captions"}
    assert "1 of 2 arms done" in parent.data.tags["mlflow.note.content"]


def test_long_series_are_thinned_and_keep_their_ends(made):
    plan = small_plan()
    (stage,) = [s for s in plan["stages"] if s["name"] == "finetune row-1"]
    stage["cost"] = {"steps": 1000}
    (made.out / "metrics" / f"{stage['id']}.jsonl").unlink(missing_ok=True)
    write_metrics(made.out, stage["id"], range(1, 1001))
    Tracker(plan, made.out, RUN, made.store.root, None).finish(SUMMARY)
    steps = [step for step, _ in shown(made)[1]["row-1"][1]["train/loss"]]
    assert len(steps) == 100 and steps[-1] == 1000 and set(steps) <= set(range(1, 1001))


def test_the_page_opens_on_the_arms_by_axis(made):
    delivered = tracker(made)
    delivered.finish(SUMMARY)
    experiment, runs = shown(made)
    state = json.loads(experiment.tags[mlflow_view.TAG])
    parent = runs[""][0].info.run_id
    assert state["runsExpanded"] == {parent: True} and state["runsVisibilityMap"] == {parent: False}
    parallel, *bars = state["compareRunCharts"]
    assert parallel["selectedParams"] and set(parallel["selectedParams"]) <= set(runs["row-1"][0].data.params)
    assert [bar["metricKey"] for bar in bars] == parallel["selectedMetrics"] == ["final/fine_grained"]
    assert {chart["metricSectionId"] for chart in state["compareRunCharts"]} == {state["compareRunSections"][0]["uuid"]}
    assert f"/#/experiments/{experiment.experiment_id}/runs?viewStateShareKey={mlflow_view.KEY}" in mlflow_view.path(delivered.experiment)


@pytest.mark.parametrize("forget", [False, True], ids=["state kept", "state lost"])
def test_delivering_again_and_resuming_adds_nothing_twice(made, forget):
    tracker(made).drain()
    before = {arm: run.info.run_id for arm, (run, _) in shown(made)[1].items()}
    if forget:
        (made.out / "tracking.json").unlink()
    write_metrics(made.out, "train-f1", range(2, 6), token=2)  # resumed from a checkpoint at step 1: steps 2 and 3 come again
    with (made.out / "metrics" / "train-f1.jsonl").open("a") as file:
        file.write('{"step": 6, "train/lo')  # and the writer was killed
    tracker(made).drain()
    tracker(made).drain()
    _, runs = shown(made)
    assert {arm: run.info.run_id for arm, (run, _) in runs.items()} == before
    assert [step for step, _ in runs["row-1"][1]["train/loss"]] == [1, 2, 3, 4, 5]
    assert runs["row-1"][1]["final/a"] == [(0, 40.0)]


def test_a_torn_line_is_delivered_once_it_is_whole(made):
    path = made.out / "metrics" / "train-f2.jsonl"
    path.write_text('{"step": 1, "train/loss": 1.0, "time": 1}\n{"step": 2, "train/lo')
    following = tracker(made)
    following.drain()
    assert [step for step, _ in shown(made)[1]["row-2"][1]["train/loss"]] == [1]
    with path.open("a") as file:
        file.write('ss": 0.5, "time": 2}\n')
    following.drain()
    assert [step for step, _ in shown(made)[1]["row-2"][1]["train/loss"]] == [1, 2]


def test_a_stage_made_by_another_run_brings_its_series_along(made):
    folder = made.store.path("train-f2")
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0, "time": 1}\n')
    tracker(made).drain()
    assert shown(made)[1]["row-2"][1]["train/loss"] == [(1, 2.0)]


def test_a_dead_server_stalls_nothing_and_loses_nothing(made, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{free.getsockname()[1]}"
    directory = SimpleNamespace(path=made.out, data=RUN)
    tracking = Tracking(small_plan(), directory, made.store, dead, seconds=0.05)
    tracking.start()
    problem = tracking.finish(SUMMARY, patience=60)
    assert "nothing is lost" in problem and f"--uri {dead}" in problem
    (made.out / "run.json").write_text(json.dumps({**RUN, "store": str(made.store.root)}))
    (made.out / "summary.json").write_text(json.dumps(SUMMARY))
    assert main([str(made.out)]) == 0
    assert shown(made)[1]["row-1"][1]["train/loss"][-1][0] == 3
    assert main([str(made.out / "metrics")]) == 1 and "not a run directory" in capsys.readouterr().err
