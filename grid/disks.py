"""Is there room for what a run writes? Folders and GiB in; what to say of them out. Used by `grid.check`; nothing is written.

Kept stages must fit. Decoded images and what frozen encoders make of them are caches: where there is less room than `resources.pixels_mb`
and `resources.features_mb` allow, fewer are kept and the rest is made again, which is slow and no failure.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from grid.profile import Resources

GIB = 2**30


def there(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())


def free(folder: Path) -> float:
    """GiB."""
    return shutil.disk_usage(folder).free / GIB


@dataclass(frozen=True)
class Claim:
    """What is to lie in a folder."""

    what: str
    folder: Path
    gib: float


def caches(resources: Resources, store: Path, need: float) -> tuple[list[str], list[str]]:
    """(what is said of kept images and encoder outputs, what is doubtful about them with a way out). store: the folder in which the run
    keeps `need` GiB of stages, on the same disk perhaps."""
    from datasets_ray import features_cache, pixels_cache

    claims, said, notes = [Claim("the stages", store, need)], [], []
    for key, what, home in (
        ("pixels_mb", "decoded images", pixels_cache.home()), ("features_mb", "encoder outputs", features_cache.home()),
    ):  # fmt: skip
        if not (megabytes := getattr(resources, key)):
            continue
        fits, note = _cache(key, what, home, megabytes, claims)
        said += [fits] * bool(fits)
        notes += [note] * bool(note)
        claims.append(Claim(what, there(home), max(0.0, megabytes / 1024 - _kept(home))))
    return said, notes


def _cache(key: str, what: str, home: Path, megabytes: int, claims: Sequence[Claim]) -> tuple[str, str]:
    """(what is said, what is doubtful) of one cache beside what else is to lie on disks; one of the two is empty."""
    from datasets_ray.diskcache import SPARE

    folder, limit = there(home), megabytes / 1024
    hint = "FINEGRID_PIXELS=DIR on a larger disk"
    if not os.access(folder, os.W_OK | os.X_OK):
        told = f"{what} are to be kept at {folder}, which can't be written: they are made again by every stage"
        return "", f"{told}; {hint.removesuffix(' on a larger disk')}, or --set resources.{key}=0"
    disk = shutil.disk_usage(folder)
    beside = [claim for claim in claims if claim.gib and os.stat(folder).st_dev == os.stat(claim.folder).st_dev]
    room = max(0.0, (disk.free - disk.total // SPARE) / GIB + _kept(home) - sum(claim.gib for claim in beside))
    if room >= limit:
        return f"{what}: at most {limit:.1f} GiB at {folder}", ""
    told = f"{key} lets {what} take {limit:.1f} GiB at {folder}, where there is room for {room:.1f}"
    others = f" beside {' and '.join(claim.what for claim in beside)}" if beside else ""
    told += f"{others} (1/{SPARE} of a disk stays free): what doesn't fit is made again"
    return "", f"{told}; {hint}, or --set resources.{key}={int(room * 1024)}"


def _kept(home: Path) -> float:
    """GiB that a cache holds already."""
    from datasets_ray.diskcache import disk_bytes

    with contextlib.suppress(OSError):  # it isn't there yet, or a run evicts meanwhile
        return sum(disk_bytes(path) for path in home.iterdir() if path.is_dir()) / GIB
    return 0.0
