"""MLflow, written by one thread of the driver from the run directory's own files; `python -m grid.tracking DIR [--uri URI]` delivers later.

In: plan.json, metrics/<stage id>.jsonl, finished artefacts in the store, report/. Out: one experiment per study, a parent run per run
directory, a child run per arm: `axis.*` parameters, series (`train/loss`; those of an arm's earlier stages under their own prefix,
`pretrain/train/loss`), finals (`final/<benchmark>`, `final/fine_grained`, ...), datasets, scored answers. Series of base models go to the
parent under `weights/` and the stage's name. What was delivered is kept per server in tracking.json and in MLflow's tags, so that a resumed
run goes on in the same runs and nothing appears twice. A dead server loses nothing (the files stay) and
stalls nothing (only this thread waits).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

from grid import mlflow_view
from grid.rundir import write_json
from grid.summary import group_of, render

STATE = "tracking.json"
BATCH = 1000  # MLflow's own limit of metrics per request
POINTS = 100  # of a series; SQLite takes half a millisecond for each
NOTE = 7900  # characters; MLflow's tags end at 8000
META = {"time", "token", "step"}
LIMITS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_DISABLE_TELEMETRY": "true"}


class Tracker:
    """Delivers what is new on every `drain()`; raises whatever MLflow raises. Used by one thread at a time."""

    def __init__(self, plan: dict[str, Any], out: Path, run: dict[str, Any], store_root: Path, uri: str | None) -> None:
        for name, value in LIMITS.items():
            os.environ.setdefault(name, value)
        self.plan, self.out, self.run, self.root = plan, out, run, store_root
        self.uri = uri or f"sqlite:///{out / 'mlflow.db'}"
        self.stages = {stage["id"]: stage for stage in plan["stages"]}
        self.arms = [*plan["arms"], *plan.get("references", [])]
        states = json.loads((out / STATE).read_text()) if (out / STATE).exists() else {}
        self.states = states
        empty: dict[str, Any] = {"runs": {}, "offsets": {}, "steps": {}, "finals": [], "datasets": [], "artifacts": [], "status": {}}
        self.state: dict[str, Any] = states.setdefault(self.uri, empty)
        self.client: Any = None
        self.experiment = ""

    def drain(self) -> None:
        """Everything that appeared in the run directory since the last time."""
        self._connect()
        for stage in self.stages.values():
            if stage["kind"] == "train":
                self._series(stage)
        for arm in self.arms:
            self._finals(arm)
        self._save()

    def finish(self, summary: dict[str, Any]) -> None:
        """States of the arms, the report as the parent's note and artifacts."""
        self.drain()
        parent = self.state["runs"][""]
        for arm in self.arms:
            name, run = arm["name"], self.state["runs"][arm["name"]]
            failed = summary["arms"]["failed"].get(name)
            status = "FAILED" if failed else "FINISHED" if name in summary["arms"]["done"] else "KILLED"
            if self.state["status"].get(name) != status:
                if failed:
                    self.client.set_tag(run, "status_reason", failed[:NOTE])
                self.client.set_terminated(run, status)
                self.state["status"][name] = status
        report = self.out / "report"
        if report.is_dir():
            self.client.log_artifacts(parent, str(report), "report")
        pages = [report / name for name in ("report.md", "README.md", "index.md") if (report / name).is_file()]
        self.client.set_tag(parent, "mlflow.note.content", (pages[0].read_text() if pages else f"```\n{render(summary)}\n```")[:NOTE])
        self.client.log_artifact(parent, str(self.out / "plan.json"))
        ended = {"finished": "FINISHED", "failed": "FAILED"}.get(summary.get("state", ""), "KILLED")
        self.client.set_terminated(parent, ended)
        self._save()

    # ---- runs

    def _connect(self) -> None:
        """Experiment, parent run and a run for every arm; found again by tags when this directory ran before."""
        if self.client is not None:
            return
        import logging

        from mlflow import MlflowClient

        for noisy in ("mlflow", "alembic"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # a whole traceback for what `problem` says in a line
        client = MlflowClient(tracking_uri=self.uri)
        name = self.plan["study"]["name"]
        known = client.get_experiment_by_name(name)
        if known is None:
            place = (self.out / "mlartifacts").as_uri() if self.uri.startswith("sqlite:") else None
            self.experiment = client.create_experiment(name, artifact_location=place)
        else:
            self.experiment = known.experiment_id
        client.set_experiment_tag(self.experiment, "mlflow.experiment.primaryMetric.name", "final/fine_grained")
        client.set_experiment_tag(self.experiment, "mlflow.experiment.primaryMetric.greaterIsBetter", "True")
        self.client = client
        for run in client.search_runs([self.experiment], f"tags.`finegrid.run` = '{self.run['id']}'", max_results=50000):
            self.state["runs"].setdefault(run.data.tags.get("finegrid.arm", ""), run.info.run_id)
        study = self.plan["study"]
        scale = {"profile": str(study.get("profile")), "miniature": str(bool(study.get("miniature")))}
        scale |= {"batch_scale": str(study.get("batch_scale", 1.0)), "allow_subset": ", ".join(study.get("allow_subset", [])) or "none"}
        tags = {"finegrid.run": self.run["id"], "finegrid.role": "study", **scale}
        parent = self._run("", self.out.name, tags, self._study_params())
        for arm in self.arms:
            tags = {"finegrid.run": self.run["id"], "finegrid.role": "arm", "finegrid.arm": arm["name"], **scale}
            tags |= {"mlflow.parentRunId": parent, "source": str(arm.get("source")), **mlflow_view.EXPANDED}
            tags |= {"row": str(arm["row"])} if arm.get("row") else {}
            axes = {f"axis.{key}": value for key, value in arm.get("axes", {}).items()}
            self._run(arm["name"], arm["name"], tags, {**axes, "init": arm.get("init"), "arm": arm["name"]})
        parents = client.search_runs([self.experiment], "tags.`finegrid.role` = 'study'", max_results=1000)
        shown = mlflow_view.view(self.plan, [run.info.run_id for run in parents])
        client.set_experiment_tag(self.experiment, mlflow_view.TAG, json.dumps(shown))
        self._save()

    def _run(self, key: str, name: str, tags: dict[str, str], params: dict[str, Any]) -> str:
        from mlflow.entities import Param, RunTag

        if key not in self.state["runs"]:
            self.state["runs"][key] = self.client.create_run(self.experiment, run_name=name, tags=tags).info.run_id
        elif self.state["status"].pop(key, None) or not key:
            self.client.update_run(self.state["runs"][key], status="RUNNING")
        run = self.state["runs"][key]
        given = [Param(k, str(v)) for k, v in params.items() if v is not None]
        self.client.log_batch(run, params=given, tags=[RunTag(k, v) for k, v in tags.items()])
        return run

    def _study_params(self) -> dict[str, Any]:
        study = self.plan["study"]
        return {key: study.get(key) for key in ("name", "profile", "seed")}

    # ---- series

    def _readers(self, stage: dict[str, Any]) -> list[tuple[str, str]]:
        """(run key, prefix) of every run that shows this training stage's series."""
        if group_of(stage) == "base":
            return [("", f"{mlflow_view.BASE}/{clean(stage['name'])}/")]
        readers = []
        for arm in self.arms:
            own = [i for i in arm["stages"] if self.stages[i]["kind"] == "train" and group_of(self.stages[i]) != "base"]
            if stage["id"] in own:
                readers.append((arm["name"], "" if own[-1] == stage["id"] else f"{group_of(stage)}/"))
        return readers

    def _series(self, stage: dict[str, Any]) -> None:
        """New lines of one stage's metrics, thinned to about POINTS steps (the run directory keeps all). A resumed stage repeats
        steps since its checkpoint, with equal values: shown once."""
        from mlflow.entities import Metric

        identity = stage["id"]
        path = self.out / "metrics" / f"{identity}.jsonl"
        if not path.exists():  # made by another run on this store
            path = self.root / identity / "metrics.jsonl"
            if not path.exists():
                return
        with path.open("rb") as file:
            file.seek(self.state["offsets"].get(identity, 0))
            text = file.read()
        text = text[: text.rfind(b"\n") + 1]
        if not text:
            return
        last = self.state["steps"].get(identity, 0)
        steps = int(stage.get("cost", {}).get("steps") or 0)
        every = max(1, steps // POINTS)
        values: list[tuple[str, float, int, int]] = []
        for line in text.splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue  # the torn line of a killed writer
            step = int(record.get("step", last + 1))
            if step <= last:
                continue
            last = step
            if "train/loss" in record and step % every and step != steps:
                continue
            stamp = int(record.get("time", time.time()) * 1000)
            values += [(clean(k), float(v), stamp, step) for k, v in record.items() if k not in META and isinstance(v, (int, float))]
        for key, prefix in self._readers(stage):
            run = self.state["runs"][key]
            for at in range(0, len(values), BATCH):
                self.client.log_batch(run, metrics=[Metric(prefix + k, v, t, s) for k, v, t, s in values[at : at + BATCH]])
        self.state["offsets"][identity] = self.state["offsets"].get(identity, 0) + len(text)
        self.state["steps"][identity] = last

    # ---- finals

    def _finals(self, arm: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        name, run = arm["name"], self.state["runs"][arm["name"]]
        if name in self.state["datasets"] and all(f"{name}/{b}" in self.state["finals"] for b in arm.get("scores", {})):
            return
        scores: dict[str, float] = {}
        new = False
        for benchmark, stage in arm.get("scores", {}).items():
            path = self.root / stage / "scores.json"
            if not (self.root / stage / "DONE.json").exists() or not path.exists():
                continue
            value = json.loads(path.read_text()).get("value")
            if value is not None:  # a benchmark without its judge is not run, and has none
                scores[benchmark] = value
            if value is None or f"{name}/{benchmark}" in self.state["finals"]:
                continue
            new = True
            stamp = int(path.stat().st_mtime * 1000)
            self.client.log_batch(run, metrics=[Metric(f"final/{clean(benchmark)}", scores[benchmark], stamp, 0)])
            scored = self.root / stage / "scored.parquet"
            if scored.exists():
                self.client.log_artifact(run, str(scored), f"predictions/{clean(benchmark)}")
            self.state["finals"].append(f"{name}/{benchmark}")
        for group, members in self.plan.get("groups", {}).items() if new else ():
            if members and all(member in scores for member in members):
                mean = sum(scores[member] for member in members) / len(members)
                self.client.log_batch(run, metrics=[Metric(f"final/{clean(group)}", mean, int(time.time() * 1000), 0)])
        if name not in self.state["datasets"]:
            self._datasets(arm, run)
            self.state["datasets"].append(name)

    def _datasets(self, arm: dict[str, Any], run: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = []
        for identity in arm["stages"]:
            stage = self.stages[identity]
            if stage["kind"] != "train" or group_of(stage) == "base":
                continue
            for rows in stage["spec"].get("data", {}).get("rows", []):
                found = self.stages.get(rows, {"name": rows, "kind": "dataset"})
                data = Dataset(found["name"][:500], rows.rpartition("-")[2][:36], "finegrid", json.dumps({"stage": rows}))
                inputs.append(DatasetInput(data, [InputTag("mlflow.data.context", group_of(stage))]))
        if inputs:
            self.client.log_inputs(run, inputs)

    def _save(self) -> None:
        write_json(self.out / STATE, self.states)


class Tracking:
    """The thread around a Tracker: drains every few seconds, waits longer after a failure, never raises into the run."""

    def __init__(self, plan: dict[str, Any], directory: Any, store: Any, uri: str | None, seconds: float = 3.0) -> None:
        self.tracker = Tracker(plan, directory.path, directory.data, store.root, uri)
        self.seconds, self.problem, self.started = seconds, "", False
        self._summary: dict[str, Any] | None = None
        self._wake, self._over = threading.Event(), threading.Event()

    def address(self) -> str:
        """How a person looks at it; nothing while nothing was delivered."""
        if not self.tracker.experiment:
            return ""
        page, uri = mlflow_view.path(self.tracker.experiment), self.tracker.uri
        if uri.startswith("http"):
            return uri.rstrip("/") + page
        return f"`make ui OUT={self.tracker.out}`, then http://127.0.0.1:5000{page}"

    def start(self) -> None:
        self.started = True
        threading.Thread(target=self._run, name="tracking", daemon=True).start()

    def finish(self, summary: dict[str, Any], patience: float = 60.0) -> str:
        """Delivers the rest; returns what went wrong, or nothing. A dead server is given up at once, a slow one after `patience`."""
        self._summary = summary
        self._wake.set()
        self._over.wait(patience)
        if self._over.is_set() and not self.problem:
            return ""
        reason = self.problem or f"no answer within {patience:g} s"
        return f"{reason}; nothing is lost, deliver with: python -m grid.tracking {self.tracker.out} --uri {self.tracker.uri}"

    def _run(self) -> None:
        wait = self.seconds
        while True:
            summary = self._summary
            try:
                if summary is None:
                    self.tracker.drain()
                else:
                    self.tracker.finish(summary)
                self.problem, wait = "", self.seconds
            except Exception as error:
                self.problem, wait = f"{type(error).__name__}: {str(error).strip()[:300]}", min(60.0, 2 * wait)
                self.tracker.client = None  # connect anew
            if summary is not None:
                self._over.set()
                return
            if self._summary is None:
                self._wake.wait(wait)


def clean(key: str) -> str:
    """Characters that MLflow takes in a metric's name."""
    return re.sub(r"[^\w\-./ ]", "_", key)


def main(argv: list[str] | None = None) -> int:
    what = "Deliver a run directory's metrics to MLflow; repeating it adds nothing."
    parser = argparse.ArgumentParser(prog="python -m grid.tracking", description=what)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--uri", help="tracking server; default: SQLite in the run directory")
    arguments = parser.parse_args(argv)
    out = arguments.directory.absolute()
    if not (out / "plan.json").is_file() or not (out / "run.json").is_file():
        print(f"error: {out} is not a run directory (no plan.json)", file=sys.stderr)
        return 1
    plan, run = json.loads((out / "plan.json").read_text()), json.loads((out / "run.json").read_text())
    summary = json.loads((out / "summary.json").read_text()) if (out / "summary.json").is_file() else None
    tracker = Tracker(plan, out, run, Path(run["store"]), arguments.uri)
    if summary is None:
        tracker.drain()
    else:
        tracker.finish(summary)
    print(f"delivered to {tracker.uri}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
