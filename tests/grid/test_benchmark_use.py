"""Benchmark files in a study: `use` takes data, prompt, rule and metric from a file, what study and profile say wins, names are checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from datasets_ray.errors import UserError
from grid import look
from grid.load import load
from grid.plan import make_plan
from tests.grid.studies import PROFILE, STUDY, changed, write

COUNTS = "  counts: {data: counts}\n"


def planned(folder: Path, benchmark: str, *sets: str, profile: str = PROFILE) -> dict[str, Any]:
    """Kind → spec of the stages that evaluate the first arm on benchmark `counts`, in whose place `benchmark` stands."""
    study = changed(STUDY, COUNTS, f"  counts: {benchmark}\n")
    files = write(folder, study, profile)
    made = make_plan(files[0], profile=files[1], sets=sets)
    stages = {stage["id"]: stage for stage in made["stages"]}
    arm = made["arms"][0]
    predict, score = (stages[arm[kind]["counts"]]["spec"] for kind in ("predictions", "scores"))
    return {"data": stages[predict["questions"]], "predict": predict, "score": score}


def test_a_file_says_data_prompt_rule_and_metric(tmp_path: Path):
    found = planned(tmp_path, "{use: pope}")
    assert found["data"]["name"] == "data pope" and found["data"]["spec"] == {
        "source": "benchmark_tables", "set": "pope", "images": "coco/val2014", "open": "yes_no", "expect": 9000, "most_dropped": 0.01,
    }  # fmt: skip
    assert found["predict"]["suffix"] == "" and found["predict"]["max_new_tokens"] == 64
    assert found["score"]["metric"] == "f1" and found["score"]["rule"] == "vlmevalkit"


def test_what_the_study_writes_wins(tmp_path: Path):
    words = "{use: foci_pets, suffix: Just the letter., rule: strict, metric: mean_per_class, max_new_tokens: 3}"
    found = planned(tmp_path, words, "data.foci_pets.keys.seed=5", "data.foci_pets.allow_subset=true")
    assert found["data"]["spec"]["seed"] == 5 and found["data"]["spec"]["set"] == "oxford_pet" and found["data"]["spec"]["allow_subset"]
    assert (found["predict"]["suffix"], found["predict"]["max_new_tokens"]) == ("Just the letter.", 3)
    assert (found["score"]["rule"], found["score"]["metric"]) == ("strict", "mean_per_class")
    other = planned(tmp_path, "{data: counts, suffix: Only this., rule: strict}")
    assert other["predict"]["suffix"] == "Only this." and other["score"]["rule"] == "strict"
    assert other["data"]["spec"]["source"] == "specimens"


def test_a_profile_says_what_a_name_means(tmp_path: Path):
    own = PROFILE + "  mmstar: {source: specimens, keys: {part: questions, set: colour, split: test, rows: 10}}\n"
    found = planned(tmp_path, "{use: mmstar}", profile=own)
    assert found["data"]["spec"]["source"] == "specimens" and found["score"]["rule"] == "vlmevalkit"
    changes = PROFILE + "  mmstar: {keys: {file: elsewhere/MMStar.tsv}, allow_subset: true}\n"
    found = planned(tmp_path, "{data: mmstar}", profile=changes)
    spec = {"source": "vlmevalkit_tsv", "file": "elsewhere/MMStar.tsv", "expect": 1500, "allow_subset": True, "most_dropped": 0.01}
    assert found["data"]["spec"] == spec and found["score"]["metric"] == "accuracy"


def test_a_profiles_data_that_ask_something_else_are_told_and_can_be_chosen(tmp_path: Path):
    own = PROFILE + "  mmbench: {source: vlmevalkit_tsv, keys: {file: MMBench_DEV_EN.tsv, circular: true}, rows: 4329}\n"
    with pytest.raises(UserError, match="asks something else than mmbench .circular: True instead of None"):
        planned(tmp_path, "{use: mmbench}", profile=own)
    theirs = planned(tmp_path, "{use: mmbench, data: mmbench}", profile=own)
    assert theirs["data"]["spec"]["circular"] is True
    published = planned(tmp_path, "{use: mmbench, data: mmbench-as-published}", profile=own)
    assert "circular" not in published["data"]["spec"] and published["data"]["spec"]["expect"] == 1164
    assert planned(tmp_path, "{use: mmbench_circular}", profile=own)["data"]["spec"]["circular"] is True


def test_a_profile_may_change_a_benchmark_that_a_study_leaves_out(tmp_path: Path):
    assert planned(tmp_path, "{data: counts}", "data.pope.keys.images=val2014") == planned(tmp_path, "{data: counts}")


def test_two_files_dont_share_the_name_of_their_rows(tmp_path: Path):
    (tmp_path / "pope.yaml").write_text(Path("experiments/benchmarks/pope.yaml").read_text())
    with pytest.raises(UserError, match="two benchmarks read their rows from 'pope'"):
        planned(tmp_path, f"{{use: pope}}\n  others: {{use: {tmp_path}/pope.yaml}}")


def test_a_file_of_ones_own(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("include: mmmu\nkeys: {most_images: 1}\nmax_new_tokens: 9\n")
    found = planned(tmp_path, f"{{use: {tmp_path}/mine.yaml}}")
    assert (
        found["data"]["name"] == "data mine"
        and found["data"]["spec"]["most_images"] == 1
        and found["data"]["spec"]["split"] == "validation"
    )
    assert found["predict"]["max_new_tokens"] == 9


def test_a_study_that_names_no_file_keeps_its_stages(tmp_path: Path):
    plain = planned(tmp_path, "{data: counts}")
    said = planned(tmp_path, "{data: counts, rule: vlmevalkit, max_new_tokens: 8}")
    assert plain == said


@pytest.mark.parametrize(("benchmark", "said"), [
    ("{use: poope}", r"study\.yaml:\d+: no benchmark 'poope'(.|\n)*did you mean 'pope'"),
    ("{data: mmstra}", r"counts\.data: unknown data set of the profile 'mmstra'\n.*did you mean 'mmstar'"),
    ("{data: counts, metric: acuracy}", r"counts\.metric: unknown metric 'acuracy'\n.*did you mean 'accuracy'"),
    ("{data: counts, rule: vlmeval}", r"counts\.rule: unknown answer rule 'vlmeval'\n.*did you mean 'vlmevalkit'"),
    ("{use: pope, metrik: f1}", r"benchmarks\.counts\.metrik: unknown key"), ("{use: [pope]}", r"benchmarks\.counts\.use is a list"),
])  # fmt: skip
def test_a_wrong_name_is_told_with_the_nearest(benchmark: str, said: str, tmp_path: Path):
    with pytest.raises(UserError, match=said):
        planned(tmp_path, benchmark)


def test_a_broken_file_is_told_at_its_line(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("include: pope\nmetric: f2\n")
    with pytest.raises(UserError, match=r"mine\.yaml:2: metric: unknown metric 'f2'"):
        planned(tmp_path, f"{{use: {tmp_path}/mine.yaml}}")


def test_a_look_shows_the_benchmarks_own_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    files = write(tmp_path, changed(STUDY, COUNTS, "  counts: {data: counts, suffix: Answer in one letter.}\n"))
    assert look.main([files[0], "--profile", files[1], "--arm", "first", "--stage", "counts"]) == 0
    assert "Answer in one letter." in capsys.readouterr().out
    assert load(*files).study.benchmarks["counts"].suffix == "Answer in one letter."
