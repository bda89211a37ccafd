"""The preflight: every failure at once, each with its way out; probes in processes of their own."""

from __future__ import annotations

import json
import shutil
import sys
from types import SimpleNamespace

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


def test_a_disk_too_small_for_the_kept_pixels_is_noted_with_a_way_out(run, tmp_path, monkeypatch):
    """8 GiB of a disk of 16, of which 2 stay free: less than the stages and pixels_mb take together, and no failure."""
    monkeypatch.setenv("FINEGRID_PIXELS", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=16 * 2**30, free=8 * 2**30))
    code, said = run(STUDY, grown(PROFILE), "--set", "resources.pixels_mb=8192")
    assert code == 0, said
    (note,) = [line for line in said.splitlines() if "pixels_mb" in line]
    assert note.startswith(f"      note: pixels_mb lets decoded images take 8.0 GiB at {tmp_path}, where there is room for ")
    assert "beside the stages" in note and "FINEGRID_PIXELS=DIR on a larger disk, or --set resources.pixels_mb=" in note
    room = int(note.rpartition("=")[2].rstrip(")"))
    assert 5 * 1024 < room < 6 * 1024
    said = run(STUDY, grown(PROFILE), "--set", f"resources.pixels_mb={room - 1}")[1]
    assert "note" not in said and f"decoded images: at most {(room - 1) / 1024:.1f} GiB at {tmp_path}" in said
    assert "decoded images" not in run(STUDY, grown(PROFILE), "--set", "resources.pixels_mb=0")[1]


def test_encoder_outputs_are_counted_beside_the_kept_pixels(run, tmp_path, monkeypatch):
    """Both lie below FINEGRID_PIXELS: 6 GiB can be had, 4 of them are the pixels'."""
    monkeypatch.setenv("FINEGRID_PIXELS", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=16 * 2**30, free=8 * 2**30))
    sets = ("--set", "resources.pixels_mb=4096", "--set")
    code, said = run(STUDY, grown(PROFILE), *sets, "resources.features_mb=1024")
    assert code == 0 and "note" not in said, said
    assert f"decoded images: at most 4.0 GiB at {tmp_path}; encoder outputs: at most 1.0 GiB at {tmp_path}" in said
    code, said = run(STUDY, grown(PROFILE), *sets, "resources.features_mb=4096")
    (note,) = [line for line in said.splitlines() if "features_mb" in line]
    assert code == 0 and "note: features_mb lets encoder outputs take 4.0 GiB" in note and "--set resources.features_mb=" in note
    assert "beside the stages and decoded images" in note and "decoded images: at most 4.0 GiB" in said
    assert 1024 < int(note.rpartition("=")[2].rstrip(")")) <= 2048
    assert "encoder outputs" not in run(STUDY, grown(PROFILE), *sets, "resources.features_mb=0")[1]


def test_pixels_that_can_not_be_kept_are_noted(run, tmp_path, monkeypatch):
    locked = tmp_path / "locked"
    locked.mkdir()
    monkeypatch.setenv("FINEGRID_PIXELS", str(locked))
    real = check.os.access
    monkeypatch.setattr(check.os, "access", lambda path, mode: str(path) != str(locked) and real(path, mode))
    code, said = run(STUDY, grown(PROFILE))
    assert code == 0 and f"{locked}, which can't be written" in said and "--set resources.pixels_mb=0" in said


def released(tmp_path, **preprocessing):
    """A profile whose strong encoder is a checkpoint on disk with these files."""
    folder = tmp_path / "eye"
    folder.mkdir(exist_ok=True)
    for name, content in preprocessing.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    of_its_own = f"  strong:\n    builder: transformers_vision\n    image: {{size: 32, patch: 8}}\n    checkpoint: {folder}\n"
    before, rest = grown(PROFILE).split("  strong:\n")
    return before + of_its_own + "  miner:\n" + rest.split("  miner:\n")[1], folder


