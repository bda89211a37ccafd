"""How long `grid.plan` takes as a whole process: on the main study, and on a study of 10,000 arms."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.bench.figure import Figure, repeat

REPOSITORY = Path(__file__).resolve().parents[2]


def _plan(study: Path) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "grid.plan", str(study), "--json"], cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def measure(repeats: int) -> list[Figure]:
    main = REPOSITORY / "experiments" / "full_ablation.yaml"
    with tempfile.TemporaryDirectory() as folder:
        from tests.grid.big_study import write_big_study

        big = write_big_study(Path(folder), arms=10_000)
        return [
            Figure("grid.plan full_ablation, whole process", "s", repeat(repeats, lambda: _plan(main)), goal=1.5),
            Figure("grid.plan 10,000 arms, whole process", "s", repeat(min(repeats, 3), lambda: _plan(big)), goal=5.0),
        ]
