"""A large tab-separated table with quoted cells: where its records start in, any record out, one at a time.

A cell may hold line breaks and megabytes of base64, so records are found by one pass of the csv reader that keeps each one's first byte
and line; a range is read again from there. Memory: one record and 16 bytes for every record.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from datasets_ray.errors import UserError
from datasets_ray.files import must_be_data

LONGEST = 512 << 20
"""Characters of one cell; a longer one is a quotation mark that never closes."""
_BOM = "\ufeff"


class _Lines:
    """Text lines of a binary file; `byte` and `line` are where the next one starts."""

    def __init__(self, file: BinaryIO, path: Path, byte: int = 0, line: int = 1) -> None:
        self.file, self.path, self.byte, self.line = file, path, byte, line

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        raw = self.file.readline()
        if not raw:
            raise StopIteration
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            why = f"{error.reason} at byte {self.byte + error.start}"
            raise UserError("not UTF-8", why=why, where=f"{self.path}:{self.line}") from None
        self.byte += len(raw)
        self.line += 1
        return text


def _parsed(lines: _Lines) -> Iterator[tuple[int, int, list[str]]]:
    """(first byte, first line, cells) of each record that isn't a blank line."""
    csv.field_size_limit(LONGEST)
    reader = csv.reader(lines, delimiter="\t")
    while True:
        byte, line = lines.byte, lines.line
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            hint = "is a quotation mark left open, or the file cut short?"
            raise UserError("not a line of a TSV", why=str(error), hint=hint, where=f"{lines.path}:{line}") from None
        if cells:
            yield byte, line, cells


class Table:
    """The header is read at once; `scan` finds the records, `read` reads some of them again. Picklable."""

    def __init__(self, path: Path) -> None:
        must_be_data(path)
        self.path = path
        with path.open("rb") as file:
            lines = _Lines(file, path)
            first = next(_parsed(lines), (0, 1, []))[2]
            self.start, self.line = lines.byte, lines.line
        self.columns = [name.removeprefix(_BOM).strip() for name in first]
        twice = {name for name in self.columns if self.columns.count(name) > 1}
        if twice:
            raise UserError(f"{path} has the column {sorted(twice)[0]!r} twice", where=f"{path}:1")

    def require(self, names: Sequence[str]) -> None:
        missing = [name for name in names if name not in self.columns]
        if missing:
            why = f"it has {', '.join(self.columns[:12])}"
            raise UserError(f"{self.path} has no column {', '.join(missing)}", why=why, hint="is it tab-separated, with a header?")

    def scan(self) -> Iterator[tuple[int, int, dict[str, str]]]:
        """(first byte, first line, column → cell) of every record."""
        return self._from(self.start, self.line)

    def read(self, byte: int, line: int = 0) -> dict[str, str]:
        """The record that starts at this byte."""
        return next(self._from(byte, line))[2]

    def _from(self, byte: int, line: int) -> Iterator[tuple[int, int, dict[str, str]]]:
        with self.path.open("rb") as file:
            file.seek(byte)
            for at, number, cells in _parsed(_Lines(file, self.path, byte, line)):
                if len(cells) != len(self.columns):
                    why = f"it has {len(cells)} cells, the header {len(self.columns)}"
                    hint = "is the file cut short, or a quotation mark left open?"
                    raise UserError("not a whole line of the TSV", why=why, hint=hint, where=f"{self.path}:{number}")
                yield at, number, dict(zip(self.columns, cells))
