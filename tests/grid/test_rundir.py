"""Laws of run directory, summary and settings: one driver, rising epochs, times that add up, lanes that leave room for data."""

from __future__ import annotations

import json
import os

import pytest

from datasets_ray.errors import UserError
from grid.memory import processes, proportional
from grid.rundir import RunDirectory, alive
from grid.settings import Settings
from grid.summary import around, each_further, lane_times, rates, render, summarise
from tests.grid.toy_plan import plan, stage


def test_one_driver_at_a_time_and_epochs_that_only_rise(tmp_path):
    first = RunDirectory.open(tmp_path / "out", "study", False, ["run"])
    assert alive(first.path)
    with pytest.raises(UserError, match="another grid.run works in"):
        RunDirectory.open(tmp_path / "out", "study", False, ["run"])
    first.end("failed", 2)
    first.close()
    assert not alive(first.path)
    second = RunDirectory.open(tmp_path / "out", "study", False, ["run"])
    assert (second.id, second.epoch) == (first.id, first.epoch + 1)
    assert [driver.get("exit") for driver in second.data["drivers"]] == [2, None]
    second.close()


def test_starting_over_empties_the_directory_and_still_fences_out_what_was_left_alive(tmp_path):
    first = RunDirectory.open(tmp_path / "out", "study", False, ["run"])
    (first.path / "store").mkdir()
    (first.path / "plan.json").write_text("{}")
    first.close()
    fresh = RunDirectory.open(tmp_path / "out", "another study", True, ["run"])
    assert sorted(path.name for path in fresh.path.iterdir()) == ["run.json", "run.lock"]
    assert (fresh.id, fresh.epoch) == (first.id, 2)
    fresh.close()


@pytest.mark.parametrize(("prepare", "message"), [("other study", "holds a run of the study"), ("other files", "not a run directory")])
def test_a_directory_with_something_else_in_it_is_left_alone(tmp_path, prepare, message):
    out = tmp_path / "out"
    if prepare == "other study":
        RunDirectory.open(out, "mine", False, ["run"]).close()
    else:
        out.mkdir()
        (out / "thesis.tex").write_text("years of work")
    before = sorted(path.name for path in out.iterdir())
    with pytest.raises(UserError, match=message):
        RunDirectory.open(out, "yours", False, ["run"])
    assert sorted(path.name for path in out.iterdir() if path.name != "run.lock") == [n for n in before if n != "run.lock"]


def events():
    ups = [{"event": "lane_up", "lane": lane, "time": time, "epoch": 1} for lane, time in (("lane-0", 10.0), ("lane-1", 12.0))]
    one = {"event": "stage", "stage": "x", "lane": "lane-0", "status": "done", "epoch": 1, "begin": 11.0, "end": 20.0}
    two = {"event": "stage", "stage": "y", "lane": "lane-1", "status": "done", "epoch": 1, "begin": 12.0, "end": 18.0}
    return [*ups, {**one, "work_begin": 12.0, "work_end": 19.0, "work_seconds": 6.0}, two]


def test_lane_time_is_work_loading_closing_and_idling():
    timeline = events()
    times = lane_times([e for e in timeline if e["event"] == "lane_up"], [e for e in timeline if e["event"] == "stage"])
    assert times["lane_seconds"] == (20 - 10) + (20 - 12)
    assert times["work_seconds"] == 6 + 6, "a stage that marks nothing works from begin to end; pauses between marks are not work"
    assert (times["loading_seconds"], times["closing_seconds"]) == (1, 1)
    assert times["idle_seconds"] == 18 - 12 - 1 - 1
    assert times["tail_seconds"] == 20 - 18, "lane-1 found nothing more to do"


