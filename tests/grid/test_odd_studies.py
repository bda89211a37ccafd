"""More kinds of broken study, and settings that can't be: one clear error each with its place, exit 1, no traceback."""

from __future__ import annotations

import pytest

from grid import cli, load, options, plan
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
    "a seed of thousands of digits": ("study", "seed: 3", f"seed: {'9' * 5000}", "study.yaml:3", "seed is the number inf"),
    "epochs of hundreds of digits": (
        "study", "    epochs: 1\n    batch: 8", f"    epochs: {'9' * 400}\n    batch: 8", "study.yaml:10", "inf is impossible",
    ),
    "steps without end": (
        "study", "    epochs: 1\n    batch: 8", f"    steps: {10**28}\n    batch: 8", "study.yaml:10", "at most 1000000000 steps",
    ),
    "a thousand levels": ("study", "seed: 3", f"seed: {'[' * 1000}{']' * 1000}", "study.yaml:3", "more than 100 levels"),
    "levels that the parser dies of": ("study", "seed: 3", f"seed: {'[' * 99_999}", "study.yaml:3", "more than 100 levels"),
    "dashes that it dies of": ("study", "seed: 3", f"seed:\n  {'- ' * 99_999}1", "study.yaml:4", "more than 100 levels"),
    "aliases that multiply": (
        "study", "seed: 3", "seed:\n" + "\n".join(f"  - &a{n} [{', '.join([f'*a{n - 1}' if n else '1'] * 9)}]" for n in range(9)),
        "study.yaml:4", "more than 500,000 values (do aliases of aliases multiply?)",
    ),
    "a choice that is a list": (
        "study", "    batch: 8", "    batch: 8\n    schedule: [cosine]", "study.yaml:12", "schedule: ['cosine'] is not a choice",
    ),
    "a name that formats": ("study", "{name: first}", "{name: '{encoder:>99999999999}'}", "study.yaml:33", "can't be filled"),
    "a name that looks inside": ("study", "{name: first}", "{name: '{encoder.__class__}'}", "study.yaml:33", "did you mean 'encoder'?"),
    "a name of no row": ("study", "{name: first}", "{name: 'r{row}'}", "study.yaml:33", "can't be filled: {row}"),
    "an objective of no module": (
        "study", "    batch: 8", "    batch: 8\n    objective: {name: '..:x'}", "study.yaml:12", "is no `module:Class`",
    ),
    "phases that don't rise": ("study", "{until: 0.2,", "{until: 1.0,", "study.yaml:28", "doesn't rise"),
    "no phases": ("study", PHASES, "phases: []\ntemplates", "study.yaml:17", "no phase at all"),
    "endless epochs": ("study", "    epochs: 1\n    batch: 8", "    epochs: .inf\n    batch: 8", "study.yaml:10", "inf is impossible"),
    "an objective of NaN": (
        "study", "    batch: 8", "    batch: 8\n    objective: {name: next_token, weight: .nan}", "study.yaml:12", "nan is impossible",
    ),
    "a study made for a misspelt profile": ("study", "seed: 3", "seed: 3\nmade_for: tinny", "study.yaml:4", "did you mean 'tiny'?"),
    "an axis without values": ("study", "  encoder: [weak, strong]", "  encoder: []", "study.yaml:20", "has no values"),
    "an axis of an unknown recipe key": (
        "study", "{pretrain.data: captions}", "{pretrain.dat: captions}", "study.yaml:24", "did you mean 'data'?",
    ),
    "an axis that undoes another": (
        "study", "short: {pretrain.data: captions}", DEEP, "study.yaml:26", "to different values, the other at study.yaml:24",
    ),
    "an unused value of an unknown recipe key": (
        "study", "none: {pretrain.data: none}", "none: {pretrain.dat: none}", "study.yaml:23", "did you mean 'data'?",
    ),
    "an unused value of no recipe key": (
        "study", "none: {pretrain.data: none}", "none: {pretran.data: none}", "study.yaml:23", "did you mean 'pretrain",
    ),
    "a judge at no port": (
        "study", "seed: 3", "seed: 3\nevaluation: {judge: {url: 'http://a:99999999/v1', model: b}}", "study.yaml:4", "url can't be read",
    ),
    "a judge at two words": (
        "study", "seed: 3", "seed: 3\nevaluation: {judge: {url: 'http://a b/v1', model: b}}", "study.yaml:4", "holds a blank",
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
    "no layers": ("profile", "num_hidden_layers: 2", "num_hidden_layers: 0", "profile.yaml:39", "num_hidden_layers 0: a whole number"),
    "half a layer": ("profile", "num_hidden_layers: 2", "num_hidden_layers: 2.5", "profile.yaml:39", "num_hidden_layers 2.5: a whole"),
    "pixels divided by zero": (
        "profile", "  weak:\n    seed: 1\n    image: {size: 32, patch: 8}",
        "  weak:\n    seed: 1\n    image: {size: 32, patch: 8, std: [0.2, 0, 0.2]}", "profile.yaml:8", "pixels are divided by it",
    ),
    "rows that are a word": ("profile", "corpus, rows: 50", "corpus, rows: true", "profile.yaml:59", "rows True (a whole number"),
    "more rows than there could be": ("profile", "corpus, rows: 50", f"corpus, rows: {10**20}", "profile.yaml:59", "no more than"),
    "a checkpoint of no name": ("profile", "checkpoint: nowhere/elder", "checkpoint: ''", "profile.yaml:50", "no directory and no hub id"),
    "a checkpoint of too long a name": (
        "profile", "checkpoint: nowhere/elder", f"checkpoint: {'x' * 5000}", "profile.yaml:50", "no directory and no hub id",
    ),
    "another builder's architecture": (
        "profile", "  weak:\n    seed: 1\n", "  weak:\n    seed: 1\n    builder: transformers_vision\n",
        "profile.yaml:10", "config is open_clip's",
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
    "a flag without its value": (["--set"], "argument --set: expected one argument\n  hint: python -m grid.plan --help"),
    "an item of no number": (["--set", "arms.²=3"], "nothing can be set at '²'"),
    "no profile's name": (["--profile", ""], "--profile is empty"),
    "a cluster as large as memory": (["--simulate", "999999999x8"], "a cluster of 7,999,999,992 GPUs (at most 1,000,000"),
    "a second study": (["other.yaml"], "unrecognized arguments: other.yaml"),
}


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


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("  counts: {data: counts}", "  how many: {data: counts}\n  counts: {data: counts}", "benchmarks.how many: 'how many' is no name"),
        ("{fine: [birds]", "{Façade réel: [birds], fine: [birds]", "groups.Façade réel: 'Façade réel' is no name"),
        ("study: small", 'study: "small\\n"', "study: 'small\\n' is no name"),
        ("  - {name: first}", "  - {name: first one}\n  - {name: first}", "name 'first one' is no name"),
        ("  - {name: first}", f"  - {{name: {'x' * 300}}}\n  - {{name: first}}", "is no name"),
    ],
)
def test_a_name_that_is_none_comes_with_one_that_is(old, new, says, tmp_path, refused):
    """Spaces, letters of other alphabets, an end of line, too many letters."""
    write(tmp_path, study=changed(STUDY, old, new))
    said = refused(plan.main, ["study.yaml", "--profile", "profile.yaml"])
    assert says in said and said.count("is no name") == 1, said
    instead = said.split("at most 100; '")[1].split("' would be one")[0]
    assert instead in ("how-many", "Facade-reel", "small", "first-one", "x" * 100)


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


def test_every_command_of_the_readme_has_its_word():
    """`finegrid WORD` is `python -m MODULE` for each module that the README's list of commands names."""
    from pathlib import Path

    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    listed = {line.split()[2] for line in readme.splitlines() if line.startswith("python -m ")}
    assert listed <= {module for module, _ in cli.COMMANDS.values()}
    for word, (module, _) in cli.COMMANDS.items():
        assert module.rpartition(".")[2] == word
