"""Laws of the ledger, without Ray: every stage once, in order; attempts outlive the driver; failures stay where they belong."""

from __future__ import annotations

import errno
import json
import random

import pytest

from grid import jsonl
from grid.jsonl import read_lines
from grid.ledger import LedgerCore
from grid.priority import seconds_of
from tests.grid.toy_plan import plan, stage


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 0.001
        return self.now


def core(tmp_path, stages, arms, done=(), **more):
    made = LedgerCore(plan(stages, arms), done, tmp_path, clock=more.pop("clock", Clock()), **more)
    for lane, world in {"lane-0": 1, "lane-1": 1}.items():
        made.lane_up(lane, world)
    return made


def diamond():
    """Two arms on one base."""
    stages = [stage("base"), stage("t-0", ["base"]), stage("t-1", ["base"]), stage("s-0", ["t-0"]), stage("s-1", ["t-1"])]
    return stages, {"arm-0": ["base", "t-0", "s-0"], "arm-1": ["base", "t-1", "s-1"]}


INFRA = {"kind": "infrastructure", "message": "a worker died"}
FAULT = {"kind": "deterministic", "message": "bad config"}


@pytest.mark.parametrize("seed", range(20))
def test_every_stage_is_made_exactly_once_and_never_before_its_needs(tmp_path, seed):
    rng = random.Random(seed)
    stages = [stage(f"x-{i}", [f"x-{j}" for j in range(i) if rng.random() < 0.2]) for i in range(30)]
    arms = {f"arm-{k}": sorted(rng.sample([s["id"] for s in stages], 8), key=lambda i: int(i[2:])) for k in range(5)}
    ledger = core(tmp_path, stages, arms)
    under_way, finished = {}, []
    while not ledger.settled():
        lane = rng.choice(["lane-0", "lane-1"])
        if lane in under_way:
            made = under_way.pop(lane)
            ledger.finish(lane, made, {})
            finished.append(made)
        elif grant := ledger.claim(lane):
            assert set(grant["stage"]["needs"]) <= set(finished)
            assert grant["stage"]["id"] not in under_way.values()
            under_way[lane] = grant["stage"]["id"]
    assert sorted(finished) == sorted(s["id"] for s in stages)
    assert all(ledger.arm(name)["state"] == "done" for name in arms)


def test_the_longest_chain_comes_first_and_equal_ones_in_the_studys_order(tmp_path):
    stages = [stage("short"), stage("long"), stage("behind", ["long"], steps=50), stage("other"), stage("last")]
    ledger = core(tmp_path, stages, {"arm-0": ["other"], "arm-1": ["short", "long", "behind"], "arm-2": ["last"]})
    assert [ledger.claim("lane-0")["stage"]["id"] for _ in range(4)] == ["long", "short", "other", "last"]


def test_a_lane_gets_the_predictions_of_the_model_it_just_trained_and_leaves_the_others(tmp_path):
    def uses(*ids):
        return {"parts": {f"p{k}": {"weights": {"stage": i}} for k, i in enumerate(ids)}}

    stages = [stage("t-0", steps=20), stage("t-1", steps=20)]
    stages += [stage("p-0", ["t-0"], model=uses("t-0")), stage("p-1", ["t-1"], model=uses("t-1"))]
    ledger = core(tmp_path, stages, {"arm-0": ["t-0", "p-0"], "arm-1": ["t-1", "p-1"]})
    ledger.lanes["lane-0"]["warm"], ledger.lanes["lane-1"]["warm"] = {"t-0"}, {"t-1"}
    ledger.state["t-0"] = ledger.state["t-1"] = "done"
    assert ledger.claim("lane-1")["stage"]["id"] == "p-1", "though arm-0 comes first"
    assert ledger.claim("lane-0")["stage"]["id"] == "p-0"


def chains(arms: int):
    """Each arm: a training of 20 seconds, four predictions of one."""
    stages, names = [], {}
    for k in range(arms):
        made = {"parts": {"llm": {"weights": {"stage": f"t-{k}"}}}}
        stages += [stage(f"t-{k}", steps=20), *(stage(f"p-{k}-{n}", [f"t-{k}"], model=made) for n in range(4))]
        names[f"arm-{k}"] = [f"t-{k}", *(f"p-{k}-{n}" for n in range(4))]
    return stages, names


