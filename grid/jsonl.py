"""Append-only JSON lines whose writer may be killed at any byte: a torn last line is dropped when read and closed before appending."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def mend(path: Path) -> None:
    """Closes the torn last line that a killed writer left, so that the next record starts on its own."""
    if path.exists() and (text := path.read_bytes()) and not text.endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a JSONL file; a torn last line (a killed writer) is dropped."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records
