"""Two readers of letters that lmms-eval shares among its tasks: an answer's text and the options in, a letter or None out.

    shared   `_task_utils/mcq_extract.py`, extract_mcq_answer: MMStar, RealWorldQA, VideoMME ...
    mmmu     `_task_utils/mmmu_mcq_utils.py`, parse_mmmu_multi_choice_response: MMMU's own parser, without the letter that it draws at
             random where it reads nothing

Both are of commit 75571cfe (2026-08-06), behind `datasets_ray.answers` as the rules `lmms_mcq` and `mmmu`. They know capital letters only,
and both find a letter in the last letter of a word before a blank ("USA is" says A): that is how they are.
"""

from __future__ import annotations

from collections.abc import Mapping

_ENDS = (",", ".", "!", "?", ";", ":", "'")
_SAYS = (
    "answer is", "the answer is", "correct answer is", "the correct answer is", "best answer is", "the best answer is",
    "correct option is", "the correct option is", "best option is", "the best option is", "choice is", "the choice is",
    "correct choice is", "the correct choice is", "i choose", "i select", "i pick", "my answer is", "my choice is",
    "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは",
)  # fmt: skip
"""Phrases behind which the next capital letter of each option is a candidate, inside a word or not."""
_FORMS = (("({})", 6), ("{}.", 5), ("{}:", 4), ("{})", 3), ("{} ", 2))
"""How a letter is written, and how far that is trusted."""
_START, _END, _PHRASE = 10, 9, 7


def _bared(text: str, marks: tuple[str, ...]) -> str:
    """Between blanks, without the marks at its ends: each kind once, in this order, so that `'B.'` loses its quotes and keeps its stop."""
    for mark in marks:
        text = text.strip(mark)
    return f" {text} "


def shared(text: str, options: Mapping[str, str]) -> str | None:
    """The most trusted candidate; of equals the one that stands last, and of those at one place the first option's."""
    if not text.strip():
        return None
    padded = _bared(text.strip(), (*_ENDS, '"'))
    found = [(trust, padded.rfind(form.format(letter)), letter) for form, trust in _FORMS for letter in options]
    lowered, bare = padded.lower(), padded.strip()
    for phrase in _SAYS:
        if phrase in lowered:
            behind = lowered.find(phrase) + len(phrase)
            found += [(_PHRASE, padded.find(letter, behind), letter) for letter in options]
    if bare and bare[0] in options and not bare[1:2].isalpha():
        found.append((_START, 0, bare[0]))
    if bare and bare[-1] in options and not bare[-2:-1].isalpha():
        found.append((_END, len(padded) - 1, bare[-1]))
    found = [one for one in found if one[1] >= 0] or [(0, at, letter) for letter in options if (at := padded.rfind(letter)) >= 0]
    return max(found, key=lambda one: one[:2])[2] if found else None


def mmmu(text: str, options: Mapping[str, str]) -> str | None:
    """`(B)`, else `B` before a blank, else `B.`, else, in more than five words, the text of an option; the last one of several.

    Of several that none stands between blanks the first option counts.
    """
    padded = _bared(text, _ENDS)
    lowered = padded.lower()
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        if said := [letter for letter in options if form.format(letter) in padded]:
            return max(said, key=lambda letter: padded.rfind(place.format(letter)))
    named = [letter for letter, option in options.items() if option.lower() in lowered] if len(padded.split()) > 5 else []
    return max(named, key=lambda letter: lowered.rfind(options[letter].lower()), default=None)