def played(ledger: LedgerCore, now: list[float], lanes: int) -> dict[str, float]:
    """When each stage ends, if stages take what the plan says."""
    under_way, ended = {}, {}
    while not ledger.settled():
        for lane in (f"lane-{n}" for n in range(lanes)):
            if lane not in under_way and (grant := ledger.claim(lane)):
                under_way[lane] = (now[0] + seconds_of(grant["stage"]), grant["stage"]["id"])
        lane = min(under_way, key=lambda one: under_way[one])
        now[0], stage_id = under_way.pop(lane)
        ledger.finish(lane, stage_id, {})
        ended[stage_id] = now[0]
    return ended


def test_short_stages_wait_for_the_end_and_fill_it_while_arms_before_it_are_finished_one_by_one(tmp_path):
    now = [0.0]
    ended = played(core(tmp_path, *chains(9), clock=lambda: now[0]), now, 2)
    assert max(ended.values()) == 108.0, "9 x 24 seconds on two lanes: neither waits for the other"
    done = [max(time for stage_id, time in ended.items() if stage_id.split("-")[1] == str(k)) for k in range(9)]
    assert done[:2] == [22.0, 24.0], "while much is left, a lane asks the model that it has just trained"
    assert min(done[2:]) > ended["t-7"] == 84.0, "then trainings go first"


def test_an_idle_lane_takes_even_what_another_has_warm(tmp_path):
    stages = [stage("t-0"), stage("p-0", ["t-0"], model={"parts": {"llm": {"weights": {"stage": "t-0"}}}})]
    ledger = core(tmp_path, stages, {"arm-0": ["t-0", "p-0"]}, done=["t-0"])
    ledger.lanes["lane-0"]["warm"] = {"t-0"}
    assert ledger.claim("lane-1")["stage"]["id"] == "p-0"


def test_a_failed_stage_fails_the_arms_that_need_it_and_no_others(tmp_path):
    ledger = core(tmp_path, *diamond())
    ledger.finish("lane-0", ledger.claim("lane-0")["stage"]["id"], {})
    assert ledger.claim("lane-0")["stage"]["id"] == "t-0"
    ledger.fail("lane-0", "t-0", FAULT)
    assert ledger.state["s-0"] == "blocked" and ledger.arm("arm-0")["state"] == "failed" and "bad config" in ledger.arm("arm-0")["reason"]
    while grant := ledger.claim("lane-1"):
        ledger.finish("lane-1", grant["stage"]["id"], {})
    assert ledger.settled() and ledger.arm("arm-1")["state"] == "done"


@pytest.mark.parametrize(("kind", "tries"), [("deterministic", 1), ("memory", 2), ("infrastructure", 5)])
def test_each_kind_of_failure_has_its_number_of_attempts(tmp_path, kind, tries):
    ledger = core(tmp_path, [stage("x")], {"arm": ["x"]})
    count = 0
    while grant := ledger.claim("lane-0"):
        count += 1
        assert grant["attempt"] == count
        ledger.fail("lane-0", "x", {"kind": kind, "message": "oh"})
    assert count == tries and ledger.arm("arm")["state"] == "failed"


@pytest.mark.parametrize("kind", ["interrupted", "lost"])
def test_interruptions_count_as_no_attempt(tmp_path, kind):
    ledger = core(tmp_path, [stage("x")], {"arm": ["x"]})
    for _ in range(20):
        assert ledger.claim("lane-0")["attempt"] == 1
        ledger.fail("lane-0", "x", {"kind": kind, "message": "stopped"})
    assert ledger.state["x"] == "waiting"


def test_a_worker_group_that_comes_back_has_lost_its_stage_and_another_lane_may_take_it(tmp_path):
    ledger = core(tmp_path, [stage("x")], {"arm": ["x"]})
    ledger.claim("lane-0")
    assert ledger.claim("lane-1") is None
    ledger.lane_up("lane-0", 1)
    assert ledger.claim("lane-1")["attempt"] == 2
    ledger.finish("lane-0", "x", {})
    assert ledger.state["x"] == "running", "the late word of the first lane changes nothing"
    ledger.finish("lane-1", "x", {})
    assert ledger.settled()


