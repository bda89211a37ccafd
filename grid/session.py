"""One driver's session over a run directory: starts Ray, the ledger, lanes, trials and tracking; watches; stops; sums up.

In: the plan, settings, a locked run directory. Out: the files of the run directory and an exit code. Used by grid/run.py.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from datasets_ray.errors import UserError, UserErrors
from grid import probe
from grid.display import Display
from grid.jsonl import read_lines
from grid.ledger import LedgerCore
from grid.memory import Meter
from grid.planfile import dump
from grid.rundir import RunDirectory, writable, write_json
from grid.settings import Settings
from grid.summary import render, summarise
from trainers.store import Damaged, Store
from trainers.warm import needs

POLL_SECONDS = 0.5
START_ATTEMPTS = 4
CLUSTER_SECONDS = 120.0
"""Longest wait for a cluster to say what it has."""


class Session:
    def __init__(self, plan: dict[str, Any], settings: Settings, directory: RunDirectory, command: list[str], began: float) -> None:
        self.plan, self.settings, self.directory, self.command, self.began = plan, settings, directory, command, began
        self.out = directory.path
        root = Path(settings.store or os.environ.get("FINEGRID_STORE") or self.out / "store")
        writable(root.absolute(), "--set store=DIR, or FINEGRID_STORE=DIR")
        self.store = Store(root)
        directory.data["store"] = str(self.store.root)
        directory.save()  # the report and grid.status find the artefacts by it while the run goes on
        self.signals = 0
        self.stopped = threading.Event()
        self.cpus, gpus = self._machine()
        self.shape = settings.shape(plan, self.cpus, gpus)
        self.display = Display(plan, self.shape.lanes)
        self.meter = Meter(os.getpid())
        self.tracker: Any = None
        self.broken = ""
        self.startup: dict[str, float] = {"plan": time.time() - began}
        """Seconds since the start at which each part was up."""

    def run(self) -> int:
        (self.out / "plan.json").write_text(dump(self.plan))
        self._copy_study()
        done = self._finished()
        self.display.finished(self.plan, done)
        self._say_head(done)
        arms = [arm["name"] for arm in [*self.plan["arms"], *self.plan.get("references", [])]]
        previous = self._listen()
        try:
            if len(done) == len(self.plan["stages"]):
                self.display.say("everything is finished already")
                snapshot = LedgerCore(self.plan, done, self.out, self.directory.epoch).snapshot()
                self._track().start()
            else:
                snapshot = self._guarded(done, arms)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        return self._end(snapshot, len(done))

    # ---- the run itself

    def _guarded(self, done: list[str], arms: list[str]) -> dict[str, Any]:
        """The work; when Ray itself breaks down, what the files say, and the user is told to go on."""
        try:
            return self._work(done, arms)
        except UserError:
            raise
        except Exception as error:
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.broken = f"{type(error).__name__}: {line}"
            (self.out / "error.txt").write_text("".join(traceback.format_exception(error)))
            with tempfile.TemporaryDirectory() as aside:  # a ledger to look at, which writes nothing into the run
                return LedgerCore(self.plan, self._finished(), Path(aside), self.directory.epoch).snapshot()

    def _work(self, done: list[str], arms: list[str]) -> dict[str, Any]:
        """Until every stage is settled or the run is stopped; returns the ledger's last snapshot."""
        environment = self.settings.environment(self.shape.lanes * self.shape.workers, self.cpus)
        os.environ.update(environment)  # before Ray is imported, which reads some of it then
        import ray

        from grid import ledger_actor
        from grid.lanes import Lanes
        from grid.trials import Trials

        scratch = self.out / "ray" / f"epoch-{self.directory.epoch}"
        scratch.mkdir(parents=True, exist_ok=True)
        self._start_ray(scratch)
        self._listen()  # again: Ray has put its own handlers in place
        self.startup["ray"] = time.time() - self.began
        ledger = ledger_actor.start(self.plan, done, self.out, self.directory.epoch, self.settings.attempts)
        lanes = Lanes(self.shape, self._lane_config(), scratch, environment, ledger)
        trials = Trials(arms, scratch, self.settings.trials)
        lanes.start()
        self.startup["train"] = time.time() - self.began
        tracking = self._track()
        snapshot: dict[str, Any] = ray.get(ledger.snapshot.remote())
        asked, patience = None, self.settings.grace_seconds
        try:
            while True:
                snapshot = ray.get(ledger.snapshot.remote())
                if not tracking.started and (any(not lane["dead"] for lane in snapshot["lanes"].values()) or snapshot["settled"]):
                    trials.start()  # after the lanes: start-up is short of cores, and trials only watch
                    tracking.start()
                self.display.update(snapshot)
                if snapshot["settled"]:
                    break
                if self.signals and asked is None:
                    asked = time.monotonic()
                    self.display.say("stopping: stages under way save what they have (once more Ctrl-C: at once)")
                    ray.get(ledger.ask_stop.remote())
                if asked is not None and (not snapshot["running"] or self.signals > 1 or time.monotonic() - asked > patience):
                    ray.get(ledger.abandon.remote())
                    break
                self.stopped.wait(POLL_SECONDS if asked is None else 0.2)
                self.stopped.clear()
            snapshot = ray.get(ledger.snapshot.remote())
            ray.get(ledger.close.remote())
            if asked is None and not trials.join(20):
                self.display.say("Ray Tune still shows trials as running; it is ended (no result depends on it)")
            trials.stop()
            if asked is None:
                if trials.error is not None:
                    self.display.say(f"Ray Tune ended early: {trials.error} (no result depends on it)")
                lanes.join(10)
        finally:
            self.display.close()
            trials.stop()
            trials.join(5)  # Tune must not find Ray gone: it would start another
            ray.shutdown()
        return snapshot

    def _start_ray(self, scratch: Path) -> None:
        import logging

        import ray

        more: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "namespace": "finegrid"}
        if not self.settings.cluster():
            # "local": never another user's cluster that happens to run on this machine
            more |= {"address": "local", "num_cpus": self.settings.ray_cpus(), "object_store_memory": self.settings.object_store_mb << 20}
            more |= {"include_dashboard": self.settings.dashboard, "dashboard_host": "127.0.0.1"}
        for attempt in range(START_ATTEMPTS):
            try:
                # Ray puts the current directory first on every worker's import path: an empty one, so that no other grid.py shadows ours
                with contextlib.chdir(scratch):
                    context: Any = ray.init(**more)
                break
            except Exception as error:  # Ray waits 30 s for its own processes, the dashboard among them; a busy machine may need longer
                if attempt == START_ATTEMPTS - 1 or self.signals:
                    raise
                line = (str(error).strip() or type(error).__name__).splitlines()[0]
                ray.shutdown()
                last = attempt == START_ATTEMPTS - 2 and "include_dashboard" in more
                if last:
                    more["include_dashboard"] = False
                self.display.say(f"Ray did not start ({line}); trying again{', without its dashboard' if last else ''}")
        self.meter.word = str(context.address_info.get("session_dir", "")).rpartition("/")[2]
        if context.dashboard_url:
            self.display.say(f"Ray dashboard: http://{context.dashboard_url}  (token: `ray get-auth-token`)")
        if self.settings.pixels_mb:
            from datasets_ray.pixels_cache import home

            most = f"{self.settings.pixels_mb} MB at most (pixels_mb)"
            self.display.say(f"decoded training images are kept in {home()} of each machine, {most}")
        if any(stage.get("runtime", {}).get("features") for stage in self.plan["stages"]):
            from datasets_ray.features_cache import home as beside

            self.display.say(f"outputs of frozen encoders are kept in {beside()}, {self.settings.features_mb} MB at most (features_mb)")

    def _lane_config(self) -> dict[str, Any]:
        from grid.ledger_actor import NAME, NAMESPACE

        kinds = self.plan.get("kinds", {})
        settings = self.settings
        root = settings.data_root or os.environ.get("FINEGRID_DATA")
        return {
            "ledger": NAME, "namespace": NAMESPACE, "store": str(self.store.root), "run": self.directory.id, "epoch": self.directory.epoch,
            "metrics": str(self.out / "metrics"), "backend": "nccl" if settings.device == "cuda" else "gloo", "device": settings.device,
            "data_root": os.path.abspath(root) if root else None, "cwd": os.getcwd(), "cache_mb": settings.cache_mb, "kinds": kinds,
            "warm": needs(self.plan["stages"]), "pixels_mb": settings.pixels_mb, "features_mb": settings.features_mb,
            "collective_seconds": settings.collective_seconds, "grace_seconds": settings.grace_seconds,
        }  # fmt: skip

    def _track(self) -> Any:
        from grid.tracking import Tracking

        self.tracker = Tracking(self.plan, self.directory, self.store, self.settings.tracking_uri)
        return self.tracker

    def _listen(self) -> dict[signal.Signals, Any]:
        """Both ways of stopping are ours; returns the handlers that were there."""
        return {number: signal.signal(number, self._signal) for number in (signal.SIGINT, signal.SIGTERM)}

    def _signal(self, number: int, frame: Any) -> None:
        self.signals += 1
        self.stopped.set()

    # ---- before and after

    def _finished(self) -> list[str]:
        """Stages the store already holds; one whose files have other sizes than its DONE.json says is made again."""
        done = []
        for stage in self.plan["stages"]:
            if not self.store.done(stage["id"]):
                continue
            try:
                self.store.verify(stage["id"])
            except Damaged as error:
                self.display.say(f"{stage['name']}: made again, its artefact is damaged: {error.reason}")
                self.store.discard(stage["id"])
                continue
            done.append(stage["id"])
        return done

    def _say_head(self, done: list[str]) -> None:
        study, say = self.plan["study"], self.display.say
        reason = f" ({study['profile_reason']})" if study.get("profile_reason") else ""
        say(f"profile {study.get('profile', '-')}{reason}")
        references = len(self.plan.get("references", []))
        more = f" and {references} reference{'s' * (references != 1)}" if references else ""
        say(f"{study['name']}: {len(self.plan['arms'])} arms{more}, {len(self.plan['stages'])} stages, {self.shape}")
        say(f"run directory {self.out}" + ("" if self.store.root.is_relative_to(self.out) else f", store {self.store.root}"))
        if study.get("batch_scale", 1.0) != 1:
            say(f"  every batch is multiplied by {study['batch_scale']:g}")
        if study.get("allow_subset"):
            say(f"  may be smaller than published: {', '.join(study['allow_subset'])}")
        for notice in study.get("notices", []):
            say(f"  {notice}")
        for doubt in study.get("doubts", []):
            say(f"  doubtful: {doubt}")
        if done:
            names = [stage["name"] for stage in self.plan["stages"] if stage["id"] in set(done)]
            say(f"skipping {len(done)} finished stage{'s' * (len(done) != 1)}: {', '.join(names[:12])}{', ...' if len(names) > 12 else ''}")

    def _copy_study(self) -> None:
        file = self.plan["study"].get("file")
        if file and Path(file).is_file():
            (self.out / "study.yaml").write_bytes(Path(file).read_bytes())

    def _end(self, snapshot: dict[str, Any], skipped: int) -> int:
        """Summary, tracking, report; the exit code."""
        arms = snapshot["arms"].values()
        failed = sum(arm["state"] == "failed" for arm in arms)
        if self.broken:
            state, code = "broken", 2
        elif not snapshot["settled"]:
            state, code = "interrupted", 130
        else:
            state, code = ("failed", 2) if failed else ("finished", 0)
        trained = [stage["id"] for stage in self.plan["stages"] if stage["kind"] == "train" and self.store.done(stage["id"])]
        computed = {stage: self.store.read_done(stage)["summary"].get("compute") or {} for stage in trained}
        summary = summarise(
            self.plan, read_lines(self.out / "timeline.jsonl"), snapshot, epoch=self.directory.epoch, began=self.began, ended=time.time(),
            workers=self.shape.workers, skipped=skipped, memory=self.meter.stop(), budget_seconds=self.settings.budget_seconds,
            computed=computed,
        )  # fmt: skip
        summary["state"] = state
        summary["startup"] = {**self.startup, "lanes": summary["startup_seconds"]}
        write_json(self.out / "summary.json", summary)
        if state in {"finished", "failed"}:
            self._report()
        if self.tracker is not None and self.tracker.started:
            problem = self.tracker.finish(summary)
            if problem:
                self.display.say(f"tracking: {problem}")
            elif address := self.tracker.address():
                self.display.say(f"MLflow: {address}")
        summary["wall_seconds"] = time.time() - self.began
        write_json(self.out / "summary.json", summary)
        self.directory.end(state, code)
        self.display.say(render(summary))
        again = shlex.join(c for c in self.command if c != "--fresh")
        if state == "interrupted":
            self.display.say(f"stopped; nothing finished is lost. Go on with:\n  {again}")
        if state == "broken":
            self.display.say(f"Ray broke down ({self.broken}; {self.out / 'error.txt'}). Nothing finished is lost. Go on with:\n  {again}")
        return code

    def _report(self) -> None:
        try:
            from grid.report import write

            write(self.out)
        except Exception as error:  # the run itself is safe in its files; the report can be written again
            self.display.say(f"the report was not written ({type(error).__name__}: {error}); try: python -m grid.report {self.out}")
        else:
            self.display.say(f"report: {self.out / 'report'}")

    def _machine(self) -> tuple[float, float]:
        """(CPUs, GPUs) that lanes are laid on: the cluster's where RAY_ADDRESS names one, else this machine's."""
        if not self.settings.cluster():
            return self.settings.ray_cpus(), self._gpus()
        answer = probe.ask("machine", {}, CLUSTER_SECONDS)
        if answer["failures"]:
            raise UserErrors(UserError(**failure) for failure in answer["failures"])
        return answer["facts"]["cpus"], answer["facts"]["gpus"]

    def _gpus(self) -> float:
        if self.settings.device != "cuda":
            return 0.0
        devices = [path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        return float(len(visible.split(",")) if visible else len(devices))
