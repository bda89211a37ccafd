"""Writes a report's files.

In: a run directory. Out: `<run>/report/`: index.html with `arms/`, `rows/` and `thumbs/`, report.md, report.json, report.tex and
`figures/` (SVG and PNG). The folder is made beside the old one and takes its place when it is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from datasets_ray.errors import UserError
from grid.report import latex, markdown, page
from grid.report.build import Report, as_json, build
from grid.report.figures import Figure, draw
from grid.report.load import load_run
from grid.report.rowpages import write_pages

FOLDER = "report"


def write(directory: Path) -> None:
    """The report of a run, in its directory."""
    write_report(build(load_run(directory)), directory)


def write_report(report: Report, directory: Path) -> Path:
    """Every format; returns the report folder. Raises UserError where it can't be written."""
    final, fresh = Path(directory) / FOLDER, Path(directory) / f".{FOLDER}.{os.getpid()}"
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        figures = draw(report.results, report.effects)
        _figures(figures, fresh / "figures")
        _page(report, figures, fresh, "index.html")
        (fresh / "report.md").write_text(markdown.render(report, figures))
        (fresh / "report.json").write_text(json.dumps(as_json(report), indent=1) + "\n")
        (fresh / "report.tex").write_text(latex.render(report))
        old = final.with_name(f".{FOLDER}.old.{os.getpid()}")
        if final.exists():
            os.rename(final, old)
        os.rename(fresh, final)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(fresh, ignore_errors=True)
        raise UserError(f"cannot write the report to {final}", why=str(error), hint="free the disk or the folder's permissions") from None
    return final


def write_html(report: Report, file: Path) -> None:
    """One page at `file`; a run's further pages go into folders beside it."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _page(report, draw(report.results, report.effects), file.parent, file.name)
    except OSError as error:
        raise UserError(f"cannot write {file}", why=str(error), hint="give a path in a folder you may write to") from None


def _page(report: Report, figures: Sequence[Figure], folder: Path, name: str) -> None:
    pages = write_pages(report.results, folder, name) if report.results.directory is not None else set()
    (folder / name).write_text(page.render(report, figures, pages))


def _figures(figures: Sequence[Figure], folder: Path) -> None:
    folder.mkdir()
    for figure in figures:
        ink = figure.svg.replace("<svg ", '<svg color="#16171a" ', 1)
        (folder / f"{figure.id}.svg").write_text('<?xml version="1.0" encoding="UTF-8"?>\n' + ink)
        (folder / f"{figure.id}.png").write_bytes(figure.png)