def test_attempts_survive_the_driver_and_the_journal_survives_a_torn_line(tmp_path):
    first = core(tmp_path, *diamond())
    for _ in range(2):
        first.claim("lane-0")
        first.fail("lane-0", "base", INFRA)
    first.claim("lane-0")  # the driver is killed here
    with (tmp_path / "ledger.jsonl").open("a") as file:
        file.write('{"event": "fin')
    second = core(tmp_path, *diamond(), epoch=2)
    assert second.claim("lane-0")["attempt"] == 4
    second.finish("lane-0", "base", {})
    third = core(tmp_path, *diamond(), done=["base"], epoch=3)
    assert third.tried["base"] == 0
    events = [event["event"] for event in read_lines(tmp_path / "ledger.jsonl")]
    assert events == ["start", "fail", "start", "fail", "start", "start", "finish"]


def test_a_stage_that_dies_with_every_driver_starts_afresh_aloud_once_its_attempts_are_used_up(tmp_path):
    for epoch in range(1, 6):
        ledger = core(tmp_path, [stage("x")], {"arm": ["x"]}, epoch=epoch)
        assert ledger.claim("lane-0")["attempt"] == epoch
    ledger = core(tmp_path, [stage("x")], {"arm": ["x"]}, epoch=6)
    assert any("afresh" in notice for notice in ledger.notices)
    assert ledger.claim("lane-0")["attempt"] == 1


def test_what_failed_for_good_is_tried_afresh_by_the_next_run(tmp_path):
    first = core(tmp_path, *diamond())
    first.claim("lane-0")
    first.fail("lane-0", "base", FAULT)
    assert first.settled()
    second = core(tmp_path, *diamond(), epoch=2)
    assert second.claim("lane-0")["attempt"] == 1 and any("afresh" in notice for notice in second.notices)


def test_a_stage_another_run_works_on_is_offered_again_later_and_waiting_is_said_once(tmp_path):
    clock = Clock()
    ledger = core(tmp_path, [stage("x"), stage("y")], {"arm": ["x", "y"]}, clock=clock)
    ledger.claim("lane-0")
    ledger.busy("lane-0", "x", "x is being made by run b", 40.0)
    assert ledger.claim("lane-0")["stage"]["id"] == "y", "the lane does something else meanwhile"
    assert ledger.claim("lane-1") is None
    clock.now += 10
    assert ledger.claim("lane-1")["attempt"] == 1
    ledger.busy("lane-1", "x", "x is being made by run b", 30.0)
    assert sum("waiting" in notice for notice in ledger.notices) == 1


def test_a_damaged_input_is_made_again_before_what_needs_it(tmp_path):
    ledger = core(tmp_path, *diamond(), done=["base"])
    assert ledger.claim("lane-0")["stage"]["id"] == "t-0"
    ledger.fail("lane-0", "t-0", {"kind": "damaged", "message": "SHA-256 differs", "damaged": "base"})
    assert ledger.claim("lane-0")["stage"]["id"] == "base"
    assert ledger.claim("lane-1") is None
    ledger.finish("lane-0", "base", {})
    assert ledger.claim("lane-0")["attempt"] == 1


def test_a_lane_that_never_starts_is_given_up_and_without_lanes_the_run_ends(tmp_path):
    ledger = LedgerCore(plan(*diamond()), [], tmp_path)
    ledger.lane_up("lane-1", 1)
    assert [ledger.lane_failed("lane-0", {"message": "no torch"}) for _ in range(3)] == [False, False, True]
    assert not ledger.settled()
    ledger.lane_lost("lane-1", "its node is gone")
    assert ledger.settled() and ledger.arm("arm-0")["state"] == "failed" and "no lane is left" in ledger.arm("arm-1")["reason"]


def test_stages_go_to_lanes_that_are_large_enough_unless_none_is(tmp_path):
    ledger = LedgerCore(plan([stage("big", world=2), stage("small")], {"arm": ["big", "small"]}), [], tmp_path)
    ledger.lane_up("one", 1)
    ledger.lane_up("two", 2)
    assert ledger.claim("one")["stage"]["id"] == "small"
    assert ledger.claim("one") is None and ledger.claim("two")["stage"]["id"] == "big"