def test_pixels_that_a_checkpoint_was_not_trained_with_fail_unless_the_profile_says_them(run, tmp_path):
    """A hub's checkpoint is read by what its name says; the files that were downloaded say otherwise."""
    profile, folder = released(tmp_path, preprocessor_config={"image_mean": [0.1] * 3, "image_std": [0.2] * 3})
    study = STUDY.replace("zeroshot: true", "zeroshot: false")
    assert run(study, profile)[0] == 0  # a local directory's files are what the plan takes
    by_hand = profile.replace("patch: 8}\n    checkpoint", "patch: 8, mean: [0, 0, 0], std: [1, 1, 1]}\n    checkpoint")
    code, said = run(study, by_hand)
    assert code == 0 and "note: encoders.strong.image: mean [0.0, 0.0, 0.0], std [1.0, 1.0, 1.0], but its preprocessor_config.json" in said
    fed = {"at": "encoders.eye.image", "said": False, "mean": [0.5] * 3, "std": [0.5] * 3}
    request = {"tokenizers": [], "checkpoints": [{"checkpoint": str(folder), "revision": None, "fed": [fed]}]}
    (failure,) = probe.models(request)["failures"]
    assert failure["what"].endswith("but its preprocessor_config.json says [0.1, 0.1, 0.1], [0.2, 0.2, 0.2]")
    assert failure["hint"] == "encoders.eye.image: {mean: [0.1, 0.1, 0.1], std: [0.2, 0.2, 0.2]}"
    (folder / "preprocessor_config.json").write_text("{")
    code, said = run(study, profile)
    assert code == 1 and "encoders.strong.image: what" in said and "of its pixels can't be read" in said


def test_a_downloaded_tower_that_nobody_builds_fails_the_models_step(run, tmp_path, monkeypatch):
    """Its name says nothing, so that it planned; its config.json does."""
    profile, folder = released(tmp_path, config={"model_type": "dinov3_vit"})
    profile = profile.replace(f"checkpoint: {folder}", "checkpoint: somebody/eye")
    monkeypatch.setattr(probe, "_at_hand", lambda checkpoint, revision: folder)
    code, said = run(STUDY.replace("zeroshot: true", "zeroshot: false"), profile)
    assert code == 1 and f"encoders.strong: a tower of type 'dinov3_vit' can't be built ({folder}/config.json says so)" in said, said
    assert "hint: builder transformers_vision has " in said and said.count("FAILED") == 1


def test_rotated_copies_of_a_release_are_one_record(tmp_path):
    """MMBench's file holds them already: 1,164 questions of 4,329 rows are what a profile expects."""
    lines = ["index\tquestion\tA\tB\tanswer\timage"]
    for question in range(3):
        lines += [f"{question + turn * 1_000_000}\twhat?\tx{turn}\ty{turn}\t{'AB'[turn]}\t{'QUJD' * 40}" for turn in range(2)]
    (tmp_path / "set.tsv").write_text("\n".join(lines) + "\n")
    for circular in (True, False):
        spec = {"source": "vlmevalkit_tsv", "file": "set.tsv", "circular": circular, "expect": 3}
        assert probe._records(spec, {}, {"data_root": str(tmp_path)}) == 3


def test_an_objective_from_outside_is_loaded(run, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("raise ImportError('no such thing here')\nclass Own:\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    study = changed(STUDY, "    batch: 8", "    batch: 8\n    objective: {name: 'mine:Own'}")
    code, said = run(study, grown(PROFILE))
    assert code == 1 and "objective 'mine:Own' can't be loaded (no such thing here)" in said


def test_more_options_than_classes_are_told_before_anything_is_mined(run):
    """The drawn flowers have twelve species or fewer than 26."""
    code, said = run(changed(STUDY, "k: 4", "k: 26"), grown(PROFILE))
    assert code == 1 and "benchmark birds: mining.k is 26, birds has " in said and "--set mining.k=" in said, said
