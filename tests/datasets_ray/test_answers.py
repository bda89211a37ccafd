"""Each documented step of the answer rules, with written-down cases, and the differences from their sources by name."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from datasets_ray.answers import RULES, extract, lettered, main, read_cases
from datasets_ray.errors import UserError

PETS = {"A": "Beagle", "B": "Boxer", "C": "Pug", "D": "Russian Blue", "E": "Sphynx"}

VLMEVALKIT = [
    # 1 refusals, and the failed call that falls through to the option texts
    ("Sorry, I can't help with images of people yet.", "Z"),
    ("I can't process this file. B", "Z"),
    ("I'm sorry, but without the image provided I can only guess: A", "Z"),
    ("Cannot determine the answer", "Z"),
    ("Failed to obtain answer via API", None),
    ("Failed to obtain answer via API. Pug", "C"),
    ("Failed to obtain answer via API. The answer is B", None),
    # 2 punctuation becomes space, quotes and hyphens stay
    ("B", "B"),
    (" B.\n", "B"),
    ("(B)", "B"),
    ("[B]", "B"),
    ("**B**", "B"),
    ("{B}:", "B"),
    ("#B;!", "B"),
    ("B.Boxer", "B"),
    ("'B'", None),
    ('"B"', None),
    ("B-", None),
    ("b", None),
    ("", None),
    # 3 exactly one letter, its first occurrence among the last four words
    ("I would say B", "B"),
    ("B it is then", "B"),
    ("B is the right one", None),
    ("It is B for me and you", None),
    ("B or so I think B", None),
    ("B B", "B"),
    ("A or B", None),
    ("a cat, so E", "E"),
    ("It shows A cat", "A"),
    # 4 a Z of its own, only when no option letter is there
    ("Z", "Z"),
    ("none of them (Z) I fear, sadly, at all", "Z"),
    ("Z or B", "B"),
    # 5 "answer is X", A to D only, no word boundary
    ("The correct answer is **B**. Here's why: the coat is short and brindled", "B"),
    ("Answer is C because of the curled tail and the flat face", "C"),
    ("the answer is a small dog with long ears, I suppose", "A"),
    ("the answer is E since there is no fur on it anywhere", None),
    ("A and B look alike, but the answer is B", "B"),
    # 6 exactly one option text in the answer, in either case, unless the answer is too long
    ("beagle", "A"),
    ("This is a RUSSIAN BLUE cat", "D"),
    ("Beagle or Boxer", None),
    ("Pug" + "." * 62, None),
    ("Pug" + "." * 61, "C"),
    ("something else", None),
]


@pytest.mark.parametrize(("text", "letter"), VLMEVALKIT)
def test_vlmevalkit_steps(text: str, letter: str | None) -> None:
    assert sum(map(len, PETS.values())) == 32  # the length limit of step 6 is twice this
    assert extract("vlmevalkit", text, PETS) == letter


def test_vlmevalkit_knows_only_the_letters_shown() -> None:
    two = {"A": "cat", "B": "dog"}
    assert extract("vlmevalkit", "C", two) is None
    assert extract("vlmevalkit", "The answer is C", two) is None
    assert extract("vlmevalkit", "The answer is D, the dog", two) is None
    assert extract("vlmevalkit", "the dog", two) == "B"
    assert extract("vlmevalkit", "D", {"A": "D", "B": "x"}) == "A"


def test_vlmevalkit_takes_the_whole_text_of_one_option_only() -> None:
    nested = {"A": "rose", "B": "primrose"}
    assert extract("vlmevalkit", "primrose", nested) is None
    assert extract("vlmevalkit", "rose", nested) == "A"


def test_vlmevalkit_deviations(monkeypatch: pytest.MonkeyPatch) -> None:
    """The source's VERBOSE switch isn't read, and the options aren't changed."""
    monkeypatch.setenv("VERBOSE", "1")
    options = dict(PETS)
    assert extract("vlmevalkit", "I would say A", options) == "A"
    assert extract("vlmevalkit", "BEAGLE", options) == "A"
    assert options == PETS
    assert len(RULES["vlmevalkit"].deviations) == 3


@pytest.mark.parametrize(
    ("text", "letter"), [("B", "B"), (" B\n", "B"), ("B.", None), ("b", None), ("(B)", None), ("F", None), ("", None), ("Boxer", None)]
)
def test_strict(text: str, letter: str | None) -> None:
    assert extract("strict", text, PETS) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [("B", "B"), ("b) it", "B"), ("Beagle", "B"), ("Daffodil", "D"), ("an ant", "A"), (" B", None), ("It is B", None), ("", None)],
)
def test_foci(text: str, letter: str | None) -> None:
    assert extract("foci", text, PETS) == letter


