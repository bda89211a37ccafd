"""The preflight: every failure at once, each with its way out; probes in processes of their own."""

from __future__ import annotations

import json
import sys

import pytest

from grid import check, probe
from tests.grid.studies import PROFILE, STUDY, changed, write

MACHINE = {"facts": {"cpus": 2, "gpus": 0, "memory_gib": 16.0, "versions": {"ray": "x"}}, "failures": []}


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """(exit code, output) of a check, data and models looked at in this process and the machine made up."""

    def ask(task, request, timeout):
        asked = json.loads(json.dumps(request))
        return MACHINE if task == "machine" else probe.TASKS[task](asked)

    def go(study=STUDY, profile=PROFILE, *words):
        monkeypatch.setattr(probe, "ask", ask)
        files = write(tmp_path, study, profile)
        code = check.main([files[0], "--profile", files[1], "--out", str(tmp_path / "out"), *words])
        return code, capsys.readouterr().out

    monkeypatch.delenv("FINEGRID_DATA", raising=False)
    return go


def grown(profile: str) -> str:
    """Vocabularies that the committed tokenizers fit into."""
    return profile.replace("vocab_size: 100", "vocab_size: 1536")


def test_all_steps_pass_and_nothing_is_written(run, tmp_path):
    code, said = run(STUDY, grown(PROFILE))
    assert code == 0, said
    assert [line.split()[0] for line in said.splitlines()[1:8]] == [f"[{n}/7]" for n in range(1, 8)]
    assert said.startswith("profile profile (--profile)") and "7 of 7 ok" in said
    assert {path.name for path in tmp_path.iterdir()} == {"study.yaml", "profile.yaml"}


def test_every_failure_is_told_at_once_with_its_way_out(run, tmp_path):
    profile = changed(
        PROFILE,
        "chats: {source: specimens, keys: {part: instructions, rows: 30}",
        "chats: {source: grocery, keys: {part: instructions, rows: 30}",
    )
    profile = changed(profile, "words: {source: specimens, keys: {part: corpus", "words: {source: specimens, keys: {part: corpse")
    code, said = run(STUDY, profile, "--set", "resources.gpus_per_worker=1", "--set", "device.memory_gib=0.001")
    assert code == 1
    for part in (
        "chats: source 'grocery' needs the folder", "--set data_root=DIR",
        "words: specimens have no part 'corpse'", "did you mean 'corpus'?",
        "1536 tokens, its model's vocabulary 100", "a lane needs 1 GPUs, 0 are visible", "GiB a device", "3 of 7 ok, 4 failed",
    ):  # fmt: skip
        assert part in said, said
    assert "Traceback" not in said


def test_a_broken_study_fails_the_first_step_and_the_rest_says_so(run):
    code, said = run(changed(STUDY, "seed: 3", "sead: 3"))
    assert code == 1 and "study.yaml:3: sead: unknown key" in said and said.count("FAILED") == 6 and "needs a step above" in said


def test_a_probe_that_hangs_or_dies_is_a_failure_like_any_other(monkeypatch):
    assert "took more than" in probe.ask("machine", {}, 0.001)["failures"][0]["what"]
    died = probe.ask("data", {"sets": {}}, 60)
    assert died["failures"] == [] or "died" in died["failures"][0]["what"]
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert "died with exit code 1" in probe.ask("machine", {}, 60)["failures"][0]["what"]


def test_the_models_probe_runs_in_its_own_process_and_downloads_nothing():
    tokenizer = {"name": "tiny-qwen2", "template": "chatml", "vocabulary": 1536}
    answer = probe.ask("models", {"tokenizers": [tokenizer], "checkpoints": [{"checkpoint": "nobody/nothing", "revision": None}]}, 250)
    assert [failure["what"] for failure in answer["failures"]] == ["checkpoint nobody/nothing is not on this machine"]
