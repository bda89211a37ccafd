"""Answers to questions without options: an answer's text and the right answers in, right, wrong or unreadable out.

A row's meta names its rule under `open`. No rule guesses: what it can't read is None, counted as invalid and wrong.

    yes_no    VLMEvalKit `YOrN_Extraction` (e8e78f05): lower case, VQA's punctuation out (not `*`, `:` and quotes, so `**Yes**` says
              neither); `yes` or `no` as a word, not both
    mmmu      MMMU's `parse_open_response` and `eval_open`: the shortest end of each line behind a phrase such as "answer is", and the
              numbers in it; right when a right answer is part of one of them, or a number equals it to two decimals
    contains  OCRBench: a right answer is part of the answer, case aside
    formula   OCRBench's handwritten formulas: the same without any blanks, case counting
    exact     equal but for case, white space and punctuation around it
    number    the last number in the answer equals the right one to as many decimals as that is written with
    vqa       VQA accuracy: the share of agreement with the annotators (datasets_ray.vqa_text)
    judged    needs a judge model (trainers.judge); without one the benchmark is not run

VLMEvalKit scores MMMU's open questions as choices between the right answer and "Other Answers" that the model never saw (its issue 1617);
these rules don't.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence

from datasets_ray.errors import UserError, nearest
from datasets_ray.vqa_text import agreement, unpunctuated

YES_NO, MMMU, JUDGED = "yes_no", "mmmu", "judged"
CONTAINS, FORMULA = "contains", "formula"
Judge = Callable[[str, Sequence[str]], float | None]
"""(text, right answers) → how right it is, 0 to 1 (most rules know only the two), or None when it can't be read."""

_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?")
_FULL_STOP = re.compile(r"(?<!\d)\.(?!\d)")
_MMMU_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)
"""What MMMU takes for a number, one pattern after the other: 1,200; 2.5e-3; 12 or .5, but neither the 5 of `5cm` nor the 1 of `1,20`."""
_TRIVIAL = (*":,.!?;'",)
_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")


def yes_or_no(text: str) -> str | None:
    """`yes` or `no`, None when it is neither or both."""
    said = set(unpunctuated(text.lower(), _FULL_STOP).split()) & {"yes", "no"}
    return said.pop() if len(said) == 1 else None


def _yes_no(text: str, answers: Sequence[str]) -> bool | None:
    said = yes_or_no(text)
    return None if said is None else said in [answer.strip().lower() for answer in answers]


def _bare(text: str) -> str:
    return " ".join(text.casefold().split()).strip(string.punctuation + " ")


def _exact(text: str, answers: Sequence[str]) -> bool | None:
    said = _bare(text)
    return said in [_bare(answer) for answer in answers] if said else None


def _contains(text: str, answers: Sequence[str]) -> bool | None:
    if not text.strip():
        return None
    said = text.lower().replace("\n", " ")
    return any(answer.lower().strip().replace("\n", " ") in said for answer in answers)


def _unspaced(text: str) -> str:
    return text.strip().replace("\n", "").replace(" ", "")


def _formula(text: str, answers: Sequence[str]) -> bool | None:
    said = _unspaced(text)
    return any(_unspaced(answer) in said for answer in answers) if said else None


def _vqa(text: str, answers: Sequence[str]) -> float | None:
    return agreement(text, answers) if text.strip() else None


def _value(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def _number(text: str, answers: Sequence[str]) -> bool | None:
    found = _NUMBER.findall(text)
    said = _value(found[-1]) if found else None
    if said is None:
        return None
    for answer in answers:
        wanted = _value(answer.strip())
        decimals = len(answer.strip().partition(".")[2])
        if wanted is not None and round(said, decimals) == round(wanted, decimals):
            return True
    return False


def _normal(text: str) -> list[str | float]:
    """MMMU's comparable forms: a number to two decimals, else lower case; a single letter only beside a space."""
    stripped = text.strip()
    value = _value(stripped)
    if value is not None:
        return [round(value, 2)]
    lowered = stripped.lower()
    return [f" {lowered}", f"{lowered} "] if len(lowered) == 1 else [lowered]


def _key_parts(text: str) -> list[str]:
    """What each line says behind its last key phrase; the whole text where no line has one."""
    whole = text.strip().strip(".").lower()
    lines, parts = whole.split("\n"), []
    for index, line in enumerate(lines):
        shortest = ""
        for key in (*_KEYS, "=") if index == len(lines) - 1 else _KEYS:
            end = line.rsplit(key, 1)[1].strip() if key in line else None
            if end is not None and (not shortest or len(end) < len(shortest)):
                shortest = end  # nothing behind a phrase gives way to the next phrase's end, however long (as there)
        if shortest and shortest not in _TRIVIAL:
            parts.append(shortest)
    return parts or [whole]


def _mmmu(text: str, answers: Sequence[str]) -> bool | None:
    if not text.strip():
        return None
    parts = _key_parts(text)
    numbers = [number for part in parts for kind in _MMMU_NUMBERS for number in kind.findall(part)]
    said = [form for part in [*parts, *numbers] for form in _normal(part)]
    wanted = [form for answer in answers for form in _normal(answer)]
    for one in said:
        if isinstance(one, str):
            if any(isinstance(right, str) and right in one for right in wanted):
                return True
        elif one in wanted:
            return True
    return False


RULES: dict[str, Judge] = {
    YES_NO: _yes_no, MMMU: _mmmu, CONTAINS: _contains, FORMULA: _formula, "exact": _exact, "number": _number, "vqa": _vqa,
}  # fmt: skip


def credit(rule: str, text: str, answers: Sequence[str]) -> float | None:
    """How far `text` says one of `answers`, 0 to 1; None when it can't be read. Raises UserError for an unknown rule."""
    if rule not in RULES:
        raise UserError(f"unknown rule {rule!r} for answers without options", hint=nearest(rule, RULES))
    found = RULES[rule](text, answers)
    return None if found is None else float(found)


def judge(rule: str, text: str, answers: Sequence[str]) -> bool | None:
    """Whether `text` says one of `answers` wholly; None when it can't be read."""
    found = credit(rule, text, answers)
    return None if found is None else found >= 1
