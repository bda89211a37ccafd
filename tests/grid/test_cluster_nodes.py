"""A cluster that is found: its nodes are one machine, or each way of not being one is told; a run lays its lanes on it."""

from __future__ import annotations

import pytest

from datasets_ray.errors import UserErrors
from grid import probe_cluster

REQUEST = {
    "writable": {"store": "/s"},
    "readable": {"data_root": "/d"},
    "need_gib": {"store": 10.0},
    "workers": 4,
    "gpus_per_worker": 1,
    "models": {"tokenizers": [], "checkpoints": []},
}


def node(name: str, everybody: list[str], **changes) -> dict:
    found = {
        "marks": {"store": everybody}, "missing": [], "free_gib": {"store": 100.0}, "failures": [],
        "versions": dict.fromkeys(("python", *probe_cluster.PACKAGES), "1"),
    }  # fmt: skip
    made = {"name": name, "id": name * 8, "cpus": 8.0, "gpus": 2.0, "unwritable": {}, "found": found}
    found.update({key: value for key, value in changes.items() if key in found})
    made.update({key: value for key, value in changes.items() if key in made})
    return made


def told(*nodes: dict) -> list[str]:
    return [f"{failure['what']} ({failure['why']})" for failure in probe_cluster.judge(nodes, REQUEST)]


def test_nodes_that_are_one_machine_pass_and_each_way_of_not_being_one_is_told():
    both = ["a" * 8, "b" * 8]
    assert told(node("a", both), node("b", both)) == []
    cases = {
        "room for 3 workers": node("b", both, gpus=1.0),
        "b: fewer CPUs than workers": node("b", both, cpus=2.0),
        "b: it can't run our code (No module named 'grid')": node("b", both, found=ImportError("No module named 'grid'")),
        "b: store /s can't be written (Read-only file system)": node("b", both, unwritable={"store": "Read-only file system"}),
        "b: store /s is not the others' folder": node("b", ["b" * 8]),
        "store /s has 1.0 GiB free (about 10.0 GiB are needed)": node("b", both, free_gib={"store": 1.0}),
        "b: no data_root /d": node("b", both, missing=["data_root"]),
        "ray differs between nodes: 1 on a; 2 on b": node(
            "b", both, versions={**dict.fromkeys(("python", *probe_cluster.PACKAGES), "1"), "ray": "2"}
        ),
        "b: checkpoint x is not on this machine": node(
            "b", both, failures=[{"what": "checkpoint x is not on this machine", "why": "", "hint": ""}]
        ),
    }
    for what, wrong in cases.items():
        found = told(node("a", both), wrong)
        assert len(found) == 1 and what in found[0], (what, found)


def test_a_node_tries_folders_tokenizers_and_checkpoints_and_leaves_nothing_behind(tmp_path):
    paths = {"store": str(tmp_path / "store"), "out": str(tmp_path / "file" / "below")}
    (tmp_path / "file").write_text("in the way")
    wrong = probe_cluster.write_marks(paths, "t", "node")
    assert set(wrong) == {"out"} and "Not a directory" in wrong["out"]
    tokenizer = {"name": "tiny-llama", "template": "chatml", "vocabulary": 10}
    request = {
        "writable": paths,
        "readable": {"data_root": str(tmp_path / "none")},
        "models": {"tokenizers": [tokenizer], "checkpoints": []},
    }
    found = probe_cluster.look(request, "t", "node")
    assert found["marks"]["store"] == ["node"] and found["missing"] == ["data_root"] and found["free_gib"]["store"] > 0
    assert "<|im_end|>" in found["failures"][0]["what"] and found["versions"]["ray"] != "missing"
    probe_cluster.remove_marks({"store": paths["store"]}, "t", "node")
    assert list((tmp_path / "store").iterdir()) == []


@pytest.mark.slow
def test_a_running_cluster_is_asked_node_by_node(tmp_path):
    import ray

    request = {**REQUEST, "writable": {"store": str(tmp_path / "store")}, "readable": {"data_root": str(tmp_path)}, "gpus_per_worker": 0}
    request["need_gib"] = {"store": 1e9}
    ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False)
    try:
        answer = probe_cluster.probe(ray, request)
    finally:
        ray.shutdown()
    assert answer["facts"] == {"nodes": 1, "gpus": 0.0, "cpus": 1.0}
    assert ["GiB free" in failure["what"] for failure in answer["failures"]] == [True]
    assert list((tmp_path / "store").iterdir()) == []


def test_a_run_lays_its_lanes_on_the_cluster_that_it_is_given(monkeypatch):
    """The driver's node may have no device at all."""
    from types import SimpleNamespace

    from grid import session
    from grid.settings import Settings

    answer = {"facts": {"cpus": 136.0, "gpus": 16.0}, "failures": []}
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    monkeypatch.setattr(session.probe, "ask", lambda task, request, timeout: answer)
    settings = Settings(workers=16, gpus_per_worker=1, device="cuda")
    cpus, gpus = session.Session._machine(SimpleNamespace(settings=settings))  # type: ignore[arg-type]
    shape = settings.shape({"stages": [{}]}, cpus, gpus)
    assert (shape.lanes, shape.workers, shape.gpus_per_worker) == (1, 16, 1)
    answer = {"facts": {}, "failures": [{"what": "no Ray cluster at head:6379", "why": "refused", "hint": "unset RAY_ADDRESS"}]}
    with pytest.raises(UserErrors, match="no Ray cluster at head:6379"):
        session.Session._machine(SimpleNamespace(settings=settings))  # type: ignore[arg-type]
