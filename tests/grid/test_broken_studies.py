"""Kinds of broken study: each gives one clear error with its line, exit 1 and no traceback."""

from __future__ import annotations

import subprocess
import sys

import pytest

from grid import options, plan
from tests.grid.studies import PROFILE, STUDY, changed, write

# name: (file, what is replaced, by what, what the message says, text on the line it points at)
BROKEN: dict[str, tuple[str, str, str, str, str]] = {
    "unknown key": ("study", "seed: 3", "sead: 3", "sead: unknown key", "sead"),
    "unknown key, nearest name": ("study", "    batch: 8", "    batch: 8\n    epoch: 1", "did you mean 'epochs'?", "epoch: 1"),
    "missing key": ("study", "question: What moves what?\n", "", "question: missing", "study: small"),
    "wrong type": ("study", "seed: 3", "seed: three", "seed is text 'three'", "seed: three"),
    "truth for a number": ("study", "seed: 3", "seed: true", "seed is true", "seed: true"),
    "text for a list": ("study", "groups: {fine: [birds]", "groups: {fine: birds", "groups.fine is text 'birds'", "groups"),
    "list for a mapping": (
        "study",
        "templates: {talker: vicuna_v1, thinker: chatml}",
        "templates: [talker]",
        "templates is a list",
        "templates",
    ),
    "impossible number": ("study", "    batch: 8", "    batch: 0", "recipe.pretrain.batch: 0 is impossible", "batch: 0"),
    "impossible share": ("study", "    batch: 8", "    batch: 8\n    warmup: 1.5", "at most 1.0", "warmup"),
    "learning rate of minus one": (
        "study", "  finetune:\n    data: chats", "  finetune:\n    optimizer: {eps: -1}\n    data: chats", "eps: -1.0 is impossible", "eps",
    ),
    "phases that don't end": (
        "study",
        "until: 1.0, learning_rates: {connector: 1e-3, llm: 1e-3}}]\ntemplates",
        "until: 0.9, learning_rates: {llm: 1e-3}}]\ntemplates",
        "the last phase ends at 0.9",
        "until: 0.9",
    ),
    "unknown part": (
        "study",
        "learning_rates: {connector: 1e-3, llm: 1e-3}}]\ntemplates",
        "learning_rates: {conector: 1e-3}}]\ntemplates",
        "unknown part 'conector'",
        "conector",
    ),
    "both epochs and steps": ("study", "    batch: 4", "    batch: 4\n    steps: 9", "both `epochs` and `steps`", "finetune:"),
    "key twice": ("study", "seed: 3", "seed: 3\nseed: 4", "key 'seed' twice", "seed: 4"),
    "not YAML": ("study", "seed: 3", "seed: [3", "not YAML", "compatibility"),
    "a tag": ("study", "seed: 3", "seed: !!python/object/apply:os.getcwd []", "tags are not read", "seed"),
    "an axis without a base value": ("study", "encoder: [weak, strong]", "encoder: [weak, strong]\n  other: [x]", "axis 'other'", "base"),
    "unknown encoder": (
        "study",
        "encoder: [weak, strong]",
        "encoder: {weak: {encoder: weak}, strong: {encoder: stronk}}",
        "unknown encoder of the profile 'stronk'",
        "name: second",
    ),
    "unknown data set": (
        "study",
        "short: {pretrain.data: captions}",
        "short: {pretrain.data: caption}",
        "did you mean 'captions'?",
        "short:",
    ),
    "unknown axis": ("study", "at: {encoder: strong}", "at: {encodr: strong}", "unknown axis 'encodr'", "encodr"),
    "unknown value of an axis": ("study", "at: {encoder: strong}", "at: {encoder: srong}", "did you mean 'strong'?", "srong"),
    "axis without base": ("study", ", updating: connector}", "}", "axis 'updating' is missing", "base"),
    "arm defined twice": ("study", "name: second, row: 2", "name: first, row: 2", "arm 'first' defined twice", "row: 2"),
    "same arm twice": (
        "study",
        "  - {name: first}",
        "  - {name: first}\n  - {name: zeroth}",
        "'first' and 'zeroth' are the same",
        "zeroth",
    ),
    "row twice": ("study", "name: first}", "name: first, row: 2}", "row 2 is claimed by", "name: second"),
    "zip of different lengths": (
        "study", "  - {name: first}", "  - {name: first}\n  - {zip: {encoder: [weak, strong], llm: [thinker]}}", "different lengths", "zip",
    ),
    "axis set twice": (
        "study",
        "  - {name: first}",
        "  - {name: first}\n  - {at: {llm: thinker}, product: {llm: [thinker]}}",
        "axis 'llm' is set twice",
        "product",
    ),
    "two axes, one key": (
        "study",
        "    full:\n",
        "    full:\n      pretrain.data: chats\n",
        "set by axis 'pretraining' and by axis 'updating'",
        "pretrain.data: chats",
    ),
    "unknown key in an arm": ("study", "set: {finetune.batch: 2}", "set: {finetune.bach: 2}", "did you mean 'batch'?", "bach"),
    "no key of the recipe": (
        "study",
        "set: {finetune.batch: 2}",
        "set: {fintune.batch: 2}",
        "fintune.batch: no key of the recipe",
        "fintune",
    ),
    "name with a hole": ("study", "name: first}", "name: '{colour}'}", "can't be filled", "colour"),
    "unknown benchmark": ("study", "fine: [birds]", "fine: [bird]", "unknown benchmark 'bird'", "groups"),
    "unknown axis of a contrast": ("study", "axis: encoder,", "axis: vision,", "unknown axis 'vision'", "stronger"),
    "unknown value of a contrast": ("study", "to: strong,", "to: stronger,", "contrasts[0].to", "stronger"),
    "condition of a contrast": ("study", "pretraining=short;row!=9", "pretraining~short", "cannot read the clause", "stronger"),
    "control of no arm": ("study", "controls: {arms: [first]}", "controls: {arms: [frist]}", "did you mean 'first'?", "controls"),
    "no template": ("study", "talker: vicuna_v1, ", "", "no conversation template for 'talker'", "templates"),
    "unknown template": ("study", "vicuna_v1", "vicuna_v2", "unknown conversation template 'vicuna_v2'", "templates"),
    "unknown rule": ("study", "mining:", "evaluation: {rule: vlmevalkat}\nmining:", "did you mean 'vlmevalkit'?", "evaluation"),
    "miner is an encoder": ("study", "miner: miner", "miner: strong", "is an arm's encoder", "mining"),
    "no miner": ("study", "mining: {miner: miner, k: 4}\n", "", "mining: missing", "benchmarks"),
    "unknown compatibility": ("study", "llava-1.5", "llava-1.6", "unknown set 'llava-1.6'", "compatibility"),
    "stale assumption": ("study", "value: 8", "value: 9", "is not the file's value", "value: 9"),
    "assumption about nothing": (
        "study",
        "key: recipe.pretrain.batch",
        "key: recipe.pretrain.bat",
        "no key 'recipe.pretrain.bat'",
        "bat,",
    ),
    "no published table": ("study", "seed: 3", "seed: 3\npublished: nowhere.csv", "no file 'nowhere.csv'", "published"),
    "unknown reference": ("study", "released: rival", "released: rivel", "did you mean 'rival'?", "rivel"),
    "fresh weights that nothing trains": (
        "profile",
        "      - {data: words, phases: [{until: 1, learning_rates: {llm: 1e-3}}], steps: 2, batch: 8}\n",
        "      []\n",
        "nothing trains it",
        "thinker",
    ),
    "weights of nowhere": ("profile", "    initial: talker\n", "", "no origin", "thinker"),
    "weights in a circle": ("profile", "initial: talker", "initial: thinker", "a circle", "thinker"),
    "data of nowhere": ("profile", "  words: {source: specimens, ", "  words: {", "one of `source` and `concat`", "words:"),
    "rows unknown": ("profile", "part: corpus, rows: 50", "part: corpus", "no number of rows", "words:"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_each_kind_of_broken_study_gives_one_clear_error(kind, tmp_path, capsys, monkeypatch):
    which, old, new, says, marker = BROKEN[kind]
    texts = {"study": STUDY, "profile": PROFILE}
    texts[which] = changed(texts[which], old, new)
    write(tmp_path, **texts)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as leaving:
        options.run(plan.main, ["study.yaml", "--profile", "profile.yaml", "--json"])
    said = capsys.readouterr()
    assert leaving.value.code == 1
    assert says in said.err
    lines = [number for number, line in enumerate(texts[which].splitlines(), 1) if marker.strip() in line]
    assert any(f"{which}.yaml:{number}: " in said.err for number in lines), f"lines {lines} expected in: {said.err}"
    assert len([line for line in said.err.splitlines() if not line.startswith("  hint")]) == 1, said.err
    assert "Traceback" not in said.err and not said.out


def test_there_are_thirty_kinds():
    assert len(BROKEN) >= 30


def test_all_mistakes_of_study_profile_and_settings_are_told_at_once(tmp_path, capsys, monkeypatch):
    study = changed(changed(STUDY, "seed: 3", "seed: three"), "    batch: 8", "    batch: 0")
    write(tmp_path, study, changed(PROFILE, "miniature: true", "miniature: perhaps"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        options.run(plan.main, ["study.yaml", "--profile", "profile.yaml", "--set", "reciep.finetune.batch=2", "--set", "store"])
    said = capsys.readouterr().err
    for part in (
        "study.yaml:3: seed",
        "study.yaml:11: recipe.pretrain.batch",
        "profile.yaml:3: miniature",
        "did you mean 'recipe'?",
        "KEY=VALUE",
    ):
        assert part in said


def test_unknown_objective_profile_file_and_arm(tmp_path, capsys, monkeypatch):
    write(tmp_path, changed(STUDY, "    batch: 8", "    batch: 8\n    objective: {name: next_tokens}"))
    monkeypatch.chdir(tmp_path)
    tries = {
        "did you mean 'next_token'?": ["study.yaml", "--profile", "profile.yaml"],
        "no profile 'tinny'": ["study.yaml", "--profile", "tinny"],
        "no file studi.yaml": ["studi.yaml"],
    }
    for says, words in tries.items():
        with pytest.raises(SystemExit) as leaving:
            options.run(plan.main, words)
        assert leaving.value.code == 1 and says in capsys.readouterr().err
    write(tmp_path)
    with pytest.raises(SystemExit):
        options.run(plan.main, ["study.yaml", "--profile", "profile.yaml", "--arms", "frist"])
    assert "did you mean 'first'?" in capsys.readouterr().err


def test_from_a_shell_there_is_no_traceback(tmp_path):
    study, profile = write(tmp_path, changed(STUDY, "seed: 3", "sead: 3"))
    done = subprocess.run([sys.executable, "-m", "grid", "plan", study, "--profile", profile], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert "study.yaml:3: sead: unknown key" in done.stderr and "Traceback" not in done.stderr


OWN = """\
from somewhere import Elsewhere

class Own(Protocol):
    def __init__(self, weight: float, *, stream: str = "text", other=None): ...

class Any_(Elsewhere):
    pass

class Loose:
    def __init__(self, **keys): ...
"""


@pytest.mark.parametrize(
    ("objective", "says", "hint"),
    [
        ("{name: next_token, strem: text}", "objective 'next_token' has no key 'strem' (it takes stream, most_logits)", "'stream'?"),
        ("{name: next_token, most_logits: many}", "most_logits of objective 'next_token' is 'many' (a whole number is expected)", ""),
        ("{name: contrastive, scale: 2}", "objective 'contrastive' has no key 'scale' (it takes none)", "{name: contrastive}"),
        ("{name: 'mine:Own', weight: 2, strean: x}", "'mine:Own' has no key 'strean' (it takes weight, stream, other)", "'stream'?"),
        ("{name: 'mine:Own'}", "objective 'mine:Own' without weight", "add `weight: ...`"),
        ("{name: 'mine:Owm', weight: 1}", "objective 'mine:Owm': mine has no class 'Owm'", "'Own'?"),
        ("{name: 'mine:Own', weight: true}", "weight of objective 'mine:Own' is True (a number is expected)", ""),
        *((text, "", "") for text in (
            "{name: 'mine:Own', weight: 1, stream: text, other: [3]}", "{name: 'mine:Any_', whatever: 1}", "{name: 'mine:Loose', x: 1}",
            "{name: 'mine:Elsewhere', x: 1}", "{name: 'not_here:Thing', x: 1}", "{name: next_token, stream: text}",
        )),
    ],
)  # fmt: skip
def test_keys_that_an_objective_does_not_take_are_told_by_the_plan_and_nothing_is_imported(objective, says, hint, tmp_path, monkeypatch):
    """What only running the code would tell is left to the check."""
    import sys

    from datasets_ray.errors import UserErrors
    from grid import signatures
    from grid.plan import make_plan

    (tmp_path / "mine.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    signatures.keys_of.cache_clear()
    study, profile = write(tmp_path, changed(STUDY, "    batch: 8", f"    batch: 8\n    objective: {objective}"))
    if not says:
        assert make_plan(study, profile=profile)["arms"]
    else:
        with pytest.raises(UserErrors) as told:
            make_plan(study, profile=profile)
        (error,) = told.value.errors
        assert says in str(error) and hint in error.hint and error.where.endswith("study.yaml:12"), str(error)
    assert "mine" not in sys.modules
    signatures.keys_of.cache_clear()
