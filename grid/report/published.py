"""A published table as `Results`: the same arms, contrasts and steps that a run has, with printed numbers and no answers.

In: `<name>_ablation.csv` (row, source, axes, printed averages, benchmarks), `<name>_effects.csv` (contrasts and printed
effects) and, where the paper has a cumulative summary, `<name>_steps.csv`. Out: `grid.results.Results`.
"""

from __future__ import annotations

import csv
import io
import math
import re
from pathlib import Path
from typing import Any

from datasets_ray.errors import UserError, nearest
from grid.results import Arm, Results, Score

GROUPS: dict[str, tuple[str, ...]] = {"fine_grained": ("imagenet", "flowers", "pets", "food"), "general_vqa": ("mmbench", "mmmu", "mmstar")}
"""The paper's two averages; a published table's columns by these names are averages as printed."""
ROUNDING = 0.101
"""Printed averages have one decimal: half a step each for the average and its columns."""
SUFFIX = "_ablation.csv"
SOURCES = ("trained", "released")
NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?", re.ASCII)


def published_folder() -> Path:
    """Where published tables lie: `experiments/published` beside the package."""
    return Path(__file__).resolve().parents[2] / "experiments" / "published"


def find_table(name: str) -> Path:
    """`fine_grained` → its ablation table; a path to a CSV is taken as it is."""
    if name.endswith(".csv"):
        path = Path(name)
        if not path.is_file():
            raise UserError(f"there is no table {name}", hint="give a CSV with the columns of a published ablation table")
        return path
    path = published_folder() / f"{name}{SUFFIX}"
    if not path.is_file():
        known = [p.name.removesuffix(SUFFIX) for p in published_folder().glob(f"*{SUFFIX}")]
        raise UserError(f"nothing published is called {name!r}", hint=nearest(name, known))
    return path


def load_published(table: Path, beside: Path | None = None, title: str = "") -> Results:
    """table: the ablation CSV. beside: the path whose siblings hold effects and steps (default: the table itself)."""
    rows = _read(table)
    columns = list(rows[0][1])
    if not set(columns) & {*GROUPS, *sum(GROUPS.values(), ())} or "row" not in columns:
        why, hint = f"its columns are {', '.join(columns)}", "row, source, the axes, and averages or benchmarks"
        raise UserError(f"{table} is no ablation table", why=why, hint=hint, where=f"{table}:1")
    benchmarks = {name: members for name, members in GROUPS.items() if name in columns or set(members) <= set(columns)}
    first = min((columns.index(c) for c in [*GROUPS, *sum(GROUPS.values(), ())] if c in columns), default=len(columns))
    axes = [c for c in columns[:first] if c not in ("row", "source")]
    results = Results(title or f"published: {table.name.removesuffix(SUFFIX).replace('_', '-')}", benchmarks, [])
    lines: dict[int, int] = {}
    for line, cells in rows:
        at = f"{table}:{line}"
        row, source = _row(cells["row"], at), cells.get("source") or "trained"
        if source not in SOURCES:
            raise UserError(f"source is {source!r}", why="a model is trained, or released", hint=nearest(source, SOURCES), where=at)
        arm = Arm(f"row-{row:02d}" if row is not None else f"line-{line}", {a: cells[a] for a in axes}, source, row)
        if row is not None and (first := lines.setdefault(row, line)) != line:
            raise UserError(f"row {row} twice", why=f"also in line {first}", hint="rows are numbered once", where=at)
        for name, members in benchmarks.items():
            printed = _points(cells.get(name, ""), name, at)
            if printed is not None:
                arm.averages[name] = printed
            for benchmark in members:
                value = _points(cells.get(benchmark, ""), benchmark, at)
                if value is None:
                    arm.missing[benchmark] = "not published"
                else:
                    arm.scores[benchmark] = Score(value)
            computed = [arm.scores[b].value for b in members if b in arm.scores]
            mean = sum(computed) / len(members)
            if printed is not None and len(computed) == len(members) and abs(printed - mean) > ROUNDING:
                results.notices.append(f"{arm.name}: printed {name} {printed:.1f}, its columns average {mean:.2f}; printed is used")
        results.arms.append(arm)
    origin = beside or table
    seen = [value for arm in results.arms for value in (*arm.averages.values(), *(score.value for score in arm.scores.values()))]
    if seen and max(seen) <= 1:
        why = "scores are percentage points, and none of the table's is above 1"
        raise UserError(f"{table} seems to hold shares", why=why, hint="write 50.5 for 0.505", where=f"{table}:2")
    results.contrasts = _contrasts(_sibling(origin, "_effects.csv"))
    results.steps = _steps(_sibling(origin, "_steps.csv"))
    results.notices += [f"{step['label']}: {step['note']}" for step in results.steps if step["note"]]
    return results


