"""More kinds of broken study; settings, folders and tables that can't be: one clear error each with its place, exit 1, no traceback."""

from __future__ import annotations

import json

import pytest

from grid import cli, load, options, plan
from grid import run as run_command
from tests.grid.studies import PROFILE, STUDY, changed, write

PHASES = "phases: [{until: 1.0, learning_rates: {connector: 1e-3, llm: 1e-3}}]\ntemplates"
DEEP = "short: {pretrain.phases.0.until: 1}"

# name: (file, what is replaced, by what, place of the message, what it says)
ODD: dict[str, tuple[str, str, str, str, str]] = {
    "a file of another encoding": ("study", "What moves what?", "Fa\xe7ade?", "study.yaml:2", "is not UTF-8"),
    "a zero byte": ("study", "seed: 3", "seed: 3 # \0", "study.yaml:3", "not text"),
    "a tab": ("study", "  encoder: weak\n", "\tencoder: weak\n", "study.yaml:6", "not YAML"),
    "an alias of nothing": ("study", "seed: 3", "seed: *nothing", "study.yaml:3", "undefined alias"),
    "an anchor in itself": ("study", "seed: 3", "seed: &a [*a]", "study.yaml:3", "contains itself"),
    "a merge key": ("study", "seed: 3", "seed: 3\n<<: {a: b}", "study.yaml:4", "merge key"),
    "a seed as text": ("study", "seed: 3", 'seed: "3"', "study.yaml:3", "seed is text '3'"),
    "a seed that torch can't take": ("study", "seed: 3", f"seed: {2**70}", "study.yaml:3", "is impossible"),
    "a negative rate": (
        "study", PHASES, PHASES.replace("connector: 1e-3", "connector: -1e-3"), "study.yaml:17", "connector: -0.001 is impossible",
    ),
    "a rate that is no number": (
        "study", PHASES, PHASES.replace("connector: 1e-3", "connector: .nan"), "study.yaml:17", "nan is impossible",
    ),
    "a phase that trains nothing": ("study", PHASES, PHASES.replace("connector: 1e-3, llm: 1e-3", ""), "study.yaml:17", "no learning rate"),
    "phases that don't rise": ("study", "{until: 0.2,", "{until: 1.0,", "study.yaml:28", "doesn't rise"),
    "no phases": ("study", PHASES, "phases: []\ntemplates", "study.yaml:17", "no phase at all"),
    "endless epochs": ("study", "    epochs: 1\n    batch: 8", "    epochs: .inf\n    batch: 8", "study.yaml:10", "inf is impossible"),
    "an objective of NaN": (
        "study", "    batch: 8", "    batch: 8\n    objective: {name: next_token, weight: .nan}", "study.yaml:12", "nan is impossible",
    ),
    "an axis without values": ("study", "  encoder: [weak, strong]", "  encoder: []", "study.yaml:20", "has no values"),
    "an axis of an unknown recipe key": (
        "study", "{pretrain.data: captions}", "{pretrain.dat: captions}", "study.yaml:24", "did you mean 'data'?",
    ),
    "an axis that undoes another": (
        "study", "short: {pretrain.data: captions}", DEEP, "study.yaml:26", "to different values, the other at study.yaml:24",
    ),
    "a seed twice": (
        "study", "  - {name: first}\n", "  - {name: other, at: {llm: thinker}, seeds: [1, 1]}\n  - {name: first}\n",
        "study.yaml:33", "twice",
    ),
    "a row that is no number": ("study", "row!=9", "row!=nine", "study.yaml:44", "a row is a number"),
    "a group that counts twice": ("study", "general: [counts]", "general: [counts, counts]", "study.yaml:42", "a benchmark twice"),
    "a group called as a benchmark": ("study", "general: [counts]", "birds: [counts]", "study.yaml:42", "has the name of a benchmark"),
    "an empty group": ("study", "general: [counts]", "general: []", "study.yaml:42", "its mean would be of nothing"),
    "more options than letters": ("study", "k: 4", "k: 27", "study.yaml:38", "at most 26 options"),
    "a setting in an arm of a whole section": (
        "study", "set: {finetune.batch: 2}", "set: {finetune: 2}", "study.yaml:35", "a mapping with keys",
    ),
    "an image without a size": (
        "profile", "  weak:\n    seed: 1\n    image: {size: 32, patch: 8}", "  weak:\n    seed: 1\n    image: {patch: 8}",
        "profile.yaml:8", "size missing",
    ),
    "an image of another size than its tower": (
        "profile", "  weak:\n    seed: 1\n    image: {size: 32,", "  weak:\n    seed: 1\n    image: {size: 64,",
        "profile.yaml:8", "the tower's image_size is 32",
    ),
    "pixels upside down": ("profile", "min_pixels: 64", "min_pixels: 6400", "profile.yaml:53", "above max_pixels"),
    "a typing mistake in an architecture": (
        "profile", "hidden_size: 32", "hidden_sizes: 32", "profile.yaml:39", "'hidden_size' is missing",
    ),
    "heads that don't divide": ("profile", "num_attention_heads: 2", "num_attention_heads: 3", "profile.yaml:39", "each must divide"),
    "text for a width": ("profile", "hidden_size: 32", "hidden_size: wide", "profile.yaml:39", "a number that can't be"),
    "an unknown source": (
        "profile", "  words: {source: specimens", "  words: {source: specimen", "profile.yaml:59", "did you mean 'specimens'?",
    ),
    "no rows": ("profile", "part: corpus, rows: 50", "part: corpus, rows: 0", "profile.yaml:59", "at least one row"),
    "keys of a set of sets": (
        "profile", "  words: {source", "  both: {concat: [captions], keys: {rows: 3}}\n  words: {source",
        "profile.yaml:59", "`concat` beside `keys`",
    ),
    "a base that is the profile": (
        "profile", "profile: small", "profile: small\nbase: ./profile.yaml", "profile.yaml:2", "leads back to itself",
    ),
    "a base of no text": ("profile", "profile: small", "profile: small\nbase: [tiny]", "profile.yaml:2", "base is no text"),
    "a base that isn't there": ("profile", "profile: small", "profile: small\nbase: clusters", "profile.yaml:2", "did you mean 'cluster'?"),
    "batches of no samples": (
        "profile", "miniature: true", "miniature: true\nbatch_scale: 0", "profile.yaml:4", "batch_scale: 0.0 is impossible",
    ),
    "a fourth ZeRO stage": ("profile", "zero: 1", "zero: 4", "profile.yaml:4", "zero: 4 is not a choice"),
    "an override of nothing": (
        "profile", "miniature: true", "miniature: true\noverrides: {recip: {}}", "profile.yaml:4", "did you mean 'recipe'?",
    ),
}  # fmt: skip

