"""Laws of the simulation: the run's own decisions, lane time accounted for, failures at their cost, and a real run foretold."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest

from datasets_ray.errors import UserError
from grid import plan as planning
from grid.ledger import LedgerCore
from grid.plan import make_plan
from grid.simulate import Cluster, simulate
from grid.simulated_run import PARTS, Simulation, VirtualLedger
from grid.simulated_times import Assumptions, Measured, Times, times_of
from tests.grid.studies import write
from tests.grid.toy_plan import plan, shared, stage

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT / "tests" / "golden" / "demo_timeline.json"
FREE = Assumptions(start_seconds=0.0, stage_seconds=0.0)


def uses(*ids):
    return {"parts": {f"part-{k}": {"weights": {"stage": i}} for k, i in enumerate(ids)}}


class Dice:
    """Failures at given moments, then never."""

    def __init__(self, *gaps):
        self.gaps = list(gaps)

    def expovariate(self, rate):
        return self.gaps.pop(0) if self.gaps else math.inf


def play(made, times, dice, assume=FREE, lanes=1):
    one = Simulation(made, times, [frozenset({0})] * lanes, 1, assume, [1.0])
    one._dice = [dice]
    return one, one.run()


# ── the cluster ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_cluster_is_nodes_times_gpus_and_failures_a_day():
    assert Cluster.parse("4x8") == Cluster.parse("4×8") == Cluster(4, 8)
    assert str(Cluster.parse(" 16X8:.5 ")) == "16x8:0.5"
    for text in ("", "4", "0x8", "4x8:", "4x8:-1", "axb", "4x8x2"):
        with pytest.raises(UserError, match="NODESxGPUS"):
            Cluster.parse(text)


def test_lanes_are_cut_from_the_nodes_and_workers_stay_whole(tmp_path):
    made = shared(2, 1, device="cuda", workers=3, gpus_per_worker=2)
    result = simulate(made, Cluster(3, 5))
    assert result["lanes"] == {"count": 2, "workers": 3, "gpus": 6}
    assert result["unused_gpus"] == 3, "two workers a node: the fifth GPU is over"
    with pytest.raises(UserError, match="a worker needs 2 GPUs, a node of 4x1 has 1"):
        simulate(made, Cluster(4, 1))
    with pytest.raises(UserError, match="a lane of 3 workers needs 6 GPUs"):
        simulate(made, Cluster(1, 4))


# ── decisions ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", range(12))
def test_the_virtual_ledger_decides_as_the_runs(tmp_path, seed):
    rng = random.Random(seed)
    stages = []
    for number in range(60):
        needs = [s["id"] for s in stages if rng.random() < 0.06][:3]
        models = [n for n in needs if rng.random() < 0.7]
        stages.append(stage(f"x-{number}", needs, steps=rng.randint(1, 9), model=uses(*models)))
    ids = [s["id"] for s in stages]
    made = plan(stages, {f"arm-{k}": sorted(rng.sample(ids, 12), key=ids.index) for k in range(6)})
    real = LedgerCore(made, [], tmp_path / "real", clock=lambda: 0.0)
    virtual = VirtualLedger(made, tmp_path / "virtual", 5, lambda: 0.0)
    lanes, under_way, claims = [f"lane-{n}" for n in range(4)], {}, 0
    for lane in lanes:
        real.lane_up(lane, 1), virtual.lane_up(lane, 1)
    while not real.settled():
        lane = rng.choice(lanes)
        if lane in under_way:
            made_now = under_way.pop(lane)
            if rng.random() < 0.1:
                real.lane_up(lane, 1), virtual.lane_up(lane, 1)
                virtual.offer(made_now)
            else:
                real.finish(lane, made_now, {}), virtual.finish(lane, made_now, {})
        else:
            granted, foretold = real.claim(lane), virtual.claim(lane)
            assert (granted and granted["stage"]["id"]) == (foretold and foretold["stage"]["id"])
            claims += 1
            if granted:
                under_way[lane] = granted["stage"]["id"]
    assert claims >= 60 and virtual.state == real.state and virtual.tried == real.tried


def test_two_lanes_by_hand():
    made = plan([stage("a", steps=10), stage("b", ["a"], steps=5), stage("c", steps=8)], {"arm-0": ["a", "b"], "arm-1": ["c"]})
    result = simulate(made, Cluster(1, 2), Assumptions(start_seconds=40.0, stage_seconds=0.0), price=3.0)
    assert result["makespan_seconds"] == 55.0 and result["idle_seconds"] == {"lane-0": 5.0, "lane-1": 2.0}
    assert result["at_least"] == {"longest_chain_seconds": 15.0, "shared_out_seconds": 11.5}
    assert result["gpu_hours"] == pytest.approx(2 * 55 / 3600) and result["cost"] == pytest.approx(3 * 2 * 55 / 3600)
    assert result["utilisation"] == pytest.approx(23 / 110) and result["arms"] == {"done": 2, "failed": {}}


def test_a_lane_reads_a_model_that_it_hasnt_in_hand():
    base, train = stage("b"), stage("t", ["b"], kind="train", model=uses("b"))
    predict = stage("p", ["t"], kind="predict", model=uses("t"))
    train["cost"] |= {"parameters": {"llm": 2**28}, "disk_gib": 2.0}  # 1 GiB of fp32
    predict["cost"] |= {"memory_gib": 5.0}
    made = plan([base, train, predict], {"arm": ["b", "t", "p"]})
    assume = Assumptions(start_seconds=0.0, stage_seconds=0.25, gib_per_second=0.5)
    result = simulate(made, Cluster(1, 1), assume)
    assert result["lane_seconds"]["loading"] == pytest.approx(0.25 + 0.25 + 2.0 + 4.0 + 0.25), "what it has just trained isn't read"
    other = {**stage("q", ["t"], kind="predict", model=uses("t")), "cost": {**predict["cost"]}}
    made = plan([base, train, predict, other], {"arm": ["b", "t", "p", "q"]})
    result = simulate(made, Cluster(1, 2), assume)
    assert result["lane_seconds"]["loading"] == pytest.approx(0.25 + 6.25 + 0.25 + 10.25), "the other lane reads it rather than wait"
    assert result["makespan_seconds"] == pytest.approx(1.25 + 1 + 6.25 + 10.25 + 1)


# ── failures ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_killed_stage_goes_on_from_its_last_checkpoint():
    made = plan([stage("t", steps=100)], {"arm": ["t"]})
    times = {"t": Times(100.0, fixed=5.0, close=3.0, chunk=30.0, save=2.0, restore=1.0)}
    calm, end = play(made, times, Dice())
    assert end == 5 + 100 + 3 * 2 + 3 and calm.busy == 100
    one, end = play(made, times, Dice(80.0), Assumptions(start_seconds=0.0, restart_seconds=50.0))
    # of 75 seconds two checkpoints stay: 60 s of work; the other 40 s need one more
    assert end == 80 + 50 + (5 + 1) + 40 + 2 + 3
    assert one.lanes[0].tally == {"work": 100.0, "loading": 9.0, "saving": 6.0, "lost": 16.0, "down": 50.0, "idle": 0.0}
    assert one.busy == 100 and one.killed == one.failures == 1 and one.core.tried["t"] == 2


def test_what_has_no_checkpoint_begins_again_and_gives_up_like_a_run():
    made = plan([stage("long", steps=100), stage("after", ["long"]), stage("short")], {"arm-0": ["long", "after"], "arm-1": ["short"]})
    times = {"long": Times(100.0), "after": Times(1.0), "short": Times(2.0)}
    one, end = play(made, times, Dice(*[30.0] * 100), Assumptions(start_seconds=0.0, restart_seconds=10.0))
    assert end == 4 * 30 + 30 + 10 + 2 and one.killed == 5
    assert one.core.arm("arm-0")["state"] == "failed" and "a worker of lane-0 died" in one.core.arm("arm-0")["reason"]
    assert one.core.arm("arm-1")["state"] == "done"


def test_a_node_takes_every_lane_on_it_down_and_no_other():
    made = plan([stage(f"t-{n}", steps=100) for n in range(4)], {f"arm-{n}": [f"t-{n}"] for n in range(4)})
    one = Simulation(
        made, {f"t-{n}": Times(100.0) for n in range(4)}, [frozenset({0}), frozenset({0, 1}), frozenset({1}), frozenset({2})], 1, FREE,
        [1.0, 0.0, 0.0],
    )  # fmt: skip
    one._dice = [Dice(40.0), Dice(), Dice()]
    assert one.run() == 40 + 300 + 100, "an idle lane could take them only once their lanes are back: until then nobody knows"
    assert [lane.tally["lost"] for lane in one.lanes] == [40.0, 40.0, 0.0, 0.0]
    assert one.failures == 1 and one.killed == 2


@pytest.mark.parametrize("seed", range(6))
def test_all_lane_time_is_accounted_for_and_nothing_runs_faster_than_it_can(seed):
    rng = random.Random(seed)
    stages = [stage(f"x-{n}", [f"x-{m}" for m in range(n) if rng.random() < 0.05], steps=rng.randint(1, 900)) for n in range(80)]
    made = plan(stages, {"arm": [s["id"] for s in stages]}, attempts=1000)
    for cluster in (Cluster(2, 2), Cluster(5, 1, 40.0), Cluster(3, 3, 400.0)):
        assume = Assumptions(seed=seed, restart_seconds=60.0)
        result = simulate(made, cluster, assume)
        assert result == simulate(made, cluster, assume)
        lanes, end = result["lanes"]["count"], result["makespan_seconds"]
        assert sum(result["lane_seconds"].values()) == pytest.approx(lanes * end)
        assert result["lane_seconds"]["work"] == pytest.approx(sum(s["spec"]["steps"] for s in stages))
        assert all(seconds >= 0 for seconds in result["lane_seconds"].values())
        assert end >= 40 + max(result["at_least"].values()) - 1e-6
        assert result["arms"]["done"] == 1 and (result["failures"]["nodes"] > 0) == (cluster.failures > 0)
    with pytest.raises(UserError, match="fails more often than it starts"):
        simulate(made, Cluster(1, 8, 2000.0), Assumptions(restart_seconds=60.0))


def test_failures_cost_time_and_checkpoints_save_some_of_it():
    train = [stage(f"t-{n}", kind="train", steps=20_000) for n in range(8)]
    for one in train:
        one["cost"] |= {"steps": 100, "work_gib": 2.0}
    made = plan(train, {f"arm-{n}": [f"t-{n}"] for n in range(8)}, attempts=100)
    ends = {}
    for every in (1, 10, 1000):
        for one in train:
            one["runtime"]["checkpoint_steps"] = every
        ends[every] = [simulate(made, Cluster(4, 1, failures), FREE) for failures in (0.0, 20.0)]
    lost = {every: result[1]["lane_seconds"]["lost"] for every, result in ends.items()}
    assert 0 < lost[1] < lost[10] < lost[1000]
    assert all(calm["makespan_seconds"] < rough["makespan_seconds"] for calm, rough in ends.values())
    assert ends[1][0]["lane_seconds"]["saving"] == pytest.approx(8 * 99 * 1.0), "one after every step but the last"


# ── measured times ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_timeline(folder: Path, world: int = 1, leave_out: str = "") -> float:
    """The real run's timeline.jsonl; returns its makespan from the first lane that was up to the last stage's end."""
    real = json.loads(REAL.read_text())
    lines = [{"event": "lane_up", "lane": f"lane-{lane}", "world": world, "time": time} for lane, time in real["ups"]]
    for name, lane, claimed, end, work in sorted(real["stages"], key=lambda row: row[3]):
        if not leave_out or not name.startswith(leave_out):
            lines.append({
                "event": "stage", "stage": "-", "name": name, "lane": f"lane-{lane}", "status": "done", "claimed": claimed, "end": end,
                "work_seconds": work,
            })  # fmt: skip
    (folder / "timeline.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return max(row[3] for row in real["stages"]) - min(time for _, time in real["ups"])


@pytest.fixture(scope="module")
def ablation():
    return make_plan(ROOT / "experiments" / "full_ablation.yaml", profile="tiny")


def test_the_makespan_of_a_real_run_is_foretold_within_a_tenth(tmp_path, ablation):
    took = write_timeline(tmp_path)
    result = simulate(ablation, Cluster(1, 2), Assumptions(start_seconds=0.0), Measured.read(tmp_path))
    assert result["stages"]["measured"] >= 0.9 * result["stages"]["count"]
    assert result["makespan_seconds"] == pytest.approx(took, rel=0.1)


def test_stages_that_the_run_didnt_have_are_scaled_by_their_group(tmp_path, ablation):
    write_timeline(tmp_path)
    whole = simulate(ablation, Cluster(1, 2), FREE, Measured.read(tmp_path))["lane_seconds"]["work"]
    write_timeline(tmp_path, leave_out="finetune row-2")
    measured = Measured.read(tmp_path)
    result = simulate(ablation, Cluster(1, 2), FREE, measured)
    assert result["stages"]["scaled"] >= 5 and result["lane_seconds"]["work"] == pytest.approx(whole, rel=0.05)
    assert simulate(ablation, Cluster(1, 2), FREE)["stages"]["estimated"] == result["stages"]["count"]


def test_collective_stages_share_their_measured_work_among_more_workers(tmp_path):
    train, score = stage("t", kind="train", world=4), stage("s", ["t"], kind="score")
    made = plan([train, score], {"arm": ["t", "s"]}, workers=4)
    rows = [("t", "interrupted", 0.0, 1.0, 0.5), ("t", "done", 1.5, 14.5, 10.0), ("s", "done", 15.0, 17.0, 1.0)]
    keys = ("stage", "status", "claimed", "end", "work_seconds")
    events = [{"event": "lane_up", "lane": "lane-0", "world": 2, "time": 0.0}]
    events += [{"event": "stage", "lane": "lane-0", "name": row[0], **dict(zip(keys, row))} for row in rows]
    (tmp_path / "timeline.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    times, sources = times_of(made, 4, 1, FREE, Measured.read(tmp_path))
    assert sources == {"measured": 2, "scaled": 0, "estimated": 0}
    assert (times["t"].seconds, times["t"].fixed) == (5.0, 3.5) and (times["s"].seconds, times["s"].fixed) == (1.0, 1.5)


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_command_prints_a_line_for_every_cluster(tmp_path, capsys):
    study, profile = write(tmp_path)
    call = [study, "--profile", profile, "--simulate", "1x2", "--simulate", "2×4:1", "--price", "2", "--assume", "stage_seconds=3"]
    assert planning.main(call) == 0
    said = capsys.readouterr().out
    assert said.startswith("profile small") and "stage_seconds=3" in said and "estimated" in said
    assert all(word in said for word in ("1x2", "2x4:1", "idle", "cost", "longest chain"))
    assert planning.main([*call, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["cluster"] for one in found["simulations"]] == ["1x2", "2x4:1"] and found["assumptions"]["stage_seconds"] == 3.0
    for one in found["simulations"]:
        assert one["cost"] == pytest.approx(2 * one["nodes"] * one["gpus_per_node"] * one["makespan_seconds"] / 3600)
        assert one["arms"] == {"done": 4, "failed": {}} and set(PARTS) < set(one["lane_seconds"])
        assert len(one["idle_seconds"]) == one["lanes"]["count"]


def test_mistakes_say_the_way_out(tmp_path):
    study, profile = write(tmp_path)
    for call, said in {
        ("--price", "2"): "--simulate 4x8", ("--simulate", "four"): "NODESxGPUS",
        ("--simulate", "1x1", "--assume", "start_second=2"): "did you mean 'start_seconds'",
        ("--simulate", "1x1", "--assume", "gib_per_second=0"): "isn't negative",
        ("--simulate", "1x1", "--assume", "seed=x"): "--assume seed=1",
        ("--simulate", "1x1", "--measured", str(tmp_path)): "no run's directory",
    }.items():  # fmt: skip
        with pytest.raises(UserError) as error:
            planning.main([study, "--profile", profile, *call])
        assert said in str(error.value)


def test_thousands_of_arms_on_a_hundred_lanes():
    made = shared(3000, 1)
    result = simulate(made, Cluster(16, 8, 5000.0), Assumptions(restart_seconds=5.0, seed=1))
    assert result["arms"]["done"] == 3000 and result["failures"]["stages_killed"] > 0
    assert result["lane_seconds"]["work"] == pytest.approx(2 + 3000 * (3 + 1))


def test_a_simulation_loads_neither_torch_nor_ray(tmp_path):
    study, profile = write(tmp_path)
    code = (
        "import sys; from grid import plan; plan.main([sys.argv[1], '--profile', sys.argv[2], '--simulate', '1x2']); "
        "print(sorted({'torch', 'ray', 'transformers', 'mlflow', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, study, profile], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