def test_what_each_further_arm_costs_leaves_out_what_arms_share_and_the_end_of_the_run():
    made = plan([stage("x"), stage("y"), stage("z")], {"one": ["x", "y"], "two": ["x", "z"], "three": ["x"]})
    ups = [{"event": "lane_up", "lane": f"lane-{n}", "time": 0.0} for n in (0, 1)]
    done = [
        {"stage": "x", "lane": "lane-0", "begin": 1.0, "work_begin": 2.0, "work_end": 9.0, "end": 10.0},
        {"stage": "y", "lane": "lane-0", "begin": 12.0, "work_begin": 13.0, "work_end": 15.0, "work_seconds": 1.5, "end": 16.0},
        {"stage": "z", "lane": "lane-1", "begin": 11.0, "end": 12.0},  # an attempt that failed before its work
        {"stage": "z", "lane": "lane-1", "begin": 12.5, "work_begin": 12.75, "work_end": 19.0, "end": 20.0},
    ]
    spent = around(ups, done)
    assert spent == {"x": 3.0, "z": 11.0 + (0.5 + 0.25 + 1.0), "y": 2.0 + 1.0 + 0.5 + 1.0}
    stages = {one["id"]: one for one in made["stages"]}
    assert each_further(stages, spent) == 4.5, "of one and two, two came first; three has nothing of its own"
    assert each_further(stages, {"x": 3.0, "y": 1.0}) is None


def test_the_summary_counts_one_epoch_and_can_be_told(tmp_path):
    from grid.ledger import LedgerCore

    made = plan([stage("x"), stage("y")], {"one": ["x"], "two": ["y"]})
    snapshot = LedgerCore(made, ["x", "y"], tmp_path).snapshot()
    earlier = {"event": "stage", "stage": "x", "lane": "lane-0", "status": "infrastructure", "epoch": 0, "begin": 0.0, "end": 5.0}
    summary = summarise(
        made, [earlier, *events()], snapshot, epoch=1, began=0.0, ended=30.0, workers=2, skipped=0, memory={"peak_gib": 1.5, "samples": 3},
        budget_seconds=60.0,
    )  # fmt: skip
    assert summary["overhead_seconds_per_arm"] == (18 - 12) / 2
    assert summary["groups"]["toy"]["attempts"] == 2 and summary["startup_seconds"] == 12
    told = render(summary)
    assert "2 of 2 arms done in 30 s (budget 1 min 00 s)" in told and "3.00 s an arm (limit 2)" in told and "1.50 GiB" in told
    assert json.dumps(summary)


def test_the_summary_says_what_each_lane_waited_and_how_much_of_the_device_was_used(tmp_path):
    from grid.ledger import LedgerCore

    made = plan([stage("x"), stage("y")], {"one": ["x"], "two": ["y"]})
    fast = {"tflops": {"llm": 6.0, "encoder": 2.0}, "seconds": 4.0, "devices": 2, "measured_tflops_per_second": 5.0}
    slow = {"tflops": {"llm": 2.0}, "seconds": 10.0, "devices": 1, "measured_tflops_per_second": 1.0, "datasheet_tflops_per_second": 4.0}
    assert rates([fast]) == {"tflops": 8.0, "mfu": 0.2}
    assert rates([fast, slow, {}]) == {"tflops": 10.0, "mfu": 10 / 50, "mfu_datasheet": 2 / 40} and rates([{}]) == {}
    summary = summarise(
        made, events(), LedgerCore(made, ["x", "y"], tmp_path).snapshot(), epoch=1, began=0.0, ended=30.0, workers=1, skipped=0, memory={},
        budget_seconds=None, computed={"x": fast, "y": slow},
    )  # fmt: skip
    assert summary["idle_seconds"] == {"lane-0": 1.0, "lane-1": 2.0}
    assert summary["groups"]["toy"]["mfu"] == 0.2
    told = render(summary)
    assert "lane-0 1 s, lane-1 2 s" in told and "toy: 20.0% of the device's measured matmul rate, 5.0% of the data sheet's" in told


def test_lanes_fit_the_machine_and_leave_room_for_data():
    made = plan([stage(f"x-{i}", world=2) for i in range(8)], {"one": ["x-0"]})
    for cpus in (2, 4, 16, 64):
        shape = Settings().shape(made, cpus, 0)
        assert shape.workers == 2 and shape.lanes >= 1
        assert shape.lanes * shape.workers * shape.cpus_per_worker <= cpus - 1
    assert Settings(device="cuda").shape(made, 32, 8).lanes == 4
    with pytest.raises(UserError, match="needs 2 GPUs"):
        Settings(device="cuda").shape(made, 32, 1)
    with pytest.raises(UserError, match="unknown run setting 'lames'"):
        Settings.read({"lames": 3})


def test_our_own_processes_are_counted_with_their_shared_pages_once():
    mine = processes(os.getpid())
    assert os.getpid() in mine
    assert proportional({os.getpid()})[os.getpid()] > 1 << 20
    assert not proportional({2**22 + 1})