SETTINGS: dict[str, tuple[list[str], str]] = {
    "an unknown key": (["--set", "recipe.finetune.bach=1"], "--set recipe.finetune.bach=1: recipe.finetune.bach: unknown key"),
    "another type": (["--set", "recipe.finetune.batch=many"], "--set recipe.finetune.batch=many: recipe.finetune.batch is text 'many'"),
    "no value": (["--set", "seed"], "KEY=VALUE is expected"),
    "a key below a number": (["--set", "seed.x=2"], "--set seed.x=2: nothing can be set at 'x' (what is above it is 3, at study.yaml:3)"),
    "a key below a list": (["--set", "axes.encoder.weak.encoder=strong"], "its items are numbered from 0, at study.yaml:20"),
    "an item beyond a list": (["--set", "recipe.finetune.phases.1.until=1"], "nothing can be set at '1'"),
    "the profile's name": (["--set", "profile=cluster"], "--profile cluster"),
    "no arm": (["--arms", "zz*"], "--arms 'zz*' matches no arm"),
    "one arm of two": (["--arms", "first", "thirt"], "did you mean 'third'?"),
    "an unknown flag": (["--sett", "a=b"], "did you mean '--set'?"),
    "a second study": (["other.yaml"], "unrecognized arguments: other.yaml"),
}


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """Runs a command that must end with a message; the message."""
    monkeypatch.chdir(tmp_path)

    def run(main, words: list[str]) -> str:
        with pytest.raises(SystemExit) as leaving:
            options.run(main, words)
        said = capsys.readouterr()
        assert leaving.value.code == 1 and "Traceback" not in said.err
        return said.err

    return run


