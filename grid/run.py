"""Runs a study: `python -m grid.run STUDY.yaml [--profile NAME|FILE] [--arms GLOB ...] [--out DIR] [--set KEY=VALUE ...] [--fresh]`.

In: the study's plan. Out: the run directory: plan.json, run.json, ledger.jsonl, timeline.jsonl, metrics/, mlflow.db, summary.json,
report/, and store/ unless FINEGRID_STORE or `--set store=...` names another. The same command again goes on where this one ended.
Exit codes: 0 all arms done, 1 user error, 2 some arms failed (the rest finished), 130 interrupted.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets_ray.errors import UserError
from grid import hollow, options
from grid.load import load
from grid.plan import plan as make_plan
from grid.rundir import RunDirectory
from grid.session import Session
from grid.settings import Settings


def main(argv: Sequence[str] | None = None) -> int:
    parser = options.parser("grid.run", __doc__)
    options.study(parser)
    parser.add_argument("--out", metavar="DIR", help="run directory; default: runs/<study>-<profile>")
    parser.add_argument("--fresh", action="store_true", help="start over: empties the run directory first")
    given = parser.parse_args(argv)
    if given.out == "":
        raise UserError("--out is empty", why="a shell variable that isn't set?", hint="--out DIR, or no --out at all")
    command = ["python", "-m", "grid.run", *(sys.argv[1:] if argv is None else argv)]
    loaded = load(given.study, given.profile, given.set, given.arms)
    if loaded.profile.hollow:
        return hollow.run(loaded, given.out)
    return run(make_plan(loaded), out=given.out, fresh=given.fresh, command=command)


def run(plan: dict[str, Any], *, out: str | Path | None, fresh: bool, command: list[str]) -> int:
    """Runs a plan to its end; returns the exit code. Raises UserError before anything was started."""
    began = time.time()
    settings = Settings.read(plan.get("run", {}))
    study = plan["study"]
    path = Path(out) if out else Path("runs") / f"{study['name']}-{study.get('profile', 'tiny')}"
    directory = RunDirectory.open(path, study["name"], fresh, command)
    try:
        return Session(plan, settings, directory, command, began).run()
    finally:
        directory.close()


if __name__ == "__main__":
    options.run(main)
