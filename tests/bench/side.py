"""One side of a comparison as a process of its own, which answers one request at a time.

    ours = Side("tests.bench.scoring:Ours", folder="...")          the class, made there with these arguments
    ours.ask("predict", "first_token")                              its method's result (JSON)

So two sides take turns without warming, filling or slowing each other, and each has a peak of memory of its own.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "MLFLOW_DISABLE_TELEMETRY": "true", "RAY_USAGE_STATS_ENABLED": "0",
    "TRANSFORMERS_VERBOSITY": "error",
}  # fmt: skip
MIB = 1 << 20


class Side:
    def __init__(self, target: str, threads: int = 1, **arguments: Any) -> None:
        """threads: of the math libraries there."""
        self.target = target
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115
        limits = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        inherited = os.environ.get("PYTHONPATH")
        limits["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), *([inherited] if inherited else [])])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.side", target, json.dumps(arguments)], cwd=REPOSITORY, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said, env={**os.environ, **ENVIRONMENT, **limits},
        )  # fmt: skip

    def ask(self, method: str, *arguments: Any) -> Any:
        """The method's result. RuntimeError with what the process said, if it ended instead."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps([method, *arguments]) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self.process.wait()
            self.said.seek(0)
            raise RuntimeError(f"{self.target} ended with {self.process.returncode}:\n{self.said.read()[-6000:]}")
        return json.loads(answer)

    def close(self) -> None:
        """Ends the process; its class may have a `close`."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.said.close()

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def resident() -> float:
    """MiB that this process holds in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB


def peak() -> float:
    """The most MiB that this process has held since `forget_peak`, or ever."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def forget_peak() -> None:
    """The peak begins anew, where the kernel lets a process say so."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is no answer
    module, _, name = sys.argv[1].partition(":")
    side = getattr(importlib.import_module(module), name)(**json.loads(sys.argv[2]))
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        answers.write(json.dumps(getattr(side, method)(*arguments)) + "\n")
        answers.flush()
    if hasattr(side, "close"):
        side.close()


if __name__ == "__main__":
    main()