@pytest.mark.parametrize("kind", ODD)
def test_each_odd_study_gives_one_error_at_its_place(kind, tmp_path, refused):
    which, old, new, place, says = ODD[kind]
    texts = {"study": STUDY, "profile": PROFILE}
    texts[which] = changed(texts[which], old, new)
    write(tmp_path)
    (tmp_path / f"{which}.yaml").write_bytes(texts[which].encode("latin-1"))
    said = refused(plan.main, ["study.yaml", "--profile", "profile.yaml"])
    assert says in said and f"{place}: " in said, said
    assert all(line.startswith((place, "  hint", "study.yaml:28: pretrain.phases.0")) for line in said.splitlines()), said


@pytest.mark.parametrize("text", ["", "# nothing\n", "- a\n- b\n", "words\n"])
def test_a_study_without_keys_is_told(text, tmp_path, refused):
    write(tmp_path, study=text)
    assert "study.yaml:1: study.yaml holds no keys" in refused(plan.main, ["study.yaml", "--profile", "profile.yaml"])


@pytest.mark.parametrize("kind", SETTINGS)
def test_each_odd_setting_gives_one_error(kind, tmp_path, refused):
    write(tmp_path)
    words, says = SETTINGS[kind]
    said = refused(plan.main, ["study.yaml", "--profile", "profile.yaml", *words])
    assert says in said and len([line for line in said.splitlines() if not line.startswith("  hint")]) == 1, said


def test_a_benchmark_called_as_a_path_is_refused(tmp_path, refused):
    write(tmp_path, study=changed(STUDY, "  counts: {data: counts}", "  ../counts: {data: counts}\n  counts: {data: counts}"))
    assert "study.yaml:41: benchmarks.../counts: '../counts' is no name" in refused(plan.main, ["study.yaml", "--profile", "profile.yaml"])


def test_settings_come_one_by_one_or_together_and_reach_into_lists(tmp_path):
    study, profile = write(tmp_path)
    parser = options.parser("grid.plan", None)
    options.study(parser)
    given = parser.parse_args(["--set", "seed=5", "recipe.finetune.phases.0.learning_rates.llm=2e-3", study, "--set", "question=a=b"])
    assert given.study == study and given.set == ["seed=5", "recipe.finetune.phases.0.learning_rates.llm=2e-3", "question=a=b"]
    loaded = load.load(study, profile, given.set)
    assert loaded.study.seed == 5 and loaded.study.question == "a=b"
    assert loaded.arms[0].recipe.finetune.phases[0].learning_rates == {"connector": 1e-3, "llm": 2e-3}


def test_what_is_legal_and_hardly_meant_is_told_and_planned(tmp_path):
    short = "    short: {pretrain.data: captions}"
    text = changed(STUDY, short, f"{short}\n{short.replace('short', 'brief')}")
    arms = ["{name: first}", "{name: brief, at: {pretraining: brief}}", "{name: seeded, seeds: [3]}"]
    text = changed(text, "  - {name: first}", "\n".join(f"  - {arm}" for arm in arms))
    more = [
        "  - {name: nowhere, axis: encoder, from: weak, to: strong, where: pretraining=none}",
        "  - {name: unpaired, axis: llm, from: talker, to: thinker}",
        "  - {name: apart, axis: encoder, from: weak, to: strong, where: source=trained;name!=first;name!=seeded-s3}",
    ]
    text = changed(text, "row!=9}", "row!=9}\n" + "\n".join(more))
    study, profile = write(tmp_path, text)
    planned = plan.make_plan(study, profile=profile)
    doubts = planned["study"]["doubts"]
    assert len(doubts) == 5, doubts
    assert doubts[0] == "contrast nowhere: no arm is where 'pretraining=none'"
    assert doubts[1] == "contrast unpaired: no arm has llm thinker"
    assert doubts[2] == "contrast apart: no two arms differ in encoder only, from weak to strong"
    assert doubts[3].startswith("arms first and brief train the same: their pretraining")
    assert doubts[4] == "arms first and seeded-s3 train the same: what one sets is what the other has anyway"
    clean, _ = write(tmp_path)
    assert plan.make_plan(clean, profile=profile)["study"]["doubts"] == []


