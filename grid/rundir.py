"""A run directory: one driver at a time, an identity that lasts, an epoch that rises with every driver.

In: `--out`. Out: `RunDirectory`, holding `<out>/run.lock` until it is closed, and `<out>/run.json`:
{"id", "study", "epoch", "store", "state", "drivers": [{"epoch", "started", "host", "pid", "command", "versions", "ended", "exit"}]}.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import socket
import time
import uuid
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from datasets_ray.errors import UserError

RUN = "run.json"
VERSIONS = ("finegrid", "ray", "torch", "transformers", "deepspeed", "open_clip_torch", "mlflow")


@dataclass
class RunDirectory:
    path: Path
    lock: IO[str]
    data: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, study: str, fresh: bool, command: list[str]) -> RunDirectory:
        """Locks the directory and starts a new epoch. Raises UserError: another driver is alive, or another study lives here."""
        path = path.absolute()
        existing = path / RUN
        writable(path, "--out DIR")
        if not existing.exists() and any(p.name != "run.lock" for p in path.iterdir()):
            raise UserError(f"{path} is not a run directory", why="it holds other files and no run.json", hint="give an empty or new --out")
        try:
            lock = (path / "run.lock").open("a+")
        except OSError as error:
            raise UserError(f"{path / 'run.lock'} can't be opened", why=error.strerror or str(error), hint="another --out") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder, hint = lock.read().strip() or "its lock is held", "wait for it, stop it, or give another --out"
            raise UserError(f"another grid.run works in {path}", why=holder, hint=hint) from None
        lock.seek(0)
        lock.truncate()
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        data = read_json(existing, "id", "epoch", "study") if existing.exists() else {}
        if data and not (isinstance(data["epoch"], int) and isinstance(data.get("drivers", []), list)):
            raise UserError(f"{existing} was not written by grid.run", why="its epoch or drivers can't be read", hint="another --out")
        if data and data["study"] != study and not fresh:
            what = f"{path} holds a run of the study {data['study']!r}, not {study!r}"
            raise UserError(what, hint="give another --out, or --fresh to start over")
        if fresh and data:
            for entry in path.iterdir():
                if entry.name == "run.lock":
                    continue
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            # the epoch goes on rising: what a killed driver left alive must stay fenced out
            data = {"id": data["id"], "epoch": data["epoch"]}
        run = cls(path, lock, {"drivers": [], "epoch": 0, "id": uuid.uuid4().hex, **data, "study": study})
        run.data["epoch"] += 1
        run.data["state"] = "running"
        driver = {"epoch": run.epoch, "started": time.time(), "host": socket.gethostname(), "pid": os.getpid(), "command": command}
        run.data["drivers"].append({**driver, "python": platform.python_version(), "versions": versions()})
        run.save()
        return run

    @property
    def epoch(self) -> int:
        return self.data["epoch"]

    @property
    def id(self) -> str:
        return self.data["id"]

    def save(self) -> None:
        write_json(self.path / RUN, self.data)

    def end(self, state: str, code: int) -> None:
        self.data["state"] = state
        self.data["drivers"][-1].update(ended=time.time(), exit=code)
        self.save()

    def close(self) -> None:
        self.lock.close()


def versions() -> dict[str, str]:
    found = {}
    for name in VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=1))
    os.replace(temporary, path)


def writable(path: Path, hint: str) -> None:
    """Makes the folder; UserError where it can't be, or can't be written into."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"{path} is a file", why="a folder is needed", hint=hint) from None
    except (OSError, ValueError) as error:  # a null byte is a ValueError
        raise UserError(f"{str(path)!r} can't be written", why=getattr(error, "strerror", None) or str(error), hint=hint) from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"{path} can't be written", why="no permission", hint=hint)


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """An object that a run wrote, with these keys. Raises UserError for a file that is damaged or somebody else's."""
    hint = "give the --out of a grid.run; a damaged one is started over by --fresh in a new directory"
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read", why=str(error).splitlines()[0], hint=hint) from None
    missing = [key for key in keys if not isinstance(found, dict) or key not in found]
    if missing:
        raise UserError(f"{path} was not written by grid.run", why=f"it has no {missing[0]!r}", hint=hint)
    return found


def read_plan(path: Path) -> dict[str, Any]:
    """A run's plan.json. Raises UserError for one that is damaged, or in which what a report reads is of another kind."""
    plan = read_json(path, "study", "stages", "arms")
    kinds = {"study": dict, "stages": list, "arms": list, "references": list, "groups": dict, "contrasts": list}
    wrong = [key for key, kind in kinds.items() if not isinstance(plan.get(key, kind()), kind)]
    parts = {"stages": ("id", "name", "kind", "spec"), "arms": ("name", "stages"), "references": ("name", "stages")}
    for key, wanted in parts.items():
        entries = [] if key in wrong else plan.get(key, [])
        if not all(isinstance(entry, dict) and all(name in entry for name in wanted) for entry in entries):
            wrong.append(key)
    if wrong or "name" not in plan["study"]:
        hint = "give the --out of a grid.run; a damaged one is started over by --fresh in a new directory"
        raise UserError(f"{path} was not written by grid.run", why=f"its {(wrong or ['study'])[0]!r} can't be read", hint=hint)
    return plan


def alive(path: Path) -> bool:
    """Whether a driver holds this run directory now (on this file system's host)."""
    try:
        with (path / "run.lock").open("a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False
