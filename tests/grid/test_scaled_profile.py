"""Profiles over profiles: the study at a scale that differs in paths, resources, allow_subset and batch_scale, each of them shown."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from datasets_ray.errors import UserError, UserErrors
from grid import check, plantext, probe
from grid.load import as_plain, load
from grid.plan import make_plan, plan
from grid.report import write
from grid.report.build import as_json, build
from grid.report.load import load_run
from tests import small_world
from tests.grid.studies import PROFILE, changed
from tests.grid.studies import write as write_study
from tests.grid.synthetic_run import make_run, small_plan

STUDY = Path(__file__).resolve().parents[2] / "experiments" / "full_ablation.yaml"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The small world's profile."""
    return small_world.overlay(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def planned(world):
    return plan(load(STUDY, str(world)))


# ── profiles over profiles


def test_a_profile_changes_its_base_key_by_key(tmp_path):
    study, base = write_study(tmp_path)
    (tmp_path / "sub").mkdir()
    over = tmp_path / "sub" / "over.yaml"
    over.write_text("profile: over\nbase: ../profile.yaml\nresources: {zero: 3}\nllms: {talker: {seed: 5}}\n")
    before, after = load(study, base).profile, load(study, str(over)).profile
    assert (after.profile, after.resources.zero, after.llms["talker"].seed) == ("over", 3, 5)
    assert (after.about, after.resources.activation_checkpointing) == (before.about, before.resources.activation_checkpointing)
    assert after.llms["talker"].config == before.llms["talker"].config and after.data == before.data
    (tmp_path / "sub" / "third.yaml").write_text("profile: third\nbase: over.yaml\nresources: {zero: 2}\n")
    third = load(study, str(tmp_path / "sub" / "third.yaml")).profile
    assert (third.resources.zero, third.llms["talker"].seed) == (2, 5)


@pytest.mark.parametrize(
    "base, told, hint",
    [
        ("clustr", "no profile 'clustr'", "did you mean 'cluster'?"),
        ("other.yaml", "no file", ""),
        ("over.yaml", "leads back to itself", ""),
        ("[a]", "base is no text", "base: cluster"),
    ],
)
def test_a_base_that_is_none_is_told_with_its_line(base, told, hint, tmp_path):
    study, _ = write_study(tmp_path)
    (tmp_path / "over.yaml").write_text(f"profile: over\nbase: {base}\n")
    with pytest.raises(UserErrors) as caught:
        load(study, str(tmp_path / "over.yaml"))
    assert told in str(caught.value) and hint in str(caught.value)
    if told != "no file":
        assert "over.yaml:2: base" in str(caught.value)


# ── batch_scale, allow_subset, expect, limits


def specs(tmp_path, *sets: str, profile: str = PROFILE) -> dict[str, dict]:
    study, file = write_study(tmp_path, profile=profile)
    return {stage["name"]: stage["spec"] for stage in make_plan(study, profile=file, sets=sets)["stages"]}


def test_batches_are_scaled_and_keep_one_sample(tmp_path):
    before, half, least = specs(tmp_path), specs(tmp_path, "batch_scale=0.5"), specs(tmp_path, "batch_scale=0.001")
    trained = [name for name in before if "batch" in before[name]]
    assert len(trained) > 8
    for name in trained:
        assert half[name]["batch"] == max(1, before[name]["batch"] // 2) and least[name]["batch"] == 1
        assert {**half[name], "batch": 0, "model": 0, "data": 0} == {**before[name], "batch": 0, "model": 0, "data": 0}
    for wrong in ("0", "2"):
        with pytest.raises(UserErrors, match="batch_scale"):
            specs(tmp_path, f"batch_scale={wrong}")


def test_a_data_set_is_held_to_what_is_given_and_to_nothing_else(tmp_path):
    keys = ("expect", "allow_subset", "most_dropped")
    assert not any(key in spec for spec in specs(tmp_path).values() for key in keys)
    some = changed(PROFILE, "keys: {part: instructions, rows: 30}", "keys: {part: instructions}, expect: 30")
    chats = specs(tmp_path, profile=some)["data chats"]
    assert {key: chats.get(key) for key in keys} == {"expect": 30, "allow_subset": None, "most_dropped": 0.01}
    assert "expect" not in specs(tmp_path, profile=some)["data captions"]
    chats = specs(tmp_path, "limits.dropped=0.2", "allow_subset=true", profile=some)["data chats"]
    assert {key: chats.get(key) for key in keys} == {"expect": 30, "allow_subset": True, "most_dropped": 0.2}
    own = specs(tmp_path, "allow_subset=true", "data.chats.allow_subset=false", profile=some)
    assert "allow_subset" not in own["data chats"] and own["data captions"]["allow_subset"] is True


def test_the_plan_counts_steps_by_the_published_records(tmp_path):
    some = changed(PROFILE, "keys: {part: instructions, rows: 30}", "keys: {part: instructions}, expect: 30")
    study, file = write_study(tmp_path, profile=some)
    stage = next(s for s in make_plan(study, profile=file)["stages"] if s["name"] == "finetune first")
    assert stage["cost"]["rows"] == 30 and stage["cost"]["steps"] == 8


# ── the paper's study under a profile of this kind


def test_the_unchanged_study_has_its_22_arms_and_all_batches_are_a_64th(planned):
    assert len(planned["arms"]) == 22 and len(planned["references"]) == 2
    batches = {s["name"].split()[0]: set() for s in planned["stages"] if s["kind"] == "train"}
    for stage in planned["stages"]:
        if stage["kind"] == "train":
            batches[stage["name"].split()[0]].add(stage["spec"]["batch"])
    assert batches == {"pretrain": {4}, "finetune": {2}}
    assert planned["study"]["batch_scale"] == 1 / 64
    assert set(planned["study"]["allow_subset"]) == set(small_world.DATA_SETS)
    assert all(s["spec"]["allow_subset"] for s in planned["stages"] if s["kind"] == "dataset" and s["spec"]["source"] != "permuted")


def test_it_differs_from_cluster_in_paths_resources_allow_subset_and_batch_scale_only(world):
    small, cluster = load(STUDY, str(world)).profile, load(STUDY, "cluster").profile
    names = ("profile", "about", "data_root", "store", "resources", "allow_subset", "batch_scale")
    for field in dataclasses.fields(cluster):
        one, other = getattr(small, field.name), getattr(cluster, field.name)
        if field.name in ("encoders", "llms", "models", "connectors"):
            assert one.keys() == other.keys()
            for name in other:
                paths = {"checkpoint", "revision", "tokenizer"}
                assert {k: v for k, v in as_plain(one[name]).items() if k not in paths} == {
                    k: v for k, v in as_plain(other[name]).items() if k not in paths
                }
                if getattr(one[name], "family", "") != "existing" and name != "siglip-so400m-14-384":  # of another study
                    assert Path(one[name].checkpoint).is_dir()
        elif field.name not in names:
            assert one == other, field.name


def test_the_plans_text_says_so_first(world, planned):
    head = plantext.render(planned, load(STUDY, str(world))).split("\n\n")[0]
    assert "BATCHES SCALED by 1/64" in head and "SUBSETS ALLOWED" in head and "llava-558k" in head
    plain = load(STUDY, "cluster")
    assert "SCALED by" not in plantext.render(plan(plain), plain) and "SUBSETS" not in plantext.render(plan(plain), plain)


def test_check_finds_every_data_set_tokenizer_and_checkpoint_of_it(world, tmp_path, capsys, monkeypatch):
    def ask(task, request, timeout):
        if task == "machine":
            return {"facts": {"cpus": 2, "gpus": 0, "memory_gib": 900.0, "versions": {"ray": "x"}}, "failures": []}
        return probe.TASKS[task](json.loads(json.dumps(request)))

    monkeypatch.setattr(probe, "ask", ask)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    check.main([str(STUDY), "--profile", str(world), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "[3/7] data sets ................ ok (10 sources make their first row" in said, said
    assert "note: llava-558k: 8 of 558,128 records, allowed" in said and "note: mmmu: 8 of 900 records, allowed" in said
    assert "[4/7] models and tokenizers .... ok (7 tokenizers fit, 11 checkpoints at hand)" in said, said
    check.main([
        str(STUDY),
        "--profile",
        str(world),
        "--set",
        "data.llava-558k.allow_subset=false",
        "--set",
        "data.pets.allow_subset=false",
    ])
    said = capsys.readouterr().out
    assert "llava-558k: 8 records, its release has 558,128" in said and "pets: 8 records, its release has 3,669" in said
    assert "say `allow_subset: true`" in said


def test_every_checkpoint_of_it_builds_the_models_that_the_study_plans(planned, tmp_path):
    from trainers.context import Context
    from trainers.models import build

    stages = {stage["name"]: stage for stage in planned["stages"]}
    wanted = {  # whatever starts from checkpoints alone
        "pretrain row-12": {"connector": 2 * (32 * 32 + 32)}, "pretrain row-15": {"connector": 48 * 32 + 32 + 32 * 32 + 32},
        "finetune row-02": {}, "finetune row-04": {}, "finetune row-10": {}, "finetune row-11": {}, "predict row-01 mmstar": {},
        "embed flowers openclip-vit-l-14-laion": {}, "embed flowers dfn-clip-vit-h-14-378": {},
    }  # fmt: skip
    for name, sizes in wanted.items():
        built = build(stages[name]["spec"]["model"], Context.local(tmp_path / name, stages[name]))
        for part, size in sizes.items():
            assert sum(p.numel() for p in built.parts[part].parameters()) == size, name
        assert all(parameter.isfinite().all() for parameter in built.parameters()), name
    with pytest.raises(UserError):
        broken = json.loads(json.dumps(stages["finetune row-02"]))
        broken["spec"]["model"]["parts"]["connector"]["weights"]["checkpoint"] = str(tmp_path / "nowhere")
        build(broken["spec"]["model"], Context.local(tmp_path / "broken", broken))


# ── the report


def test_every_table_figure_and_page_says_subset_and_scale(tmp_path):
    made = small_plan()
    made["study"] |= {"miniature": False, "batch_scale": 1 / 64, "allow_subset": ["imagenet", "pets", "mmbench"]}
    for stage in made["stages"]:
        if stage["kind"] == "dataset" and stage["spec"]["source"] != "permuted":
            stage["spec"]["allow_subset"] = True
    run = make_run(tmp_path / "run", made, n=20)
    short = next(stage for stage in made["stages"] if stage["name"] == "data pets")
    manifest = run / "store" / short["id"] / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "subset": {"expected": 3669, "found": 20}}))
    results = load_run(run)
    marks = ["batches × 1/64", "subsets allowed: pets 20 of 3,669 records"]
    report = build(results)
    assert list(report.marks)[:2] == marks
    assert report.tables and all(list(table.marks)[:2] == marks for table in report.tables), [t.id for t in report.tables if not t.marks]
    table = report.table("subsets")
    assert table is not None and [cell.text for cell in table.rows[0]][:3] == ["pets", "20", "3,669"]
    told = as_json(report)
    assert (told["batch_scale"], told["allow_subset"]) == (1 / 64, ["imagenet", "pets", "mmbench"])
    assert told["subsets"] == {"pets": {"expected": 3669, "found": 20}} and told["marks"][:2] == marks
    write(run)
    pages = list((run / "report").rglob("*.html"))
    assert len(pages) > 5
    for page in pages:
        text = page.read_text()
        assert "batches × 1/64" in text and "20 of 3,669" in text, page
    assert (run / "report" / "report.tex").read_text().count("3,669 records") >= 5


def test_many_subsets_are_counted_in_a_mark_and_listed_in_their_table(tmp_path):
    made = small_plan()
    names = [f"set-{k}" for k in range(5)]
    results = load_run(make_run(tmp_path / "run", made, n=20))
    results.study |= {"allow_subset": names, "subsets": {name: {"expected": 10, "found": 4} for name in names}}
    report = build(results)
    assert "subsets allowed: 5 of 5 data sets are smaller than published" in report.marks
    table = report.table("subsets")
    assert table is not None and len(table.rows) == 5


@pytest.mark.slow
def test_the_unchanged_study_runs_on_small_checkpoints_and_data_in_the_published_formats(tmp_path):
    """Two arms of it, the Qwen2-VL one and the longest; `python -m tests.small_world DIR` runs them all."""
    code = small_world.main([str(tmp_path), "--arms", "row-11", "row-24"])
    assert code == 0
    report = json.loads((tmp_path / "run" / "report" / "report.json").read_text())
    assert {arm["name"] for arm in report["arms"]} == {"row-11", "row-24"} and not any(arm["missing"] for arm in report["arms"])
    assert any("batches" in mark for mark in report["marks"]) and any("subsets allowed" in mark for mark in report["marks"])
    trained = [json.loads(path.read_text()) for path in (tmp_path / "store").glob("train-*/model.json")]
    assert trained and all(part["weights"]["of"]["checkpoint"] for model in trained for part in [model["parts"]["llm"]])