def test_doubts_agree_with_the_effects_that_a_report_would_find():
    """The published study: all of its contrasts have pairs, by both ways of counting; none is doubtful."""
    from pathlib import Path

    from grid.effects import matched_pairs, parse_contrast
    from grid.report.published import find_table, load_published

    results = load_published(find_table("fine_grained"))
    assert all(matched_pairs(results.arms, parse_contrast(given, results.axes)) for given in results.contrasts)
    experiments = Path(__file__).resolve().parents[2] / "experiments"
    assert plan.make_plan(experiments / "full_ablation.yaml", profile="tiny")["study"]["doubts"] == []


def test_folders_that_a_run_cannot_have(tmp_path, refused):
    write(tmp_path)
    words = ["study.yaml", "--profile", "profile.yaml", "--out"]
    (tmp_path / "file").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "run.json").write_text("{")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "run.json").write_text('{"a": 1}')
    for out, says in {
        "file": "is a file", "file/x": "can't be written", "other": "it holds other files", "damaged": "can't be read",
        "foreign": "was not written by grid.run",
    }.items():  # fmt: skip
        assert says in refused(run_command.main, [*words, out])
    assert (tmp_path / "other" / "notes.txt").read_text() == "mine"
    assert "file is a file" in refused(run_command.main, [*words, "new", "--set", "store=file"])


@pytest.mark.parametrize("text", ["", "{", "[]", '{"study": 1}', "\xff"])
def test_a_folder_that_is_no_run_is_told(text, tmp_path, refused):
    from grid import status
    from grid.report.load import load_run

    (tmp_path / "plan.json").write_bytes(text.encode("latin-1"))
    (tmp_path / "run.json").write_text(json.dumps({"state": "finished", "epoch": 1}))
    assert "plan.json" in refused(status.main, ["."])
    assert "plan.json" in refused(lambda words: load_run(words[0]), ["."])
    assert "no such folder" in refused(lambda words: load_run(words[0]), ["nowhere"])


def test_published_tables_that_cannot_be(tmp_path, refused):
    from grid.report.published import load_published

    head = "row,source,encoder,fine_grained\n"
    for text, says in {
        "a,b\n1,2\n": "t.csv:1: ", f"{head}1,trained,x,abc\n": "t.csv:2: fine_grained is 'abc'",
        f"{head}1,trained,x,nan\n": "t.csv:2: fine_grained is 'nan'",
        head: "has no rows", "\xff\xfe": "is not UTF-8",
    }.items():  # fmt: skip
        (tmp_path / "t.csv").write_bytes(text.encode("latin-1"))
        assert says in refused(lambda words: load_published(tmp_path / "t.csv"), [])
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbf" + f"{head}1,trained,x,50.5\r\n".encode())
    (arm,) = load_published(tmp_path / "t.csv").arms
    assert arm.row == 1 and arm.averages == {"fine_grained": 50.5}


def test_every_command_of_the_readme_has_its_word():
    """`finegrid WORD` is `python -m MODULE` for each module that the README's list of commands names."""
    from pathlib import Path

    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    listed = {line.split()[2] for line in readme.splitlines() if line.startswith("python -m ")}
    assert listed <= {module for module, _ in cli.COMMANDS.values()}
    for word, (module, _) in cli.COMMANDS.items():
        assert module.rpartition(".")[2] == word
