"""`grid.report`'s command line.

In: a run directory, or the name of a published table. Out: text on stdout, files where asked.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import grid.report as package
from datasets_ray.errors import UserError
from grid import options
from grid.report.build import as_json, build
from grid.report.load import load_run
from grid.report.markdown import render
from grid.report.published import find_table, load_published


def main(argv: Sequence[str] | None = None) -> int:
    """Parses, reports, returns 0; mistakes are UserErrors."""
    parser = options.parser("grid.report", package.__doc__)
    parser.add_argument("dir", metavar="DIR", nargs="?", help="a run directory (the --out of a grid.run)")
    parser.add_argument("--json", action="store_true", help="the report's numbers as JSON on stdout; writes nothing")
    parser.add_argument("--html", metavar="FILE", help="write the page to FILE, its further pages beside it")
    parser.add_argument("--latex", metavar="FILE", help="write the tables to FILE")
    parser.add_argument("--published", metavar="NAME", help="report on a published table instead of a run, for example fine_grained")
    parser.add_argument("--table", metavar="CSV", help="with --published: another CSV with the same columns")
    given = parser.parse_args(argv)
    if bool(given.dir) == bool(given.published):
        raise UserError(
            "give either a run directory or --published NAME", hint="python -m grid.report runs/full_ablation, or --published fine_grained"
        )
    if given.table and not given.published:
        raise UserError("--table needs --published", why="it replaces a published table", hint="--published fine_grained --table CSV")
    if given.published:
        original = find_table(given.published)
        results = load_published(find_table(given.table) if given.table else original, beside=original)
    else:
        results = load_run(given.dir)
    report = build(results)
    if given.json:
        sys.stdout.write(json.dumps(as_json(report), indent=1) + "\n")
        return 0
    if given.latex:
        from grid.report.latex import render as render_latex

        _write(Path(given.latex), render_latex(report))
    if given.html:
        from grid.report.files import write_html

        write_html(report, Path(given.html))
        print(f"written: {given.html}")
    if not given.html and not given.latex:
        if given.dir:
            from grid.report.files import write_report

            folder = write_report(report, Path(given.dir))
            print(render(report, links=False))
            print(f"written: {folder / 'index.html'}")
        else:
            print(render(report, links=False))
    return 0


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise UserError(f"cannot write {path}", why=str(error), hint="give a path in a folder you may write to") from None
    print(f"written: {path}")
