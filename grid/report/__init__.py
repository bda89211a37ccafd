"""Reports: a run directory or a published table in; Markdown, HTML, LaTeX and JSON out.

    python -m grid.report DIR [--json | --html FILE | --latex FILE]
    python -m grid.report --published fine_grained [--json] [--table CSV]

Without a flag, DIR/report/ is written (report.md, report.json, report.tex, index.html with its pages, figures/) and the
Markdown is printed. `--html FILE` and `--latex FILE` write that one file; the HTML's pages go beside it. `--published` runs the
same engine over a published table; `--table` gives another CSV with its columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def write(out_dir: str | Path) -> None:
    """Writes `<out_dir>/report/` in every format. Raises UserError where there is nothing to report on."""
    from grid.report.files import write as write_all

    write_all(Path(out_dir))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    from grid.report.command import main as command

    return command(argv)
