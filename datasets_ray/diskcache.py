"""Caches as folders on a machine's own disk: opened under a shared lock, evicted whole, the least recently used first.

In: a root folder, a limit in bytes, a cache's name and how to fill its folder. Out: the folder with its lock held, or bytes that are free.
A folder is whole from the moment it has its name; the time of change of its `about.json` says when it was used last.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

SPARE = 8
"""Of the disk, one part in so many is left free: more than a Kubernetes node wants of it."""
STALE_SECONDS = 3600.0
TRIES = 5
NAME = re.compile("[0-9a-f]{24}")
"""How a cache's folder is called."""
OURS = (".new-", ".gone-")
"""How folders begin that are being made or removed; nothing else in the root is ours to touch."""


def opened(path: Path, about: Mapping[str, Any], fill: Callable[[Path], None], parts: Sequence[str] = ()) -> io.FileIO:
    """The folder of a cache, made and filled where there is none; the file that holds a shared lock on it until it is closed.

    about: what it is of, JSON; parts: files that `fill` makes, without which a folder is made anew.
    OSError where it can't be made or belongs to another user.
    """
    _prepare(path.parent)
    for _ in range(TRIES):
        if path.is_dir() and not all((path / name).is_file() for name in ("about.json", "lock", *parts)):
            _remove(path)  # a cleaner of temporary folders took a part of it
        if not path.is_dir():
            _make(path, about, fill)
        with contextlib.suppress(FileNotFoundError):
            lock = io.FileIO(path / "lock", "r+")
            fcntl.flock(lock, fcntl.LOCK_SH)
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(path / "lock")):
                for name in ("about.json", "lock"):  # cleaners of temporary folders take what is old
                    os.utime(path / name)
                return lock  # else it was evicted while we waited
            lock.close()
    raise OSError(f"{path} can't be opened")


def _prepare(root: Path) -> None:
    """A folder that only its user reads and writes. OSError when it is somebody else's."""
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = os.lstat(root)
    if status.st_uid != os.getuid():
        raise PermissionError(f"{root} belongs to another user")


def _make(path: Path, about: Mapping[str, Any], fill: Callable[[Path], None]) -> None:
    new = Path(tempfile.mkdtemp(prefix=".new-", dir=path.parent))
    try:
        (new / "about.json").write_text(json.dumps(about, indent=1, sort_keys=True))
        (new / "lock").touch()
        fill(new)
        os.rename(new, path)
    except OSError:
        if not path.is_dir():  # else another process was faster
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)


def make_room(root: Path, limit: int, need: int) -> int:
    """Evicts caches that nobody has open, least recently used first, until `need` bytes are free below the limit. Returns how many are."""
    caches: list[tuple[float, Path, int]] = []
    for path in root.iterdir():
        with contextlib.suppress(OSError):
            if path.name.startswith(OURS) and time.time() - path.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)  # left by a process that was killed
            if not NAME.fullmatch(path.name):
                continue
            caches.append((os.stat(path / "about.json").st_mtime, path, disk_bytes(path)))
    used = sum(size for _, _, size in caches)
    for _, path, size in sorted(caches):
        if used + need <= limit:
            break
        if _evict(path):
            used -= size
    disk = shutil.disk_usage(root)
    return max(0, min(limit - used, disk.free - disk.total // SPARE))


def disk_bytes(path: Path) -> int:
    """What a cache takes on the disk; holes take nothing."""
    return sum(512 * entry.stat().st_blocks for entry in os.scandir(path))


def _evict(path: Path) -> bool:
    """Removes a cache unless somebody has it open."""
    try:
        with io.FileIO(path / "lock", "r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return _remove(path)
    except FileNotFoundError:
        return _remove(path)
    except OSError:
        return False


def _remove(path: Path) -> bool:
    gone = path.with_name(f".gone-{path.name}-{os.getpid()}")
    try:
        os.rename(path, gone)
    except OSError:
        return False
    shutil.rmtree(gone, ignore_errors=True)
    return True
