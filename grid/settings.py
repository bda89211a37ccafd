"""How a run uses its machine: lanes, workers, memory, where things go. None of it can change a result.

In: the plan's `run` section (profile and `--set`), the machine. Out: `Settings`, the lanes' `Shape`, and `environment()` for Ray, Tune,
Train and the math libraries.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from datasets_ray.errors import UserError, nearest

DATA_CPUS = 1.5
"""CPUs that lanes leave to Ray Data: one for a task that reserves a whole one, some for those that reserve a fraction beside it."""


@dataclass(frozen=True)
class Settings:
    lanes: int = 0
    """Worker groups side by side; 0: as many as the machine carries."""
    workers: int = 0
    """Workers per lane; 0: the largest world any stage asks for."""
    gpus_per_worker: int = 0
    cpus: int | None = None
    """CPUs given to Ray on this machine; all by default. Lanes reserve all but DATA_CPUS of them."""
    device: str = "cpu"
    threads: int = 0
    """Threads of the math libraries in each worker; 0: a fair share of the CPUs."""
    object_store_mb: int = 400
    cache_mb: int = 512
    """Models and decoded images that a worker keeps from stage to stage."""
    pixels_mb: int = 4096
    """Decoded images kept on each machine's disk, for all lanes and runs; 0: none."""
    features_mb: int = 0
    """Outputs of frozen encoders kept there, for stages whose runtime asks for it."""
    attempts: int = 5
    trials: int = 2
    """Tune trials alive at once: each is a process that only waits, so few are enough."""
    store: str | None = None
    data_root: str | None = None
    tracking_uri: str | None = None
    collective_seconds: float = 1800.0
    grace_seconds: float = 30.0
    """How long ranks wait for each other after one of them failed; a run that is stopped waits as long for its stages to save."""
    budget_seconds: float | None = None
    dashboard: bool = True

    @classmethod
    def read(cls, section: dict[str, Any]) -> Settings:
        known = {field.name for field in fields(cls)}
        for key in section:
            if key not in known:
                raise UserError(f"unknown run setting {key!r}", hint=nearest(key, known))
        return cls(**section)

    def cluster(self) -> bool:
        return bool(os.environ.get("RAY_ADDRESS"))

    def ray_cpus(self) -> int:
        return max(2, self.cpus or len(os.sched_getaffinity(0)))

    def shape(self, plan: dict[str, Any], cpus: float, gpus: float) -> Shape:
        """Lanes of one size, as many as fit. The results don't depend on it."""
        collective = [stage.get("runtime", {}).get("world", 1) for stage in plan["stages"]]
        workers = self.workers or max([1, *collective])
        if self.gpus_per_worker or self.device == "cuda":
            per = max(1, self.gpus_per_worker)
            fit = int(gpus // (per * workers))
            if fit < 1:
                what = f"a lane of {workers} workers needs {per * workers} GPUs, the machine has {gpus:g}"
                raise UserError(what, hint="set fewer workers in the profile's resources, or choose another profile")
            lanes = min(self.lanes or fit, fit)
            return Shape(lanes, workers, per, max(0.1, min(1.0, (cpus - DATA_CPUS) / (lanes * workers))))
        lanes = self.lanes or max(1, int(cpus // workers))
        lanes = min(lanes, max(1, len(plan["stages"])))
        return Shape(lanes, workers, 0, max(0.01, int(100 * min(1.0, (cpus - DATA_CPUS) / (lanes * workers))) / 100))

    def environment(self, shape_workers: int, cpus: float) -> dict[str, str]:
        """Environment of the driver and every process of Ray (measured: these are what start-up and memory hang on)."""
        threads = self.threads or max(1, int(cpus // max(1, shape_workers)))
        root = str(Path(__file__).resolve().parent.parent)
        inherited = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry and entry != root]
        return {
            "PYTHONPATH": os.pathsep.join([root, *inherited]),
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            "DS_ACCELERATOR": self.device,
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
            "RAY_TRAIN_METRICS_ENABLED": "0",
            # a machine busy with other things starts slowly: that is no reason to give up
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
            "RAY_worker_register_timeout_seconds": "600",
            "RAY_health_check_failure_threshold": "20",
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1" if self.cluster() else "0",
            "RAY_CHDIR_TO_TRIAL_DIR": "0",
            "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
            "TUNE_DISABLE_SIGINT_HANDLER": "1",
            "RAY_AIR_NEW_OUTPUT": "0",
            "RAY_ENABLE_AUTO_CONNECT": "0",
            "RAY_enable_worker_prestart": "0",
            "RAY_prestart_worker_first_driver": "0",
            # Ray Data's workers stay from stage to stage: each costs 3 core-seconds to start
            "RAY_num_workers_soft_limit": str(int(cpus) + 24),
            "RAY_idle_worker_killing_time_threshold_ms": "60000",
            "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
            "RAY_DEDUP_LOGS": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }


@dataclass(frozen=True)
class Shape:
    lanes: int
    workers: int
    gpus_per_worker: int
    cpus_per_worker: float

    def __str__(self) -> str:
        devices = f"{self.gpus_per_worker} GPU" if self.gpus_per_worker else f"{self.cpus_per_worker:g} CPU"
        return f"{self.lanes} lane{'s' * (self.lanes != 1)} of {self.workers} worker{'s' * (self.workers != 1)} ({devices} each)"
