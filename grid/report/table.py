"""A table before it is Markdown, HTML or LaTeX: cells with their text, number, link and reason for absence.

In: numbers from `grid.report.tables` and `grid.report.evidence`. Out: `Table`s that every writer renders alike, so that a
number, its mark and its footnote can't differ between formats.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from grid.results import NOT_RUN

ABSENT = "–"


@dataclass(frozen=True)
class Cell:
    """text is what is shown; detail is smaller beside it; href is relative to the report folder; reason explains a `–`."""

    text: str
    detail: str = ""
    href: str = ""
    reason: str = ""
    tone: str = ""
    """"" | "published" | "strong" | "warn"."""


@dataclass(frozen=True)
class Column:
    title: str
    group: str = ""
    """Columns with equal, adjacent groups share a heading."""
    numeric: bool = True


@dataclass
class Table:
    id: str
    title: str
    columns: Sequence[Column]
    rows: list[list[Cell]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    marks: Sequence[str] = ()
    """What a reader must know of every number here: miniature, subset, incomplete."""
    caption: str = ""
    folded: bool = False
    """Long tables that a page shows on demand."""

    def absences(self) -> list[str]:
        """One note per reason that stands behind a `–`: the rows it concerns, by their first cell."""
        behind: dict[str, dict[str, list[str]]] = {}
        for cells in self.rows:
            for column, cell in zip(self.columns, cells, strict=True):
                if cell.text in (ABSENT, NOT_RUN) and cell.reason:
                    label = f"{column.group} {column.title}".strip()
                    behind.setdefault(cell.reason, {}).setdefault(cells[0].text, []).append(label)
        return [f"{ABSENT} {reason}: {_names(list(rows))}" for reason, rows in behind.items()]


def number(
    value: float | None, detail: str = "", href: str = "", reason: str = "", tone: str = "", signed: bool = False, digits: int = 1
) -> Cell:
    """A number with a real minus sign, or `–` with its reason."""
    if value is None or value != value:
        return Cell(ABSENT, href=href, reason=reason, tone=tone)
    return Cell(plain(value, signed, digits), detail, href, "", tone)


def plain(value: float, signed: bool = False, digits: int = 1) -> str:
    """`63.0`, `+7.5`, `−1.6`; never a negative zero."""
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    if float(text) == 0:
        text = f"{0:.{digits}f}"
    return text.replace("-", "−")


def span(low: float | None, high: float | None, signed: bool = False) -> str:
    """`[1.2, 3.4]` or nothing."""
    return "" if low is None or high is None else f"[{plain(low, signed)}, {plain(high, signed)}]"


def probability(p: float | None) -> str:
    return "" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def slug(name: str) -> str:
    """A file name that any system takes, distinct for names that differ beyond letter case in other characters."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "unnamed"
    if safe == name:
        return safe
    import zlib

    return f"{safe}-{zlib.crc32(name.encode()):08x}"


def arm_page(arm: str) -> str:
    return f"arms/{slug(arm)}.html"


def rows_page(arm: str, benchmark: str, page: int = 1) -> str:
    return f"rows/{slug(arm)}/{slug(benchmark)}{'' if page == 1 else f'-{page}'}.html"


def control_page(arm: str, benchmark: str, page: int = 1) -> str:
    """Rows of an arm that was asked with images permuted."""
    return f"control/{slug(arm)}/{slug(benchmark)}{'' if page == 1 else f'-{page}'}.html"


def encoder_page(stage: str, page: int = 1) -> str:
    """Rows of an encoder as a zero-shot classifier, by its stage."""
    return f"encoders/{slug(stage)}{'' if page == 1 else f'-{page}'}.html"


def beside_page(benchmark: str, page: int = 1) -> str:
    """Every question of a benchmark with the answers of all arms side by side."""
    return f"answers/{slug(benchmark)}{'' if page == 1 else f'-{page}'}.html"


def benchmark_page(benchmark: str) -> str:
    return f"benchmarks/{slug(benchmark)}.html"


def confusions_page(benchmark: str) -> str:
    return f"confusions/{slug(benchmark)}.html"


def _names(names: list[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
