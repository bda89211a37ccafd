"""A run end to end on toy stages, with workers and drivers killed: `python -m tests.grid.toy_plan PLAN OUT` is the driver.

One lane of two workers (gloo). Starting Ray is what costs, so the first run holds every kind of trouble, the second goes on with it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grid.jsonl import read_lines
from grid.status import status
from tests.grid.toy_plan import plan, stage
from trainers.store import Store

WAIT = 1500
"""Seconds that any part of a run may take before it is given up: a busy machine takes its time, and an idle one waits for nothing."""
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * WAIT)]  # whichever test comes first waits for both drivers
REPOSITORY = Path(__file__).resolve().parents[2]
TROUBLE = {
    "calm": {},
    "faulty": {"2": "fail"},
    "halfway": dict.fromkeys("234", "fail-one-rank"),
    "killed": {"3": "once:kill"},
    "network": {"2": "once:network"},
    "driver": {"3": "once:kill-driver"},
}


def trouble() -> dict:
    """Six arms on one base, one trouble each; the last kills the driver."""
    stages, arms = [stage("base", kind="toyone", steps=2)], {}
    for name, do in TROUBLE.items():
        stages.append(stage(f"train-{name}", ["base"], world=2, steps=4, do=do))
        stages.append(stage(f"score-{name}", [f"train-{name}"], kind="toyone"))
        arms[name] = ["base", f"train-{name}", f"score-{name}"]
    return plan(stages, arms, lanes=1, workers=2, trials=1, grace_seconds=4.0)


DRIVERS: list[subprocess.Popen] = []


@pytest.fixture(scope="module", autouse=True)
def no_driver_is_left():
    yield
    for driver in DRIVERS:
        if driver.poll() is None:
            driver.kill()


def start(folder: Path, made: dict, out: str = "out") -> subprocess.Popen:
    (folder / "plan.json").write_text(json.dumps(made))
    with (folder / "log.txt").open("a") as log:
        environment = {**os.environ, "FINEGRID_STORE": ""}
        command = [sys.executable, "-m", "tests.grid.toy_plan", str(folder / "plan.json"), str(folder / out)]
        DRIVERS.append(subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=log, env=environment, start_new_session=True))
        return DRIVERS[-1]


@pytest.fixture(scope="module")
def after(tmp_path_factory):
    """(folder, exit code of the killed driver, exit code of the one that went on, what was done when the first died)."""
    folder = tmp_path_factory.mktemp("trouble")
    first = start(folder, trouble())
    killed = first.wait(WAIT)
    done_before = {p.parent.name: p.read_text() for p in (folder / "out" / "store").glob("*/DONE.json")}
    second = start(folder, trouble())
    return folder, killed, second.wait(WAIT), done_before


def test_the_driver_was_killed_and_the_next_one_finished_with_some_arms_failed(after):
    folder, killed, code, _ = after
    assert (killed, code) == (-signal.SIGKILL, 2), (folder / "log.txt").read_text()[-4000:]
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert sorted(summary["arms"]["done"]) == ["calm", "driver", "killed", "network"]
    assert set(summary["arms"]["failed"]) == {"faulty", "halfway"}
    assert "on purpose" in summary["arms"]["failed"]["faulty"] and "only the last rank" in summary["arms"]["failed"]["halfway"]


def test_every_finished_stage_has_the_value_of_an_undisturbed_run(after):
    store = Store(after[0] / "out" / "store")
    for name in ("calm", "killed", "network", "driver"):
        for kind, value in (("train", 4 + 2), ("score", 1 + 4 + 2)):
            assert store.read_done(f"{kind}-{name}")["summary"]["value"] == value
            store.verify(f"{kind}-{name}", digests=True)


def test_what_was_finished_is_skipped_aloud_and_never_made_again(after):
    folder, _, _, before = after
    assert before
    for name, text in before.items():
        assert (folder / "out" / "store" / name / "DONE.json").read_text() == text
    assert f"skipping {len(before)} finished stages" in (folder / "log.txt").read_text()
    starts = [e["stage"] for e in read_lines(folder / "out" / "ledger.jsonl") if e["event"] == "start" and e["epoch"] == 2]
    assert not set(starts) & set(before)


def test_killed_stages_went_on_from_their_checkpoints(after):
    store = Store(after[0] / "out" / "store")
    for name in ("killed", "network", "driver"):
        assert store.read_done(f"train-{name}")["summary"]["resumed_at"] >= 1


def test_attempts_are_journaled_over_both_drivers(after):
    events = read_lines(after[0] / "out" / "ledger.jsonl")
    attempts = {name: [e["attempt"] for e in events if e["event"] == "start" and e["stage"] == f"train-{name}"] for name in TROUBLE}
    assert attempts["calm"] == [1]
    assert attempts["killed"] == attempts["network"] == attempts["driver"] == [1, 2]
    kinds = {e["stage"]: e["kind"] for e in events if e["event"] == "fail"}
    assert kinds["train-killed"] == kinds["train-network"] == "infrastructure" and kinds["train-faulty"] == "deterministic"


def test_nothing_of_the_killed_run_lives_on(after):
    deadline = time.monotonic() + WAIT / 10  # processes that were told to end may do so late
    while (left := alive_with(str(after[0]))) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not left


def alive_with(text: str) -> list[str]:
    """Command lines of other processes that hold this text."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_text()
            except OSError:
                continue
            if text in command:
                found.append(command)
    return found


