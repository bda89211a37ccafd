"""Parquet and Arrow files as one long table that is read a range at a time, with pyarrow alone.

In: files (Parquet, or Arrow as a stream or a file, told apart by their first bytes) with the same columns. Out: rows of a range as
dicts. Arrow files are memory-mapped; of a Parquet file the row groups of the range are decoded, the latest kept per process.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from datasets_ray.errors import UserError
from datasets_ray.files import must_be_data

END = b"\xff\xff\xff\xff\0\0\0\0"
"""What an Arrow stream ends with."""
BATCH = 512
"""Rows of a column that are read at a time."""


def _damaged(path: str | Path, error: Exception) -> UserError:
    hint = "download it again, and compare its size with the release's"
    return UserError(f"{path} can't be read", why=str(error).splitlines()[0], hint=hint)


def _is_parquet(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"PAR1"


def _stamp(path: str) -> tuple[int, int]:
    """Changes when the file is replaced, so that a long-lived worker doesn't read the old one."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _parquet(path: str) -> pq.ParquetFile:
    return _parquet_of(path, _stamp(path))


@lru_cache(maxsize=8)
def _parquet_of(path: str, _: tuple[int, int]) -> pq.ParquetFile:
    must_be_data(Path(path))
    try:
        return pq.ParquetFile(path, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from None


def _arrow(path: str) -> pa.Table:
    return _arrow_of(path, _stamp(path))


@lru_cache(maxsize=8)
def _arrow_of(path: str, _: tuple[int, int]) -> pa.Table:
    must_be_data(Path(path))
    try:
        source = pa.memory_map(path)
        if source.read(6) == b"ARROW1":
            return pa.ipc.open_file(source).read_all()
        source.seek(max(0, source.size() - len(END)))
        if source.read() != END:  # a stream that is cut between two batches reads as a shorter one
            raise pa.ArrowInvalid("the stream's end mark is missing: the file is cut short")
        source.seek(0)
        return pa.ipc.open_stream(source).read_all()
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from None


@lru_cache(maxsize=2)
def _group(path: str, number: int, columns: tuple[str, ...], _: tuple[int, int]) -> pa.Table:
    try:
        return _parquet(path).read_row_group(number, columns=list(columns))
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from None


class Columns:
    """`len(c)`, `c.read(start, stop, ["caption"])`, `c.types`; picklable. UserError for a damaged file or one with other columns."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.parts: list[tuple[str, int]] = []
        """(file, row group; -1: an Arrow file)"""
        rows: list[int] = []
        self.types: dict[str, str] = {}
        for path in map(str, paths):
            must_be_data(Path(path))
            if _is_parquet(path):
                opened = _parquet(path)
                schema, groups = opened.schema_arrow, opened.metadata.num_row_groups
                self.parts += [(path, number) for number in range(groups)]
                rows += [opened.metadata.row_group(number).num_rows for number in range(groups)]
            else:
                table = _arrow(path)
                schema = table.schema
                self.parts.append((path, -1))
                rows.append(table.num_rows)
            types = {field.name: str(field.type) for field in schema}
            if self.types and types != self.types:
                why = f"it has {_told(types)}, {paths[0]} has {_told(self.types)}"
                raise UserError(f"{path} has other columns than the first file", why=why, hint="name the files of one release")
            self.types = types
        self.ends = np.cumsum(rows, dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def need(self, key: str, name: str, kinds: Sequence[str]) -> str:
        """The column that a spec's key names; kinds: how its type may begin. UserError says which columns there are."""
        if name not in self.types:
            raise UserError(f"{key}: no column {name!r}", why=f"the files have {_told(self.types)}", hint=f"{key}: COLUMN")
        if not self.types[name].startswith(tuple(kinds)):
            raise UserError(f"{key}: column {name!r} is {self.types[name]}", why=f"one of {', '.join(kinds)} is needed")
        return name

    def tables(self, start: int, stop: int, columns: Sequence[str]) -> list[pa.Table]:
        """The range's rows, cut where files and row groups end."""
        made, begin = [], 0
        for (path, group), end in zip(self.parts, self.ends.tolist()):
            low, high = max(start, begin), min(stop, end)
            if low < high:
                table = _group(path, group, tuple(columns), _stamp(path)) if group >= 0 else _arrow(path).select(list(columns))
                made.append(table.slice(low - begin, high - low))
            begin = end
        return made

    def read(self, start: int, stop: int, columns: Sequence[str]) -> list[dict[str, Any]]:
        """Rows [start, stop) as dicts."""
        return [row for table in self.tables(start, stop, columns) for row in table.to_pylist()]

    def column(self, name: str, most: int | None = None) -> list[Any]:
        """One column's values, of the first `most` rows."""
        stop = len(self) if most is None else min(most, len(self))
        ranges = ((at, min(at + BATCH, stop)) for at in range(0, stop, BATCH))
        return [value for low, high in ranges for table in self.tables(low, high, [name]) for value in table.column(name).to_pylist()]


def _told(types: dict[str, str]) -> str:
    return ", ".join(f"{name}: {kind if len(kind) < 40 else kind[:36] + '...'}" for name, kind in types.items()) or "no columns"
