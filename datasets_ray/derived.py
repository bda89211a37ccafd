"""Rows made of other rows: `concat` (one artefact after the other) and `permuted` (the control: images permuted among questions).

Flows in: finished rows artefacts by stage id. Flows out: a rows artefact.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from datasets_ray.errors import UserError
from datasets_ray.rows import RowTable, write_rows


def _root(tables: Iterable[RowTable]) -> tuple[str | None, list[str]]:
    """The folder that all image paths are below, and each table's own folder relative to it."""
    roots = [t.manifest.get("root") for t in tables]
    present = [r for r in roots if r]
    if not present:
        return None, ["" for _ in roots]
    common = os.path.commonpath(present)
    return common, ["" if r is None else os.path.relpath(r, common) for r in roots]


def _rebased(row: dict[str, Any], below: str) -> dict[str, Any]:
    if below in {"", "."}:
        return row
    images = [{**i, "path": f"{below}/{i['path']}"} if i.get("path") else i for i in row["images"]]
    return {**row, "images": images}


def concat(spec: dict[str, Any], out: Path, inputs: Callable[[str], Path], data_root: str | None) -> dict[str, Any]:
    """`{"source": "concat", "inputs": [ids]}`: all rows in order; image paths are rewritten below the common root."""
    ids = spec.get("inputs") or []
    if not ids:
        raise UserError("concat has no inputs", hint="inputs: [two or more datasets]")
    tables = [RowTable(inputs(i)) for i in ids]
    root, below = _root(tables)
    classes = sorted({c for t in tables for c in t.manifest["classes"]})
    rows = [_rebased(r, b) for t, b in zip(tables, below) for r in t]
    return write_rows(rows, out, root=root, classes=classes)


def permuted(spec: dict[str, Any], out: Path, inputs: Callable[[str], Path], data_root: str | None) -> dict[str, Any]:
    """`{"source": "permuted", "input": id, "seed": s}`: every question keeps its text, options and answer and gets the image of another.

    A cyclic shift of a seeded order: no row keeps its own image (given two rows or more). Ids are kept, so that rows pair up.
    """
    table = RowTable(inputs(spec["input"]))
    rows = list(table)
    order = np.random.default_rng(spec.get("seed", 0)).permutation(len(rows))
    donor = np.empty(len(rows), np.int64)
    donor[order] = np.roll(order, 1)
    mixed = [{**r, "images": rows[int(d)]["images"]} for r, d in zip(rows, donor)]
    return write_rows(mixed, out, root=table.manifest.get("root"), classes=table.manifest["classes"], permuted=True)
