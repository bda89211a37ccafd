"""The artefact store: finished stages by identity, checkpoints of unfinished ones, and who may write what.

In: stage ids, the files a stage left in its temporary directory. Out: `<root>/<stage id>/` with its files and DONE.json.

    <root>/<id>/                 finished: appears by one rename, never changes afterwards
    <root>/<id>/DONE.json        {"stage", "summary", "files": {name: {"bytes", "sha256"}}, "seconds", "token", "run"}
    <root>/.tmp/<id>.<token>/    being written by the attempt that holds this token
    <root>/.work/<id>/<token>/   checkpoints, renamed to the newest token when another attempt takes over
    <root>/.lease/<id>.json      who works on it: {"token", "run", "epoch", "host", "pid", "born", "expires"}

Fencing: every lease has a token larger than all before it for this stage. Each durable write (commit, metrics line) happens
under the lease's file lock after comparing tokens, and directories carry the token in their names, so that whatever is left
of a killed driver finds its paths gone: it can neither commit, nor checkpoint, nor append a metric.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers.context import LeaseLost

DONE = "DONE.json"
METRICS = "metrics.jsonl"
LEASE_SECONDS = 60.0


class LeaseBusy(Exception):
    """Another live run works on this stage in the same store: wait, and say so."""

    def __init__(self, stage: str, holder: dict[str, Any], now: float) -> None:
        self.stage, self.holder, self.seconds = stage, holder, max(0.0, holder["expires"] - now)
        super().__init__(f"{stage} is being made by run {holder['run']} (process {holder['pid']} on {holder['host']})")


class Damaged(Exception):
    """A finished artefact no longer is what DONE.json says."""

    def __init__(self, stage: str, reason: str) -> None:
        self.stage, self.reason = stage, reason
        super().__init__(f"{stage}: {reason}")


@dataclass(frozen=True)
class Owner:
    """Who claims: the run (one id per run directory), its driver's epoch, and the process that does the work."""

    run: str
    epoch: int
    host: str
    pid: int
    born: str

    @classmethod
    def here(cls, run: str, epoch: int) -> Owner:
        return cls(run, epoch, socket.gethostname(), os.getpid(), process_birth(os.getpid()))


