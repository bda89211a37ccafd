"""A lane: a long-lived Ray Train worker group that makes one stage after another. `serve(config)` is its worker loop.

In: grants from the ledger actor (a planned stage and its attempt), artefacts in the store. Out: artefacts committed under a
lease, metrics lines in `<metrics>/<stage id>.jsonl`, times and failures reported to the ledger.

Rank 0 claims and tells the others; collective kinds run on all ranks, the rest on rank 0. An exception on any rank ends the
stage, not the lane: ranks agree through the channel. If a rank is stuck in a collective that another rank left by raising,
or collectives no longer match, the worker raises GroupBroken and Ray Train builds the group anew.
`config` is JSON: lane, ledger (actor name), namespace, store, run, epoch, metrics, backend, device, data_root, cwd, cache_mb, kinds,
warm, pixels_mb, features_mb, collective_seconds, grace_seconds.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import shutil
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainers import failures, stages
from trainers.context import Cache, Context, Interrupted, LeaseLost
from trainers.process_group import Channel
from trainers.store import Lease, LeaseBusy, Owner, Store
from trainers.warm import warm

BEAT_SECONDS = 1.0
FULL_BYTES = 256 << 20
"""A disk with less room than this is full."""
log = logging.getLogger(__name__)


class GroupBroken(RuntimeError):
    """The ranks of this lane no longer agree; Ray Train starts the group again."""


def serve(config: dict[str, Any]) -> None:
    """Runs on every worker until the ledger closes or gives this lane up."""
    import ray
    from ray.train import get_context

    rank, world = get_context().get_world_rank(), get_context().get_world_size()
    ledger = ray.get_actor(config["ledger"], namespace=config["namespace"])
    os.chdir(config.get("cwd", "."))
    title(f"finegrid {config['lane']}.{rank}")
    try:
        lane = Lane(config, ledger, rank, world)
    except Exception as error:  # an import that fails would fail for ever: the ledger decides when to give up
        if ray.get(ledger.lane_failed.remote(config["lane"], failures.classify(error).to_json())):
            return
        raise
    lane.loop()


class Lane:
    def __init__(self, config: dict[str, Any], ledger: Any, rank: int, world: int) -> None:
        import torch

        from datasets_ray import features_cache
        from datasets_ray.pixels_cache import PixelStore, home

        self.config, self.ledger, self.rank, self.world, self.name = config, ledger, rank, world, config["lane"]
        stages.KINDS.update({kind: stages.Kind(**entry) for kind, entry in config.get("kinds", {}).items()})
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        self.device = "cpu"
        if config.get("device", "cpu") == "cuda":
            local = int(os.environ.get("LOCAL_RANK", "0"))
            torch.cuda.set_device(local)
            self.device = f"cuda:{local}"
        self.channel = Channel(rank, world, config.get("backend", "gloo"), config.get("collective_seconds", 1800.0))
        warm(config["warm"], self.device, rank)
        gc.collect()
        gc.freeze()  # a million objects of torch and transformers need no looking at after every stage
        self.store = Store(config["store"])
        self.cache = Cache(int(config.get("cache_mb", 1024)) << 20)
        self.pixels = PixelStore(config["pixels_mb"] << 20, str(home().absolute())) if config.get("pixels_mb") else None
        folder = str(features_cache.home().absolute())
        self.features = PixelStore(config["features_mb"] << 20, folder) if config.get("features_mb") else None
        self.metrics = Path(config["metrics"])
        self.grace = float(config.get("grace_seconds", 30.0))
        self.stop = threading.Event()
        self.lease: Lease | None = None
        self.progress: dict[str, Any] = {}
        self.count = 0
        self.told: Any = None
        self.asked: Any = None
        """What the ledger was told of the last stage and asked for, before this process cleaned up: answers come meanwhile."""

    def loop(self) -> None:
        import ray

        if self.rank == 0:
            ray.get(self.ledger.lane_up.remote(self.name, self.world))
            threading.Thread(target=self._beat, daemon=True).start()
        while True:
            self.count += 1
            grant = self._claim() if self.rank == 0 else self.channel.wait(f"{self.count}/grant", None)
            if self.rank == 0 and self.world > 1:
                self.channel.put(f"{self.count}/grant", grant)
            if grant is None:
                break
            self._attempt(grant)
            self._clean(grant)
        self._leave()

    def _claim(self) -> dict[str, Any] | None:
        """The next stage with its lease taken; None when the ledger is closed."""
        import ray

        while True:
            if self.told is not None:
                ray.get(self.told)
                self.told = None
            grant = ray.get(self.asked if self.asked is not None else self.ledger.claim.remote(self.name))
            self.asked = None
            if grant is None:
                return None
            stage = grant["stage"]["id"]
            if self.store.done(stage):
                ray.get(self.ledger.finish.remote(self.name, stage, {"found": True}))  # another run on this store made it meanwhile
                continue
            try:
                self.lease = self.store.acquire(stage, Owner.here(self.config["run"], self.config["epoch"]))
            except LeaseBusy as busy:
                ray.get(self.ledger.busy.remote(self.name, stage, str(busy), busy.seconds))
                continue
            except OSError as error:
                failure = failures.classify(error)
                if failure.kind == failures.INFRASTRUCTURE:  # a share that doesn't answer for a while
                    ray.get(self.ledger.busy.remote(self.name, stage, failure.message, 5.0))
                else:
                    ray.get(self.ledger.fail.remote(self.name, stage, failure.to_json()))
                continue
            return {**grant, "token": self.lease.token, "begin": time.time()}

    def _attempt(self, grant: dict[str, Any]) -> None:
        """One attempt at one stage, from grant to finish or failure, on every rank."""
        import ray

        from trainers import rng

        stage, number = grant["stage"], self.count
        collective = stages.KINDS[stage["kind"]].collective if stage["kind"] in stages.KINDS else False
        if not collective and self.rank:
            return
        lease = self.lease if self.rank == 0 else Lease(self.store, stage["id"], grant["token"], self.config["run"])
        assert lease is not None
        hold = self.ledger.hold.options(name=stage["name"]).remote(stage["id"], self.name) if self.rank == 0 else None
        world = self.world if collective else 1
        ctx = self._context(stage, lease, world, number)
        summary: dict[str, Any] = {}
        failure: failures.Failure | None = None
        begin = time.time()
        try:
            rng.begin_alike()
            summary = stages.load(stage["kind"])(stage["spec"], ctx) or {}
        except Exception as error:
            failure = failures.classify(error)
            log.warning("%s failed on rank %d: %s\n%s", stage["name"], self.rank, failure.message, failure.detail)
        if collective and self.world > 1:
            failure = self._agree(number, failure, grant)
        if failure is not None:
            self.cache.drop()  # a model may have been left half changed
        if self.rank:
            return
        if failure is None:
            try:
                json.dumps(summary)
                lease.commit(summary, time.time() - begin, self.metrics / f"{stage['id']}.jsonl")
            except Exception as error:
                failure = failures.classify(error)
        marks: dict[str, float] = {k: ctx.marks[k] for k in ("work_begin", "work_end", "work_seconds") if k in ctx.marks}
        marks["begin"] = grant["begin"]
        marks["end"] = time.time()
        self.lease = None
        if failure is None:
            self.told = self.ledger.finish.remote(self.name, stage["id"], {"marks": marks})
        else:
            if failure.kind == failures.FULL and not self._disk_is_full():
                failure = replace(failure, kind=failures.INFRASTRUCTURE)
            with contextlib.suppress(OSError):  # a full disk; the run takes its own lease over
                lease.release()
            if failure.damaged:
                with contextlib.suppress(OSError):
                    self.store.discard(failure.damaged)
            ray.get(self.ledger.fail.remote(self.name, stage["id"], {**failure.to_json(), "marks": marks}))
        del hold
        self.asked = self.ledger.claim.remote(self.name)  # decided while this process cleans up

    def _disk_is_full(self) -> bool:
        """Whether one of the places that a stage writes to has no room, while what it wrote still lies there. Others say the same words:
        shared memory of collectives, the limit of watched files."""
        places = (self.store.root, self.metrics, Path(tempfile.gettempdir()))
        return any(shutil.disk_usage(place).free < FULL_BYTES for place in places if place.exists())

    def _agree(self, number: int, failure: failures.Failure | None, grant: dict[str, Any]) -> failures.Failure | None:
        """All ranks learn whether all succeeded. Raises GroupBroken when one of them can't be reached or collectives don't match."""
        self.channel.put(f"{number}/status/{self.rank}", failure.to_json() if failure else {})
        found: list[dict[str, Any]] = [failure.to_json()] if failure else []
        missing, deadline = set(range(self.world)) - {self.rank}, time.monotonic() + self.grace if failure else None
        while missing:
            for other in sorted(missing):
                status = self.channel.wait(f"{number}/status/{other}", 1.0 if found else 10.0)
                if status is None:
                    continue
                missing.discard(other)
                if status:
                    found.append(status)
            if found and missing:
                deadline = deadline or time.monotonic() + self.grace
                if time.monotonic() > deadline:
                    self._break(grant, found, f"ranks {sorted(missing)} did not come back")
        if found and not self.channel.usable(number, self.grace):
            self._break(grant, found, "collectives no longer match")
        if self.rank == 0 and number > 2:
            for other in range(self.world):
                self.channel.forget(f"{number - 2}/status/{other}")
        if not found:
            return None
        telling = [f for f in found if f["kind"] != failures.INFRASTRUCTURE] or found  # the cause rather than its echo
        return failures.Failure(**telling[0])

    def _break(self, grant: dict[str, Any], found: list[dict[str, Any]], why: str) -> None:
        import ray

        telling = [f for f in found if f["kind"] != failures.INFRASTRUCTURE] or found
        marks = {"begin": grant["begin"], "end": time.time()}
        ray.get(self.ledger.fail.remote(self.name, grant["stage"]["id"], {**telling[0], "marks": marks}))
        raise GroupBroken(f"{self.name}: {why} after {telling[0]['message']}")

    def _context(self, stage: dict[str, Any], lease: Lease, world: int, number: int) -> Context:
        path = self.metrics / f"{stage['id']}.jsonl"
        self.progress = {}

        def report(metrics: dict[str, Any]) -> None:
            if self.rank == 0:
                self.progress = {k: v for k, v in metrics.items() if k in {"step", "steps", "done", "total"}}
                lease.append(path, json.dumps({"time": time.time(), "token": lease.token, **metrics}))

        def stopping(step: int) -> bool:
            """Rank 0 names a step two ahead: ranks meet in every step's collectives, so none has passed it yet."""
            if world == 1:
                return self.stop.is_set()
            stop_at = self.channel.peek(f"{number}/stop")
            if stop_at is None and self.rank == 0 and self.stop.is_set():
                stop_at = step + 2
                self.channel.put(f"{number}/stop", stop_at)
            return stop_at is not None and step >= stop_at

        if self.rank == 0:
            self.metrics.mkdir(parents=True, exist_ok=True)
        return Context(
            stage=stage, out=lease.out, work=lease.work, inputs=self.store.reuse, rank=self.rank, world=world, device=self.device,
            data_root=self.config.get("data_root"), report=report, guard=lease.guard, stopping=stopping, cache=self.cache,
            pixels=self.pixels, features=self.features,
        )  # fmt: skip

    def _beat(self) -> None:
        """Renews the lease, tells the ledger how far we are, hears whether to stop. A vanished ledger ends the process."""
        import ray

        renewed, lost = time.monotonic(), 0.0
        while True:
            time.sleep(BEAT_SECONDS)
            try:
                if ray.get(self.ledger.beat.remote(self.name, self.progress), timeout=60)["stop"]:
                    self.stop.set()
            except ray.exceptions.RayActorError:
                os._exit(70)  # the driver is gone: whatever this lane still does is void
            except Exception as error:
                log.warning("%s: heartbeat: %s", self.name, error)
            lease = self.lease
            try:
                if lease and time.monotonic() - renewed > lease.seconds / 4:
                    lease.renew()
                    renewed = time.monotonic()
            except LeaseLost:
                lost = lost or time.monotonic()
                if time.monotonic() - lost > self.grace and self.lease is lease:
                    os._exit(75)
            except OSError as error:
                log.warning("%s: renewing the lease: %s", self.name, error)

    def _clean(self, grant: dict[str, Any]) -> None:
        """Nothing of a stage outlives it but what it put into the cache."""
        if self.rank == 0 and self.world > 1 and self.count > 2:
            self.channel.forget(f"{self.count - 2}/grant")
        kind = stages.KINDS.get(grant["stage"]["kind"])
        if kind is None or not kind.collective or (self.device == "cpu" and kind.makes != "weights"):
            return  # only an engine holds itself, and only on a GPU does it matter when tensors go
        gc.collect()
        if self.device != "cpu":
            import torch

            torch.cuda.empty_cache()

    def _leave(self) -> None:
        """Rank 0 serves the channel: it leaves last."""
        self.channel.put(f"left/{self.rank}", True)
        if self.rank == 0:
            for other in range(1, self.world):
                self.channel.wait(f"left/{other}", 5.0)
        self.channel.close()


def title(name: str) -> None:
    """What `ps` and `top` show; best effort."""
    with contextlib.suppress(Exception):
        from ray import _raylet

        getattr(_raylet, "setproctitle")(name)  # noqa: B009  (a compiled module without stubs)


__all__ = ["GroupBroken", "Interrupted", "Lane", "serve"]