def test_foci_tries_the_letters_shown() -> None:
    assert extract("foci", "E", PETS) == "E"
    assert extract("foci", "E", dict(list(PETS.items())[:4])) is None


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"), ("b", "B"), (" B ", "B"), ("B. Boxer", "B"), ("B.", "B"),
        ("b. Boxer", None), ("A) x", None), ("(A)", None), ("F", None), ("F. x", None),
    ],
)
def test_lmms(text: str, letter: str | None) -> None:
    assert extract("lmms", text, PETS) == letter


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        # 1 the letter alone, an option or not
        ("B", "B"), (" B\n", "B"), ("b", None), ("B.", None), ("(B)", None), ("F", None), ("", None),
        # 2 a letter, a full stop, a blank
        ("B. Boxer", "B"), ("B.Boxer", None), ("b. Boxer", None), ("F. x", None), ("E. The answer is B.", "E"),
        # 3 one `The answer is X` and something behind
        ("The answer is B.", "B"), ("I think. The answer is B, a Boxer.", "B"), ("The answer is Boxer", "B"), ("The answer is B", None),
        ("The answer is B\n", None), ("The answer is **B**.", None), ("the answer is B.", None), ("The answer is F.", None),
        ("The answer is B. The answer is B.", None), ("It is B.", None), ("Boxer", None),
    ],
)  # fmt: skip
def test_llava(text: str, letter: str | None) -> None:
    assert extract("llava", text, PETS) == letter


def test_llava_takes_a_letter_that_is_no_option_for_the_answer() -> None:
    two = {"A": "cat", "B": "dog"}
    assert extract("llava", "E. The answer is B.", two) is None
    assert extract("llava", "G. The answer is B.", two) == "B"


SIX = {"A": "cat", "B": "wildcat", "C": "a dog", "D": "D'Artagnan's hat", "E": "émeu", "F": "none of A to E"}
EVERY = ("strict", "vlmevalkit", "lmms", "foci", "llava", "lmms_mcq", "mmmu")
TRICKY: list[tuple[str, tuple[str | None, ...]]] = [
    ("F", ("F", "F", "F", "F", "F", "F", "F")),
    ("f", (None, None, "F", "F", None, None, None)),
    ("B\n", ("B", "B", "B", "B", "B", "B", None)),  # MMMU's parser takes no white space off
    ("(B)", (None, "B", None, None, None, "B", "B")),
    ("B:", (None, "B", None, "B", None, "B", "B")),
    ("**B**", (None, "B", None, None, None, "B", None)),
    ("Answer: B", (None, "B", None, "A", None, "B", "B")),
    ("B. wildcat", (None, "B", "B", "B", "B", "B", "B")),
    ("E.", (None, "E", "E", "E", None, "E", "E")),
    ("wildcat", (None, None, None, None, None, None, None)),  # `cat` is in it too
    ("cat", (None, "A", None, "C", None, None, None)),
    ("A dog", (None, "A", None, "A", None, "A", "A")),
    ("It is A dog I see there today", (None, "C", None, None, None, "A", "A")),
    ("A and B", (None, None, None, "A", None, "A", "B")),
    ("The answer is F. It is big", (None, "F", None, None, "F", "F", "F")),
    ("The answer is F because nothing else here fits at all", (None, None, None, None, "F", "F", "F")),  # VLMEvalKit's phrase knows A to D
    ("The answer is B. The answer is C.", (None, "B", None, None, None, "C", "C")),
    ("The answer is Beagle", (None, "B", None, None, "B", "B", None)),
    ("ÉMEU", (None, "E", None, None, None, "E", None)),
    ("Ｂ", (None, None, None, None, None, None, None)),  # noqa: RUF001
    ("none of A to E", (None, "F", None, None, None, "E", "E")),
    ("Z", (None, "Z", None, None, None, None, None)),
    ("G", (None, None, None, None, None, None, None)),
    ("G. The answer is B.", (None, "B", None, None, "B", "B", "B")),
    ("", (None, None, None, None, None, None, None)),
]


@pytest.mark.parametrize(("text", "letters"), TRICKY)
def test_every_rule_on_tricky_answers(text: str, letters: tuple[str | None, ...]) -> None:
    assert set(EVERY) == set(RULES)
    assert tuple(extract(rule, text, SIX) for rule in EVERY) == letters


