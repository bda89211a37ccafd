"""Starts and ends the lanes: each is one Ray Train run whose workers loop in `trainers.lane.serve`.

In: the settings' shape, the lane configuration (JSON). Out: `Lanes`, whose threads end when the ledger closes. Start-up is paid
once per lane and all lanes start in parallel; a worker that dies makes Train build its group anew (FailureConfig).
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from grid.settings import Shape

REBUILDS = 200  # of one worker group; what limits repeated failures are the attempts each stage is given


def lean_trainer() -> Any:
    """Ray Train's data-parallel trainer without two helper processes per lane that have nothing to do here (3-4 core-seconds and
    120 MiB each): the data set manager (stages read their own data) and, where the driver owns the cluster and it dies with the
    driver, the placement group cleaner.
    """
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    idle = {"DatasetsCallback"} if os.environ.get("RAY_ADDRESS") else {"DatasetsCallback", "PlacementGroupCleanerCallback"}

    class LaneTrainer(DataParallelTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            return [callback for callback in super()._create_default_callbacks() if type(callback).__name__ not in idle]

    return LaneTrainer


class Lanes:
    """`start()` returns at once; `join()` waits until all groups are gone."""

    def __init__(self, shape: Shape, config: dict[str, Any], folder: Path, environment: dict[str, str], ledger: Any) -> None:
        self.shape, self.config, self.folder, self.environment, self.ledger = shape, config, folder, environment, ledger
        self.threads: list[threading.Thread] = []

    def start(self) -> None:
        import ray.train  # noqa: F401  (once here: the threads below would import it at the same time)

        for index in range(self.shape.lanes):
            thread = threading.Thread(target=self._run, args=(f"lane-{index}",), name=f"lane-{index}", daemon=True)
            self.threads.append(thread)
            thread.start()

    def join(self, seconds: float) -> bool:
        """True when every lane ended in time."""
        for thread in self.threads:
            thread.join(seconds)
        return not any(thread.is_alive() for thread in self.threads)

    def _run(self, name: str) -> None:
        import ray
        from ray.train import ScalingConfig
        from ray.train.v2.api.config import FailureConfig, RunConfig

        from trainers.lane import serve
        from trainers.process_group import LaneBackendConfig

        resources: dict[str, float] = {"CPU": self.shape.cpus_per_worker}
        if self.shape.gpus_per_worker:
            resources["GPU"] = self.shape.gpus_per_worker
        message = "its worker group ended"
        try:
            lean_trainer()(
                serve,
                train_loop_config={**self.config, "lane": name},
                backend_config=LaneBackendConfig(),
                scaling_config=ScalingConfig(
                    num_workers=self.shape.workers, use_gpu=bool(self.shape.gpus_per_worker), resources_per_worker=resources
                ),
                run_config=RunConfig(
                    # a fresh name per driver: Train would else find the old run's snapshot; resuming is the store's business
                    name=f"{name}-{self.config['epoch']}",
                    storage_path=str(self.folder),
                    failure_config=FailureConfig(max_failures=REBUILDS, controller_failure_limit=3),
                    worker_runtime_env={"env_vars": self.environment},
                ),
            ).fit()
        except Exception as error:
            message = str(error).strip().splitlines()[-1][:300] if str(error).strip() else type(error).__name__
        try:
            ray.get(self.ledger.lane_lost.remote(name, message), timeout=30)
        except Exception:
            return  # the ledger is gone: the run is over anyway
