"""Source `benchmark_tables`: benchmarks as their authors publish them, in Parquet or JSON lines.

Flows in: the release's files. Flows out: question rows with image bytes (POPE's JSON lines: paths). Keys:

    set          mmstar | scienceqa | ai2d | mathvista | mmmu | pope
    file         its files, a pattern or a list of them below the data root; left out: the release's own names
    split        which part, where `file` is left out
    images       pope in JSON lines: the folder of COCO's val2014 images
    most_images  mmmu: the first N images of a question; what is left out is counted
    open         rule for rows without options (open_answers.py); left out: the set's own
    text_only    scienceqa: keep questions without an image (they are left out and counted)
    rows         the first questions

What the releases hold and how a record is read is in `benchmark_sets`. POPE and MathVista's and MMMU's open questions have no
options: their answers are read by an open rule. MathVista's authors extract answers with a judge model; rule `number` or `exact` is ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from datasets_ray.benchmark_sets import SETS, Record
from datasets_ray.columns import Columns
from datasets_ray.errors import UserError, nearest
from datasets_ray.files import below, check_keys, listed, matching, must_be_data
from datasets_ray.question_rows import check_most, check_open, check_question, question_row
from datasets_ray.shards import Made, write_sharded

SHARD_ROWS = 128
"""Rows hold their images: a task has a shard in memory."""
CHUNK = 4096
CUT = "images beyond most_images left out"


class Records:
    """Records of several files by number, in the files' order: Parquet through `columns`, JSON lines at once. Picklable."""

    def __init__(self, files: Sequence[Path], needed: Sequence[str]) -> None:
        self.files = list(files)
        kinds = {"parquet" if file.suffix == ".parquet" else "json" for file in files}
        if len(kinds) > 1:
            raise UserError(f"{listed(files)} are Parquet and JSON lines together", why="a release has one of them", hint="file: PATTERN")
        self.table = Columns(files) if kinds == {"parquet"} else None
        for name in needed if self.table is not None else ():
            self.table.need("set", name, ("",))  # type: ignore[union-attr]
        self.ends = [] if self.table is not None else list(accumulate(len(_json_lines(file)) for file in self.files))

    def __len__(self) -> int:
        return len(self.table) if self.table is not None else self.ends[-1]

    def read(self, start: int, stop: int) -> list[tuple[Record, str]]:
        """Records [start, stop), each with where it is. UserError when a file is damaged."""
        if self.table is not None:
            found = self.table.read(start, stop, list(self.table.types))
            return [(record, f"{listed(self.files)}: row {number}") for number, record in enumerate(found, start)]
        places = [(record, f"{file}: record {number}") for file in self.files for number, record in enumerate(_json_lines(file), 1)]
        return places[start:stop]

    def with_image(self, column: str) -> np.ndarray:
        """int64: numbers of the records whose image isn't null. Only the images' paths are read."""
        if self.table is None:
            return np.arange(len(self))
        ranges = ((at, min(at + CHUNK, len(self))) for at in range(0, len(self), CHUNK))
        parts = [part.column(column) for low, high in ranges for part in self.table.tables(low, high, [f"{column}.path"])]
        return np.flatnonzero([there for part in parts for there in part.is_valid().to_pylist()])


def _json_lines(file: Path) -> list[Record]:
    """A record a line; POPE's are told apart by their file: `coco_pope_random.json` is category random."""
    must_be_data(file)
    return _parsed(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _parsed(file: Path, changed: int) -> list[Record]:
    found: list[Record] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line) if line.strip() else None
        except ValueError as error:
            raise UserError("not JSON", why=str(error), hint="one record a line", where=f"{file}:{number}") from None
        if record is not None and not isinstance(record, dict):
            raise UserError("not a record", why="an object a line", where=f"{file}:{number}")
        if record is not None:
            found.append({"category": file.stem.rsplit("_", 1)[-1], **record})
    return found


class Maker:
    """Question rows of a range of kept records; picklable."""

    def __init__(self, records: Records, kept: np.ndarray, name: str, root: Path | None, most: int | None, open: str | None) -> None:
        self.records, self.kept, self.name, self.root, self.most, self.open = records, kept, name, root, most, open

    def __call__(self, start: int, stop: int) -> Made:
        made, chosen = Made([]), SETS[self.name]
        numbers = self.kept[start:stop].tolist()
        found = self.records.read(numbers[0], numbers[-1] + 1)
        for number in numbers:
            record, where = found[number - numbers[0]]
            asked = chosen.read(record, where)
            if self.open is not None and not asked.options:
                asked = replace(asked, open=self.open)
            check_question(asked, where)
            id = f"{self.name}-{chosen.name(record, number)}"
            built, reason = question_row(id, asked, root=self.root, most=self.most)
            if built is None:
                made.dropped.append((id, reason))
                continue
            made.rows.append(built)
            if self.most is not None and len(asked.images) > self.most:
                made.substituted.append((id, CUT))
        return made


def build(spec: dict[str, Any], out: Path, inputs: Callable[[str], Path], data_root: str | None) -> dict[str, Any]:
    check_keys(spec, ["set", "file", "split", "images", "most_images", "open", "text_only", "rows"])
    name = spec.get("set")
    if name not in SETS:
        raise UserError(f"set: {name!r} is none that can be read", hint=nearest(str(name), SETS))
    chosen = SETS[name]
    split = spec.get("split", chosen.splits[0])
    if split not in chosen.splits:
        raise UserError(f"{name} has no split {split!r}", hint=nearest(str(split), chosen.splits))
    usual = [pattern.replace("{split}", split) for pattern in chosen.usual]
    files = matching(spec, "file", data_root, (".parquet", ".json", ".jsonl"), usual)
    root = below(spec, "images", data_root, folder=True) if spec.get("images") else files[0].parent
    records = Records(files, chosen.columns)
    kept, filtered = np.arange(len(records)), dict[str, int]()
    if chosen.image is not None and not spec.get("text_only", False):
        kept = records.with_image(chosen.image)
        filtered = {"no image": len(records) - len(kept)} if len(kept) < len(records) else {}
    if not len(kept):
        raise UserError(f"no questions in {listed(files)}", why=f"left out: {filtered}" if filtered else "the files hold no record")
    kept = kept[: spec.get("rows")]
    return write_sharded(
        len(kept), Maker(records, kept, name, root, check_most(spec), check_open(spec)), Path(out), SHARD_ROWS, kind="questions",
        part="questions", set=name, root=str(root), filtered=filtered, records=len(kept),
    )  # fmt: skip
