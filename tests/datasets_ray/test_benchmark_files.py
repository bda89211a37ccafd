"""Benchmarks as data: every file loads, siblings are filled in, mistakes have a file and a line, and the README says what the files say."""

from __future__ import annotations

from pathlib import Path

import pytest

from datasets_ray import benchmarks
from datasets_ray.errors import UserError
from datasets_ray.prompts import question_prompt
from datasets_ray.rows import RowTable
from datasets_ray.sources import build
from tests.datasets_ray.small_benchmarks import CASES

WHOLE = "about: a\norigin: b\nversion: c\nsource: vlmevalkit_tsv\nkeys: {file: a.tsv, split: dev}\nexpect: 3\n"
NAMED = {
    "imagenet", "imagenet_mined", "flowers", "pets", "food", "cub", "stanford_cars", "stanford_dogs", "aircraft", "mmbench",
    "mmbench_circular", "mmmu", "mmstar", "scienceqa", "ai2d", "mathvista", "ocrbench", "hallusionbench", "mm_vet", "mme", "pope",
}  # fmt: skip


def file(folder: Path, text: str, name: str = "mine") -> str:
    (folder / f"{name}.yaml").write_text(text)
    return str(folder / f"{name}.yaml")


def test_every_benchmark_has_a_file_and_every_file_a_small_release():
    assert NAMED < set(benchmarks.names()) == set(CASES)
    for name in benchmarks.names():
        made = benchmarks.load(name)
        assert made.differs and made.suffix is not None and made.rule, f"{name} says how it is asked and how it differs from the peers"
        assert made.expect or name == "imagenet"


@pytest.mark.parametrize("name", benchmarks.names())
def test_a_benchmark_loads_from_its_layout(name: str, tmp_path: Path):
    CASES[name].write(tmp_path)
    made = benchmarks.load(name)
    manifest = build(made.spec(allow_subset=True), tmp_path / "out", lambda _: tmp_path, str(tmp_path))
    assert manifest["rows"] == CASES[name].rows == len(RowTable(tmp_path / "out"))
    if made.expect is None:
        return
    assert manifest["subset"]["expected"] == made.expect
    with pytest.raises(UserError, match=rf"records, its release has {made.expect:,}"):
        build(made.spec(), tmp_path / "short", lambda _: tmp_path, str(tmp_path))


@pytest.mark.parametrize("name", ["pets", "food", "cub", "foci_pets", "foci_food"])
def test_real_photographs_load(name: str, tmp_path: Path, data_root: Path):
    manifest = build(benchmarks.load(name).spec(allow_subset=True), tmp_path, lambda _: tmp_path, str(data_root))
    assert manifest["rows"] >= 100 and manifest["subset"]["found"] == manifest["rows"] < manifest["subset"]["expected"]
    assert all(row["label"] for row in RowTable(tmp_path))


@pytest.mark.parametrize(
    ("name", "things"),
    [("foci_pets", "pets"), ("foci_food", "dishes"), ("foci_cars", "cars"), ("foci_flowers", "flowers"), ("foci_aircraft", "aircrafts")],
)
def test_foci_is_asked_in_its_own_words(name: str, things: str, tmp_path: Path):
    """As `prepare_prompt_mc` of FOCI writes a question, but for the conversation around it."""
    CASES[name].write(tmp_path)
    made = benchmarks.load(name)
    build(made.spec(allow_subset=True), tmp_path / "out", lambda _: tmp_path, str(tmp_path))
    for row in RowTable(tmp_path / "out"):
        listed = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCD", row["options"]))
        words = f"Which of these {things} is shown in the image?\nChoices:\n{listed}\nAnswer with the letter from the given choices"
        assert question_prompt(row, made.suffix or "") == f"<image>\n{words} directly." and len(row["options"]) == 4
        assert "Choices" not in question_prompt(row, "", listed=False)


