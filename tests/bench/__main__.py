"""Runs every benchmark of this package (or those named), prints one table, writes experiments/measurements/<date>.json and .md.

    python -m tests.bench                 all of them
    python -m tests.bench step input      these
    python -m tests.bench.gpu_step        the one that needs a GPU, by itself (of the packages only torch and transformers)

A benchmark module has `measure(repeats) -> list[Figure]`; a peer runs on the same rows, weights and machine, in turn with ours. Absolute
times are of a shared, noisy machine: quote ratios.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import platform
import sys
import time
import traceback
from pathlib import Path

from tests.bench.figure import Figure, NotHere, table, versions

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "measurements"
BENCHMARKS = ("step", "overhead", "reuse", "input", "scoring", "mining", "planning", "demo", "gpu_step")


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__, formatter_class=raw)
    parser.add_argument("names", nargs="*", help=f"benchmarks to run: {', '.join(BENCHMARKS)}")
    parser.add_argument("--repeats", type=int, default=5, help="paired repetitions (overhead and reuse are runs of the grid, made once)")
    parser.add_argument("--out", type=Path, default=FOLDER, help="where the measurements go (experiments/measurements)")
    options = parser.parse_args()
    unknown = set(options.names) - set(BENCHMARKS)
    if unknown:
        print(f"no such benchmark: {', '.join(sorted(unknown))}; known: {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 1
    used = versions()
    print(", ".join(f"{name} {version}" for name, version in used.items()), file=sys.stderr, flush=True)
    figures: list[Figure] = []
    seconds: dict[str, float] = {}
    failed: list[str] = []
    for name in options.names or BENCHMARKS:
        start = time.time()
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            figures += importlib.import_module(f"tests.bench.{name}").measure(options.repeats)
        except NotHere as error:
            figures.append(Figure(name, "", note=str(error)))
        except Exception as error:  # the others are measured all the same
            traceback.print_exc()
            figures.append(Figure(name, "", note=f"FAILED: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"))
            failed.append(name)
        seconds[name] = round(time.time() - start, 1)
        print(f"{name}: {seconds[name]:.0f} s", file=sys.stderr, flush=True)
    print(table(figures))
    write(options.out, figures, seconds, used, beside=bool(options.names))
    return 1 if failed else 0


def write(folder: Path, figures: list[Figure], seconds: dict[str, float], used: dict[str, str], beside: bool) -> None:
    """Today's file; beside: with what of today wasn't measured again."""
    folder.mkdir(parents=True, exist_ok=True)
    today = datetime.date.today().isoformat()
    path = folder / f"{today}.json"
    before = json.loads(path.read_text()) if beside and path.is_file() else {"figures": [], "seconds": {}}
    kept = [f for f in before["figures"] if f["name"] not in {figure.name for figure in figures}]
    record = {
        "date": today, "python": platform.python_version(), "machine": platform.machine(), "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0], "versions": used, "seconds": {**before["seconds"], **seconds},
        "figures": kept + [f.as_dict() for f in figures],
    }  # fmt: skip
    path.write_text(json.dumps(record, indent=1) + "\n")
    fields = Figure.__dataclass_fields__
    everything = [Figure(**{key: value for key, value in f.items() if key in fields}) for f in kept] + figures
    about = f"{record['cores']} cores, Python {record['python']}, " + ", ".join(f"{name} {version}" for name, version in used.items())
    path.with_suffix(".md").write_text(f"# Measured on {today}\n\n{about}\n\n{table(everything)}\n")
    print(f"written to {path} and {path.stem}.md", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
