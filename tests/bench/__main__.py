"""Runs every benchmark of this package (or those named), prints one table, writes experiments/measurements/<date>.json.

    python -m tests.bench                 all of them
    python -m tests.bench planning        one

A benchmark module has `measure() -> list[Figure]`. Absolute times are of a shared, noisy machine: quote ratios.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import pkgutil
import platform
import sys
import time
from pathlib import Path

import tests.bench
from tests.bench.figure import Figure, table

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "measurements"


def main() -> int:
    known = sorted(m.name for m in pkgutil.iter_modules(tests.bench.__path__) if m.name not in {"__main__", "figure"})
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__, formatter_class=raw)
    parser.add_argument("names", nargs="*", help=f"benchmarks to run: {', '.join(known)}")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    unknown = set(options.names) - set(known)
    if unknown:
        print(f"no such benchmark: {', '.join(sorted(unknown))}; known: {', '.join(known)}", file=sys.stderr)
        return 1
    figures: list[Figure] = []
    for name in options.names or known:
        start = time.time()
        print(f"{name} ...", file=sys.stderr, flush=True)
        figures += importlib.import_module(f"tests.bench.{name}").measure(options.repeats)
        print(f"{name}: {time.time() - start:.0f} s", file=sys.stderr, flush=True)
    print(table(figures))
    record = {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "figures": [f.as_dict() for f in figures],
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{record['date']}.json"
    previous = json.loads(path.read_text())["figures"] if path.is_file() else []
    measured = {f.name for f in figures}
    record["figures"] = [f for f in previous if f["name"] not in measured] + record["figures"]
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