@pytest.mark.parametrize(("text", "shared", "mmmu"), [
    # marks at the ends go, each kind once
    ("'B.'", "B", "B"), ('"B"', "B", None), ("?!", None, None), ("  ", None, None), ("b", None, None),
    # lmms_mcq: start, end, phrase (any capital letter behind it, the last of them), then how the letter is written
    ("D, I think", "D", None), ("I think D", "D", "D"), ("best answer is C, not A", "A", "A"),
    ("I choose the small Dog or the Cat", "C", None),
    ("It is (C), not (A) nor B) ok", "A", "A"), ("x: C) y", "C", None), ("C: the pug, D: the cat ok", "C", "C"), ("A.B", "A", "B"),
    ("Not A. but B. or", "B", "A"), ("Best guess", "B", None), ("答案是C", "C", "C"), ("답은 C입니다", "C", None),
    ("The answer is not here", None, None),
    # a letter before a blank, inside a word too
    ("in the USA today", "A", "A"),
    # mmmu: brackets over blanks over stops, the last of several; of several without a blank in front the first option's
    ("(A) or (C)", "C", "C"), ("(C) (B) A", "A", "B"), ("B C or A x", "B", "A"), ("XB. and YC.", "B", "C"), ("SB and SA too", "A", "A"),
    # mmmu: an option's text in more than five words
    ("I think it's a pug because of the face", None, "C"), ("I see a pug and a beagle in the picture", None, "A"),
    ("I see a pug here", None, None),
])  # fmt: skip
def test_the_readers_that_lmms_eval_shares(text: str, shared: str | None, mmmu: str | None) -> None:
    assert (extract("lmms_mcq", text, PETS), extract("mmmu", text, PETS)) == (shared, mmmu)


def test_letters_in_the_order_shown() -> None:
    assert lettered(["cat", "dog"]) == {"A": "cat", "B": "dog"}
    with pytest.raises(UserError):
        lettered(["x"] * 27)


def test_an_unknown_rule_names_the_nearest() -> None:
    with pytest.raises(UserError, match="vlmevalkit"):
        extract("vlmeval", "A", PETS)


def test_command_reads_and_writes_one_case_a_line(repository: Path) -> None:
    cases = [("B.", "B"), ("I am sure it is neither", None), ("Z", "Z"), ("pug", "C")]
    lines = "".join(json.dumps({"answer": text, "options": PETS}) + "\n" for text, _ in cases)
    done = subprocess.run(
        [sys.executable, "-m", "datasets_ray.answers", "--rule", "vlmevalkit"], input=lines, capture_output=True, text=True, cwd=repository
    )
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["letter"] for line in done.stdout.splitlines()] == [letter for _, letter in cases]


@pytest.mark.parametrize(
    "line",
    [
        "not json", "", "[]", '{"answer": "A"}', '{"options": {"A": "x"}}', '{"answer": 3, "options": {"A": "x"}}',
        '{"answer": "A", "options": ["x"]}', '{"answer": "A", "options": {"a": "x"}}', '{"answer": "A", "options": {"AB": "x"}}',
        '{"answer": "A", "options": {"A": 1}}', '{"answer": "A", "options": {"A": "x", "A": "y"}}',
    ],
)
def test_a_bad_line_is_named_by_its_number(line: str) -> None:
    good = '{"answer": "A", "options": {"A": "x"}}'
    with pytest.raises(UserError, match="line 2"):
        read_cases("strict", [good, line, good], io.StringIO())


def test_command_ends_with_one_message(repository: Path) -> None:
    command = [sys.executable, "-m", "datasets_ray.answers", "--rule", "strict"]
    done = subprocess.run(command, input="{\n", capture_output=True, text=True, cwd=repository)
    assert done.returncode == 1
    assert "line 1" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("locale", ["C.UTF-8", "C", "POSIX"])
def test_command_reads_utf8_whatever_the_locale(repository: Path, locale: str) -> None:
    command = [sys.executable, "-X", "utf8=0", "-m", "datasets_ray.answers", "--rule", "vlmevalkit"]
    case = json.dumps({"answer": "un Épagneul", "options": {"A": "épagneul", "B": "猫"}}, ensure_ascii=False)
    second = json.dumps({"answer": "(B)", "options": {"A": "x", "B": "y"}})
    environment = {**os.environ, "LC_ALL": locale, "PYTHONCOERCECLOCALE": "0"}
    text = f"\ufeff{case}\r\n{second}\r\n\n  \n".encode()
    done = subprocess.run(command, input=text, capture_output=True, cwd=repository, env=environment)
    assert (done.returncode, done.stdout) == (0, b'{"letter": "A"}\n{"letter": "B"}\n'), done.stderr
    done = subprocess.run(command, input=second.encode() + b"\n\xff\n", capture_output=True, cwd=repository, env=environment)
    assert done.returncode == 1 and b"line 2: byte 1 of the line is not UTF-8" in done.stderr and b"Traceback" not in done.stderr
    done = subprocess.run(command, input=b"", capture_output=True, cwd=repository, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_list_shows_sources_and_deviations(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    shown = capsys.readouterr().out
    assert all(rule.name in shown and rule.source in shown for rule in RULES.values())
    assert "e8e78f05" in shown and "VERBOSE" in shown
