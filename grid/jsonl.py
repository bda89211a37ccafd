"""Append-only JSON lines whose writer may be killed at any byte and whose disk may be full: a torn last line is dropped when read and
closed before appending; what finds no room waits and is written later."""

from __future__ import annotations

import json
import os
from collections import deque
from pathlib import Path
from typing import Any

from trainers.failures import disk_full


def mend(path: Path) -> None:
    """Closes the torn last line that a killed writer left, so that the next record starts on its own."""
    if path.exists() and (text := path.read_bytes()) and not text.endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a JSONL file, none where there is no such file; a torn line (a killed writer) and what is no record are dropped."""
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


class Journal:
    """Appends records to files of a folder, in order. While the disk is full they wait here."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.waiting: deque[tuple[str, dict[str, Any]]] = deque()

    def write(self, name: str, record: dict[str, Any]) -> None:
        self.waiting.append((name, record))
        self.flush()

    def flush(self) -> None:
        """Writes what waits, as far as there is room."""
        while self.waiting:
            name, record = self.waiting[0]
            try:
                _append(self.folder / name, json.dumps(record))
            except OSError as error:
                if not disk_full(error):
                    raise
                return
            self.waiting.popleft()


def _append(path: Path, line: str) -> None:
    with path.open("ab+") as file:
        if file.tell() and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n":
            file.write(b"\n")  # the disk was full in the middle of a line
        file.write(line.encode() + b"\n")
