"""How long `grid.plan` takes as a whole process: on the main study, and on a study of 10,000 arms."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.bench.figure import Figure, repeat
from tests.grid.studies import write_big

REPOSITORY = Path(__file__).resolve().parents[2]


def _plan(*words: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "grid.plan", *words], cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def measure(repeats: int) -> list[Figure]:
    main = REPOSITORY / "experiments" / "full_ablation.yaml"
    with tempfile.TemporaryDirectory() as folder:
        big, profile = write_big(Path(folder))
        return [
            Figure("grid.plan full_ablation, whole process", "s", repeat(repeats, lambda: _plan(str(main), "--json")), goal=1.5),
            Figure("grid.plan 10,000 arms, whole process", "s", repeat(repeats, lambda: _plan(big, "--profile", profile)), goal=5.0),
        ]
