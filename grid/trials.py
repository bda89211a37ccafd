"""The arms as Ray Tune trials: one per arm, named like it, waiting on the ledger without holding resources.

In: arm names in the plan's order. Out: nothing but the trials' states in Tune and the dashboard; results are files.
A trial of a failed arm fails with the arm's reason; the others don't notice.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any


class ArmFailed(Exception):
    """This arm can't be finished; the message says which stage failed and why."""


def arm(config: dict[str, Any]) -> None:
    """A trial: waits until its arm is settled."""
    import ray
    from ray import tune

    from grid.ledger_actor import NAME, NAMESPACE

    ledger = ray.get_actor(NAME, namespace=NAMESPACE)
    # the task that waits bears the arm's name: Tune calls all its trials' tasks alike, and so would the dashboard
    state: Any = ray.get(ledger.arm.options(name=f"arm {config['arm']}").remote(config["arm"]))
    if state["state"] == "failed":
        raise ArmFailed(state["reason"])
    tune.report({"finished": int(state["state"] == "done"), "stages": state["stages"]})


class Trials:
    """`Tuner.fit` in a thread of its own, so that the main thread keeps signals and the display."""

    def __init__(self, names: list[str], folder: Path, at_once: int) -> None:
        self.names, self.folder, self.at_once = names, folder, at_once
        self.error: BaseException | None = None
        self._over = folder / "over"
        self.thread = threading.Thread(target=self._run, name="tune", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        """Ends Tune at its next look, whatever its trials do."""
        self._over.parent.mkdir(parents=True, exist_ok=True)
        self._over.touch()

    def join(self, seconds: float) -> bool:
        if self.thread.ident is not None:
            self.thread.join(seconds)
        return not self.thread.is_alive()

    def _run(self) -> None:
        import logging

        from ray import tune

        over = self._over  # a file and not an event: Tune pickles its stopper

        class Stop(tune.Stopper):
            def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
                return False

            def stop_all(self) -> bool:
                return over.exists()

        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a failed arm is told once, by the display, not as a traceback here
        try:
            tune.Tuner(
                tune.with_resources(arm, {"CPU": 0.001}),
                param_space={"arm": tune.grid_search(self.names)},  # grid_search keeps the order given
                tune_config=tune.TuneConfig(
                    max_concurrent_trials=self.at_once, reuse_actors=True, trial_name_creator=name_of, trial_dirname_creator=name_of
                ),
                run_config=tune.RunConfig(
                    name="arms", storage_path=str(self.folder), verbose=0, stop=Stop(), failure_config=tune.FailureConfig(max_failures=0)
                ),
            ).fit()
        except BaseException as error:  # the run goes on without Tune's view of it; the caller reports it
            self.error = error


def name_of(trial: Any) -> str:
    return str(trial.config["arm"])
