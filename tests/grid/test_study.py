"""YAML with lines, and typed reading."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
from pathlib import Path

import pytest

from datasets_ray import yamlfile
from datasets_ray.errors import UserError, UserErrors
from datasets_ray.schema import Reader, explain, option
from grid import cli, keys, load, profile, recipe, study, validate_profile
from grid.plan import make_plan
from grid.settings import Settings
from tests.grid.studies import PROFILE, STUDY, changed, write

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


def test_scalars_follow_yaml_1_2():
    text = "a: 1e-3\nb: no\nc: on\nd: 012\ne: 'true'\nf: ~\ng: 1_000\nh: .5\ni: 1.\nj: 2024-01-01\nk: -3\n"
    values = yamlfile.parse(text, "x").plain()
    assert values == {
        "a": 0.001, "b": "no", "c": "on", "d": 12, "e": "true", "f": None, "g": 1000, "h": 0.5, "i": 1.0, "j": "2024-01-01", "k": -3,
    }  # fmt: skip


def test_every_value_knows_its_line():
    tree = yamlfile.parse("a:\n  b: 1\n  c: [2,\n    3]\n", "x")
    assert (tree.value["a"].line, tree.value["a"].value["b"].line, tree.value["a"].value["c"].value[1].line) == (1, 2, 4)
    assert tree.value["a"].value["b"].where == "x:2"


@pytest.mark.parametrize("text", ["a: 1\na: 2", "a: !!set {}", "<<: {a: 1}", "[a: 1", "? [a]\n: 1", "a: &x [*x]"])
def test_what_a_study_may_not_hold(text):
    with pytest.raises(UserError, match="x:"):
        yamlfile.parse(text, "x")


def test_yaml_constructs_nothing(tmp_path):
    with pytest.raises(UserErrors, match="tags are not read"):
        yamlfile.parse(f"a: !!python/object/apply:pathlib.Path.touch ['{tmp_path}/made']", "x")
    assert not (tmp_path / "made").exists()


def test_merging_joins_mappings_and_replaces_the_rest():
    below, above = yamlfile.parse("a: {b: 1, c: [1, 2]}\nd: 3", "below"), yamlfile.parse("a: {c: [9]}\ne: 4", "above")
    joined = yamlfile.merged(below, above)
    assert joined.plain() == {"a": {"b": 1, "c": [9]}, "d": 3, "e": 4}
    assert joined.value["a"].value["b"].where == "below:1" and joined.value["a"].value["c"].where == "above:1"
    assert below.plain() == {"a": {"b": 1, "c": [1, 2]}, "d": 3}


def test_reader_collects_all_mistakes():
    @dataclasses.dataclass
    class Point:
        x: int = option("across", unit="pixels", low=0)
        y: float = option("down", 1.5)
        name: str | None = option("what it is called", None)

    Point.__module__ = __name__
    reader = Reader()
    assert reader.read(Point, yamlfile.parse("x: 3\ny: 2", "f")) == Point(x=3, y=2.0, name=None)
    assert not reader.errors
    assert reader.read(Point, yamlfile.parse("x: -1\ny: high\nz: 1", "f")) is None
    assert len(reader.errors) == 3
    assert explain(Point)[0] == ("x", "across [pixels]")


def test_every_key_of_study_and_profile_says_what_it_means():
    for module in (study, recipe, profile):
        for kind in vars(module).values():
            if dataclasses.is_dataclass(kind):
                assert kind.__doc__ and not kind.__doc__.startswith(f"{kind.__name__}(")
                for name, told in explain(kind):
                    assert len(told) >= 3, f"{kind.__name__}.{name}"


def test_all_keys_can_be_looked_up(capsys):
    assert keys.main([]) == 0
    said = capsys.readouterr().out
    assert all(f"\n{name}: " in f"\n{said}" for name in ("Study", "Training", "Contrast", "Profile", "Data", "Resources"))
    assert "weight_decay: decoupled weight decay (float; default 0.0)" in said
    with pytest.raises(UserError, match="did you mean 'Benchmark'"):
        keys.main(["Benchmrk"])


def test_no_top_level_key_belongs_to_both_study_and_profile():
    keys = [{field.name for field in dataclasses.fields(kind)} for kind in (study.Study, profile.Profile)]
    assert not keys[0] & keys[1], "--set KEY=VALUE could not tell them apart"


def test_overrides_and_settings_reach_study_and_profile(tmp_path):
    files = write(tmp_path, STUDY, PROFILE + "overrides:\n  recipe: {finetune: {batch: 6}}\n")
    sets = [
        "recipe.pretrain.batch=32",
        "data_root=/elsewhere",
        "tracking.uri=http://here",
        "axes.updating.full.pretrain.phases=[{until: 1, learning_rates: {llm: 1e-4}}]",
    ]
    loaded = load.load(*files, sets=sets)
    by_name = {arm.name: arm.recipe for arm in loaded.arms}
    assert (by_name["first"].pretrain.batch, by_name["first"].finetune.batch, by_name["third"].finetune.batch) == (32, 6, 2)
    assert by_name["third"].pretrain.phases[0].learning_rates == {"llm": 1e-4}
    assert (loaded.profile.data_root, loaded.profile.tracking.uri) == ("/elsewhere", "http://here")
    told = {change["key"]: (change["study"], change["here"]) for change in loaded.scaled}
    assert told["recipe.finetune.batch"] == (4, 6) and told["recipe.pretrain.batch"] == (8, 32)


def test_compatibility_fills_what_the_study_leaves_out_and_nothing_else(tmp_path):
    recipe = load.load(*write(tmp_path)).arms[0].recipe
    assert (recipe.pretrain.template, recipe.pretrain.fit, recipe.finetune.fit, recipe.finetune.order) == (
        "plain",
        "crop",
        "pad",
        "modality_grouped",
    )
    own = load.load(*write(tmp_path, changed(STUDY, "    batch: 8", "    batch: 8\n    fit: squash"))).arms[0].recipe
    assert own.pretrain.fit == "squash"


def test_which_profile_and_why(tmp_path, monkeypatch):
    monkeypatch.delenv("FINEGRID_PROFILE", raising=False)
    path, why = profile.choose(None)
    assert path.stem == "tiny" and "default" in why
    monkeypatch.setenv("FINEGRID_PROFILE", str(tmp_path / "mine.yaml"))
    assert profile.choose(None) == (tmp_path / "mine.yaml", "FINEGRID_PROFILE")
    assert profile.choose("tiny")[1] == "--profile"


def test_a_profile_scales_what_a_study_has_and_adds_nothing(tmp_path):
    overrides = "overrides:\n  recipe: {finetune: {batch: 6}}\n  axes: {arch: {other: {model: x}}, updating: {full: {finetune.batch: 9}}}\n"
    files = write(tmp_path, STUDY, PROFILE + overrides + "  benchmarks: {unheard: {data: birds}, counts: {metric: mean_per_class}}\n")
    loaded = load.load(*files)
    assert set(loaded.study.axes) == {"encoder", "llm", "pretraining", "updating"} and set(loaded.study.benchmarks) == {"birds", "counts"}
    assert loaded.study.benchmarks["counts"].metric == "mean_per_class" and loaded.arms[0].recipe.finetune.batch == 6
    own = load.load(*write(tmp_path, changed(STUDY, "seed: 3", "seed: 3\nmade_for: small"), (tmp_path / "profile.yaml").read_text()))
    assert own.arms[0].recipe.finetune.batch == 4 and not own.scaled


@pytest.mark.parametrize(
    ("name", "scale"), [("full_ablation", "tiny"), ("full_ablation", "cluster"), ("full_ablation", "gpu"), ("photos", "tiny")]
)
def test_every_study_of_the_house_loads_and_plans(name, scale):
    made = make_plan(EXPERIMENTS / f"{name}.yaml", profile=scale)
    assert made["arms"] and made["contrasts"] and made["study"]["assumptions"]
    assert made["study"]["miniature"] == (scale == "tiny") and made["totals"]["fits"]
    grouped = [benchmark for group in made["groups"].values() for benchmark in group]
    assert all(sorted(arm["scores"]) == sorted(grouped) for arm in made["arms"])


def test_there_are_no_other_studies_and_profiles():
    assert {path.stem for path in EXPERIMENTS.glob("*.yaml")} == {"full_ablation", "photos", "existing_vlms"}
    assert {path.stem for path in (EXPERIMENTS / "profiles").glob("*.yaml")} == {"tiny", "cluster", "gpu"}


def test_the_photos_study_crosses_encoders_captions_and_updating():
    made = make_plan(EXPERIMENTS / "photos.yaml", profile="tiny")
    axes = {tuple(arm["axes"].values()) for arm in made["arms"]}
    assert axes == set(itertools.product(("photo-weak", "photo-strong"), ("labels", "written"), ("connector", "full")))
    specs = [stage["spec"] for stage in made["stages"] if stage["kind"] == "dataset" and "part" in stage["spec"]]
    asked = {spec["source"] for spec in specs if spec.get("split") == "test"}
    assert asked == {"grocery", "pets", "food101", "cub"} and all(
        spec["part"] == "labelled" for spec in specs if spec.get("split") == "test"
    )


def test_the_run_section_is_what_the_run_reads(tmp_path):
    study, profile = write(tmp_path)
    made = make_plan(study, profile=profile, sets=["resources.lanes=3", "store=/some/where"])
    assert {field.name for field in dataclasses.fields(Settings)} == set(made["run"])
    settings = Settings.read(made["run"])
    assert (settings.lanes, settings.store) == (3, "/some/where")


def test_one_word_in_front_of_every_command(capsys, tmp_path):
    study, profile = write(tmp_path)
    assert cli.dispatch(["plan", study, "--profile", profile]) == 0
    assert "first" in capsys.readouterr().out
    assert cli.dispatch([]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in cli.COMMANDS)
    with pytest.raises(UserError, match="did you mean 'plan'"):
        cli.dispatch(["pln"])
    for module, _ in cli.COMMANDS.values():
        assert importlib.util.find_spec(module) is not None, module


def test_registered_names_are_what_the_modules_have():
    pytest.importorskip("torch")
    from datasets_ray.prompts import TEMPLATES
    from trainers.objectives import OBJECTIVES

    assert set(validate_profile.objectives()) == set(OBJECTIVES)
    assert set(validate_profile.registered("datasets_ray/prompts.py", "TEMPLATES")) == set(TEMPLATES)


def test_the_study_shown_in_the_readme_plans(tmp_path):
    text = (EXPERIMENTS / "README.md").read_text().split("```yaml\n")[1].split("```")[0]
    (tmp_path / "two.yaml").write_text(text)
    made = make_plan(tmp_path / "two.yaml", profile="tiny")
    assert len(made["arms"]) == 9 and not made["study"]["scaled"]
