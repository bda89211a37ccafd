"""Is there room for what a run writes? Folders and GiB in; what to say of them out. Used by `grid.check`; nothing is written.

Kept stages must fit. Decoded images are a cache: where there is less room than `resources.pixels_mb` allows, fewer are kept and the rest is
decoded again, which is slow and no failure.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

GIB = 2**30


def there(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())


def free(folder: Path) -> float:
    """GiB."""
    return shutil.disk_usage(folder).free / GIB


def pixels(megabytes: int, store: Path, need: float) -> tuple[str, str]:
    """(what is said of kept images, what is doubtful about them with a way out); either may be empty. store: the folder in which the run
    keeps `need` GiB of stages, on the same disk perhaps."""
    from datasets_ray.diskcache import SPARE, disk_bytes
    from datasets_ray.pixels_cache import home

    if not megabytes:
        return "", ""
    folder, limit = there(home()), megabytes / 1024
    hint = "FINEGRID_PIXELS=DIR on a larger disk"
    if not os.access(folder, os.W_OK | os.X_OK):
        told = f"decoded images are to be kept at {folder}, which can't be written: they are decoded again by every stage"
        return "", f"{told}; {hint.removesuffix(' on a larger disk')}, or --set resources.pixels_mb=0"
    disk, kept = shutil.disk_usage(folder), 0
    with contextlib.suppress(OSError):  # a run evicts meanwhile
        kept = sum(disk_bytes(path) for path in folder.iterdir() if path.is_dir()) if folder == home().absolute() else 0
    beside = need if os.stat(folder).st_dev == os.stat(store).st_dev else 0.0
    room = max(0.0, (disk.free - disk.total // SPARE + kept) / GIB - beside)
    if room >= limit:
        return f"decoded images: at most {limit:.1f} GiB at {folder}", ""
    told = f"pixels_mb lets decoded images take {limit:.1f} GiB at {folder}, where there is room for {room:.1f}"
    told += f"{' beside the stages' * bool(beside)} (1/{SPARE} of a disk stays free): what doesn't fit is decoded again"
    return "", f"{told}; {hint}, or --set resources.pixels_mb={int(room * 1024)}"