def _sibling(table: Path, suffix: str) -> Path:
    """The file of that suffix beside a table, else beside the packaged table of its name; another paper's says nothing of this one."""
    name = table.name.removesuffix(SUFFIX) if table.name.endswith(SUFFIX) else table.stem
    beside = table.with_name(name + suffix)
    return beside if beside.is_file() else published_folder() / (name + suffix)


def _contrasts(path: Path) -> list[dict[str, Any]]:
    contrasts = []
    for line, cells in _read(path, "effect", "axis", "from", "to", "where") if path.is_file() else []:
        at = f"{path}:{line}"
        printed = {name.removesuffix("_pp"): _number(value, name, at) for name, value in cells.items() if name.endswith("_pp")}
        pairs = _number(cells.get("pairs", ""), "pairs", at)
        contrasts.append({
            "name": cells["effect"], "axis": cells["axis"], "from": cells["from"], "to": cells["to"], "where": cells["where"],
            "printed": {k: v for k, v in printed.items() if v is not None},
            "printed_pairs": None if pairs is None else int(pairs),
        })  # fmt: skip
    return contrasts


def _steps(path: Path) -> list[dict[str, Any]]:
    steps = []
    for line, cells in _read(path, "label", "row", "from_row", "note") if path.is_file() else []:
        at = f"{path}:{line}"
        printed = {name: _number(cells.get(name, ""), name, at) for name in GROUPS}
        rows = {key: _number(cells[key], key, at) for key in ("row", "from_row")}
        steps.append({
            "label": cells["label"],
            "note": cells["note"],
            "printed": {k: v for k, v in printed.items() if v is not None},
            **{key: None if value is None else int(value) for key, value in rows.items()},
        })
    return steps


def _read(path: Path, *needed: str) -> list[tuple[int, dict[str, str]]]:
    """(line number, cells) of every row. needed: columns without which it isn't the table that it should be."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        at = f"{path}:{error.object[: error.start].count(10) + 1}"
        raise UserError(f"{path} is not text", why=f"byte {error.start} is not UTF-8", hint="save it as UTF-8", where=at) from None
    reader, rows = csv.reader(io.StringIO(text, newline=""), strict=True), []
    try:
        columns = [cell.strip() for cell in next(reader, [])]
        _header(columns, path)
        for cells in reader:
            at = f"{path}:{reader.line_num}"
            if cells and len(cells) != len(columns):
                why, hint = f"the header has {len(columns)}", "quote a cell that holds a comma"
                raise UserError(f"{len(cells)} cells", why=why, hint=hint, where=at)
            if cells:
                rows.append((reader.line_num, {column: cell.strip() for column, cell in zip(columns, cells)}))
    except csv.Error as error:
        raise UserError("not CSV", why=str(error), hint="close every quote", where=f"{path}:{reader.line_num}") from None
    if not rows:
        raise UserError(f"{path} has no rows", hint="a header and at least one row are needed")
    if missing := [name for name in needed if name not in columns]:
        raise UserError(f"no column {missing[0]!r}", why=f"they are {', '.join(columns)}", where=f"{path}:1")
    return rows


def _header(columns: list[str], path: Path) -> None:
    if len(columns) == 1 and (other := next((sign for sign in ";\t" if sign in columns[0]), None)):
        raise UserError(f"columns are separated by {other!r}", why="a comma is expected", hint="save it as plain CSV", where=f"{path}:1")
    if twice := next((column for column in columns if columns.count(column) > 1), None):
        raise UserError(f"column {twice!r} is there twice", why="a cell is known by its column", where=f"{path}:1")


def _number(text: str, column: str, at: str) -> float | None:
    """An empty cell is never zero: it is None."""
    if not text:
        return None
    plain = text.rstrip("% ").replace(",", ".") if text.count(",") < 2 else text
    if NUMBER.fullmatch(text) and math.isfinite(float(text)):
        return float(text)
    hint = f"write {plain}" if NUMBER.fullmatch(plain) else "leave the cell empty where there is none"
    raise UserError(f"{column} is {text!r}", why="a number is needed", hint=hint, where=at)


def _row(text: str, at: str) -> int | None:
    number = _number(text, "row", at)
    if number is not None and (number < 0 or number != int(number)):
        raise UserError(f"row is {text!r}", why="rows are counted", hint="a whole number", where=at)
    return None if number is None else int(number)


def _points(text: str, column: str, at: str) -> float | None:
    """A score in percentage points."""
    number = _number(text, column, at)
    if number is not None and not 0 <= number <= 100:
        raise UserError(f"{column} is {text!r}", why="scores are percentage points, 0 to 100", where=at)
    return number