def test_metrics_are_whole_lines_of_one_attempt_after_another(after):
    for name in ("calm", "killed", "network", "driver"):
        text = (after[0] / "out" / "metrics" / f"train-{name}.jsonl").read_text()
        records = [json.loads(line) for line in text.splitlines()]
        assert [r["token"] for r in records] == sorted(r["token"] for r in records)
        assert {r["step"] for r in records} == {1, 2, 3, 4}


def test_status_and_summary_tell_the_same(after):
    out = after[0] / "out"
    found = status(out)
    summary = json.loads((out / "summary.json").read_text())
    assert found["state"] == "failed" and found["stages"]["failed"] == 2 and not found["running"]
    assert {a["name"] for a in found["arms"] if a["state"] == "done"} == set(summary["arms"]["done"])
    assert summary["memory"]["samples"] > 0 and summary["lanes"]["work_seconds"] > 0
    assert summary["overhead_seconds_per_arm"] > 0


def test_once_everything_is_finished_a_run_starts_nothing(after, tmp_path):
    folder = after[0]
    made = trouble()
    good = [arm for arm in made["arms"] if arm["name"] not in {"faulty", "halfway"}]
    wanted = {i for arm in good for i in arm["stages"]}
    made["arms"], made["stages"] = good, [s for s in made["stages"] if s["id"] in wanted]
    driver = start(folder, made)
    assert driver.wait(WAIT) == 0
    assert "everything is finished already" in (folder / "log.txt").read_text()


def test_a_terminated_run_saves_stops_and_says_how_to_go_on(tmp_path):
    slow = stage("slow", world=2, steps=4000, seconds=0.1)  # not done before a busy machine has looked at it
    made = plan([slow], {"arm": ["slow"]}, lanes=1, workers=2, trials=1, grace_seconds=float(WAIT))
    driver = start(tmp_path, made)
    out = tmp_path / "out"
    deadline = time.monotonic() + WAIT
    while not (out / "metrics" / "slow.jsonl").exists():
        assert driver.poll() is None and time.monotonic() < deadline, (tmp_path / "log.txt").read_text()[-4000:]
        time.sleep(0.2)
    second = subprocess.run(driver.args, cwd=REPOSITORY, capture_output=True, text=True, timeout=WAIT, check=False)
    assert second.returncode != 0 and "another grid.run works in" in second.stderr
    assert status(out)["state"] == "running" and status(out)["running"][0]["stage"] == "slow"
    driver.send_signal(signal.SIGTERM)  # what a scheduler sends; Ctrl-C ends the same way
    assert driver.wait(WAIT) == 130, (tmp_path / "log.txt").read_text()[-4000:]
    log = (tmp_path / "log.txt").read_text()
    assert "Go on with" in log
    events = read_lines(out / "ledger.jsonl")
    assert [e["event"] for e in events] == ["start", "fail"] and events[1]["kind"] == "interrupted"
    assert "stopped after step" in events[1]["message"], "the stage itself saved and stopped"
    saved = [json.loads(path.read_text())["count"] for path in (out / "store" / ".work" / "slow").glob("*/count.json")]
    assert saved == [int(events[1]["message"].rsplit(" ", 1)[1])]
    assert status(out)["state"] == "interrupted"