@pytest.mark.parametrize("key", ["question", "lead"])
@pytest.mark.parametrize("value", [3, "", "Two\nlines"])
def test_focis_words_are_a_line(key: str, value: object, tmp_path: Path):
    CASES["foci_pets"].write(tmp_path)
    with pytest.raises(UserError, match=rf"{key}: .*a line of text\)\n.*leave {key} out"):
        build({"source": "foci", "set": "oxford_pet", key: value}, tmp_path / "out", lambda _: tmp_path, str(tmp_path))


def test_a_sibling_says_only_what_differs(tmp_path: Path):
    circular, plain = benchmarks.load("mmbench_circular"), benchmarks.load("mmbench")
    assert circular.keys == {**plain.keys, "circular": True} and circular.version == plain.version and circular.metric == "circular"
    file(tmp_path, WHOLE, "below")
    mine = benchmarks.load(file(tmp_path, "include: below\nkeys: {split: test}\nexpect: null\nrows: 7\nmetric: mean_per_class\n"))
    assert mine.keys == {"file": "a.tsv", "split": "test"} and (mine.expect, mine.rows, mine.metric) == (None, 7, "mean_per_class")
    assert mine.spec(rows=2) == {"source": "vlmevalkit_tsv", "file": "a.tsv", "split": "test", "rows": 2}
    assert benchmarks.load(file(tmp_path, "include: pope\nexpect: 5\n")).keys["set"] == "pope"


@pytest.mark.parametrize(("text", "said"), [
    (WHOLE + "metrik: accuracy\n", r"mine\.yaml:7: metrik: unknown key.*\n.*did you mean 'metric'"),
    (WHOLE + "metric: acuracy\n", r"mine\.yaml:7: metric: unknown metric 'acuracy'\n.*did you mean 'accuracy'"),
    (WHOLE + "rule: vlmeval\n", r":7: rule: unknown rule 'vlmeval'\n.*did you mean 'vlmevalkit'"),
    (WHOLE + "negatives: minded\n", r":7: negatives: 'minded' is not a choice"), (WHOLE + "expect: 5\n", "key 'expect' twice"),
    (WHOLE.replace("tsv\nkeys", "tvs\nkeys"), r":4: source: unknown source 'vlmevalkit_tvs'\n.*did you mean 'vlmevalkit_tsv'"),
    (WHOLE.replace("expect: 3\n", ""), "expect: missing.*short copy"), (WHOLE.replace("about: a\n", ""), "about: missing"),
    (WHOLE + "metric: circular\nzeroshot: true\n", ":7: metric: circular"),
    (WHOLE + "templates: ['a {}']\nensemble: pets\n", ":8: `templates`"), ("- a\n", "holds no keys"),
    (WHOLE.replace("split: dev", "expect: 4"), r":5: keys\.expect: it is no key of a source"),
    ("include: mmbnch\n", r"mine\.yaml:1: no benchmark 'mmbnch'.*\n.*did you mean 'mmbench'"),
    ("include: [pope]\n", ":1: include is no text"),
    ("include: mine\n", r"mine\.yaml:1: include: 'mine' leads back to itself"),
])  # fmt: skip
def test_a_mistake_has_its_place(text: str, said: str, tmp_path: Path):
    with pytest.raises(UserError, match=said):
        benchmarks.load(file(tmp_path, text))


def test_includes_in_a_circle_are_one_error(tmp_path: Path):
    file(tmp_path, "include: two\n", "one")
    file(tmp_path, "include: one\n", "two")
    with pytest.raises(UserError, match=r"one\.yaml:1: include: 'two'|two\.yaml:1: include: 'one' leads back to itself"):
        benchmarks.load(str(tmp_path / "one.yaml"))
    with pytest.raises(UserError, match="did you mean 'mmstar'"):
        benchmarks.load("mmstars")


def test_the_readme_is_what_the_files_say(repository: Path, capsys: pytest.CaptureFixture[str]):
    assert benchmarks.main([]) == 0
    table = capsys.readouterr().out
    assert table in (repository / "experiments" / "benchmarks" / "README.md").read_text(encoding="utf-8"), (
        "python -m datasets_ray.benchmarks"
    )
    assert benchmarks.main(["mmbench_circular"]) == 0 and '"circular": true' in capsys.readouterr().out