def test_a_stopped_ledger_gives_nothing_and_stopping_is_no_attempt(tmp_path):
    ledger = core(tmp_path, *diamond())
    ledger.claim("lane-0")
    ledger.stop = True
    assert ledger.claim("lane-1") is None and ledger.beat("lane-0", {}) == {"stop": True}
    ledger.abandon()
    assert core(tmp_path, *diamond(), epoch=2).claim("lane-0")["attempt"] == 1


def test_the_timeline_names_stage_lane_and_marks(tmp_path):
    ledger = core(tmp_path, *diamond())
    ledger.claim("lane-0")
    marks = {"begin": 1.0, "work_begin": 2.0, "work_end": 4.0, "work_seconds": 2.0, "end": 5.0}
    ledger.finish("lane-0", "base", {"marks": marks})
    event = read_lines(tmp_path / "timeline.jsonl")[-1]
    assert {key: event[key] for key in marks} == marks
    assert (event["stage"], event["lane"], event["status"], event["attempt"]) == ("base", "lane-0", "done", 1)
    assert json.dumps(ledger.snapshot())


FULL = {"kind": "full", "message": "OSError: [Errno 28] No space left on device"}


def test_a_full_disk_pauses_everything_counts_no_attempt_and_is_said_once_a_pause(tmp_path):
    clock = Clock()
    ledger = core(tmp_path, *diamond(), done=["base"], attempts=2, clock=clock)
    pauses = []
    for _ in range(8):
        stage = ledger.claim("lane-0")["stage"]["id"]
        other = ledger.claim("lane-1")["stage"]["id"]
        ledger.fail("lane-0", stage, FULL)
        ledger.fail("lane-1", other, FULL)
        assert ledger.claim("lane-0") is None and ledger.tried[stage] == 0
        pauses.append(ledger.paused_until - clock.now)
        clock.now = max(ledger.not_before.values())
    assert [round(p) for p in pauses] == [15, 30, 60, 120, 240, 480, 600, 600]
    assert len(ledger.notices) == 8 and all("a disk is full" in n and "make room" in n for n in ledger.notices)


def test_a_stage_that_does_not_fit_lets_smaller_ones_go_first(tmp_path):
    clock = Clock()
    ledger = core(tmp_path, *diamond(), done=["base"], attempts=2, clock=clock)
    large, waits = "t-0", []
    for small in ("t-1", "s-1"):
        assert ledger.claim("lane-0")["stage"]["id"] == large
        ledger.fail("lane-0", large, FULL)
        waits.append(ledger.not_before[large] - clock.now)
        clock.now = ledger.not_before[large] - 1  # the pause is over a little earlier, or as long ago as the last finish
        ledger.paused_until = min(ledger.paused_until, clock.now)
        assert ledger.claim("lane-0")["stage"]["id"] == small
        ledger.finish("lane-0", small, {})
        clock.now += 2
    assert [round(wait) for wait in waits] == [15, 30] and ledger.tried[large] == 0, "a finish ends the pause, not this stage's waiting"
    assert ledger.claim("lane-0")["stage"]["id"] == large


def test_the_journal_waits_for_room_and_keeps_its_order(tmp_path, monkeypatch):
    ledger = core(tmp_path, *diamond())
    real = jsonl._append

    def full(path, line):
        with path.open("a") as file:
            file.write(line[:7])  # what still fitted
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(jsonl, "_append", full)
    stage = ledger.claim("lane-0")["stage"]["id"]
    ledger.finish("lane-0", stage, {})
    assert [e["event"] for e in read_lines(tmp_path / "ledger.jsonl")] == []
    monkeypatch.setattr(jsonl, "_append", real)
    ledger.beat("lane-0", {})
    assert [e["event"] for e in read_lines(tmp_path / "ledger.jsonl")] == ["start", "finish"]
    assert [e["event"] for e in read_lines(tmp_path / "timeline.jsonl")] == ["lane_up", "lane_up", "stage"]

    def broken(path, line):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(jsonl, "_append", broken)
    with pytest.raises(OSError, match="Input/output"):
        ledger.claim("lane-1")