def process_birth(pid: int) -> str:
    """Start time of a process in clock ticks since boot (a pid alone may be used again); empty when there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]


class Store:
    """Artefacts under one directory. `clock` returns seconds; tests give their own."""

    def __init__(self, root: str | Path, clock: Callable[[], float] = time.time) -> None:
        self.root, self.clock = Path(root).absolute(), clock
        self._verified: set[str] = set()

    def path(self, stage: str) -> Path:
        return self.root / stage

    def done(self, stage: str) -> bool:
        return (self.root / stage / DONE).is_file()

    def read_done(self, stage: str) -> dict[str, Any]:
        return json.loads((self.root / stage / DONE).read_text())

    def verify(self, stage: str, digests: bool = False) -> None:
        """Sizes always, SHA-256 on request. Raises Damaged."""
        try:
            files = self.read_done(stage)["files"]
        except (OSError, ValueError, KeyError) as error:
            raise Damaged(stage, f"{DONE} is unreadable: {error}") from error
        for name, expected in files.items():
            path = self.root / stage / name
            if not path.is_file():
                raise Damaged(stage, f"{name} is missing")
            if (size := path.stat().st_size) != expected["bytes"]:
                raise Damaged(stage, f"{name} has {size} bytes, {DONE} says {expected['bytes']}")
            if digests and sha256(path) != expected["sha256"]:
                raise Damaged(stage, f"the SHA-256 of {name} differs from {DONE}")

    def reuse(self, stage: str) -> Path:
        """Directory of a finished artefact, its digests verified on this process's first use."""
        if stage not in self._verified:
            self.verify(stage, digests=True)
            self._verified.add(stage)
        return self.path(stage)

    def discard(self, stage: str) -> None:
        """Moves an artefact out of the way (damaged, or made anew): it is no longer done."""
        self._verified.discard(stage)
        with self._lock(stage):
            if self.path(stage).exists():
                lease, token = self._read_lease(stage), self._token(stage)
                aside = self._make(".tmp") / f"{stage}.discarded.{time.time_ns()}"
                os.rename(self.path(stage), aside)
                shutil.rmtree(aside, ignore_errors=True)
                if lease and lease["token"] == token:  # of whoever finished it, not of one who makes it again: its time is over
                    with suppress(OSError):  # a full disk: it expires by itself
                        self._write_lease(stage, {**lease, "expires": 0.0})

    def _token(self, stage: str) -> int | None:
        """The token of the attempt that finished an artefact; None where that can't be read any more."""
        try:
            return self.read_done(stage)["token"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def acquire(self, stage: str, owner: Owner, seconds: float = LEASE_SECONDS) -> Lease:
        """Takes the lease, or raises LeaseBusy (another live run has it) or LeaseLost (a newer driver of this run has it).

        Within one epoch the run's ledger decides who works, so the same run takes its own lease over at once; another run's
        lease is taken when it expired or when its process on this host is gone.
        """
        with self._lock(stage):
            held, now = self._read_lease(stage), self.clock()
            if held and held["run"] == owner.run and held["epoch"] > owner.epoch:
                raise LeaseLost(f"{stage}: driver epoch {owner.epoch} is over, epoch {held['epoch']} has the lease")
            if held and held["run"] != owner.run and held["expires"] > now and not self._holder_gone(held):
                raise LeaseBusy(stage, held, now)
            token = (held["token"] if held else 0) + 1
            for old in self._make(".tmp").glob(f"{stage}.*"):  # first: on a full disk it makes the room for what follows
                shutil.rmtree(old, ignore_errors=True)
            self._write_lease(stage, {"token": token, **vars(owner), "expires": now + seconds})
            lease = Lease(self, stage, token, owner.run, seconds)
            work = self._make(f".work/{stage}")
            earlier = sorted(path for path in work.iterdir() if path.name.isdigit())
            if earlier:
                os.rename(earlier[-1], lease.work)
            for old in earlier[:-1]:
                shutil.rmtree(old, ignore_errors=True)
            lease.work.mkdir(exist_ok=True)
            lease.out.mkdir()
            return lease

    @staticmethod
    def _holder_gone(held: dict[str, Any]) -> bool:
        return held["host"] == socket.gethostname() and process_birth(held["pid"]) != held["born"]

    @contextmanager
    def _lock(self, stage: str) -> Generator[None, None, None]:
        with (self._make(".lease") / f"{stage}.lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _read_lease(self, stage: str) -> dict[str, Any]:
        path = self.root / ".lease" / f"{stage}.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def _write_lease(self, stage: str, lease: dict[str, Any]) -> None:
        write_json(self.root / ".lease" / f"{stage}.json", lease)

    def _make(self, name: str) -> Path:
        path = self.root / name
        path.mkdir(parents=True, exist_ok=True)
        return path


@dataclass
class Lease:
    """The right to make one stage. Rank 0 acquires it; the other ranks rebuild it from (stage, token) to guard their writes."""

    store: Store
    stage: str
    token: int
    run: str
    seconds: float = LEASE_SECONDS

    @property
    def out(self) -> Path:
        return self.store.root / ".tmp" / f"{self.stage}.{self.token:08d}"

    @property
    def work(self) -> Path:
        return self.store.root / ".work" / self.stage / f"{self.token:08d}"

    @contextmanager
    def held(self) -> Generator[dict[str, Any], None, None]:
        """Holds the lease's file lock and yields the lease; raises LeaseLost if another attempt has a newer token."""
        with self.store._lock(self.stage):
            lease = self.store._read_lease(self.stage)
            if lease.get("token") != self.token:
                raise LeaseLost(f"{self.stage}: token {self.token} is over, {lease.get('run')} holds {lease.get('token')}")
            yield lease

    def guard(self) -> None:
        with self.held():
            pass

    def renew(self) -> None:
        with self.held() as lease:
            self.store._write_lease(self.stage, {**lease, "expires": self.store.clock() + self.seconds})

    def append(self, path: Path, line: str) -> None:
        """One line to a metrics file, whole or not at all as seen by later readers, and only while the lease is ours."""
        with self.held(), path.open("ab+") as file:
            if file.tell() and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n":
                file.write(b"\n")  # a killed writer left a torn line: close it, readers drop it
            file.write(line.encode() + b"\n")

    def commit(self, summary: dict[str, Any], seconds: float, metrics: Path | None = None) -> dict[str, Any]:
        """Makes `out` the finished artefact. Returns what DONE.json says. The lease has nothing left to guard, so it isn't written again.

        `metrics`: the attempt's metrics file, kept beside DONE.json (not among the digests: it holds times).
        """
        files = {}
        for path in sorted(p for p in self.out.rglob("*") if p.is_file()):
            files[path.relative_to(self.out).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
            sync(path)
        if metrics is not None and metrics.exists():
            shutil.copyfile(metrics, self.out / METRICS)
        done = {"stage": self.stage, "summary": summary, "files": files, "seconds": seconds, "token": self.token, "run": self.run}
        write_json(self.out / DONE, done)
        with self.held():
            final = self.store.path(self.stage)
            if self.store.done(self.stage):
                shutil.rmtree(self.out)  # made by someone else before we took the lease: equal identity, equal content
            else:
                if final.exists():
                    shutil.rmtree(final)
                os.rename(self.out, final)
                sync(self.store.root)
        shutil.rmtree(self.store.root / ".work" / self.stage, ignore_errors=True)
        return done

    def release(self) -> None:
        """Gives the lease back unfinished: temporary files go, checkpoints stay. Quiet when it was already lost."""
        shutil.rmtree(self.out, ignore_errors=True)  # its name carries the token: nobody else's; and a full disk has room again
        for partial in self.work.glob(".*.partial"):
            shutil.rmtree(partial, ignore_errors=True)
        with suppress(LeaseLost), self.held():
            self._expire()

    def _expire(self) -> None:
        self.store._write_lease(self.stage, {**self.store._read_lease(self.stage), "expires": 0.0})


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all: a temporary name, fsync, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
