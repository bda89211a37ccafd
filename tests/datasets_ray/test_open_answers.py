"""Rules for answers without options against their sources' documented steps, on the cases where readings of them would differ."""

from __future__ import annotations

import pytest

from datasets_ray.open_answers import credit, judge, yes_or_no
from datasets_ray.vqa_text import normalised


@pytest.mark.parametrize(("text", "said"), [
    ("Yes", "yes"), ("no.", "no"), ("Yes, it is.", "yes"), ("NO!", "no"), ("(yes)", "yes"), ('"No"', "no"), ("no-one", "no"),
    ("yes;", "yes"),
    # a mark beside a blank goes, one inside words parts them, a full stop always goes: the words beside it become one
    ("yes,no", None), ("Yes.It is", None), ("Yes. It is", "yes"), ("no/ maybe", "no"), ("no -way", "no"), ("a-no b- c", None),
    # with a comma between digits all marks go
    ("no-one of 1,000", None), ("no, 1,000", "no"),
    # what isn't VQA's punctuation stays with the word
    ("**Yes**", None), ("'yes'", None), ("answer:yes", None), ("answer: yes", "yes"), ("yes:", None), ("#no", None), ("yes。", None),
    ("yes or no", None), ("not", None), ("knows", None), ("", None), ("Yes, 3.5", "yes"), ("it is 5.yes", None),
    # of the full stops the first 32 go
    ("." * 31 + "yes.", "yes"), ("." * 32 + "yes.", None),
])  # fmt: skip
def test_yes_or_no_as_vlmevalkit_reads_it(text: str, said: str | None) -> None:
    assert yes_or_no(text) == said


@pytest.mark.parametrize(("text", "answers", "right"), [
    # numbers: to two decimals, with separators, in scientific form; none at the front of a longer word or list
    ("The answer is 12.", ["12"], True), ("it is 3.14159", ["3.14"], True), ("so 1,200", ["1200"], True), ("is 2.5e-3", ["0.0"], True),
    ("is .5", ["0.5"], True), ("is -3", ["3"], False), ("is 5cm", ["5"], False), ("is 5 cm", ["5"], True), ("is 1,20", ["1"], False),
    ("is 12e", ["12"], False), ("is 1,200.50", ["1200"], True), ("is 1,200.50", ["1200.5"], True), ("is 12,3456", ["6"], False),
    # strings: part of what stands behind the last phrase of a line, a single letter only beside a blank
    ("The answer is Paris", ["paris"], True), ("Paris it is not", ["paris"], False), ("the result is a tree", ["a"], True),
    ("the result is xa", ["a"], False), ("the result is tar", ["a"], False), ("x = 4 cats", ["4 cats"], True),
    ("x = 4\nso what", ["4"], False),
    ("the result is cat\nthe answer is dog", ["cat"], True), ("cat", ["cat", "dog"], True), ("no phrase with dogs", ["dog"], True),
    # a phrase with nothing behind it leaves the next one's words, a mark alone none
    ("the answer is", ["answer"], False), ("paris is ", ["paris"], False), ("lyon is ", ["lyon"], True),
    ("paris\nanswer is :", ["paris"], True),
])  # fmt: skip
def test_mmmus_open_answers(text: str, answers: list[str], right: bool) -> None:
    assert judge("mmmu", text, answers) is right


@pytest.mark.parametrize(("text", "answers", "right"), [
    ("x ^ 2\n+ 1", ["x^2+1"], True), (" X^2", ["x^2"], False), ("x\t^2", ["x^2"], False), ("", ["x"], None), ("y", ["x", "y"], True),
])  # fmt: skip
def test_ocrbenchs_formulas_lose_blanks_and_line_ends(text: str, answers: list[str], right: bool | None) -> None:
    assert judge("formula", text, answers) is right


@pytest.mark.parametrize(("text", "form"), [
    ("1,000-2,000", "10002000"), ("x-ray", "x ray"), ("x-ray - b", "xray b"), ("im", "im"), ("lets", "lets"), ("whats", "what's"),
    ("y'alld've", "y'all'd've"), ("couldntve", "couldntve"), ("U.S.", "us"), ("5. 3.2", "5 3.2"), ("a/c", "c"),
])  # fmt: skip
def test_vqas_server_forms(text: str, form: str) -> None:
    assert normalised(text) == form


def test_vqa_credit_leaves_each_annotator_out_once() -> None:
    assert credit("vqa", "Two", ["2"] * 3 + ["3"] * 7) == pytest.approx((3 * 2 / 3 + 7 * 1) / 10)
    assert credit("vqa", "  ", ["2"] * 10) is None
