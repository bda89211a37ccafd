"""Peak memory of all our processes together: proportional set size (shared pages counted once), read from /proc.

In: the driver's pid and a word found in the command lines of Ray's processes (its session directory). Out: `Meter.peak` in bytes.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any


def processes(root: int, word: str = "") -> set[int]:
    """The process, its descendants, and every process whose command line holds the word, with their descendants."""
    parents: dict[int, int] = {}
    roots = {root}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if word and word in (entry / "cmdline").read_text():
                roots.add(int(entry.name))
        except (OSError, ValueError):
            continue
    found = set(roots)
    grown = True
    while grown:
        more = {pid for pid, parent in parents.items() if parent in found} - found
        found |= more
        grown = bool(more)
    return found & (set(parents) | {root})


def proportional(pids: set[int]) -> dict[int, int]:
    """Bytes of proportional set size by process; a process that just ended is left out."""
    sizes = {}
    for pid in pids:
        try:
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    sizes[pid] = int(line.split()[1]) * 1024
        except OSError:
            continue
    return sizes


class Meter:
    """Samples every `seconds` in a daemon thread; keeps the peak and who made it."""

    def __init__(self, root: int, seconds: float = 3.0) -> None:
        self.root, self.seconds, self.word = root, seconds, ""
        self.peak, self.samples = 0, 0
        self.at_peak: list[dict[str, Any]] = []
        self._end = threading.Event()
        threading.Thread(target=self._run, name="memory", daemon=True).start()

    def _run(self) -> None:
        while not self._end.wait(self.seconds):
            sizes = proportional(processes(self.root, self.word))
            total = sum(sizes.values())
            self.samples += 1
            if total > self.peak:
                largest = sorted(sizes.items(), key=lambda item: -item[1])[:12]
                self.peak, self.at_peak = total, [{"process": name_of(pid), "mib": size >> 20} for pid, size in largest]

    def stop(self) -> dict[str, Any]:
        self._end.set()
        return {"peak_gib": round(self.peak / 2**30, 2), "samples": self.samples, "largest": self.at_peak}


def name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()[:60] or str(pid)
    except OSError:
        return str(pid)
