"""The general axis of a figure: numbers that the user brings, one a model, in a CSV with the columns `model` and `average`.

In: the file. Out: model → percentage points. A row without a number is a model without a number: it is left out of the figure, and named.
Nothing here averages benchmarks: a number under a leaderboard's name is that leaderboard's, over all of its sets.
"""

from __future__ import annotations

import csv
from pathlib import Path

from datasets_ray.errors import UserError

COLUMNS = ("model", "average")


def read(path: Path) -> dict[str, float]:
    """model → average, 0-100. Raises UserError for a file that isn't there, lacks a column, or says one thing twice or no number."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            head, lines = table.fieldnames or [], list(table)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} can't be read", why=str(error), hint=f"a CSV with the columns {', '.join(COLUMNS)}") from None
    missing = [column for column in COLUMNS if column not in head]
    if missing:
        why = f"the columns are {', '.join(head) or 'none'}"
        raise UserError(f"no column {missing[0]!r}", why=why, hint=",".join(COLUMNS), where=str(path))
    found: dict[str, float] = {}
    seen: set[str] = set()
    for number, line in enumerate(lines, 2):
        name, text, where = (line["model"] or "").strip(), (line["average"] or "").strip(), f"{path}:{number}"
        if not name:
            raise UserError("a row without a model", where=where)
        if name in seen:
            raise UserError(f"{name!r} twice", why="a model has one average", where=where)
        seen.add(name)
        if not text:
            continue
        try:
            found[name] = float(text)
        except ValueError:
            raise UserError(f"{text!r} is no number", hint="percentage points such as 51.4, or nothing", where=where) from None
        if not 0 <= found[name] <= 100:
            raise UserError(f"{name}: {text} is no average", why="percentage points lie between 0 and 100", where=where)
    return found
